#include <pytorch.h>

#include "loss_gradient.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

namespace grl_ext {
namespace {

using at::Tensor;

// The targets as probabilities of `dtype`, smoothed: (N, classes).
Tensor probabilities(const Tensor& target, const Tensor& valid, int64_t size, double smoothing, at::ScalarType dtype) {
  const auto classes = classes_of(size);
  Tensor y;
  if (target.scalar_type() == at::kLong) {
    // Not at::one_hot, which makes the number of rows a constant of the graph.
    y = target.masked_fill(valid.logical_not(), 0).unsqueeze(1).eq(at::arange(classes, target.options())).to(dtype);
  } else {
    y = size == 1 ? at::cat({1 - target, target}, 1) : target;
    y = at::where(valid.unsqueeze(1), y, at::zeros({}, y.options()));
  }
  return y * (1 - smoothing) + smoothing / static_cast<double>(classes);
}

}  // namespace

Tensor loss_gradient(const Tensor& logits, const HeadsOptions& options, size_t h) {
  const auto wide = logits.to(c10::promoteTypes(logits.scalar_type(), at::kFloat));
  const auto& target = options.targets[h];
  // Not size(1), which would make the number of rows a constant of the graph too.
  const auto size = logits.sym_size(1).guard_int(__FILE__, __LINE__);
  const bool by_output = is_by_output(options.kind[h]), labels = !by_output && target.scalar_type() == at::kLong;
  const auto zero = at::zeros({}, wide.options());
  const auto given = options.sample_weight.get(h);
  const auto class_weight = options.class_weight.get(h);
  auto row_weight = given ? *given : at::ones_symint({logits.sym_size(0)}, wide.options());
  const bool of_entries = row_weight.dim() == 2;
  auto valid = row_weight.ne(0);
  if (labels) {
    valid = valid.logical_and(target.ne(options.ignore_index[h]));
  }
  row_weight = at::where(valid, row_weight, zero);
  auto norm = row_weight.sum();
  if (by_output) {
    norm = of_entries ? norm : norm * size;
  } else if (labels && class_weight) {
    const auto of_target = class_weight->index_select(0, target.masked_fill(valid.logical_not(), 0));
    norm = at::where(valid, row_weight * of_target, zero).sum();
  }
  if (options.mean) {
    valid = valid.logical_and(norm.ne(0));  // without a norm no row counts
  }
  const auto as_column = [&](const Tensor& of_rows) { return of_entries ? of_rows : of_rows.unsqueeze(1); };
  const auto column = as_column(valid);
  auto z = at::where(column, wide, zero);
  Tensor dz;
  if (by_output) {
    const auto wanted = at::where(column, target, zero);
    dz = options.kind[h] == kSquaredError ? 2 * (z - wanted) : z.sigmoid() - wanted;
  } else {
    if (size == 1) {
      z = at::cat({at::zeros_like(z), z}, 1);  // binary: the softmax over 0 and z
    }
    auto wanted = probabilities(target, valid, size, options.label_smoothing[h], z.scalar_type());
    if (class_weight) {  // that of a class that is not wanted may be infinite
      wanted = at::where(column.logical_and(wanted.ne(0)), wanted * *class_weight, zero);
    }
    dz = wanted.sum(1, /*keepdim=*/true) * z.softmax(1) - wanted;
    dz = size == 1 ? dz.narrow(1, 1, 1) : dz;
  }
  auto factor = row_weight;
  if (options.mean) {
    factor = at::where(norm.eq(0), zero, row_weight / norm);
  }
  return at::where(column, dz * as_column(factor), zero);
}

}  // namespace grl_ext
