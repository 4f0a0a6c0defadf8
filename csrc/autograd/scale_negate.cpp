#include "scale_negate.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/functions/utils.h>

#include "../arithmetic_type.h"
#include "../lambda_layout.h"
#include "node.h"

namespace grl_ext {
namespace {

// Whether the host can read this lambda at once. Not under a dispatch mode, which has to see operators on it instead.
bool is_host_number(const at::Tensor& lambda) {
  return lambda.dim() == 0 && lambda.is_cpu() && lambda.layout() == at::kStrided && is_plain(lambda) &&
      !c10::impl::dispatch_mode_enabled();
}

double host_number(const at::Tensor& lambda) {
  return lambda.scalar_type() == at::kDouble ? *lambda.const_data_ptr<double>() : lambda.item<double>();
}

// The lambda in a form that the kernels read, or nothing where there is no such form.
std::optional<Lambda> for_kernel(const Lambda& lambda, const at::Tensor& grad) {
  if (!lambda.tensor) {
    return lambda;
  }
  const auto& tensor = *lambda.tensor;
  if (is_host_number(tensor)) {
    return Lambda{lambda.value * host_number(tensor), std::nullopt};
  }
  if (!is_plain(tensor)) {
    return std::nullopt;
  }
  const auto dtype = arithmetic_type(grad.scalar_type());
  if (tensor.dim() == 0) {
    const bool readable = tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble;
    return Lambda{lambda.value, tensor.to(grad.device(), readable ? tensor.scalar_type() : dtype)};
  }
  if (!grad.is_contiguous() || !lambda_layout(grad.sizes(), tensor.sizes())) {
    return std::nullopt;
  }
  return Lambda{lambda.value, tensor.to(dtype).contiguous()};
}

bool is_for_kernel(const at::Tensor& grad) {
  return !at::GradMode::is_enabled() && has_kernel(grad) && !torch::autograd::isFwGradDefined(grad);
}

bool is_minus_one(const Lambda& lambda) {
  return !lambda.tensor && lambda.value == -1;
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
    // Not zeros_like: gradients of gradients need the graph. And only what a masked gradient knows too.
    return lambda.value == 0 ? grad.mul(0).nan_to_num(0) : grad.mul(-lambda.value);
  }
  // A number on the CPU is a factor for tensors of any device as it is.
  const bool on_host = is_host_number(*lambda.tensor);
  const auto device = on_host ? lambda.tensor->device() : grad.device();
  const auto factor = lambda.tensor->to(grad.options().dtype(arithmetic_type(grad.scalar_type())).device(device))
                          .mul(-lambda.value);
  const auto scaled = grad.to(c10::promoteTypes(grad.scalar_type(), at::kFloat)).mul(factor).to(grad.scalar_type());
  const auto off = on_host
      ? at::full({}, host_number(*lambda.tensor) * lambda.value == 0, grad.options().dtype(at::kBool))
      : factor.eq(0);
  return at::where(off, at::zeros({}, grad.options()), scaled);
}

at::Tensor scale_negate(at::Tensor grad, const Lambda& lambda, Made made) {
  static const auto out_of_place =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("grl_ext::_scale_negate", "")
          .typed<at::Tensor(const at::Tensor&, double, const std::optional<at::Tensor>&)>();
  static const auto in_place = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("grl_ext::_scale_negate_", "")
                                   .typed<void(at::Tensor&, double, const std::optional<at::Tensor>&)>();

  const auto given = is_for_kernel(grad) ? for_kernel(lambda, grad) : std::nullopt;
  if (!given) {
    return scale_negate_composite(grad, lambda);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  if (is_unshared(grad)) {
    if (is_minus_one(*given)) {
      return grad;
    }
    if (made == Made::kByThisNode || grad.is_cpu()) {
      in_place.call(grad, given->value, given->tensor);
      return grad;
    }
  }
  return out_of_place.call(grad.is_non_overlapping_and_dense() ? grad : grad.contiguous(), given->value, given->tensor);
}

void scale_negate_list(std::vector<at::Tensor>& grads, const Lambda& lambda) {
  static const auto in_place = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("grl_ext::_scale_negate_list_", "")
                                   .typed<void(at::TensorList, double, const std::optional<at::Tensor>&)>();

  const bool readable = !lambda.tensor || is_plain(*lambda.tensor);
  std::vector<at::Tensor> together;
  together.reserve(grads.size());
  for (auto& grad : grads) {
    if (grad.defined() && readable && is_for_kernel(grad) && is_unshared(grad)) {
      together.push_back(grad);
    } else if (grad.defined()) {
      grad = scale_negate(std::move(grad), lambda, Made::kByThisNode);
    }
  }
  if (together.empty()) {
    return;
  }
  const auto given = *for_kernel(lambda, together[0]);
  if (!is_minus_one(given)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    in_place.call(together, given.value, given.tensor);
  }
}

Lambda read_lambda(const at::Tensor& lambda) {
  if (lambda.requires_grad()) {
    return {1.0, lambda};
  }
  if (is_host_number(lambda)) {
    return {host_number(lambda), std::nullopt};
  }
  const bool hidden = lambda.dim() == 0 && lambda.is_cpu();  // its value cannot be read
  return {1.0, hidden ? lambda.clone() : lambda};
}

}  // namespace grl_ext
