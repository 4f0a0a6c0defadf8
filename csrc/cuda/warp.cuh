// Sums over the lanes of a warp and the warps of a block. Each adds in one fixed order, so that results repeat bit for
// bit.
#pragma once

#include <cuda_runtime.h>

namespace grl_ext {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = ~0u;

__device__ inline int lane_id() {
  return static_cast<int>(threadIdx.x) % kWarpSize;
}

__device__ inline int warp_id() {
  return static_cast<int>(threadIdx.x) / kWarpSize;
}

// Every lane gets op over all lanes.
template <typename T, typename Op>
__device__ T over_warp(T x, Op op) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    x = op(x, __shfl_xor_sync(kWholeWarp, x, distance));
  }
  return x;
}

// Every lane gets the sum over the lanes whose number differs from its own by a multiple of `step`, a power of two.
template <typename T>
__device__ T over_lanes_in_steps(T x, int step) {
  for (int distance = step; distance < kWarpSize; distance *= 2) {
    x += __shfl_xor_sync(kWholeWarp, x, distance);
  }
  return x;
}

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Maximum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// Lane i gets the sum over the lanes of v[i]. At every step a lane keeps half of its numbers and sends the other half
// to the lane that keeps those. This takes 31 exchanges; 32 sums one by one would take 160. It is a recursion because
// the compiler does not unroll loops with such bounds, and v would be in memory instead of registers.
template <int kHalf = kWarpSize / 2, typename T>
__device__ T transposed_sum(T (&v)[kWarpSize]) {
  const bool upper = lane_id() & kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const T kept = upper ? v[i + kHalf] : v[i];
    const T sent = upper ? v[i] : v[i + kHalf];
    v[i] = kept + __shfl_xor_sync(kWholeWarp, sent, kHalf);
  }
  if constexpr (kHalf > 1) {
    return transposed_sum<kHalf / 2>(v);
  } else {
    return v[0];
  }
}

// Each lane of the first warp gets the sum of its counterparts' values in all warps; `scratch` holds a number for each
// thread.
__device__ inline double sum_over_warps(double value, double* scratch) {
  __syncthreads();
  scratch[threadIdx.x] = value;
  __syncthreads();
  double sum = 0;
  for (unsigned t = threadIdx.x; warp_id() == 0 && t < blockDim.x; t += kWarpSize) {
    sum += scratch[t];
  }
  return sum;
}

}  // namespace grl_ext
