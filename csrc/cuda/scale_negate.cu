// _scale_negate on CUDA: chooses the kernel for the gradients' type and the form of lambda. Everything is enqueued on
// the current stream, and the host never waits, so that it can be captured in a CUDA graph.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <vector>

#include "../lambda_layout.h"
#include "dispatch.h"
#include "scale_negate.cuh"

namespace grl_ext {
namespace {

int multiprocessors(const at::Tensor& tensor) {
  int count = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, tensor.get_device()));
  return count;
}

// A complex element is a pair of reals.
at::ScalarType real_type(const at::Tensor& grad) {
  return c10::toRealValueType(grad.scalar_type());
}

int64_t reals(const at::Tensor& grad) {
  return grad.numel() * (grad.is_complex() ? 2 : 1);
}

// enqueue(form) with the form in which the kernels read a number: `value`, times the one element of `lambda` if there
// is one.
template <typename A, class F>
void enqueue_number(double value, const std::optional<at::Tensor>& lambda, const F& enqueue) {
  if (!lambda) {
    enqueue(LambdaValue<A>{static_cast<A>(value)});
  } else if (lambda->scalar_type() == at::kDouble) {
    enqueue(LambdaOnDevice<A, double>{lambda->const_data_ptr<double>(), static_cast<A>(value)});
  } else {
    enqueue(LambdaOnDevice<A, float>{lambda->const_data_ptr<float>(), static_cast<A>(value)});
  }
}

template <typename T>
void scale_as(const at::Tensor& out, const at::Tensor& grad, double value, const std::optional<at::Tensor>& lambda) {
  using A = typename Arithmetic<T>::type;
  const int64_t n = reals(grad);
  const auto enqueue = [&](auto form) {
    C10_CUDA_CHECK(scale_negate(
        static_cast<T*>(out.mutable_data_ptr()), static_cast<const T*>(grad.const_data_ptr()), n, form,
        multiprocessors(grad), c10::cuda::getCurrentCUDAStream()));
  };

  if (!lambda || lambda->numel() == 1) {
    enqueue_number<A>(value, lambda, enqueue);
  } else {
    const auto layout = *lambda_layout(grad.sizes(), lambda->sizes());
    const auto broadcast = [&](auto index) {
      using Index = decltype(index);
      enqueue(
          LambdaBroadcast<A, Index>{
              lambda->const_data_ptr<A>(), static_cast<Index>(layout.period),
              static_cast<Index>(layout.inner * (grad.is_complex() ? 2 : 1))});
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
  dispatch(real_type(grad), [&](auto zero) { scale_as<decltype(zero)>(out, grad, value, lambda); });
}

at::Tensor scale_negate_cuda(const at::Tensor& grad, double value, const std::optional<at::Tensor>& lambda) {
  auto out = at::empty_like(grad);
  scale(out, grad, value, lambda);
  return out;
}

void scale_negate_cuda_(at::Tensor& grad, double value, const std::optional<at::Tensor>& lambda) {
  scale(grad, grad, value, lambda);
}

void scale_negate_list_cuda_(at::TensorList grads, double value, const std::optional<at::Tensor>& lambda) {
  if (grads.empty()) {
    return;
  }
  const c10::cuda::CUDAGuard guard(grads[0].device());
  dispatch(real_type(grads[0]), [&](auto zero) {
    using T = decltype(zero);
    using A = typename Arithmetic<T>::type;
    std::vector<T*> data;
    std::vector<int64_t> sizes;
    for (const auto& grad : grads) {
      TORCH_CHECK_TYPE(
          grad.scalar_type() == grads[0].scalar_type(), "_scale_negate_list_: gradients of ", grads[0].scalar_type(),
          " and of ", grad.scalar_type());
      data.push_back(static_cast<T*>(grad.mutable_data_ptr()));
      sizes.push_back(reals(grad));
    }
    const auto enqueue = [&](auto form) {
      C10_CUDA_CHECK(scale_negate_list(
          data.data(), sizes.data(), static_cast<int>(data.size()), form, multiprocessors(grads[0]),
          c10::cuda::getCurrentCUDAStream()));
    };
    enqueue_number<A>(value, lambda, enqueue);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(grl_ext, CUDA, m) {
  m.impl("_scale_negate", scale_negate_cuda);
  m.impl("_scale_negate_", scale_negate_cuda_);
  m.impl("_scale_negate_list_", scale_negate_list_cuda_);
}

}  // namespace grl_ext
