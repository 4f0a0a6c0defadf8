// The gradients from a tile of rows in shared memory: dx = (g * factor) W, dW = g^T x.
#pragma once

#include "heads_tiles.cuh"

namespace grl_ext {

// dx[r] = sum_c scaled[c][r] w[c], over the columns whose bit is set in `dx_columns`: not over those of a head with
// factor 0, whose weight may hold an infinity. A thread takes kRowGroup rows of a piece. For each c it loads a piece of
// w, another one in each lane, and kRowGroup numbers of `scaled`, the same in all lanes, for 32 multiply-adds.
template <typename T, typename A>
__device__ void write_feature_gradient(
    T* dx, int64_t stride, const A* scaled, int scaled_pitch, const T* weight, int pitch, unsigned dx_columns, int rows,
    int width, bool whole) {
  const int pieces = (width + kPiece - 1) / kPiece;
  const int groups = (rows + kRowGroup - 1) / kRowGroup;
  for (int item = static_cast<int>(threadIdx.x); item < pieces * groups; item += static_cast<int>(blockDim.x)) {
    const int group = item / pieces;
    const int at = (item - group * pieces) * kPiece;
    A sum[kRowGroup][kPiece] = {};
#pragma unroll 2
    for (unsigned left = dx_columns; left != 0; left &= left - 1) {
      const int c = __ffs(static_cast<int>(left)) - 1;
      A w[kPiece];
      A s[2][kPiece];
      load_piece(w, weight + c * pitch + at);
      load_piece(s[0], scaled + c * scaled_pitch + group * kRowGroup);
      load_piece(s[1], scaled + c * scaled_pitch + group * kRowGroup + kPiece);
#pragma unroll
      for (int r = 0; r < kRowGroup; ++r) {
#pragma unroll
        for (int e = 0; e < kPiece; ++e) {
          sum[r][e] += s[r / kPiece][r % kPiece] * w[e];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowGroup; ++r) {
      if (group * kRowGroup + r < rows) {
        store_piece(dx + (group * kRowGroup + r) * stride + at, sum[r], width - at, whole);
      }
    }
  }
}

// The thread's part of the weights' gradient, in registers: kTilesPerThread tiles of kColumnGroup columns x kPiece
// features. Tiles without a `needed` column are skipped.
template <typename T>
struct WeightGradient {
  using A = typename Arithmetic<T>::type;
  unsigned needed;
  A sum[kTilesPerThread][kColumnGroup][kPiece];

  __device__ void clear() {
#pragma unroll
    for (auto& tile : sum) {
      for (auto& column : tile) {
        for (A& element : column) {
          element = 0;
        }
      }
    }
  }

  // f(tile, first column, first feature) for the thread's tiles.
  template <typename F>
  __device__ void for_each_tile(int width, int columns, F f) {
    const int pieces = (width + kPiece - 1) / kPiece;
    const int tiles = pieces * ((columns + kColumnGroup - 1) / kColumnGroup);
#pragma unroll
    for (int i = 0; i < kTilesPerThread; ++i) {
      const int tile = static_cast<int>(threadIdx.x) + i * static_cast<int>(blockDim.x);
      const int column = tile / pieces * kColumnGroup;
      if (tile < tiles && (needed >> column & ((1u << kColumnGroup) - 1)) != 0) {
        f(sum[i], column, tile % pieces * kPiece);
      }
    }
  }

  // sum[c] += sum_r g[r][c] x[r]. For each r a thread loads a piece of x, another one in each lane, and a piece of g,
  // the same in nearly all lanes, for 16 multiply-adds.
  __device__ void add(const A* g, int g_pitch, const T* x, int pitch, int columns, int rows, int width) {
    for_each_tile(width, columns, [&](A(&tile)[kColumnGroup][kPiece], int column, int at) {
#pragma unroll 4
      for (int r = 0; r < rows; ++r) {
        A xs[kPiece];
        A gs[kColumnGroup];
        load_piece(xs, x + r * pitch + at);
        load_piece(gs, g + r * g_pitch + column);
#pragma unroll
        for (int c = 0; c < kColumnGroup; ++c) {
#pragma unroll
          for (int e = 0; e < kPiece; ++e) {
            tile[c][e] += gs[c] * xs[e];
          }
        }
      }
    });
  }

  __device__ void write(A* dw, int64_t stride, int columns, int width, bool whole) {
    for_each_tile(width, columns, [&](A(&tile)[kColumnGroup][kPiece], int column, int at) {
#pragma unroll
      for (int c = 0; c < kColumnGroup; ++c) {
        if (needed >> (column + c) & 1) {
          store_piece(dw + (column + c) * stride + at, tile[c], width - at, whole);
        }
      }
    });
  }
};

}  // namespace grl_ext
