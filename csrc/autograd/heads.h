// The gradients of the heads' linear layer, for both operators on it.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

namespace grl_ext {

// (dx, dw, db) from the gradient of the logits; dx with each head's scale. By the kernel, or by ATen operators where gradients
// of gradients or many gradients at once are asked for. x (N, D), grad_logits (N, K). x may be undefined where dw is not needed, weight where dx is not.
std::tuple<at::Tensor, at::Tensor, at::Tensor> heads_gradients(
    const at::Tensor& grad_logits, const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef head_sizes,
    const at::Tensor& grad_scale, std::array<bool, 3> needs);

// One number for each head as it is now: what is on the CPU may change before the backward, what is on a device is read there.
inline at::Tensor per_head_now(const at::Tensor& values) {
  return values.is_cpu() ? values.detach().clone() : values.detach();
}

}  // namespace grl_ext
