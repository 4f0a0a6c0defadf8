// _scale_negate on CUDA: chooses the kernel for the gradient's type and the form of lambda. Everything is enqueued on the current
// stream and nothing waits, so that it can be captured in a CUDA graph.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>

#include "../lambda_layout.h"
#include "scale_negate.cuh"

namespace grl_ext {
namespace {

template <typename T>
void scale_as(const at::Tensor& out, const at::Tensor& grad, double value, const std::optional<at::Tensor>& lambda) {
  using A = typename Arithmetic<T>::type;
  const int64_t parts = grad.is_complex() ? 2 : 1;  // a complex element is a pair of reals under one lambda
  const int64_t n = grad.numel() * parts;
  const auto enqueue = [&](auto form) {
    int sm_count = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, grad.get_device()));
    C10_CUDA_CHECK(scale_negate(
        static_cast<T*>(out.mutable_data_ptr()), static_cast<const T*>(grad.const_data_ptr()), n, form, sm_count,
        c10::cuda::getCurrentCUDAStream()));
  };

  if (!lambda) {
    enqueue(LambdaValue<A>{static_cast<A>(value)});
  } else if (lambda->numel() == 1 && lambda->scalar_type() == at::kDouble) {
    enqueue(LambdaOnDevice<A, double>{lambda->const_data_ptr<double>(), static_cast<A>(value)});
  } else if (lambda->numel() == 1) {
    enqueue(LambdaOnDevice<A, float>{lambda->const_data_ptr<float>(), static_cast<A>(value)});
  } else {
    const auto layout = *lambda_layout(grad.sizes(), lambda->sizes());
    const auto broadcast = [&](auto index) {
      using Index = decltype(index);
      enqueue(
          LambdaBroadcast<A, Index>{
              lambda->const_data_ptr<A>(), static_cast<Index>(layout.period), static_cast<Index>(layout.inner * parts)});
    };
    if (n <= std::numeric_limits<int32_t>::max()) {
      broadcast(uint32_t{});
    } else {
      broadcast(uint64_t{});
    }
  }
}

void scale(const at::Tensor& out, const at::Tensor& grad, double value, const std::optional<at::Tensor>& lambda) {
  const c10::cuda::CUDAGuard guard(grad.device());
  switch (grad.scalar_type()) {
    case at::kHalf:
      return scale_as<__half>(out, grad, value, lambda);
    case at::kBFloat16:
      return scale_as<__nv_bfloat16>(out, grad, value, lambda);
    case at::kDouble:
    case at::kComplexDouble:
      return scale_as<double>(out, grad, value, lambda);
    default:
      TORCH_CHECK_TYPE(
          grad.scalar_type() == at::kFloat || grad.scalar_type() == at::kComplexFloat, "no kernel for ", grad.scalar_type());
      return scale_as<float>(out, grad, value, lambda);
  }
}

at::Tensor scale_negate_cuda(const at::Tensor& grad, double value, const std::optional<at::Tensor>& lambda) {
  auto out = at::empty_like(grad);
  scale(out, grad, value, lambda);
  return out;
}

void scale_negate_cuda_(at::Tensor& grad, double value, const std::optional<at::Tensor>& lambda) {
  scale(grad, grad, value, lambda);
}

}  // namespace

TORCH_LIBRARY_IMPL(grl_ext, CUDA, m) {
  m.impl("_scale_negate", scale_negate_cuda);
  m.impl("_scale_negate_", scale_negate_cuda_);
}

}  // namespace grl_ext
