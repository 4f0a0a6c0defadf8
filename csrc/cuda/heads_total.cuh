// Adds up the partial sums of the sweep's blocks: the weights' and biases' gradients, and the losses.
#pragma once

#include "heads_arguments.cuh"
#include "launch.cuh"
#include "warp.cuh"

namespace grl_ext {

// Where the losses go.
template <typename A>
struct LossOutputs {
  A* loss;         // the sum of the heads' losses, each with its weight
  A* head_losses;  // (heads of all launches)
};

template <typename T>
struct HeadsTotal {
  using A = typename Arithmetic<T>::type;
  // (blocks, partial_stride): the gradients of all weights, `weight_elements` in all, then those of the biases.
  const A* partial;
  int64_t partial_stride;
  int64_t weight_elements;
  int features;
  // losses[block][head of all launches], of which the sum is a head's loss.
  const double* losses;
  LossOutputs<A> out;
  int all_heads;
  int blocks;
  Heads<T> heads;

  // How many runs of 32 elements, a warp's width, a head's gradient has; 0 if it is not needed.
  __host__ __device__ int64_t weight_runs(int h) const {
    return heads.head[h].grad_weight ? divide_up(int64_t{heads.head[h].size()} * features, 32) : 0;
  }
  __host__ __device__ int64_t bias_runs(int h) const {
    return heads.head[h].grad_bias ? divide_up(heads.head[h].size(), 32) : 0;
  }
};

// The heads' losses and their weighted sum, by one block: a warp for each head.
template <typename T>
__device__ void total_of_losses(const HeadsTotal<T>& in, double* scratch) {
  using A = typename Arithmetic<T>::type;
  const Heads<T>& heads = in.heads;
  double weighted = 0;
  for (int h = warp_id(); h < heads.count; h += kTotalThreads / kWarpSize) {
    double loss = 0;
    for (int b = lane_id(); b < in.blocks; b += kWarpSize) {
      loss += in.losses[int64_t{b} * in.all_heads + heads.first + h];
    }
    loss = over_warp(loss, Sum{});
    if (lane_id() == 0) {
      in.out.head_losses[heads.first + h] = static_cast<A>(loss);
      weighted += heads.head[h].weight_in_loss() * loss;
    }
  }
  weighted = sum_over_warps(weighted, scratch);
  if (threadIdx.x == 0) {
    *in.out.loss = static_cast<A>((heads.first == 0 ? 0.0 : static_cast<double>(*in.out.loss)) + weighted);
  }
}

// grad_weight, grad_bias and the losses, each the sum of the blocks' parts in their order.
// Traffic: the parts once; the sweep has just written them, so that they are in the L2 cache. Launch: a warp's lanes
// take 32 neighbouring elements, and the warps of a block divide the parts among them, so that there are enough loads
// in flight. Block 0 adds the losses first.
template <typename T, bool kWithLoss>
__global__ void __launch_bounds__(kTotalThreads) heads_total_kernel(const __grid_constant__ HeadsTotal<T> in) {
  using A = typename Arithmetic<T>::type;
  constexpr int kWarps = kTotalThreads / kWarpSize;
  __shared__ double scratch[kTotalThreads];
  if constexpr (kWithLoss) {
    if (blockIdx.x == 0) {
      total_of_losses(in, scratch);
    }
  }
  int h = 0;
  int64_t run = blockIdx.x;  // among those of head h
  for (;; run += gridDim.x) {
    while (h < in.heads.count && run >= in.weight_runs(h) + in.bias_runs(h)) {
      run -= in.weight_runs(h) + in.bias_runs(h);
      ++h;
    }
    if (h == in.heads.count) {
      return;
    }
    const Head<T>& head = in.heads.head[h];
    const bool of_weight = run < in.weight_runs(h);
    const int64_t element = (of_weight ? run : run - in.weight_runs(h)) * kWarpSize + lane_id();
    const int64_t elements = of_weight ? int64_t{head.size()} * in.features : head.size();
    const int64_t begin = of_weight ? int64_t{head.begin} * in.features : in.weight_elements + head.begin;
    A sum = 0;
    if (element < elements) {
#pragma unroll 4
      for (int b = warp_id(); b < in.blocks; b += kWarps) {
        sum += in.partial[b * in.partial_stride + begin + element];
      }
    }
    const T total = Arithmetic<T>::narrow(static_cast<A>(sum_over_warps(static_cast<double>(sum), scratch)));
    if (warp_id() == 0 && element < elements) {
      (of_weight ? head.grad_weight : head.grad_bias)[element] = total;
    }
  }
}

}  // namespace grl_ext
