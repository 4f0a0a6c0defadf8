// The element types of the kernels and the types they compute in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace grl_ext {

// The type that an element is computed in: f16 and bf16 are widened to f32, and results are rounded once, when they are
// stored. widen_pair takes two neighbours in a 32-bit word, the first in its low half.
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
  __device__ static float2 widen_pair(uint32_t bits) {
    __half2 pair;
    memcpy(&pair, &bits, sizeof pair);
    return __half22float2(pair);
  }
  __device__ static uint32_t narrow_pair(float x, float y) {
    const __half2 pair = __floats2half2_rn(x, y);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
  }
};

template <>
struct Arithmetic<__nv_bfloat16> {
  using type = float;
  __device__ static float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  __device__ static __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
  // A bfloat16 is the upper half of a float. So two take a shift and a mask; one by one they would take three
  // instructions.
  __device__ static float2 widen_pair(uint32_t bits) {
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
  }
  __device__ static uint32_t narrow_pair(float x, float y) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
  }
};

}  // namespace grl_ext
