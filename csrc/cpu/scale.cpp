// _scale on the CPU: splits the gradient among the threads and calls the kernel of this machine's instruction set.
#include <pytorch.h>

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty_like.h>
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

void scale(const at::Tensor& out, const at::Tensor& grad, double factor, const std::optional<at::Tensor>& tensor) {
  // The loops go through memory, in whatever order the dimensions lie there.
  TORCH_CHECK_VALUE(grad.is_non_overlapping_and_dense(), "_scale: grad must be dense and not overlap");
  const auto& kernels = scale_kernels(grad.scalar_type());
  const int64_t parts = grad.is_complex() ? 2 : 1;  // a complex element is a pair of reals under one factor
  const int64_t size = grad.element_size() / parts;
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const auto* from = static_cast<const char*>(grad.const_data_ptr());

  if (!tensor || tensor->numel() == 1) {
    const double number = tensor ? factor * tensor->item<double>() : factor;
    at::parallel_for(0, grad.numel() * parts, kGrain, [&](int64_t begin, int64_t end) {
      kernels.scale(to + begin * size, from + begin * size, end - begin, number);
    });
    return;
  }

  const auto found = lambda_layout(grad.sizes(), tensor->sizes());
  TORCH_CHECK_VALUE(
      found && grad.is_contiguous() && tensor->is_contiguous() &&
          tensor->scalar_type() == (size == 8 ? at::kDouble : at::kFloat),
      "_scale: tensor does not lie over grad in a form that the kernel reads");
  auto layout = *found;
  const auto values = layout.inner * parts == 1 ? *tensor : tensor->to(at::kDouble);
  layout.inner *= parts;
  at::parallel_for(0, grad.numel() * parts, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / layout.inner % layout.period;
      int64_t n = 0;
      if (layout.inner == 1) {
        n = std::min(end - begin, layout.period - row);
        const auto* each = static_cast<const char*>(values.const_data_ptr()) + row * values.element_size();
        kernels.scale_each(to + begin * size, from + begin * size, n, factor, each);
      } else {
        n = std::min(end - begin, layout.inner - begin % layout.inner);
        kernels.scale(to + begin * size, from + begin * size, n, factor * values.const_data_ptr<double>()[row]);
      }
      begin += n;
    }
  });
}

at::Tensor scale_new(const at::Tensor& grad, double factor, const std::optional<at::Tensor>& tensor) {
  auto out = at::empty_like(grad);
  scale(out, grad, factor, tensor);
  return out;
}

void scale_(at::Tensor& grad, double factor, const std::optional<at::Tensor>& tensor) {
  scale(grad, grad, factor, tensor);
}

void scale_list_(at::TensorList grads, double factor, const std::optional<at::Tensor>& tensor) {
  for (const auto& grad : grads) {
    scale(grad, grad, factor, tensor);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(grl_ext, CPU, m) {
  m.impl("_scale", scale_new);
  m.impl("_scale_", scale_);
  m.impl("_scale_list_", scale_list_);
}

}  // namespace grl_ext
