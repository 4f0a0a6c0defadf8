#include "scale_negate.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/functions/utils.h>

#include "../lambda_layout.h"
#include "node.h"

namespace grl_ext {
namespace {

at::ScalarType arithmetic_type(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kComplexDouble ? at::kDouble : at::kFloat;
}

// The lambda in the form that the kernels read, or nothing where they have none for it.
std::optional<at::Tensor> for_kernel(const at::Tensor& lambda, const at::Tensor& grad) {
  if (!is_plain(lambda)) {
    return std::nullopt;
  }
  const auto dtype = arithmetic_type(grad.scalar_type());
  if (lambda.dim() == 0) {
    const bool readable = lambda.scalar_type() == at::kFloat || lambda.scalar_type() == at::kDouble;
    return lambda.to(grad.device(), readable ? lambda.scalar_type() : dtype);
  }
  if (!grad.is_contiguous() || !lambda_layout(grad.sizes(), lambda.sizes())) {
    return std::nullopt;
  }
  return lambda.to(dtype).contiguous();
}

}  // namespace

at::Tensor scale_negate_composite(const at::Tensor& grad, const Lambda& lambda) {
  if (grad.is_complex()) {  // by parts: the product with a complex number would make NaN of infinity times 0
    return at::complex(scale_negate_composite(at::real(grad), lambda), scale_negate_composite(at::imag(grad), lambda));
  }
  if (grad.is_sparse() && (lambda.tensor || lambda.value == 0)) {
    if (lambda.tensor && lambda.tensor->numel() > 1) {
      return scale_negate_composite(grad.to_dense(), lambda);
    }
    const auto entries = grad.coalesce();
    const auto number = lambda.tensor ? std::optional(lambda.tensor->reshape({})) : std::nullopt;
    const auto values = scale_negate_composite(entries.values(), {lambda.value, number});
    return at::sparse_coo_tensor(entries.indices(), values, grad.sizes(), grad.options(), /*is_coalesced=*/true);
  }
  if (!lambda.tensor) {
    // Not zeros_like: gradients of gradients need the graph.
    return lambda.value == 0 ? grad.masked_fill(at::ones({}, grad.options().dtype(at::kBool)), 0) : grad.mul(-lambda.value);
  }
  const auto factor = lambda.tensor->to(grad.options().dtype(arithmetic_type(grad.scalar_type()))).mul(-lambda.value);
  const auto scaled = grad.to(c10::promoteTypes(grad.scalar_type(), at::kFloat)).mul(factor).to(grad.scalar_type());
  return at::where(factor.eq(0), at::zeros({}, grad.options()), scaled);
}

at::Tensor scale_negate(at::Tensor grad, const Lambda& lambda) {
  static const auto out_of_place = c10::Dispatcher::singleton()
                                       .findSchemaOrThrow("grl_ext::_scale_negate", "")
                                       .typed<at::Tensor(const at::Tensor&, double, const std::optional<at::Tensor>&)>();
  static const auto in_place = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("grl_ext::_scale_negate_", "")
                                   .typed<void(at::Tensor&, double, const std::optional<at::Tensor>&)>();

  if (at::GradMode::is_enabled() || !has_kernel(grad) || torch::autograd::isFwGradDefined(grad)) {
    return scale_negate_composite(grad, lambda);
  }
  std::optional<at::Tensor> factor;
  if (lambda.tensor) {
    factor = for_kernel(*lambda.tensor, grad);
    if (!factor) {
      return scale_negate_composite(grad, lambda);
    }
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  if (is_unshared(grad)) {
    if (factor || lambda.value != -1) {
      in_place.call(grad, lambda.value, factor);
    }
    return grad;
  }
  return out_of_place.call(grad.is_non_overlapping_and_dense() ? grad : grad.contiguous(), lambda.value, factor);
}

Lambda read_lambda(const at::Tensor& lambda) {
  if (lambda.dim() != 0 || !lambda.is_cpu() || lambda.requires_grad()) {
    return {1.0, lambda};
  }
  if (!is_plain(lambda) || dispatch_mode_enabled()) {
    return {1.0, lambda.clone()};
  }
  return {lambda.scalar_type() == at::kDouble ? *lambda.const_data_ptr<double>() : lambda.item<double>(), std::nullopt};
}

}  // namespace grl_ext
