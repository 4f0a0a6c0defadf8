// The products of a tile of rows on a warp's lanes, for any type: heads_logits.cuh and heads_gradients.cuh, for the
// sweep.
#pragma once

#include "heads_gradients.cuh"
#include "heads_logits.cuh"

namespace grl_ext {

// From shared memory about (1 + K / 4 + K / 8) + (3 K / 16) + (5 K / 16) elements are loaded for each feature of a row
// with K columns: it is the limit before the multiply-adds are.
template <typename T, int kThreads>
class LaneTile {
 public:
  using A = typename Arithmetic<T>::type;
  static constexpr int kMaxThreads = kThreads;
  static constexpr int kMinBlocks = sizeof(A) == 8 ? 1 : 512 / kThreads;
  static constexpr int kWidthMultiple = kPiece;
  static constexpr bool kHasUnits = false;
  static constexpr bool kCompiles = true;

  __device__ LaneTile(const Sweep& sweep, char* shared) : sweep_(sweep), shared_(shared) {}

  __device__ static int warps() { return kThreads / kWarpSize; }

  __device__ void begin_slice(int) { dw_.clear(); }

  __device__ void multiply(const T* x, int rows, int columns, int width) {
    logits_ = LogitsTiles(rows, columns);
    logits_.multiply(sums(), x, weight(), sweep_.pitch, (width + kPiece - 1) / kPiece, columns);
  }

  __device__ A logit(int row, int column) const { return logits_.sum_of_splits(sums(), row, column); }

  __device__ void keep_gradient(int row, int column, A dz, A factor) const {
    g()[row * sweep_.row_lanes + column] = dz;
    scaled()[column * sweep_.scaled_pitch + row] = dz * factor;
  }

  template <bool kWithLoss>
  __device__ void gradients(
      T* dx, int stride, unsigned dx_columns, unsigned weight_columns, const T* x, int rows, int columns, int width) {
    if (dx) {
      write_feature_gradient(
          dx, stride, scaled(), sweep_.scaled_pitch, weight(), sweep_.pitch, dx_columns, rows, width,
          pieces_are_whole(dx, stride));
    }
    if (weight_columns != 0) {
      dw_.needed = weight_columns;
      dw_.add(g(), sweep_.row_lanes, x, sweep_.pitch, columns, rows, width);
    }
  }

  __device__ void write_weight_gradient(A* dw, int stride, unsigned weight_columns, int columns, int width) {
    dw_.needed = weight_columns;
    dw_.write(dw, stride, columns, width, pieces_are_whole(dw, stride));
  }

 private:
  __device__ const T* weight() const { return reinterpret_cast<const T*>(shared_ + sweep_.weight_at); }
  __device__ A* sums() const { return reinterpret_cast<A*>(shared_ + sweep_.sums_at); }
  __device__ A* g() const { return reinterpret_cast<A*>(shared_ + sweep_.g_at); }
  __device__ A* scaled() const { return reinterpret_cast<A*>(shared_ + sweep_.scaled_at); }

  const Sweep& sweep_;
  char* shared_;
  LogitsTiles logits_;
  WeightGradient<T> dw_;
};

}  // namespace grl_ext
