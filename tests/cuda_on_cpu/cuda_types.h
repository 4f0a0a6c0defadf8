// The words and types of CUDA that need no machine behind them, for cuda_emulation.h.
#pragma once

#include <cstddef>

// ---- The language
// -----------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local  // each block has an operating system's thread to itself, which its fibres share

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::exp;
using std::log;
using std::max;
using std::min;

template <typename T>
struct alignas(2 * sizeof(T)) EmulatedVector2 {
  T x, y;
};

template <typename T>
struct alignas(16) EmulatedVector4 {
  T x, y, z, w;
};

using float2 = EmulatedVector2<float>;
using double2 = EmulatedVector2<double>;
using int2 = EmulatedVector2<int>;
using uint2 = EmulatedVector2<unsigned>;
using float4 = EmulatedVector4<float>;
using int4 = EmulatedVector4<int>;
using uint4 = EmulatedVector4<unsigned>;

inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

// ---- The runtime's types
// ----------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum cudaSharedCarveout { cudaSharedmemCarveoutMaxShared = 100 };  // per cent
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
using cudaStream_t = void*;

struct cudaFuncAttributes {
  std::size_t sharedSizeBytes;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};
