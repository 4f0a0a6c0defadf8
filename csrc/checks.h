// Argument checks. grl_ext/_reference.py makes the same ones, in the same order and with the same texts.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>

namespace grl_ext {

inline std::string dtype_name(const at::Tensor& tensor) {
  return "torch." + std::string(c10::getDtypeNames(tensor.scalar_type()).first);
}

inline void check_lambda(const at::Tensor& x, const at::Tensor& lambda) {
  TORCH_CHECK_TYPE(
      !lambda.is_complex(), "lambda_ must be a real number or a real tensor, got a tensor of ", dtype_name(lambda));
  const bool elsewhere = lambda.device() != x.device();
  TORCH_CHECK_VALUE(
      !elsewhere || (lambda.dim() == 0 && lambda.device().is_cpu()), "lambda_ is on ", lambda.device(), " but x is on ",
      x.device(), ": only a 0-d lambda_ may be elsewhere, on the CPU");
  const auto offset = x.dim() - lambda.dim();
  bool broadcasts = offset >= 0;
  for (int64_t d = 0; broadcasts && d < lambda.dim(); ++d) {
    broadcasts = lambda.sym_size(d) == 1 || lambda.sym_size(d) == x.sym_size(offset + d);
  }
  TORCH_CHECK_VALUE(
      broadcasts, "lambda_ of shape ", lambda.sym_sizes(), " does not broadcast to x of shape ", x.sym_sizes());
}

inline void check_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "x must have at least one dimension, got shape []");
  TORCH_CHECK_VALUE(
      weight.dim() == 2 && weight.sym_size(1) == x.sym_size(-1),
      "weight must have shape [K, D] with D = x.shape[-1] = ", x.sym_size(-1), ", got ", weight.sym_sizes());
  TORCH_CHECK_VALUE(weight.device() == x.device(), "weight is on ", weight.device(), " but x is on ", x.device());
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(
      (dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble) &&
          weight.scalar_type() == dtype,
      "x and weight must have the same dtype, float16, bfloat16, float32 or float64, got ", dtype_name(x), " and ",
      dtype_name(weight));
  if (bias) {
    TORCH_CHECK_VALUE(
        bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0), "bias must have shape [", weight.sym_size(0),
        "], got ", bias->sym_sizes());
    TORCH_CHECK_VALUE(bias->device() == x.device(), "bias is on ", bias->device(), " but x is on ", x.device());
    TORCH_CHECK_TYPE(
        bias->scalar_type() == x.scalar_type(), "bias must have x's dtype ", dtype_name(x), ", got ",
        dtype_name(*bias));
  }
}

}  // namespace grl_ext
