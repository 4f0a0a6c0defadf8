// __half, __nv_bfloat16 and their conversions, for cuda_emulation.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_types.h"

struct __half {
  uint16_t bits;
};

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31;
  const int fraction = x.bits & 1023;
  const float magnitude = exponent == 31
      ? (fraction ? NAN : INFINITY)
      : std::ldexp(float(exponent ? 1024 + fraction : fraction), std::max(exponent, 1) - 25);
  return std::copysign(magnitude, x.bits & 0x8000 ? -1.0f : 1.0f);
}

// A half is a count of its binade's unit; a count that rounds up to the next binade carries into the exponent by
// itself.
inline __half __float2half_rn(float x) {
  const unsigned sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) {
    return {0x7fff};
  }
  if (std::fabs(x) >= 65536) {
    return {uint16_t(sign | 0x7c00)};
  }
  const int exponent = x == 0 ? -14 : std::max(std::ilogb(x), -14);
  const auto count = unsigned(std::nearbyint(std::ldexp(std::fabs(x), 10 - exponent)));
  return {uint16_t(sign | (((exponent + 14) << 10) + count))};
}

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return {uint16_t(std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

using __half2 = EmulatedVector2<__half>;
using __nv_bfloat162 = EmulatedVector2<__nv_bfloat16>;

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline int __ffs(int x) {
  return __builtin_ffs(x);
}

inline float2 __half22float2(__half2 v) {
  return {__half2float(v.x), __half2float(v.y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) {
  return {__bfloat162float(v.x), __bfloat162float(v.y)};
}
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
