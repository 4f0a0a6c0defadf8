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
    __builtin_unreachable();
  }
}

// How many rows a thread has in flight: it loads all their labels and weights, then adds them up.
constexpr int kRowsInFlight = 8;

// What rows first, first + step, ... before `end` add to the head's norm. Where each entry of a row has a weight, an
// entry counts as a row. `exist` becomes false where a row has a class that does not exist. It is for the caller to
// look at, after the loop: a call in the loop would end each group of loads.
template <typename T>
__device__ double sum_of_rows(const Head<T>& head, int64_t first, int64_t end, int64_t step, bool& exist) {
  using A = typename Arithmetic<T>::type;
  const auto* const labels = head.kind == TargetKind::kClasses ? static_cast<const int64_t*>(head.target) : nullptr;
  double sum = 0;
  for (int64_t row = first; row < end; row += kRowsInFlight * step) {
    const auto inside = [&](int k) { return row + k * step < end; };
    const auto at = [&](int k) { return inside(k) ? row + k * step : row; };
    A weight[kRowsInFlight];
    A class_weight[kRowsInFlight];
    int64_t label[kRowsInFlight];
    bool counts[kRowsInFlight];
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) {
      weight[k] = class_weight[k] = 1;
      counts[k] = inside(k);
    }
    if (head.sample_weight) {
#pragma unroll
      for (int k = 0; k < kRowsInFlight; ++k) {
        weight[k] = __ldg(head.sample_weight + at(k));
      }
    }
    if (labels) {
#pragma unroll
      for (int k = 0; k < kRowsInFlight; ++k) {
        label[k] = __ldg(labels + at(k));
      }
#pragma unroll
      for (int k = 0; k < kRowsInFlight; ++k) {
        // & and |, because && and || are branches, each of which would wait for its label
        counts[k] = counts[k] & (weight[k] != 0) & (label[k] != head.ignore_index);
        const bool exists = static_cast<uint64_t>(label[k]) < static_cast<uint64_t>(head.classes());
        exist &= exists | !counts[k];
        label[k] = exists ? label[k] : 0;
      }
      if (head.class_weight) {
#pragma unroll
        for (int k = 0; k < kRowsInFlight; ++k) {
          class_weight[k] = __ldg(head.class_weight + label[k]);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kRowsInFlight; ++k) {
      sum += counts[k] ? static_cast<double>(weight[k]) * static_cast<double>(class_weight[k]) : 0.0;
    }
  }
  const bool of_outputs = head.kind == TargetKind::kValues || head.kind == TargetKind::kIndicators;
  return of_outputs && !head.of_entries ? sum * head.size() : sum;
}

// norms[h] = the sum over rows [begin, end), by the whole block. `scratch` holds a number for each thread. The block's
// threads are divided among the heads: thread t of a head takes rows t, t + threads, t + 2 threads, ... A warp adds up
// the threads' sums.
template <typename T>
__device__ void add_rows(double* norms, double* scratch, const Heads<T>& heads, int64_t begin, int64_t end) {
  const int threads = static_cast<int>(blockDim.x) / heads.count;
  const int head = static_cast<int>(threadIdx.x) / threads;
  double sum = 0;
  bool exist = true;
  if (head < heads.count) {
    const Head<T>& mine = heads.head[head];
    const int64_t of_row = mine.weights_of_row();
    sum = sum_of_rows(
        mine, begin * of_row + static_cast<int>(threadIdx.x) % threads, end * of_row, int64_t{threads}, exist);
  }
  check_target(exist);
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
