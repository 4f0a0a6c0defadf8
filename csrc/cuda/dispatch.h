// From a tensor's dtype to the kernels' type for it.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace grl_ext {

// f(T()) with the kernels' type T for dtype.
template <class F>
auto dispatch(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kHalf:
      return f(__half());
    case at::kBFloat16:
      return f(__nv_bfloat16());
    case at::kDouble:
      return f(double());
    default:
      TORCH_CHECK_TYPE(dtype == at::kFloat, "no kernel for ", dtype);
      return f(float());
  }
}

}  // namespace grl_ext
