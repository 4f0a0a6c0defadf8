// AdversarialHeads' operations on the heads' operators, in eager mode.
//
// What surrounds those is small: a scale for each head, the targets side by side. It is done here with plain loops: behind a pass
// over the features nothing else is left in the caches, and an ATen operator that takes 2 us in a loop of its own takes 15 there.
#include <ATen/ATen.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <functional>

#include "../ops.h"
#include "heads.h"
#include "node.h"

namespace grl_ext {
namespace {

using at::Tensor;

// Whether plain loops may do an ATen operator's work on a tensor of the CPU. A dispatch mode is to see the operator.
bool is_plain_vector(const Tensor& tensor, at::ScalarType dtype) {
  return tensor.is_cpu() && is_plain(tensor) && tensor.scalar_type() == dtype && tensor.dim() == 1 && tensor.is_contiguous() &&
      !c10::impl::dispatch_mode_enabled();
}

// 1 for the predictors, -lambda for the adversaries, which come last. A lambda of another length gives a scale of another length,
// which the operators refuse.
Tensor grad_scale_of(const Tensor& lambda, int64_t predictors) {
  if (!is_plain_vector(lambda, at::kDouble)) {
    return at::constant_pad_nd(lambda.neg(), {predictors, 0}, 1.0);
  }
  const int64_t adversaries = lambda.numel();
  auto scale = at::empty({predictors + adversaries}, lambda.options());
  const double* from = lambda.const_data_ptr<double>();
  double* to = scale.mutable_data_ptr<double>();
  std::fill_n(to, predictors, 1.0);
  std::transform(from, from + adversaries, to + predictors, std::negate<>());
  return scale;
}

// at::stack(targets, -1)
Tensor side_by_side(at::TensorList targets) {
  const bool simple = std::all_of(targets.begin(), targets.end(), [&](const Tensor& target) {
    return is_plain_vector(target, at::kLong) && target.numel() == targets[0].numel();
  });
  if (!simple) {
    return at::stack(targets, -1);
  }
  std::vector<const int64_t*> from;
  for (const auto& target : targets) {
    from.push_back(target.const_data_ptr<int64_t>());
  }
  const auto rows = targets[0].numel(), heads = static_cast<int64_t>(targets.size());
  auto result = at::empty({rows, heads}, targets[0].options());
  auto* to = result.mutable_data_ptr<int64_t>();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t h = 0; h < heads; ++h) {
      *to++ = from[h][r];
    }
  }
  return result;
}

}  // namespace

Tensor adversarial_heads_logits(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef head_sizes, int64_t predictors,
    const Tensor& lambda) {
  return linear_heads(x, weight, bias, head_sizes, grad_scale_of(lambda, predictors));
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> adversarial_heads_loss(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, at::TensorList targets, at::IntArrayRef head_sizes,
    int64_t predictors, const Tensor& lambda, const std::optional<Tensor>& loss_weight, int64_t ignore_index,
    double label_smoothing) {
  const auto [loss, head_losses, logits] = heads_cross_entropy(
      x, weight, bias, side_by_side(targets),
      {head_sizes.vec(), grad_scale_of(lambda, predictors), loss_weight, ignore_index, label_smoothing});
  return {loss, head_losses.unbind(), logits.split_with_sizes(head_sizes, -1)};
}

}  // namespace grl_ext
