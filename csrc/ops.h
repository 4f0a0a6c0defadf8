// The public operators as C++ functions: what schema.cpp registers and bindings.cpp calls.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "heads_options.h"

namespace grl_ext {

at::Tensor gradient_reversal(const at::Tensor& x, const at::Tensor& lambda);
at::Tensor gradient_reversal_by_value(const at::Tensor& x, double lambda);

at::Tensor grl_linear(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& lambda);
at::Tensor grl_linear_by_value(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, double lambda);

// The logits of each head.
std::vector<at::Tensor> linear_heads(
    const at::Tensor& x, at::TensorList weight, const OptionalTensors& bias, const at::Tensor& lambda,
    at::IntArrayRef lambda_index);

// Returns (loss, head_losses, logits). Head h has depth[h] linear layers; weight and bias list those of head 0, then of
// head 1, ...
using LossAndLogits = std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>>;
LossAndLogits heads_loss(
    const at::Tensor& x, at::TensorList weight, const OptionalTensors& bias, at::IntArrayRef depth,
    HeadsOptions options);
LossAndLogits heads_loss_of_lists(  // the schema's argument list
    const at::Tensor& x, at::TensorList weight, const OptionalTensors& bias, at::IntArrayRef depth, at::TensorList targets,
    const OptionalTensors& sample_weight, const OptionalTensors& class_weight, const at::Tensor& lambda,
    at::IntArrayRef lambda_index, const std::optional<at::Tensor>& loss_weight, at::IntArrayRef kind,
    at::ArrayRef<double> label_smoothing, at::IntArrayRef ignore_index, bool mean);

}  // namespace grl_ext
