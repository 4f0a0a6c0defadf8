// The kernels between matrix products, for any number of columns: which run, one after the other. `all_heads` holds all
// heads, kHeadsPerLaunch at a time.
#pragma once

#include "heads_products.cuh"
#include "heads_queue.cuh"
#include "heads_total.cuh"

namespace grl_ext {

// The buffers that the products read and write: weight (pitch, features), bias (pitch), z, g and scaled (rows, pitch).
// Null: not needed.
template <typename T>
struct Products {
  int64_t rows;
  int features;
  int columns;
  int pitch;
  T* weight;
  T* bias;
  T* z;
  T* g;
  T* scaled;
};

// A thread for every four elements.
inline dim3 grid_of_elements(int64_t elements, int heads, const HeadsDevice& device) {
  return small_grid(divide_up(elements, int64_t{4} * kProductThreads), device, heads);
}

template <typename T, typename HeadsList>
cudaError_t gather_weights(const Products<T>& in, const HeadsList& all_heads, const HeadsQueue& queue) {
  Launches launches{queue.stream};
  for (const Heads<T>& heads : all_heads) {
    launches(
        heads_gather_weights_kernel<T>,
        grid_of_elements(int64_t{in.pitch} * in.features / heads.count + 1, heads.count, queue.device), kProductThreads,
        0, in.weight, in.bias, in.features, in.columns, in.pitch, heads);
  }
  return launches.status;
}

template <typename T, typename HeadsList>
cudaError_t silence_weights(const Products<T>& in, const HeadsList& all_heads, const HeadsQueue& queue) {
  Launches launches{queue.stream};
  for (const Heads<T>& heads : all_heads) {
    launches(
        heads_silence_kernel<T>,
        grid_of_elements(int64_t{in.pitch} * in.features / heads.count + 1, heads.count, queue.device), kProductThreads,
        0, in.weight, in.features, heads);
  }
  return launches.status;
}

template <typename T, typename HeadsList>
cudaError_t split_logits(const Products<T>& in, const HeadsList& all_heads, const HeadsQueue& queue) {
  Launches launches{queue.stream};
  for (const Heads<T>& heads : all_heads) {
    if (in.rows > 0) {
      launches(
          heads_split_logits_kernel<T>,
          grid_of_elements(in.rows * in.pitch / heads.count + 1, heads.count, queue.device), kProductThreads, 0, in.z,
          in.rows, in.pitch, heads);
    }
  }
  return launches.status;
}

template <typename T, typename HeadsList>
cudaError_t gather_gradients(const Products<T>& in, const HeadsList& all_heads, const HeadsQueue& queue) {
  Launches launches{queue.stream};
  for (const Heads<T>& heads : all_heads) {
    if (in.rows > 0) {
      launches(
          heads_gather_gradients_kernel<T>,
          grid_of_elements(in.rows * in.pitch / heads.count + 1, heads.count, queue.device), kProductThreads, 0, in.g,
          in.scaled, in.rows, in.columns, in.pitch, heads);
    }
  }
  return launches.status;
}

// Computes the heads' logits and losses, g and scaled from z.
template <typename T, typename HeadsList, typename Allocate>
cudaError_t heads_loss_of_products(
    const Products<T>& in, const HeadsList& all_heads, int heads_count, bool mean,
    const HeadsLosses<typename Arithmetic<T>::type>& losses, const HeadsQueue& queue, const Allocate& allocate) {
  const int norm_blocks = mean ? norm_blocks_for(in.rows * heads_count) : 0;
  const dim3 grid = grid_of_elements(in.rows * in.pitch / heads_count + 1, 1, queue.device);
  const int blocks = in.rows == 0 ? 0 : static_cast<int>(grid.x);
  double* parts = nullptr;
  double* partial = nullptr;
  place_in_workspace(allocate, [&](Workspace& w) {
    parts = w.take<double>(int64_t{norm_blocks} * kHeadsPerLaunch);
    partial = w.take<double>(int64_t{blocks} * heads_count);
  });

  Launches launches{queue.stream};
  for (const Heads<T>& heads : all_heads) {
    if (blocks > 0) {
      if (norm_blocks > 0) {
        launches(
            heads_norm_kernel<T>, dim3(static_cast<unsigned>(norm_blocks)), kNormThreads, 0, parts, in.rows, heads);
      }
      launches(
          heads_loss_kernel<T>, dim3(grid.x, static_cast<unsigned>(heads.count)), kProductThreads, 0, in.g, in.scaled,
          partial, in.z, in.rows, in.columns, in.pitch, heads_count, Norms{mean, parts, norm_blocks}, heads);
    }
    HeadsTotal<T> total{};
    total.losses = partial;
    total.out = losses;
    total.all_heads = heads_count;
    total.blocks = blocks;
    total.heads = heads;
    for (Head<T>* head = total.heads.head; head != total.heads.head + heads.count; ++head) {
      head->grad_weight = head->grad_bias = nullptr;  // the products make those
    }
    launches(heads_total_kernel<T, true>, dim3(1), kTotalThreads, 0, total);
  }
  return launches.status;
}

}  // namespace grl_ext
