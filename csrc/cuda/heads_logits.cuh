// The logits of a tile of rows in shared memory: z = x W^T.
#pragma once

#include "heads_tiles.cuh"

namespace grl_ext {

// The tile's logits, in register tiles of kRowGroup x kColumnGroup dot products, each computed by a warp. Where there
// are more warps than register tiles, several warps share one, and each takes a range of the features.
struct LogitsTiles {
  int column_groups;
  int tiles;
  int splits;

  LogitsTiles() = default;

  __device__ LogitsTiles(int rows, int columns) {
    const int warps = static_cast<int>(blockDim.x) / kWarpSize;
    column_groups = (columns + kColumnGroup - 1) / kColumnGroup;
    tiles = (rows + kRowGroup - 1) / kRowGroup * column_groups;
    splits = max(1, warps / tiles);
  }

  // sums[split][tile][row within][column within]. Every piece loaded is used four or eight times: 12 loads of a piece
  // for 128 multiply-adds.
  template <typename T, typename A>
  __device__ void multiply(A* sums, const T* x, const T* weight, int pitch, int pieces, int columns) const {
    static_assert(kRowGroup * kColumnGroup == kWarpSize);
    for (int job = warp_id(); job < tiles * splits; job += static_cast<int>(blockDim.x) / kWarpSize) {
      const int split = job / tiles;
      const int row = job % tiles / column_groups * kRowGroup;
      const int column = job % tiles % column_groups * kColumnGroup;
      A sum[kWarpSize] = {};
      for (int p = pieces * split / splits + lane_id(); p < pieces * (split + 1) / splits; p += kWarpSize) {
        A w[kColumnGroup][kPiece];
#pragma unroll
        for (int c = 0; c < kColumnGroup; ++c) {
          load_piece(w[c], weight + min(column + c, columns - 1) * pitch + p * kPiece);
        }
#pragma unroll
        for (int r = 0; r < kRowGroup; ++r) {
          A xs[kPiece];
          load_piece(xs, x + (row + r) * pitch + p * kPiece);
#pragma unroll
          for (int c = 0; c < kColumnGroup; ++c) {
#pragma unroll
            for (int e = 0; e < kPiece; ++e) {
              sum[r * kColumnGroup + c] += xs[e] * w[c][e];
            }
          }
        }
      }
      sums[job * kWarpSize + lane_id()] = transposed_sum(sum);
    }
  }

  template <typename A>
  __device__ A sum_of_splits(const A* sums, int row, int column) const {
    const int tile = row / kRowGroup * column_groups + column / kColumnGroup;
    const int within = row % kRowGroup * kColumnGroup + column % kColumnGroup;
    A sum = 0;
    for (int split = 0; split < splits; ++split) {
      sum += sums[(split * tiles + tile) * kWarpSize + within];
    }
    return sum;
  }
};

}  // namespace grl_ext
