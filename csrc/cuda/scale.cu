// _scale on CUDA: chooses the kernel for the gradients' type and the form of the factor. Everything is enqueued on the
// current stream, and the host never waits, so that it can be captured in a CUDA graph.
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
#include "scale.cuh"

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

void check_readable(const at::Tensor& grad, const std::optional<at::Tensor>& tensor) {
  TORCH_CHECK_VALUE(
      grad.is_non_overlapping_and_dense() && (!tensor || tensor->device() == grad.device()),
      "_scale: grad must be dense and not overlap, and tensor be on its device");
}

// enqueue(form) with the form in which the kernels read a number: `factor`, times the one element of `tensor` if there
// is one.
template <typename A, class F>
void enqueue_number(double factor, const std::optional<at::Tensor>& tensor, const F& enqueue) {
  const auto multiplier = static_cast<A>(factor);
  if (!tensor) {
    enqueue(HostFactor<A>{multiplier});
  } else if (tensor->scalar_type() == at::kDouble) {
    enqueue(DeviceFactor<A, double>{tensor->const_data_ptr<double>(), multiplier});
  } else {
    enqueue(DeviceFactor<A, float>{tensor->const_data_ptr<float>(), multiplier});
  }
}

template <typename A, class F>
void enqueue_broadcast(double factor, const at::Tensor& tensor, const at::Tensor& grad, const F& enqueue) {
  const auto layout = lambda_layout(grad.sizes(), tensor.sizes());
  TORCH_CHECK_VALUE(
      layout && grad.is_contiguous() && tensor.is_contiguous(),
      "_scale: grad and tensor must be contiguous, and tensor vary along neighbouring dimensions only");
  const auto enqueue_with = [&](auto index) {
    using Index = decltype(index);
    const auto inner = layout->inner * (grad.is_complex() ? 2 : 1);
    enqueue(
        BroadcastFactor<A, Index>{
            tensor.const_data_ptr<A>(), static_cast<A>(factor), static_cast<Index>(layout->period),
            static_cast<Index>(inner)});
  };
  if (reals(grad) <= std::numeric_limits<int32_t>::max()) {
    enqueue_with(uint32_t{});
  } else {
    enqueue_with(uint64_t{});
  }
}

void scale_into(const at::Tensor& out, const at::Tensor& grad, double factor, const std::optional<at::Tensor>& tensor) {
  check_readable(grad, tensor);
  const c10::cuda::CUDAGuard guard(grad.device());
  dispatch(real_type(grad), [&](auto zero) {
    using T = decltype(zero);
    using A = typename Arithmetic<T>::type;
    const auto enqueue = [&](auto form) {
      C10_CUDA_CHECK(scale(
          static_cast<T*>(out.mutable_data_ptr()), static_cast<const T*>(grad.const_data_ptr()), reals(grad), form,
          multiprocessors(grad), c10::cuda::getCurrentCUDAStream()));
    };
    if (!tensor || tensor->numel() == 1) {
      enqueue_number<A>(factor, tensor, enqueue);
    } else {
      enqueue_broadcast<A>(factor, *tensor, grad, enqueue);
    }
  });
}

at::Tensor scale_cuda(const at::Tensor& grad, double factor, const std::optional<at::Tensor>& tensor) {
  auto out = at::empty_like(grad);
  scale_into(out, grad, factor, tensor);
  return out;
}

void scale_cuda_(at::Tensor& grad, double factor, const std::optional<at::Tensor>& tensor) {
  scale_into(grad, grad, factor, tensor);
}

void scale_list_cuda_(at::TensorList grads, double factor, const std::optional<at::Tensor>& tensor) {
  if (grads.empty()) {
    return;
  }
  const c10::cuda::CUDAGuard guard(grads[0].device());
  dispatch(real_type(grads[0]), [&](auto zero) {
    using T = decltype(zero);
    std::vector<T*> data;
    std::vector<int64_t> sizes;
    for (const auto& grad : grads) {
      check_readable(grad, tensor);
      TORCH_CHECK_TYPE(
          grad.scalar_type() == grads[0].scalar_type(), "_scale_list_: gradients of ", grads[0].scalar_type(),
          " and of ", grad.scalar_type());
      data.push_back(static_cast<T*>(grad.mutable_data_ptr()));
      sizes.push_back(reals(grad));
    }
    enqueue_number<typename Arithmetic<T>::type>(factor, tensor, [&](auto form) {
      C10_CUDA_CHECK(scale_list(
          data.data(), sizes.data(), static_cast<int>(data.size()), form, multiprocessors(grads[0]),
          c10::cuda::getCurrentCUDAStream()));
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(grl_ext, CUDA, m) {
  m.impl("_scale", scale_cuda);
  m.impl("_scale_", scale_cuda_);
  m.impl("_scale_list_", scale_list_cuda_);
}

}  // namespace grl_ext
