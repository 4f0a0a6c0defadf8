// The public operators as C++ functions: what schema.cpp registers and bindings.cpp calls. They return nothing where
// they do not take their arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "heads_options.h"

namespace grl_ext {

std::optional<at::Tensor> gradient_reversal(const at::Tensor& x, const at::Tensor& lambda);
at::Tensor gradient_reversal_by_value(const at::Tensor& x, double lambda);

std::optional<at::Tensor> grl_linear(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& lambda);

// The logits of each head.
std::optional<std::vector<at::Tensor>> linear_heads(
    const at::Tensor& x, at::TensorList weight, const OptionalTensors& bias, std::vector<Factor> factors);

// (loss, head_losses, logits)
using LossAndLogits = std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>>;
std::optional<LossAndLogits> heads_loss(
    const at::Tensor& x, at::TensorList weight, const OptionalTensors& bias, std::vector<Factor> factors,
    HeadsOptions options);

// The layers of one head, with ReLU between them.
struct Layers {
  std::vector<at::Tensor> weight;
  std::vector<std::optional<at::Tensor>> bias;
};

// Not an operator: the same for heads of which each may have several layers.
std::optional<LossAndLogits> layered_heads_loss(
    const at::Tensor& x, const std::vector<Layers>& heads, std::vector<Factor> factors, HeadsOptions options);

// The factor of a head's part in the features' gradient: 1 for a predictor, which has no lambda, and -lambda for an
// adversary. Nothing if it is not a head's lambda.
std::optional<Factor> factor_of(const at::Tensor& x, const std::optional<at::Tensor>& lambda);

// Not an operator: ReLU of z, then linear layers, each with its ReLU. Overwrites z.
std::optional<at::Tensor> hidden_layers(const at::Tensor& z, at::TensorList weight, const OptionalTensors& bias);

}  // namespace grl_ext
