// The public operators as C++ functions: what schema.cpp registers and bindings.cpp calls.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace grl_ext {

at::Tensor gradient_reversal(const at::Tensor& x, const at::Tensor& lambda);
at::Tensor gradient_reversal_by_value(const at::Tensor& x, double lambda);

at::Tensor grl_linear(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& lambda);
at::Tensor grl_linear_by_value(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, double lambda);

at::Tensor linear_heads(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::IntArrayRef head_sizes,
    const at::Tensor& grad_scale);

// (loss, head_losses, logits)
std::tuple<at::Tensor, at::Tensor, at::Tensor> heads_cross_entropy(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& targets,
    at::IntArrayRef head_sizes, const at::Tensor& grad_scale, const std::optional<at::Tensor>& loss_weight,
    int64_t ignore_index, double label_smoothing);

// The two in AdversarialHeads' terms, for eager mode: the predictors' heads are the first, the adversaries', with their lambda, the
// last; targets and results by head. A loss_weight is the graph's own.
at::Tensor adversarial_heads_logits(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::IntArrayRef head_sizes,
    int64_t predictors, const at::Tensor& lambda);
std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> adversarial_heads_loss(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::TensorList targets,
    at::IntArrayRef head_sizes, int64_t predictors, const at::Tensor& lambda, const std::optional<at::Tensor>& loss_weight,
    int64_t ignore_index, double label_smoothing);

}  // namespace grl_ext
