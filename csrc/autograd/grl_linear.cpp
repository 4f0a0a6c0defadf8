// grl_linear: F.linear whose gradient for x is multiplied by -lambda. Under one lambda it is one linear head.
#include <pytorch.h>

#include <ATen/ops/linear.h>

#include "../accepted.h"
#include "../ops.h"
#include "heads.h"
#include "node.h"

namespace grl_ext {

std::optional<at::Tensor> grl_linear(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& lambda) {
  OptionalTensors biases;
  biases.push_back(bias);
  if (lambda.dim() == 0 && !lambda.requires_grad()) {
    const auto factor = factor_of(x, lambda);
    const auto logits = factor ? linear_heads(x, weight, biases, {*factor}) : std::nullopt;
    return logits ? std::optional((*logits)[0]) : std::nullopt;
  }
  const auto seen = gradient_reversal(x, lambda);
  const bool accepted = seen && prepare(x, weight, biases, {Factor{}});
  return accepted ? std::optional(at::linear(*seen, weight, bias)) : std::nullopt;
}

}  // namespace grl_ext
