// The shapes and dtypes of what the kernels return, for tracing.
#include <pytorch.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "arithmetic_type.h"
#include "gradient_slots.h"
#include "heads_options.h"

namespace grl_ext {
namespace {

using at::Tensor;

Tensor scale(const Tensor& grad, double, const std::optional<Tensor>&) {
  return at::empty_like(grad);
}

void scale_(Tensor&, double, const std::optional<Tensor>&) {}

void scale_list_(at::TensorList, double, const std::optional<Tensor>&) {}

std::vector<Tensor> heads_logits(const Tensor& x, at::TensorList weight, const OptionalTensors&) {
  std::vector<Tensor> logits;
  for (const auto& matrix : weight) {
    logits.push_back(x.new_empty_symint({x.sym_size(0), matrix.sym_size(0)}));
  }
  return logits;
}

HeadsGradients heads_gradients(
    at::TensorList grad_logits, const std::optional<Tensor>& x, at::TensorList weight, at::ArrayRef<double>,
    const OptionalTensors&, const c10::List<bool>& needs) {
  const auto& like = grad_logits[0];
  const auto dtype = gradients_type(like, x, weight);
  const auto features = !weight.empty() ? weight[0].sym_size(1) : x ? x->sym_size(1) : c10::SymInt(0);
  const auto needed = [&](size_t slot, c10::SymIntArrayRef sizes) {
    return needs.get(slot) ? like.new_empty_symint(sizes, dtype) : like.new_empty_symint({0}, dtype);
  };
  const GradientSlots slots{grad_logits.size()};
  std::vector<Tensor> dw, db;
  for (size_t h = 0; h < grad_logits.size(); ++h) {
    dw.push_back(needed(slots.weight(h), {grad_logits[h].sym_size(1), features}));
    db.push_back(needed(slots.bias(h), {grad_logits[h].sym_size(1)}));
  }
  return {needed(slots.x(), {like.sym_size(0), features}), dw, db};
}

HeadsLossResult heads_loss(
    const Tensor& x, at::TensorList weight, const OptionalTensors& bias, at::TensorList, const OptionalTensors&,
    const OptionalTensors&, at::ArrayRef<double> factor, const OptionalTensors& lambda, const std::optional<Tensor>&,
    at::IntArrayRef, at::ArrayRef<double>, at::IntArrayRef, bool, bool with_grad_logits, const c10::List<bool>& needs) {
  const auto loss_options = x.options().dtype(arithmetic_type(x.scalar_type()));
  auto logits = heads_logits(x, weight, bias);
  auto [dx, dw, db] = heads_gradients(logits, x, weight, factor, lambda, needs);
  std::vector<Tensor> grad_logits;
  for (size_t h = 0; with_grad_logits && h < logits.size(); ++h) {
    grad_logits.push_back(at::empty_like(logits[h], loss_options));
  }
  auto head_losses = at::empty({static_cast<int64_t>(weight.size())}, loss_options);
  return {at::empty({}, loss_options), head_losses, logits, grad_logits, dx, dw, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(grl_ext, Meta, m) {
  m.impl("_scale", scale);
  m.impl("_scale_", scale_);
  m.impl("_scale_list_", scale_list_);
  m.impl("_heads_logits", heads_logits);
  m.impl("_heads_gradients", heads_gradients);
  m.impl("_heads_loss", heads_loss);
}

}  // namespace grl_ext
