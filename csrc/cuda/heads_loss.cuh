// What the heads' kernels know of the heads, and their softmax cross entropy: of a row whose columns are the lanes of a warp, and
// of heads of any width.
//
//   y = (1 - smoothing) [c == target] + smoothing / classes
//   loss = log sum_c exp z[c] - sum_c y[c] z[c],   g[c] = (softmax(z)[c] - y[c]) * loss_weight / valid
//
// over the valid rows of a head; a head of one column is binary, the softmax over 0 and z. Rows that are not valid: no loss, g = 0.
#pragma once

#include <cassert>
#include <cstdint>

#include "arithmetic.cuh"
#include "heads_plan.h"
#include "launch.cuh"
#include "warp.cuh"

namespace grl_ext {

// As many heads as a launch takes: what the host knows of them travels among the kernel's arguments.
constexpr int kHeadsPerLaunch = kMaxSweepColumns;

// A number for each head, that the host knows or that the device holds; there it is read when the kernel runs, so that nothing
// waits for it and a replayed CUDA graph sees its changes.
struct PerHead {
  double values[kHeadsPerLaunch];
  const float* floats;
  const double* doubles;

  __device__ double operator[](int head) const {
    return doubles ? doubles[head] : floats ? double{floats[head]} : values[head];
  }
};

struct Heads {
  int count;
  int first;                       // its place among the heads of all launches
  int begin[kHeadsPerLaunch + 1];  // of the heads' columns; the last head's end
  PerHead grad_scale;
  PerHead loss_weight;
};

struct Targets {
  const int64_t* classes;  // (rows, stride), from the first of the launch's heads
  int stride;              // heads of all launches
  int64_t rows;
  int64_t ignore_index;
  double smoothing;
  const int* counts;  // (count_blocks, heads of the launch) of valid targets; null: count them
  int count_blocks;
};

// ---------------------------------------------------------------------------------------------------------------------
// Valid targets
// ---------------------------------------------------------------------------------------------------------------------

// valid[h] += valid targets of head h in rows [begin, end), by the whole block. A thread keeps its head from row to row. The
// atomics are on integers: their order does not matter.
__device__ inline void count_rows(int* valid, const Targets& targets, int heads, int64_t begin, int64_t end) {
  const int rows_at_once = static_cast<int>(blockDim.x) / heads;
  const int head = static_cast<int>(threadIdx.x) % heads;
  const int row = static_cast<int>(threadIdx.x) / heads;
  if (row >= rows_at_once) {
    return;
  }
  int count = 0;
#pragma unroll 4
  for (int64_t r = begin + row; r < end; r += rows_at_once) {
    count += __ldg(targets.classes + r * targets.stride + head) != targets.ignore_index;
  }
  atomicAdd(&valid[head], count);
}

// counts[block][h] = valid targets of head h in the block's rows. The mean needs them before the first gradient is written.
// Traffic: 8 bytes a target. Launch: 16 targets a thread or more, kMaxCountBlocks at most, because all their counts are added up
// again by every block that needs them.
__global__ void __launch_bounds__(kCountThreads) heads_count_kernel(int* counts, Targets targets, int heads) {
  __shared__ int valid[kHeadsPerLaunch];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kHeadsPerLaunch) {
    valid[thread] = 0;
  }
  __syncthreads();
  count_rows(
      valid, targets, heads, targets.rows * blockIdx.x / gridDim.x, targets.rows * (blockIdx.x + int64_t{1}) / gridDim.x);
  __syncthreads();
  if (thread < heads) {
    counts[blockIdx.x * heads + thread] = valid[thread];
  }
}

// The block's valid[h] for heads [0, heads): added up from what heads_count_kernel left, or counted here.
__device__ inline void find_valid(int* valid, const Targets& targets, int heads) {
  const int thread = static_cast<int>(threadIdx.x);
  if (targets.counts) {
    for (int h = warp_id(); h < heads; h += static_cast<int>(blockDim.x) / kWarpSize) {
      int sum = 0;
      for (int b = lane_id(); b < targets.count_blocks; b += kWarpSize) {
        sum += targets.counts[b * heads + h];
      }
      sum = over_warp(sum, Sum{});
      if (lane_id() == 0) {
        valid[h] = sum;
      }
    }
  } else {
    if (thread < kHeadsPerLaunch) {
      valid[thread] = 0;
    }
    __syncthreads();
    count_rows(valid, targets, heads, 0, targets.rows);
  }
  __syncthreads();
}

// A class that does not exist stops the program as PyTorch's own loss does: without the host waiting for the device.
__device__ inline void check_target(bool exists) {
  if (!exists) {
    __assert_fail("a target is neither a class of its head nor ignore_index", __FILE__, __LINE__, __func__);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Columns on lanes
// ---------------------------------------------------------------------------------------------------------------------

// A lane's column of the logits, the same in every row.
template <typename A>
struct Column {
  int head;
  int first_lane, end_lane;  // of the head
  bool exists;
  bool binary;
  A scale;       // of the gradient that goes into dX
  A row_weight;  // of a row in the loss: loss_weight / valid
  A share;       // of every class in the smoothed target,
  A rest;        // and what the target has above it
};

template <typename A>
__device__ Column<A> lane_column(const Heads& heads, const Targets& targets, const int* valid) {
  Column<A> column{};
  const int lane = lane_id();
  column.exists = lane < heads.begin[heads.count];
  column.first_lane = lane;
  column.end_lane = lane + 1;
  for (int h = 0; h < heads.count; ++h) {
    if (heads.begin[h] <= lane && lane < heads.begin[h + 1]) {
      column.head = h;
      column.first_lane = heads.begin[h];
      column.end_lane = heads.begin[h + 1];
    }
  }
  if (column.exists) {
    const int size = column.end_lane - column.first_lane;
    column.binary = size == 1;
    column.scale = static_cast<A>(heads.grad_scale[column.head]);
    column.share = static_cast<A>(targets.smoothing / max(2, size));
    column.rest = static_cast<A>(1 - targets.smoothing);
    if (valid) {
      column.row_weight = static_cast<A>(heads.loss_weight[column.head] / max(1, valid[column.head]));
    }
  }
  return column;
}

// Every lane gets op over the lanes of its head.
template <typename A, typename Op>
__device__ A over_head(A x, const Column<A>& column, Op op) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const A other = __shfl_down_sync(kWholeWarp, x, distance);
    x = lane_id() + distance < column.end_lane ? op(x, other) : x;  // now over [lane, lane + 2 distance)
  }
  return __shfl_sync(kWholeWarp, x, column.first_lane);
}

// A lane's part in what a target expects: y (z - top); nothing where y is 0, though z be infinite.
template <typename A>
__device__ A expected_part(A y, A shifted) {
  return y == 0 ? A(0) : y * shifted;
}

// The gradient of the row's loss for the lane's logit z. The first lane of each head adds the head's loss to `loss`.
template <typename A>
__device__ A cross_entropy_of_lane(double& loss, A z, int64_t target, const Column<A>& column, int64_t ignore_index) {
  const bool valid = column.exists && target != ignore_index;
  const int size = column.end_lane - column.first_lane;
  check_target(!valid || (target >= 0 && target < max(2, size)));
  const int hit = column.binary ? 1 : lane_id() - column.first_lane;  // the class that the lane stands for

  const A top = over_head(column.binary ? Maximum{}(z, A(0)) : z, column, Maximum{});
  const A e = exp(z - top);
  const A y = column.share + (target == hit ? column.rest : A(0));
  A sum = e;
  A expected = expected_part(y, z - top);
  if (column.binary) {  // the class of the logit 0, which has no lane
    sum += exp(-top);
    expected += expected_part(column.share + (target == 0 ? column.rest : A(0)), -top);
  }
  sum = over_head(sum, column, Sum{});
  expected = over_head(expected, column, Sum{});
  if (valid && lane_id() == column.first_lane) {
    loss += static_cast<double>(log(sum) - expected);
  }
  return valid ? (e / sum - y) * column.row_weight : A(0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Heads of any width
// ---------------------------------------------------------------------------------------------------------------------

// g, scaled (each where not null), and losses[block][head], from the logits of a product: (rows, columns), all heads.
// Traffic: the logits once from memory and twice more from the cache, g and scaled written once. Launch: one warp a row and head;
// the heads of the launch along y; along x enough blocks to fill the GPU, which stride over the rows.
template <typename T>
__global__ void __launch_bounds__(kCrossEntropyThreads) heads_cross_entropy_kernel(
    T* g, T* scaled, double* losses, const T* logits, int columns, const __grid_constant__ Heads heads,
    const __grid_constant__ Targets targets) {
  using A = typename Arithmetic<T>::type;
  constexpr int kWarps = kCrossEntropyThreads / kWarpSize;
  __shared__ int valid[kHeadsPerLaunch];
  __shared__ double scratch[kCrossEntropyThreads];
  find_valid(valid, targets, heads.count);

  const int head = static_cast<int>(blockIdx.y);
  const int size = heads.begin[head + 1] - heads.begin[head];
  const int classes = max(2, size);
  const A scale = static_cast<A>(heads.grad_scale[head]);
  const A row_weight = static_cast<A>(heads.loss_weight[head] / max(1, valid[head]));
  const A share = static_cast<A>(targets.smoothing / classes);
  const A rest = static_cast<A>(1 - targets.smoothing);
  double loss = 0;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + warp_id(); row < targets.rows; row += int64_t{gridDim.x} * kWarps) {
    const int64_t at = row * columns + heads.begin[head];
    const auto z = [&](int c) { return Arithmetic<T>::widen(logits[at + c]); };
    const int64_t target = targets.classes[row * targets.stride + head];
    const bool is_valid = target != targets.ignore_index;
    check_target(!is_valid || (target >= 0 && target < classes));
    const auto y = [&](int c) { return share + (target == c ? rest : A(0)); };
    const int first_class = size == 1;  // of the columns: a binary head's one column is class 1, beside the logit 0 of class 0
    A top = size == 1 ? A(0) : z(0);
    for (int c = lane_id(); c < size; c += kWarpSize) {
      top = Maximum{}(top, z(c));
    }
    top = over_warp(top, Maximum{});
    const bool has_zero = first_class == 1 && lane_id() == 0;
    A sum = has_zero ? exp(-top) : A(0);
    A expected = has_zero ? expected_part(y(0), -top) : A(0);
    for (int c = lane_id(); c < size; c += kWarpSize) {
      sum += exp(z(c) - top);
      expected += expected_part(y(c + first_class), z(c) - top);
    }
    sum = over_warp(sum, Sum{});
    expected = over_warp(expected, Sum{});
    loss += is_valid && lane_id() == 0 ? static_cast<double>(log(sum) - expected) : 0.0;
    for (int c = lane_id(); (g || scaled) && c < size; c += kWarpSize) {
      const A dz = is_valid ? (exp(z(c) - top) / sum - y(c + first_class)) * row_weight : A(0);
      if (g) {
        g[at + c] = Arithmetic<T>::narrow(dz);
      }
      if (scaled) {
        scaled[at + c] = Arithmetic<T>::narrow(scale == 0 ? A(0) : dz * scale);
      }
    }
  }
  loss = sum_over_warps(loss, scratch);
  if (threadIdx.x == 0) {
    losses[int64_t{blockIdx.x} * targets.stride + heads.first + head] = loss / max(1, valid[head]);
  }
}

// scaled = g with each head's gradient scale, for the matrix product that makes dX: 2 N K elements of traffic, one thread each.
template <typename T>
__global__ void __launch_bounds__(kCrossEntropyThreads)
    heads_scale_kernel(T* scaled, const T* g, int64_t rows, int columns, const __grid_constant__ Heads heads) {
  using A = typename Arithmetic<T>::type;
  const int head = static_cast<int>(blockIdx.y);
  const int size = heads.begin[head + 1] - heads.begin[head];
  const A scale = static_cast<A>(heads.grad_scale[head]);
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < rows * size; i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t at = i / size * columns + heads.begin[head] + i % size;
    scaled[at] = Arithmetic<T>::narrow(scale == 0 ? A(0) : Arithmetic<T>::widen(g[at]) * scale);
  }
}

}  // namespace grl_ext
