// What the operators on several heads share.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace grl_ext {

// (dx, dw, db) from the gradient of the logits; dx with each head's scale. By the kernel, or by ATen operators where gradients
// of gradients or many gradients at once are asked for. x (N, D), grad_logits (N, K). x may be undefined where dw is not needed,
// weight where dx is not.
std::tuple<at::Tensor, at::Tensor, at::Tensor> heads_gradients(
    const at::Tensor& grad_logits, const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef head_sizes,
    const at::Tensor& grad_scale, std::array<bool, 3> needs);

// One number for each head as it is now: what is on the CPU may change before the backward, what is on a device is read there.
inline at::Tensor per_head_now(const at::Tensor& values) {
  return values.is_cpu() ? values.detach().clone() : values.detach();
}

// heads_cross_entropy's numbers. The tensors are the graph's own: nobody changes them before the backward.
struct LossOptions {
  std::vector<int64_t> head_sizes;
  at::Tensor grad_scale;
  std::optional<at::Tensor> loss_weight;
  int64_t ignore_index;
  double label_smoothing;
};

// (loss, head_losses, logits)
std::tuple<at::Tensor, at::Tensor, at::Tensor> heads_cross_entropy(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& targets,
    LossOptions options);

}  // namespace grl_ext
