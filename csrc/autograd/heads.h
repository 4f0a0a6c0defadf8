// The gradients of the heads' linear layer, for both operators on it.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

namespace grl_ext {

// (dx, dw, db) from the gradient of the logits; dx with each head's scale. By the kernel, or by ATen operators where gradients
// of gradients are asked for. x (N, D), grad_logits (N, K).
std::tuple<at::Tensor, at::Tensor, at::Tensor> heads_gradients(
    const at::Tensor& grad_logits, const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef head_sizes,
    const at::Tensor& grad_scale, std::array<bool, 3> needs);

}  // namespace grl_ext
