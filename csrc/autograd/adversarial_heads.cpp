// AdversarialHeads' operations on the heads' operators, in eager mode.
//
// What surrounds those is small: a scale for each head, the targets side by side. It is done here with plain loops: behind a pass
// over the features nothing else is left in the caches, and an ATen operator that takes 2 us in a loop of its own takes 15 there.
#include <ATen/ATen.h>

#include <algorithm>
#include <functional>

#include "../ops.h"
#include "node.h"

namespace grl_ext {
namespace {

using at::Tensor;

// 1 for the predictors, -lambda for the adversaries, whose heads are the last.
Tensor grad_scale_of(const Tensor& lambda, int64_t heads) {
  const int64_t adversaries = lambda.size(0), predictors = heads - adversaries;
  if (!lambda.is_cpu() || !is_plain(lambda) || lambda.scalar_type() != at::kDouble || !lambda.is_contiguous()) {
    return at::constant_pad_nd(lambda.neg(), {predictors, 0}, 1.0);
  }
  auto scale = at::empty({heads}, lambda.options());
  const double* from = lambda.const_data_ptr<double>();
  double* to = scale.mutable_data_ptr<double>();
  std::fill_n(to, predictors, 1.0);
  std::transform(from, from + adversaries, to + predictors, std::negate<>());
  return scale;
}

// at::stack(targets, -1)
Tensor side_by_side(at::TensorList targets) {
  const bool simple = std::all_of(targets.begin(), targets.end(), [&](const Tensor& target) {
    return target.is_cpu() && is_plain(target) && target.scalar_type() == at::kLong && target.dim() == 1 &&
        target.is_contiguous() && target.size(0) == targets[0].size(0);
  });
  if (!simple) {
    return at::stack(targets, -1);
  }
  const auto rows = targets[0].size(0), heads = static_cast<int64_t>(targets.size());
  auto result = at::empty({rows, heads}, targets[0].options());
  auto* to = result.mutable_data_ptr<int64_t>();
  for (int64_t h = 0; h < heads; ++h) {
    const auto* from = targets[h].const_data_ptr<int64_t>();
    for (int64_t r = 0; r < rows; ++r) {
      to[r * heads + h] = from[r];
    }
  }
  return result;
}

}  // namespace

Tensor adversarial_heads_logits(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef head_sizes, const Tensor& lambda) {
  return linear_heads(x, weight, bias, head_sizes, grad_scale_of(lambda, static_cast<int64_t>(head_sizes.size())));
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> adversarial_heads_loss(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, at::TensorList targets, at::IntArrayRef head_sizes,
    const Tensor& lambda, const std::optional<Tensor>& loss_weight, int64_t ignore_index, double label_smoothing) {
  const auto scale = grad_scale_of(lambda, static_cast<int64_t>(head_sizes.size()));
  const auto [loss, head_losses, logits] = heads_cross_entropy(
      x, weight, bias, side_by_side(targets), head_sizes, scale, loss_weight, ignore_index, label_smoothing);
  return {loss, head_losses.unbind(), logits.split_with_sizes(head_sizes, -1)};
}

}  // namespace grl_ext
