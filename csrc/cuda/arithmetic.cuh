// The element types of the kernels and the types they compute in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace grl_ext {

// How an element is computed with: f16 and bf16 are widened to f32 and rounded once, on the way out.
template <typename T>
struct Arithmetic {
  using type = T;
  __device__ static T widen(T x) { return x; }
  __device__ static T narrow(T x) { return x; }
};

template <>
struct Arithmetic<__half> {
  using type = float;
  __device__ static float widen(__half x) { return __half2float(x); }
  __device__ static __half narrow(float x) { return __float2half_rn(x); }
};

template <>
struct Arithmetic<__nv_bfloat16> {
  using type = float;
  __device__ static float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  __device__ static __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
};

}  // namespace grl_ext
