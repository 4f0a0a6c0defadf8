// The norm of each head: the sum of its rows' weights, by which its mean divides. It must be known before the first
// gradient is written. Added up in double and in one fixed order: no atomics.
#pragma once

#include <cassert>

#include "heads_arguments.cuh"
#include "warp.cuh"

namespace grl_ext {

// Where the sweep finds the norms.
struct Norms {
  bool mean;  // false: the loss is a sum, and every norm is 1
  // (blocks, heads of the launch), by heads_norm_kernel. Null: each block adds the rows' weights up itself.
  const double* parts;
  int blocks;
};

// A class that does not exist stops the program, as in PyTorch's own loss: an error would need the host to wait for the
// device.
__device__ inline void check_target(bool exists) {
  if (!exists) {
    __assert_fail("a target is neither a class of its head nor ignore_index", __FILE__, __LINE__, __func__);
  }
}

// What a row adds to its head's norm.
template <typename T>
__device__ double weight_of_row(const Head<T>& head, int64_t row) {
  if (head.of_entries) {
    double sum = 0;
    for (int64_t i = row * head.size(); i < (row + 1) * head.size(); ++i) {
      sum += static_cast<double>(__ldg(head.sample_weight + i));
    }
    return sum;
  }
  const double weight = head.sample_weight ? static_cast<double>(__ldg(head.sample_weight + row)) : 1.0;
  if (head.kind != TargetKind::kClasses) {
    return weight * (head.kind == TargetKind::kProbabilities ? 1 : head.size());
  }
  const int64_t target = __ldg(static_cast<const int64_t*>(head.target) + row);
  if (target == head.ignore_index || weight == 0) {
    return 0;
  }
  const bool exists = target >= 0 && target < head.classes();
  check_target(exists);
  return head.class_weight && exists ? weight * static_cast<double>(__ldg(head.class_weight + target)) : weight;
}

// norms[h] = the sum over rows [begin, end), by the whole block. `scratch` holds a number for each thread. The block's
// threads are divided among the heads: thread t of a head takes rows t, t + threads, t + 2 threads, ... A warp adds up
// the threads' sums.
template <typename T>
__device__ void add_rows(double* norms, double* scratch, const Heads<T>& heads, int64_t begin, int64_t end) {
  const int threads = static_cast<int>(blockDim.x) / heads.count;
  const int head = static_cast<int>(threadIdx.x) / threads;
  double sum = 0;
  if (head < heads.count) {
    const Head<T>& mine = heads.head[head];
#pragma unroll 4
    for (int64_t row = begin + static_cast<int>(threadIdx.x) % threads; row < end; row += threads) {
      sum += weight_of_row(mine, row);
    }
  }
  scratch[threadIdx.x] = sum;
  __syncthreads();
  for (int h = warp_id(); h < heads.count; h += static_cast<int>(blockDim.x) / kWarpSize) {
    double total = 0;
    for (int t = lane_id(); t < threads; t += kWarpSize) {
      total += scratch[h * threads + t];
    }
    total = over_warp(total, Sum{});
    if (lane_id() == 0) {
      norms[h] = total;
    }
  }
  __syncthreads();
}

// parts[block][h] = the sum over the block's rows.
// Traffic: the targets and sample weights once. Launch: 16 rows a thread or more, kMaxNormBlocks at most, because all
// their parts are added up again by every block that needs them.
template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    heads_norm_kernel(double* parts, int64_t rows, const __grid_constant__ Heads<T> heads) {
  __shared__ double norms[kHeadsPerLaunch];
  __shared__ double scratch[kNormThreads];
  add_rows(norms, scratch, heads, rows * blockIdx.x / gridDim.x, rows * (blockIdx.x + int64_t{1}) / gridDim.x);
  if (static_cast<int>(threadIdx.x) < heads.count) {
    parts[blockIdx.x * heads.count + threadIdx.x] = norms[threadIdx.x];
  }
}

// Sets the block's norms[h], in the way that `from` says. All threads may read them afterwards.
template <typename T>
__device__ void find_norms(double* norms, double* scratch, const Norms& from, const Heads<T>& heads, int64_t rows) {
  if (from.mean && !from.parts) {
    add_rows(norms, scratch, heads, 0, rows);
    return;
  }
  for (int h = warp_id(); h < heads.count; h += static_cast<int>(blockDim.x) / kWarpSize) {
    double sum = 0;
    for (int b = lane_id(); from.mean && b < from.blocks; b += kWarpSize) {
      sum += from.parts[b * heads.count + h];
    }
    sum = over_warp(sum, Sum{});
    if (lane_id() == 0) {
      norms[h] = from.mean ? sum : 1.0;
    }
  }
  __syncthreads();
}

}  // namespace grl_ext
