// _scale_negate on the CPU: splits the gradient among the threads and calls the kernel of this machine's instruction
// set.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "../lambda_layout.h"
#include "kernels.h"

namespace grl_ext {
namespace {

// Elements per thread below which a second thread costs more than it saves; PyTorch's own choice for such loops.
constexpr int64_t kGrain = at::internal::GRAIN_SIZE;

const cpu::ScaleKernels& scale_kernels(at::ScalarType dtype) {
  const auto& kernels = cpu::kernels();
  switch (dtype) {
    case at::kHalf:
      return kernels.scale_half;
    case at::kBFloat16:
      return kernels.scale_bfloat16;
    case at::kDouble:
    case at::kComplexDouble:
      return kernels.scale_double;
    default:
      TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kComplexFloat, "no kernel for ", dtype);
      return kernels.scale_float;
  }
}

void scale(const at::Tensor& out, const at::Tensor& grad, double value, const std::optional<at::Tensor>& lambda) {
  const auto& kernels = scale_kernels(grad.scalar_type());
  const int64_t parts = grad.is_complex() ? 2 : 1;  // a complex element is a pair of reals under one lambda
  const int64_t size = grad.element_size() / parts;
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const auto* from = static_cast<const char*>(grad.const_data_ptr());

  if (!lambda || lambda->numel() == 1) {
    const double number = lambda ? value * lambda->item<double>() : value;
    at::parallel_for(0, grad.numel() * parts, kGrain, [&](int64_t begin, int64_t end) {
      kernels.scale(to + begin * size, from + begin * size, end - begin, number);
    });
    return;
  }

  const auto found = lambda_layout(grad.sizes(), lambda->sizes());
  TORCH_CHECK_VALUE(
      found && grad.is_contiguous() && lambda->is_contiguous() &&
          lambda->scalar_type() == (size == 8 ? at::kDouble : at::kFloat),
      "_scale_negate: lambda_ does not lie over the gradient in a form that the kernel reads");
  auto layout = *found;
  const auto values = layout.inner * parts == 1 ? *lambda : lambda->to(at::kDouble);
  layout.inner *= parts;
  at::parallel_for(0, grad.numel() * parts, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / layout.inner % layout.period;
      if (layout.inner == 1) {
        const int64_t n = std::min(end - begin, layout.period - row);
        const auto* each = static_cast<const char*>(values.const_data_ptr()) + row * values.element_size();
        kernels.scale_each(to + begin * size, from + begin * size, n, each);
        begin += n;
      } else {
        const int64_t n = std::min(end - begin, layout.inner - begin % layout.inner);
        kernels.scale(to + begin * size, from + begin * size, n, values.const_data_ptr<double>()[row]);
        begin += n;
      }
    }
  });
}

at::Tensor scale_negate(const at::Tensor& grad, double value, const std::optional<at::Tensor>& lambda) {
  auto out = at::empty_like(grad);
  scale(out, grad, value, lambda);
  return out;
}

void scale_negate_(at::Tensor& grad, double value, const std::optional<at::Tensor>& lambda) {
  scale(grad, grad, value, lambda);
}

void scale_negate_list_(at::TensorList grads, double value, const std::optional<at::Tensor>& lambda) {
  for (const auto& grad : grads) {
    scale(grad, grad, value, lambda);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(grl_ext, CPU, m) {
  m.impl("_scale_negate", scale_negate);
  m.impl("_scale_negate_", scale_negate_);
  m.impl("_scale_negate_list_", scale_negate_list_);
}

}  // namespace grl_ext
