// The kernels before, between and after matrix products, for heads that the sweep does not take. One product serves all
// heads, over buffers in which their columns lie side by side. There are `pitch` columns, a multiple of
// kProductColumns; those after the last head's are zero.
//
// Kernels that go through rows give each row of a head as many lanes as it can use: a warp takes several rows of a
// narrow head.
#pragma once

#include "heads_loss.cuh"

namespace grl_ext {

// The lanes that work on one row, a power of two, and which rows this thread takes part in.
struct LanesOfRow {
  int lanes;
  int lane;  // this thread's, among them
  int64_t first;  // this thread's first row
  int64_t step;  // from one of its rows to the next

  __device__ explicit LanesOfRow(int size) : lanes(1) {
    while (lanes < size && lanes < kWarpSize) {
      lanes *= 2;
    }
    const int rows_at_once = static_cast<int>(blockDim.x) / lanes;
    lane = static_cast<int>(threadIdx.x) % lanes;
    first = int64_t{blockIdx.x} * rows_at_once + static_cast<int>(threadIdx.x) / lanes;
    step = int64_t{gridDim.x} * rows_at_once;
  }

  // Each of the row's lanes gets op over them. The whole warp calls it.
  template <typename A, typename Op>
  __device__ A over(A x, Op op) const {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      x = op(x, __shfl_xor_sync(kWholeWarp, x, distance));
    }
    return x;
  }
};

// The end of the columns that head h fills in a buffer: its own, and for the last head of all also the padding after
// them.
template <typename T>
__device__ int padded_end(const Heads<T>& heads, int h, int columns, int pitch) {
  return heads.head[h].end == columns ? pitch : heads.head[h].end;
}

// weight (pitch, features) and bias (pitch) from the heads' own. Traffic: weights read and written once. Launch: heads
// along y.
template <typename T>
__global__ void __launch_bounds__(kProductThreads) heads_gather_weights_kernel(
    T* weight, T* bias, int features, int columns, int pitch, const __grid_constant__ Heads<T> heads) {
  const int h = static_cast<int>(blockIdx.y);
  const Head<T>& head = heads.head[h];
  const T zero = Arithmetic<T>::narrow(0);
  const int64_t own = int64_t{head.size()} * features;
  const int64_t all = (padded_end(heads, h, columns, pitch) - head.begin) * int64_t{features};
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < all; i += int64_t{gridDim.x} * blockDim.x) {
    weight[int64_t{head.begin} * features + i] = i < own ? head.weight[i] : zero;
  }
  for (int64_t c = first; bias && head.begin + c < padded_end(heads, h, columns, pitch);
       c += int64_t{gridDim.x} * blockDim.x) {
    bias[head.begin + c] = head.bias && c < head.size() ? head.bias[c] : zero;
  }
}

// Zeros the rows of `weight` that belong to heads with scale 0, so that such a head, which may hold infinities, adds
// nothing to the product that makes dx. Launch: heads along y; those with another scale return at once.
template <typename T>
__global__ void __launch_bounds__(kProductThreads)
    heads_silence_kernel(T* weight, int features, const __grid_constant__ Heads<T> heads) {
  const int h = static_cast<int>(blockIdx.y);
  if (heads.scale_of(h) != 0) {
    return;
  }
  const int64_t count = int64_t{heads.head[h].size()} * features;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    weight[int64_t{heads.head[h].begin} * features + i] = Arithmetic<T>::narrow(0);
  }
}

// The heads' logits from a product's: z (rows, pitch). Traffic: z read and written once. Launch: heads along y.
template <typename T>
__global__ void __launch_bounds__(kProductThreads)
    heads_split_logits_kernel(const T* z, int64_t rows, int pitch, const __grid_constant__ Heads<T> heads) {
  const Head<T>& head = heads.head[blockIdx.y];
  const LanesOfRow at(head.size());
  for (int64_t row = at.first; row < rows; row += at.step) {
    for (int c = at.lane; c < head.size(); c += at.lanes) {
      head.logits[row * head.size() + c] = z[row * pitch + head.begin + c];
    }
  }
}

// g and scaled (rows, pitch), each where not null, from the heads' grad_logits; scaled = g with each head's scale.
// Traffic: the gradient read once and written twice. Launch: heads along y.
template <typename T>
__global__ void __launch_bounds__(kProductThreads) heads_gather_gradients_kernel(
    T* g, T* scaled, int64_t rows, int columns, int pitch, const __grid_constant__ Heads<T> heads) {
  using A = typename Arithmetic<T>::type;
  const int h = static_cast<int>(blockIdx.y);
  const Head<T>& head = heads.head[h];
  const A scale = static_cast<A>(heads.scale_of(h));
  const int end = padded_end(heads, h, columns, pitch) - head.begin;
  const LanesOfRow at(head.size());
  for (int64_t row = at.first; row < rows; row += at.step) {
    for (int c = at.lane; c < end; c += at.lanes) {
      const A dz = c < head.size() ? Arithmetic<T>::widen(head.grad_logits[row * head.size() + c]) : A(0);
      const int64_t to = row * pitch + head.begin + c;
      if (g) {
        g[to] = Arithmetic<T>::narrow(dz);
      }
      if (scaled) {
        scaled[to] = Arithmetic<T>::narrow(scale == 0 ? A(0) : dz * scale);
      }
    }
  }
}

// The heads' logits, g and scaled (each where not null), and losses[block][head], from a product's logits z (rows,
// pitch). Traffic: z once from memory and twice more from the cache; logits, g and scaled written once. Launch: the
// heads of the launch along y; along x enough blocks to fill the GPU, which stride over the rows.
template <typename T>
__global__ void __launch_bounds__(kProductThreads) heads_loss_kernel(
    T* g, T* scaled, double* losses, const T* z, int64_t rows, int columns, int pitch, int all_heads, Norms from,
    const __grid_constant__ Heads<T> heads) {
  using A = typename Arithmetic<T>::type;
  __shared__ double norms[kHeadsPerLaunch];
  __shared__ double scratch[kProductThreads];
  find_norms(norms, scratch, from, heads, rows);

  const int h = static_cast<int>(blockIdx.y);
  const Head<T>& head = heads.head[h];
  const HeadLoss<T> of_head = head_loss(heads, h, norms[h]);
  const int size = head.size();
  const int first_class =
      head.binary();  // of the first column: that of a binary head is class 1, and class 0 has the logit 0
  const int end = padded_end(heads, h, columns, pitch) - head.begin;
  const A scale = static_cast<A>(heads.scale_of(h));
  const LanesOfRow at(size);
  double loss = 0;
  // All lanes of a warp leave the loop together, because its shuffles need them all. A lane beyond the last row reads
  // the last row and adds nothing.
  const int64_t warp_first = at.first - lane_id() / at.lanes;
  for (int64_t ahead = 0; warp_first + ahead < rows; ahead += at.step) {
    const bool inside = at.first + ahead < rows;
    const int64_t row = inside ? at.first + ahead : rows - 1;
    const T* const z_row = z + row * pitch + head.begin;
    const auto logit = [&](int c) { return Arithmetic<T>::widen(z_row[c]); };
    const char* const target = static_cast<const char*>(head.target) + row * head.target_bytes();
    const RowTarget<T> row_target(of_head, target, head.sample_weight ? head.sample_weight[row] : A(1));
    const auto wanted = [&](int c) { return row_target.valid ? row_target.wanted(of_head, c) : A(0); };

    A sum = 1, mass = 1, top = 0, part = 0;
    if (of_head.squared()) {
      for (int c = at.lane; c < size; c += at.lanes) {
        const A error = logit(c) - row_target.dense[c];
        part += error * error;
      }
    } else {
      top = head.binary() ? A(0) : logit(0);
      for (int c = at.lane; c < size; c += at.lanes) {
        top = Maximum{}(top, logit(c));
      }
      top = at.over(top, Maximum{});
      const bool has_zero = head.binary() && at.lane == 0;
      const A zero_wanted = has_zero ? wanted(0) : A(0);
      sum = has_zero ? exp(-top) : A(0);
      mass = zero_wanted;
      part = has_zero ? expected_part(zero_wanted, -top) : A(0);
      for (int c = at.lane; c < size; c += at.lanes) {
        const A u = wanted(c + first_class);
        sum += exp(logit(c) - top);
        mass += u;
        part += expected_part(u, logit(c) - top);
      }
      sum = at.over(sum, Sum{});
      mass = of_head.mass_is_one ? A(1) : at.over(mass, Sum{});
    }
    part = at.over(part, Sum{});
    if (inside && row_target.valid && at.lane == 0) {
      loss += static_cast<double>(row_target.weight) *
          static_cast<double>(of_head.squared() ? part : mass * log(sum) - part);
    }
    for (int c = at.lane; inside && c < end; c += at.lanes) {
      A dz = 0;
      if (c < size && row_target.valid) {
        dz = of_head.squared() ? 2 * (logit(c) - row_target.dense[c])
                               : mass * (exp(logit(c) - top) / sum) - wanted(c + first_class);
        dz *= row_target.weight * of_head.factor;
      }
      const int64_t to = row * pitch + head.begin + c;
      if (c < size) {
        head.logits[row * size + c] = z_row[c];
      }
      if (g) {
        g[to] = Arithmetic<T>::narrow(dz);
      }
      if (scaled) {
        scaled[to] = Arithmetic<T>::narrow(scale == 0 ? A(0) : dz * scale);
      }
    }
  }
  loss = sum_over_warps(loss, scratch);
  const double total = warp_id() == 0 ? over_warp(loss, Sum{}) : 0.0;
  if (threadIdx.x == 0) {
    losses[int64_t{blockIdx.x} * all_heads + heads.first + h] = norms[h] == 0 ? 0.0 : total / norms[h];
  }
}

}  // namespace grl_ext
