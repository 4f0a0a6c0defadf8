#include <pytorch.h>

#include "scale.h"

#include <ATen/ops/complex.h>
#include <ATen/ops/full.h>
#include <ATen/ops/imag.h>
#include <ATen/ops/real.h>
#include <ATen/ops/sparse_coo_tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/functions/utils.h>

#include "../arithmetic_type.h"
#include "../lambda_layout.h"
#include "node.h"

namespace grl_ext {
namespace {

// Whether the host can read this number at once. Not under a dispatch mode, which has to see operators on it instead.
bool is_host_number(const at::Tensor& tensor) {
  return tensor.dim() == 0 && tensor.is_cpu() && tensor.layout() == at::kStrided && is_plain(tensor) &&
      !c10::impl::dispatch_mode_enabled();
}

double host_number(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? *tensor.const_data_ptr<double>() : tensor.item<double>();
}

// The factor in a form that the kernels read, or nothing where there is no such form.
std::optional<Factor> for_kernel(const Factor& factor, const at::Tensor& grad) {
  if (!factor.tensor) {
    return factor;
  }
  const auto& tensor = *factor.tensor;
  if (is_host_number(tensor)) {
    return Factor{factor.value * host_number(tensor), std::nullopt};
  }
  if (!is_plain(tensor)) {
    return std::nullopt;
  }
  const auto dtype = arithmetic_type(grad.scalar_type());
  if (tensor.dim() == 0) {
    const bool readable = tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble;
    return Factor{factor.value, tensor.to(grad.device(), readable ? tensor.scalar_type() : dtype)};
  }
  if (!grad.is_contiguous() || !lambda_layout(grad.sizes(), tensor.sizes())) {
    return std::nullopt;
  }
  return Factor{factor.value, tensor.to(dtype).contiguous()};
}

bool is_for_kernel(const at::Tensor& grad) {
  return !at::GradMode::is_enabled() && has_kernel(grad) && !torch::autograd::isFwGradDefined(grad);
}

bool is_one(const Factor& factor) {
  return !factor.tensor && factor.value == 1;
}

}  // namespace

at::Tensor scale_composite(const at::Tensor& grad, const Factor& factor) {
  if (grad.is_complex()) {  // by parts: the product with a complex number would make NaN of infinity times 0
    return at::complex(scale_composite(at::real(grad), factor), scale_composite(at::imag(grad), factor));
  }
  if (grad.is_sparse() && (factor.tensor || factor.value == 0)) {
    if (factor.tensor && factor.tensor->numel() > 1) {
      return scale_composite(grad.to_dense(), factor);
    }
    const auto entries = grad.coalesce();
    Factor number = factor;
    if (factor.tensor) {
      number.tensor = factor.tensor->reshape({});
    }
    const auto values = scale_composite(entries.values(), number);
    return at::sparse_coo_tensor(entries.indices(), values, grad.sizes(), grad.options(), /*is_coalesced=*/true);
  }
  if (!factor.tensor) {
    // Not zeros_like: gradients of gradients need the graph. And only what a masked gradient knows too.
    return factor.value == 0 ? grad.mul(0).nan_to_num(0) : grad.mul(factor.value);
  }
  // A number on the CPU is a factor for tensors of any device as it is.
  const bool on_host = is_host_number(*factor.tensor);
  const auto device = on_host ? factor.tensor->device() : grad.device();
  const auto tensor = factor.tensor->to(grad.options().dtype(arithmetic_type(grad.scalar_type())).device(device))
                          .mul(factor.value);
  const auto scaled = grad.to(c10::promoteTypes(grad.scalar_type(), at::kFloat)).mul(tensor).to(grad.scalar_type());
  const auto off = on_host
      ? at::full({}, host_number(*factor.tensor) * factor.value == 0, grad.options().dtype(at::kBool))
      : tensor.eq(0);
  return at::where(off, at::zeros({}, grad.options()), scaled);
}

at::Tensor scale(at::Tensor grad, const Factor& factor, Made made) {
  static const auto out_of_place = find_kernel<at::Tensor(const at::Tensor&, double, const std::optional<at::Tensor>&)>(
      "_scale");
  static const auto in_place = find_kernel<void(at::Tensor&, double, const std::optional<at::Tensor>&)>("_scale_");
  const auto given = is_for_kernel(grad) ? for_kernel(factor, grad) : std::nullopt;
  if (!given) {
    return scale_composite(grad, factor);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  if (is_unshared(grad)) {
    if (is_one(*given)) {
      return grad;
    }
    if (made == Made::kByThisNode || grad.is_cpu()) {
      in_place.call(grad, given->value, given->tensor);
      return grad;
    }
  }
  return out_of_place.call(grad.is_non_overlapping_and_dense() ? grad : grad.contiguous(), given->value, given->tensor);
}

void scale_list(std::vector<at::Tensor>& grads, const Factor& factor) {
  static const auto in_place = find_kernel<void(at::TensorList, double, const std::optional<at::Tensor>&)>(
      "_scale_list_");
  const bool readable = !factor.tensor || is_plain(*factor.tensor);
  std::vector<at::Tensor> together;
  together.reserve(grads.size());
  for (auto& grad : grads) {
    if (grad.defined() && readable && is_for_kernel(grad) && is_unshared(grad)) {
      together.push_back(grad);
    } else if (grad.defined()) {
      grad = scale(std::move(grad), factor, Made::kByThisNode);
    }
  }
  if (together.empty()) {
    return;
  }
  const auto given = *for_kernel(factor, together[0]);
  if (!is_one(given)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    in_place.call(together, given.value, given.tensor);
  }
}

Factor read_factor(const at::Tensor& factor) {
  if (factor.requires_grad()) {
    return {1, factor};
  }
  if (is_host_number(factor)) {
    return {host_number(factor), std::nullopt};
  }
  const bool hidden = factor.dim() == 0 && factor.is_cpu();  // its value cannot be read
  return {1, hidden ? factor.clone() : factor};
}

Factor reversed(const at::Tensor& lambda) {
  auto factor = read_factor(lambda);
  factor.value = -factor.value;
  return factor;
}

Factor reversed(double lambda) {
  return {-lambda, std::nullopt};
}

}  // namespace grl_ext
