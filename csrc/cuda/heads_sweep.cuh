// The sweep over the features: one kernel, whose passes make the logits, the gradients, or with the loss in between both at once.
#pragma once

#include "async_copy.cuh"
#include "heads_loss.cuh"

namespace grl_ext {

enum class Pass {
  kLogits,        // logits (and z, their unrounded form, where asked for)
  kLoss,          // logits, loss and gradients
  kLossOfLogits,  // loss and gradients, from the z that kLogits left
  kGradients,     // gradients, from grad_logits
};

template <typename T>
struct SweepArguments {
  using A = typename Arithmetic<T>::type;
  Pass pass;
  Sweep sweep;
  int64_t rows;
  int features;
  int columns;
  Heads heads;
  Targets targets;
  const T* x;            // (rows, features)
  const T* weight;       // (columns, features)
  const T* bias;         // (columns), or null
  const T* grad_logits;  // (rows, columns)
  A* z;                  // (rows, columns), or null
  T* logits;             // (rows, columns)
  T* dx;                 // (rows, features), or null
  bool weight_gradient;
  A* partial;             // by block: the weight's gradient if asked for, then the bias's; `partial_stride` apart
  int64_t partial_stride;
  double* losses;         // (blocks, heads): the block's part of each head's mean
};

// kPiece neighbouring numbers, moved in as few instructions as there are.
template <typename T>
struct alignas(sizeof(T) * kPiece < 16 ? sizeof(T) * kPiece : 16) Piece {
  T elements[kPiece];
};

template <typename T, typename A>
__device__ void load_piece(A (&to)[kPiece], const T* from) {
  const auto piece = *reinterpret_cast<const Piece<T>*>(from);
#pragma unroll
  for (int e = 0; e < kPiece; ++e) {
    to[e] = Arithmetic<T>::widen(piece.elements[e]);
  }
}

// The first `count` numbers of a piece; all at once where `whole` says that every piece is whole and aligned.
template <typename T, typename A>
__device__ void store_piece(T* to, const A (&from)[kPiece], int count, bool whole) {
  Piece<T> piece;
#pragma unroll
  for (int e = 0; e < kPiece; ++e) {
    piece.elements[e] = Arithmetic<T>::narrow(from[e]);
  }
  if (whole) {
    *reinterpret_cast<Piece<T>*>(to) = piece;
    return;
  }
#pragma unroll
  for (int e = 0; e < kPiece; ++e) {
    if (e < count) {
      to[e] = piece.elements[e];
    }
  }
}

template <typename T>
__device__ bool pieces_are_whole(const T* base, int features) {
  return features % kPiece == 0 && reinterpret_cast<uintptr_t>(base) % alignof(Piece<T>) == 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Into shared memory
// ---------------------------------------------------------------------------------------------------------------------

template <int kBytes>
__device__ void copy_row(char* to, const char* from, int bytes) {
  for (int i = lane_id() * kBytes; i < bytes; i += kWarpSize * kBytes) {
    cp_async<kBytes>(to + i, from + i);
  }
}

// Starts to copy `rows` rows of `width` numbers, `stride` apart, to shared memory, `pitch` apart; a warp a row. In the widest
// copies that all rows are aligned for: only halves at odd addresses have none, and are moved by the thread.
template <typename T>
__device__ void copy_rows(T* to, int pitch, const T* from, int64_t stride, int rows, int width) {
  const auto alignment = reinterpret_cast<uintptr_t>(from) | sizeof(T) * (uintptr_t(pitch) | uintptr_t(stride) | uintptr_t(width));
  for (int r = warp_id(); r < rows; r += static_cast<int>(blockDim.x) / kWarpSize) {
    T* const row = to + r * pitch;
    const T* const source = from + r * stride;
    auto* const bytes_to = reinterpret_cast<char*>(row);
    const auto* const bytes_from = reinterpret_cast<const char*>(source);
    const int bytes = width * static_cast<int>(sizeof(T));
    if (alignment % 16 == 0) {
      copy_row<16>(bytes_to, bytes_from, bytes);
    } else if (alignment % 8 == 0) {
      copy_row<8>(bytes_to, bytes_from, bytes);
    } else if (alignment % 4 == 0) {
      copy_row<4>(bytes_to, bytes_from, bytes);
    } else {
      for (int i = lane_id(); i < width; i += kWarpSize) {
        row[i] = source[i];
      }
    }
  }
}

// Zeros what a row's last piece holds past its end: the dot products run over whole pieces.
template <typename T>
__device__ void zero_row_ends(T* base, int pitch, int rows, int width) {
  for (int r = static_cast<int>(threadIdx.x); r < rows; r += static_cast<int>(blockDim.x)) {
    for (int i = width; i % kPiece != 0; ++i) {
      base[r * pitch + i] = Arithmetic<T>::narrow(0);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic on a tile in shared memory
// ---------------------------------------------------------------------------------------------------------------------

// The tile's logits, in register tiles of kRowGroup x kColumnGroup dot products, a warp each; where there are more warps than
// register tiles, several share one and each takes a range of the features.
struct LogitsTiles {
  int column_groups;
  int tiles;
  int splits;

  __device__ LogitsTiles(int rows, int columns) {
    const int warps = static_cast<int>(blockDim.x) / kWarpSize;
    column_groups = (columns + kColumnGroup - 1) / kColumnGroup;
    tiles = (rows + kRowGroup - 1) / kRowGroup * column_groups;
    splits = max(1, warps / tiles);
  }

  // sums[split][tile][row within][column within]. Every piece loaded is used four or eight times: 12 loads of a piece for 128
  // multiply-adds.
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

// dx[r] = sum_c scaled[c][r] w[c]: a thread takes kRowGroup rows of a piece. A step over c: one piece of w, its own, and kRowGroup
// numbers of `scaled`, the same for all lanes, for 32 multiply-adds.
template <typename T, typename A>
__device__ void write_feature_gradient(
    T* dx, int64_t stride, const A* scaled, int scaled_pitch, const T* weight, int pitch, int columns, int rows, int width, bool whole) {
  const int pieces = (width + kPiece - 1) / kPiece;
  const int groups = (rows + kRowGroup - 1) / kRowGroup;
  for (int item = static_cast<int>(threadIdx.x); item < pieces * groups; item += static_cast<int>(blockDim.x)) {
    const int group = item / pieces;
    const int at = (item - group * pieces) * kPiece;
    A sum[kRowGroup][kPiece] = {};
#pragma unroll 2
    for (int c = 0; c < columns; ++c) {
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

// The thread's part of the weight's gradient, in registers: kTilesPerThread tiles of kColumnGroup columns x kPiece features.
template <typename T>
struct WeightGradient {
  using A = typename Arithmetic<T>::type;
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
      if (tile < tiles) {
        f(sum[i], tile / pieces * kColumnGroup, tile % pieces * kPiece);
      }
    }
  }

  // sum[c] += sum_r g[r][c] x[r]. A step over r: one piece of x, its own, and one of g, the same for nearly all lanes, for 16
  // multiply-adds.
  __device__ void add(const A* g, const T* x, int pitch, int columns, int rows, int width) {
    for_each_tile(width, columns, [&](A(&tile)[kColumnGroup][kPiece], int column, int at) {
#pragma unroll 4
      for (int r = 0; r < rows; ++r) {
        A xs[kPiece];
        A gs[kColumnGroup];
        load_piece(xs, x + r * pitch + at);
        load_piece(gs, g + r * kMaxSweepColumns + column);
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
        if (column + c < columns) {
          store_piece(dw + (column + c) * stride + at, tile[c], width - at, whole);
        }
      }
    });
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The kernel
// ---------------------------------------------------------------------------------------------------------------------

// z = x W^T + b; g and the loss as in heads_loss.cuh; dx = (g * scale) W; partial dW = g^T x and db = sum g over the block's rows.
// Per row of D features and K columns, e bytes an element: D e bytes read, D e written; 2 D K operations for the logits and 4 D K
// for the gradients. Of shared memory about (1 + K / 4 + K / 8) + (3 K / 16) + (5 K / 16) elements are loaded for each feature, so
// that it binds before the multiply-adds do.
// Launch: persistent blocks, each with its range of rows; slices of the features along y, or one after the other within a block
// (kLogits: their sums meet in z). Tiles arrive by asynchronous copies, the next during the arithmetic of this one where two fit.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, sizeof(typename Arithmetic<T>::type) == 8 ? 1 : 512 / kThreads)
    heads_sweep_kernel(const __grid_constant__ SweepArguments<T> in) {
  using A = typename Arithmetic<T>::type;
  const Sweep& sweep = in.sweep;
  const int pitch = sweep.slice_features;
  char* const shared = dynamic_shared_memory();
  T* const tiles = reinterpret_cast<T*>(shared);
  T* const weight = reinterpret_cast<T*>(shared + sweep.weight_at);
  auto* const target_tiles = reinterpret_cast<int64_t*>(shared + sweep.targets_at);
  A* const sums = reinterpret_cast<A*>(shared + sweep.sums_at);
  A* const g = reinterpret_cast<A*>(shared + sweep.g_at);
  A* const scaled = reinterpret_cast<A*>(shared + sweep.scaled_at);
  __shared__ int valid[kHeadsPerLaunch];

  const bool multiplies = in.pass == Pass::kLogits || in.pass == Pass::kLoss;
  const bool has_loss = in.pass == Pass::kLoss || in.pass == Pass::kLossOfLogits;
  const bool reads_x = multiplies || in.weight_gradient;
  const bool reads_weight = multiplies || in.dx;
  if (has_loss) {
    find_valid(valid, in.targets, in.heads.count);
  }
  const auto column = lane_column<A>(in.heads, in.targets, has_loss ? valid : nullptr);
  const A bias = in.bias && column.exists ? Arithmetic<T>::widen(in.bias[lane_id()]) : A(0);
  const int64_t begin = blockIdx.x * sweep.rows_per_block;
  const int64_t end = min(begin + sweep.rows_per_block, in.rows);

  WeightGradient<T> dw;
  A db = 0;
  double loss = 0;
  for (int slice = static_cast<int>(blockIdx.y); slice < sweep.slices; slice += static_cast<int>(gridDim.y)) {
    const int first = slice * pitch;
    const int width = min(pitch, in.features - first);
    const int pieces = (width + kPiece - 1) / kPiece;
    const auto start_tile = [&](int stage, int64_t row) {
      if (row < end) {
        const int rows = static_cast<int>(min(int64_t{sweep.tile_rows}, end - row));
        if (reads_x) {
          copy_rows(tiles + stage * sweep.tile_rows * pitch, pitch, in.x + row * in.features + first, in.features, rows, width);
        }
        if (has_loss) {
          const int heads = in.heads.count;
          copy_rows(
              target_tiles + stage * sweep.tile_rows * heads, heads, in.targets.classes + row * heads, heads, rows, heads);
        }
      }
      cp_async_commit();
    };
    if (reads_weight) {
      copy_rows(weight, pitch, in.weight + first, in.features, in.columns, width);
      zero_row_ends(weight, pitch, in.columns, width);
    }
    zero_row_ends(tiles, pitch, sweep.stages * sweep.tile_rows, width);
    start_tile(0, begin);
    dw.clear();

    int stage = 0;
    for (int64_t row = begin; row < end; row += sweep.tile_rows) {
      const int rows = static_cast<int>(min(int64_t{sweep.tile_rows}, end - row));
      const T* const x = tiles + stage * sweep.tile_rows * pitch;
      const int64_t* const row_targets = target_tiles + stage * sweep.tile_rows * in.heads.count;
      if (sweep.stages == 2) {
        stage ^= 1;
        start_tile(stage, row + sweep.tile_rows);
        cp_async_wait<1>();
      } else {
        cp_async_wait<0>();
      }
      __syncthreads();

      const LogitsTiles logits_tiles(rows, in.columns);
      if (multiplies) {
        logits_tiles.multiply(sums, x, weight, pitch, pieces, in.columns);
        __syncthreads();
      }

      // A warp a row, a lane a column.
      for (int r = warp_id(); r < rows; r += kThreads / kWarpSize) {
        const int64_t at = (row + r) * in.columns + lane_id();
        A z = 0;
        if (multiplies && column.exists) {
          z = logits_tiles.sum_of_splits(sums, r, lane_id()) + (slice == 0 ? bias : in.z[at]);
          if (in.z) {
            in.z[at] = z;
          }
          if (slice == sweep.slices - 1) {
            in.logits[at] = Arithmetic<T>::narrow(z);
          }
        } else if (in.pass == Pass::kLossOfLogits && column.exists) {
          z = in.z[at];
        }
        A dz = 0;
        if (has_loss) {
          dz = cross_entropy_of_lane(loss, z, row_targets[r * in.heads.count + column.head], column, in.targets.ignore_index);
        } else if (in.pass == Pass::kGradients && column.exists) {
          dz = Arithmetic<T>::widen(in.grad_logits[at]);
        }
        db += dz;
        g[r * kMaxSweepColumns + lane_id()] = dz;
        scaled[lane_id() * sweep.scaled_pitch + r] = column.scale == 0 ? A(0) : dz * column.scale;
      }
      __syncthreads();

      if (in.dx) {
        write_feature_gradient(
            in.dx + row * in.features + first, in.features, scaled, sweep.scaled_pitch, weight, pitch, in.columns, rows, width,
            pieces_are_whole(in.dx, in.features));
      }
      if (in.weight_gradient) {
        dw.add(g, x, pitch, in.columns, rows, width);
      }
      __syncthreads();
      if (sweep.stages == 1) {
        start_tile(0, row + sweep.tile_rows);
      }
    }
    if (in.weight_gradient) {
      A* const out = in.partial + blockIdx.x * in.partial_stride + first;
      dw.write(out, in.features, in.columns, width, pieces_are_whole(in.partial, in.features));
    }
  }

  // Every slice has seen the whole gradient of the logits: the first one tells.
  auto* const scratch = reinterpret_cast<double*>(sums);
  if (in.partial) {
    const auto total = static_cast<A>(sum_over_warps(static_cast<double>(db), scratch));
    if (blockIdx.y == 0 && warp_id() == 0 && column.exists) {
      const int64_t dw_size = in.weight_gradient ? int64_t{in.columns} * in.features : 0;
      in.partial[blockIdx.x * in.partial_stride + dw_size + lane_id()] = total;
    }
  }
  if (has_loss) {
    const double total = sum_over_warps(loss, scratch);
    if (blockIdx.y == 0 && warp_id() == 0 && column.exists && lane_id() == column.first_lane) {
      in.losses[blockIdx.x * in.heads.count + column.head] = total / max(1, valid[column.head]);
    }
  }
}

}  // namespace grl_ext
