// The kernels between matrix products, for any number of columns. `all_heads` holds all heads, kHeadsPerLaunch at a
// time.
#pragma once

#include "heads_products.cuh"
#include "heads_stream.cuh"
#include "heads_total.cuh"

namespace grl_ext {

// A thread for every four elements.
inline dim3 grid_of_elements(int64_t elements, int heads, const HeadsDevice& device) {
  return small_grid(divide_up(elements, int64_t{4} * kProductThreads), device, heads);
}

// Starts a kernel over buffers of this many elements.
template <typename T, typename HeadsList>
void start_on_elements(
    Stream& stream, void (*kernel)(Products<T>, Heads<T>), int64_t elements, const Products<T>& in,
    const HeadsList& all_heads) {
  for (const Heads<T>& heads : all_heads) {
    if (elements > 0) {
      const dim3 grid = grid_of_elements(elements / heads.count + 1, heads.count, stream.device);
      stream.start(kernel, grid, kProductThreads, 0, in, heads);
    }
  }
}

template <typename T, typename HeadsList>
void gather_weights(const Products<T>& in, const HeadsList& all_heads, Stream& stream) {
  start_on_elements(stream, heads_gather_weights_kernel<T>, in.pitch * (int64_t{in.features} + 1), in, all_heads);
}

template <typename T, typename HeadsList>
void zero_weights(const Products<T>& in, const HeadsList& all_heads, Stream& stream) {
  start_on_elements(stream, heads_zero_weights_kernel<T>, in.pitch * int64_t{in.features}, in, all_heads);
}

template <typename T, typename HeadsList>
void split_logits(const Products<T>& in, const HeadsList& all_heads, Stream& stream) {
  start_on_elements(stream, heads_split_logits_kernel<T>, in.rows * in.pitch, in, all_heads);
}

template <typename T, typename HeadsList>
void gather_gradients(const Products<T>& in, const HeadsList& all_heads, Stream& stream) {
  start_on_elements(stream, heads_gather_gradients_kernel<T>, in.rows * in.pitch, in, all_heads);
}

// Computes the heads' logits and losses, g and scaled from z.
template <typename T, typename HeadsList, typename Allocate>
void heads_loss_between_products(
    const Products<T>& in, const HeadsList& all_heads, int heads_count, bool mean,
    const LossOutputs<typename Arithmetic<T>::type>& outputs, Stream& stream, Allocate allocate) {
  const int norm_blocks = mean ? norm_blocks_for(in.rows * heads_count) : 0;
  const dim3 grid = grid_of_elements(in.rows * in.pitch / heads_count + 1, 1, stream.device);
  const int blocks = in.rows == 0 ? 0 : static_cast<int>(grid.x);
  double* parts = nullptr;
  double* partial = nullptr;
  place_in_workspace(allocate, [&](Workspace& w) {
    parts = w.take<double>(int64_t{norm_blocks} * kHeadsPerLaunch);
    partial = w.take<double>(int64_t{blocks} * heads_count);
  });
  for (const Heads<T>& heads : all_heads) {
    if (blocks > 0) {
      if (norm_blocks > 0) {
        stream.start(
            heads_norm_kernel<T>, dim3(static_cast<unsigned>(norm_blocks)), kNormThreads, 0, parts, in.rows, heads);
      }
      stream.start(
          heads_loss_kernel<T>, dim3(grid.x, static_cast<unsigned>(heads.count)), kProductThreads, 0, in, partial,
          heads_count, Norms{mean, parts, norm_blocks}, heads);
    }
    HeadsTotal<T> total{};
    total.losses = partial;
    total.out = outputs;
    total.all_heads = heads_count;
    total.blocks = blocks;
    total.heads = heads;
    for (Head<T>* head = total.heads.head; head != total.heads.head + heads.count; ++head) {
      head->grad_weight = head->grad_bias = nullptr;  // the products make those
    }
    stream.start(heads_total_kernel<T, true>, dim3(1), kTotalThreads, 0, total);
  }
}

}  // namespace grl_ext
