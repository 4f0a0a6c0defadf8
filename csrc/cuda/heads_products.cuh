// The kernels before, between and after matrix products, for heads that the sweep does not take. One product serves all
// heads, over buffers in which their columns lie side by side. There are `pitch` columns, a multiple of
// kProductColumns; those after the last head's are zero.
//
// Kernels that go through rows give each row of a head as many lanes as it can use: a warp takes several rows of a
// narrow head.
#pragma once

#include "row_loss.cuh"

namespace grl_ext {

// The buffers that the products read and write. Null: not needed.
template <typename T>
struct Products {
  int64_t rows;
  int features;
  int columns;
  int pitch;
  T* weight;  // (pitch, features)
  T* bias;  // (pitch)
  T* z;  // (rows, pitch), like the next two
  T* g;
  T* scaled;  // g, with each head's factor
};

// The lanes that work on one row, a power of two, and which rows this thread works on.
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
__device__ int padded_end(const Products<T>& in, const Head<T>& head) {
  return head.end == in.columns ? in.pitch : head.end;
}

// weight and bias from the heads' own. Traffic: weights read and written once. Launch: heads along y.
template <typename T>
__global__ void __launch_bounds__(kProductThreads)
    heads_gather_weights_kernel(Products<T> in, const __grid_constant__ Heads<T> heads) {
  const Head<T>& head = heads.head[blockIdx.y];
  const T zero = Arithmetic<T>::narrow(0);
  const int end = padded_end(in, head);
  const int64_t given = int64_t{head.size()} * in.features;
  const int64_t all = (end - head.begin) * int64_t{in.features};
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < all; i += int64_t{gridDim.x} * blockDim.x) {
    in.weight[int64_t{head.begin} * in.features + i] = i < given ? head.weight[i] : zero;
  }
  for (int64_t c = first; in.bias && head.begin + c < end; c += int64_t{gridDim.x} * blockDim.x) {
    in.bias[head.begin + c] = head.bias && c < head.size() ? head.bias[c] : zero;
  }
}

// Zeros the rows of `weight` that belong to heads with factor 0, so that such a head, which may hold infinities, adds
// nothing to the product that makes dx. Launch: heads along y; those with another factor return at once.
template <typename T>
__global__ void __launch_bounds__(kProductThreads)
    heads_zero_weights_kernel(Products<T> in, const __grid_constant__ Heads<T> heads) {
  const Head<T>& head = heads.head[blockIdx.y];
  if (head.factor_in_dx() != 0) {
    return;
  }
  const int64_t count = int64_t{head.size()} * in.features;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    in.weight[int64_t{head.begin} * in.features + i] = Arithmetic<T>::narrow(0);
  }
}

// The heads' logits from z. Traffic: z read and written once. Launch: heads along y.
template <typename T>
__global__ void __launch_bounds__(kProductThreads)
    heads_split_logits_kernel(Products<T> in, const __grid_constant__ Heads<T> heads) {
  const Head<T>& head = heads.head[blockIdx.y];
  const LanesOfRow at(head.size());
  for (int64_t row = at.first; row < in.rows; row += at.step) {
    for (int c = at.lane; c < head.size(); c += at.lanes) {
      head.logits[row * head.size() + c] = in.z[row * in.pitch + head.begin + c];
    }
  }
}

// g and scaled, each where not null, at (row, column of the head) from the gradient dz for the logits.
template <typename T, typename A>
__device__ void store_gradient(const Products<T>& in, int64_t at, A dz, A factor) {
  if (in.g) {
    in.g[at] = Arithmetic<T>::narrow(dz);
  }
  if (in.scaled) {
    in.scaled[at] = Arithmetic<T>::narrow(factor == 0 ? A(0) : dz * factor);
  }
}

// g and scaled from the heads' grad_logits. Traffic: the gradient read once and written twice. Launch: heads along y.
template <typename T>
__global__ void __launch_bounds__(kProductThreads)
    heads_gather_gradients_kernel(Products<T> in, const __grid_constant__ Heads<T> heads) {
  using A = typename Arithmetic<T>::type;
  const Head<T>& head = heads.head[blockIdx.y];
  const A factor = static_cast<A>(head.factor_in_dx());
  const int end = padded_end(in, head) - head.begin;
  const LanesOfRow at(head.size());
  for (int64_t row = at.first; row < in.rows; row += at.step) {
    for (int c = at.lane; c < end; c += at.lanes) {
      const A dz = c < head.size() ? Arithmetic<T>::widen(head.grad_logits[row * head.size() + c]) : A(0);
      store_gradient(in, row * in.pitch + head.begin + c, dz, factor);
    }
  }
}

// The heads' logits, g and scaled, and losses[block][head], from z. Traffic: z once from memory and twice more from the
// cache; logits, g and scaled written once. Launch: the heads of the launch along y; along x enough blocks to fill the
// GPU, which stride over the rows.
template <typename T>
__global__ void __launch_bounds__(kProductThreads) heads_loss_kernel(
    Products<T> in, double* losses, int all_heads, Norms from, const __grid_constant__ Heads<T> heads) {
  using A = typename Arithmetic<T>::type;
  __shared__ double norms[kHeadsPerLaunch];
  __shared__ double scratch[kProductThreads];
  find_norms(norms, scratch, from, heads, in.rows);

  const int h = static_cast<int>(blockIdx.y);
  const Head<T>& head = heads.head[h];
  const RowLoss<T> of_head = row_loss(head, norms[h]);
  const int size = head.size();
  const int first_class = head.binary();  // the column of a binary head is class 1, and class 0 has the logit 0
  const int end = padded_end(in, head) - head.begin;
  const A factor = static_cast<A>(head.factor_in_dx());
  const LanesOfRow at(size);
  double loss = 0;
  bool targets_exist = true;
  // All lanes of a warp leave the loop together, because its shuffles need them all. A lane beyond the last row reads
  // the last row and adds nothing.
  const int64_t warp_first = at.first - lane_id() / at.lanes;
  for (int64_t ahead = 0; warp_first + ahead < in.rows; ahead += at.step) {
    const bool inside = at.first + ahead < in.rows;
    const int64_t row = inside ? at.first + ahead : in.rows - 1;
    const T* const z_row = in.z + row * in.pitch + head.begin;
    const auto logit = [&](int c) { return Arithmetic<T>::widen(z_row[c]); };
    const char* const target = static_cast<const char*>(head.target) + row * head.target_bytes();
    const bool of_row = head.sample_weight && !head.of_entries;
    const RowTarget<T> row_target(of_head, target, of_row ? head.sample_weight[row] : A(1));
    targets_exist &= row_target.exists;
    const auto wanted = [&](int c) { return row_target.valid ? row_target.wanted(of_head, c) : A(0); };

    A top = 0, sum = 1, log_sum = 0, mass = 1;
    A part = 0;  // of the row's loss: this lane's
    if (!of_head.by_output()) {
      top = head.binary() ? A(0) : logit(0);
      for (int c = at.lane; c < size; c += at.lanes) {
        top = Maximum{}(top, logit(c));
      }
      top = at.over(top, Maximum{});
      const bool has_zero = head.binary() && at.lane == 0;
      const A zero_u = has_zero ? wanted(0) : A(0);
      sum = has_zero ? exp(-top) : A(0);
      mass = zero_u;
      for (int c = at.lane; c < size; c += at.lanes) {
        sum += exp(logit(c) - top);
        mass += wanted(c + first_class);
      }
      sum = at.over(sum, Sum{});
      log_sum = log(sum);
      mass = of_head.mass_is_one ? A(1) : at.over(mass, Sum{});
      part = class_loss(zero_u, log_sum + top);
    }
    for (int c = at.lane; inside && c < end; c += at.lanes) {
      A dz = 0;
      const A weight = head.of_entries && c < size ? head.sample_weight[row * size + c] : A(1);
      if (c < size && row_target.valid && weight != 0) {
        if (of_head.by_output()) {
          part += weight * loss_of_output(dz, logit(c), row_target.dense[c], of_head.kind);
          dz *= weight;
        } else {
          const A u = wanted(c + first_class);
          part += class_loss(u, log_sum - (logit(c) - top));
          dz = mass * (exp(logit(c) - top) / sum) - u;
        }
        dz *= row_target.weight * of_head.share;
      }
      if (c < size) {
        head.logits[row * size + c] = z_row[c];
      }
      store_gradient(in, row * in.pitch + head.begin + c, dz, factor);
    }
    if (inside && row_target.valid) {
      loss += static_cast<double>(row_target.weight) * static_cast<double>(part);
    }
  }
  check_target(targets_exist);
  loss = sum_over_warps(loss, scratch);
  const double total = warp_id() == 0 ? over_warp(loss, Sum{}) : 0.0;
  if (threadIdx.x == 0) {
    losses[int64_t{blockIdx.x} * all_heads + heads.first + h] = norms[h] == 0 ? 0.0 : total / norms[h];
  }
}

}  // namespace grl_ext
