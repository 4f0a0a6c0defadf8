// The sweep over the features: one kernel that computes, depending on the pass, the logits, the gradients, or both and
// the loss.
#pragma once

#include "heads_lane_tile.cuh"
#include "heads_matrix_tile.cuh"
#include "launch.cuh"
#include "row_loss.cuh"

namespace grl_ext {

enum class Pass {
  kLogits,        // logits (and z, their unrounded form, where asked for)
  kLoss,          // logits, loss and gradients
  kLossOfLogits,  // loss and gradients, from the z that kLogits left
  kGradients,     // gradients, from grad_logits
};

// The arguments of an operator. The description of each head says where its parameters, targets and results are.
template <typename T>
struct HeadsCall {
  const T* x;  // (rows, features)
  T* dx;       // (rows, features), or null
  int64_t rows;
  int features;
  int columns;
  Heads<T> heads;
};

template <typename T>
struct SweepArguments : HeadsCall<T> {
  using A = typename Arithmetic<T>::type;
  Pass pass;
  unsigned weight_columns;  // bit c: the weight gradient of column c is needed
  Sweep sweep;
  Norms norms;
  SumsNeeded sums;
  A* z;                    // (rows, columns), or null
  A* partial;              // of each block, partial_stride apart: the weights' gradient if needed, then the biases'
  int64_t partial_stride;
  double* losses;          // (blocks, heads): the block's part of each head's mean
};

// The limit of drivers before CUDA 12.1. The arguments of the wide types are the largest.
static_assert(sizeof(SweepArguments<double>) <= 4096 && sizeof(SweepArguments<float>) <= 4096);

// A lane's column, the same in every row. It and its head's loss are in shared memory: they are read once a tile, and
// the arithmetic in between needs the registers. A warp takes several rows at a time where they have few columns, and
// then as many of its lanes have the same column.
template <typename T>
struct Column {
  using A = typename Arithmetic<T>::type;
  int head;
  int first_lane, end_lane;  // of the head
  bool exists;
  A factor;                  // in dx
  A bias;
  union {                    // of row 0
    T* logits;
    const T* grad_logits;
  };
  int target_at, weight_at;  // in the row's targets; no sample weight: -1
  int weight_pitch;  // from one row's weight to the next: 1, or the head's size where each entry has one
};

template <typename T>
__device__ Column<T> column_of_lane(const Heads<T>& heads, int columns, int row_lanes) {
  using A = typename Arithmetic<T>::type;
  const int lane = lane_id() & (row_lanes - 1);
  const int row_at = lane_id() - lane;  // the first lane of the row
  Column<T> column{};
  column.exists = lane < columns;
  column.first_lane = lane_id();
  column.end_lane = lane_id() + 1;
  if (column.exists) {
    column.head = heads.of_column(lane);
    const Head<T>& head = heads.head[column.head];
    column.first_lane = row_at + head.begin;
    column.end_lane = row_at + head.end;
    column.factor = static_cast<A>(head.factor_in_dx());
    column.bias = head.bias ? Arithmetic<T>::widen(head.bias[lane - head.begin]) : A(0);
    column.logits = head.logits + (lane - head.begin);  // or grad_logits
    column.target_at = head.target_at;
    column.weight_at = head.sample_weight ? head.weight_at : -1;
    column.weight_pitch = head.weights_of_row();
  }
  return column;
}

// z = x W^T + b; g and the loss as in row_loss.cuh; dx = (g * factor) W; partial dW = g^T x and db = sum g over the
// block's rows. Per row of D features and K columns, e bytes an element: D e bytes read, D e written; 2 D K operations
// for the logits and 4 D K for the gradients, by a Tile: LaneTile or MatrixTile. Launch: persistent blocks, each
// with its range of rows; slices of the features along y, or one after the other within a block (kLogits: their sums
// meet in z). Tiles arrive by asynchronous copies; where two fit, the next one during the arithmetic of this one.
// kWithLoss is for the passes with a loss and for the pass that makes their logits. The others, without it, need fewer
// registers.
template <typename T, typename Tile, bool kWithLoss>
__global__ void __launch_bounds__(Tile::kMaxThreads, Tile::kMinBlocks)
    heads_sweep_kernel(const __grid_constant__ SweepArguments<T> in) {
  using A = typename Arithmetic<T>::type;
  if constexpr (!Tile::kCompiles) {
    return;
  }
  const Sweep& sweep = in.sweep;
  const int warps = Tile::warps();
  const int pitch = sweep.pitch;
  char* const shared = dynamic_shared_memory();
  T* const tiles = reinterpret_cast<T*>(shared);
  T* const weight = reinterpret_cast<T*>(shared + sweep.weight_at);
  char* const target_tiles = shared + sweep.targets_at;
  auto* const scratch = reinterpret_cast<double*>(shared + sweep.sums_at);
  __shared__ Column<T> columns[kMaxSweepColumns];
  __shared__ RowLoss<T> losses[kWithLoss ? kHeadsPerLaunch : 1];
  __shared__ double norms[kWithLoss ? kHeadsPerLaunch : 1];
  static_assert(sizeof columns + sizeof losses + sizeof norms <= kStaticBytes);

  const bool multiplies = in.pass == Pass::kLogits || in.pass == Pass::kLoss;
  const bool has_loss = kWithLoss && in.pass != Pass::kLogits;
  const bool reads_x = multiplies || in.weight_columns != 0;
  const bool reads_weight = multiplies || in.dx;
  const int64_t begin = blockIdx.x * sweep.rows_per_block;
  const int64_t end = min(begin + sweep.rows_per_block, in.rows);

  const auto width_of = [&](int slice) {
    return min(sweep.slice_features, in.features - slice * sweep.slice_features);
  };
  // Starts the copies of the tile at `row`: its rows, its targets and sample weights, and `weight_rows` of the weights.
  // A warp takes one of these after the other.
  const auto start_copies = [&](int slice, int stage, int64_t row, int weight_rows) {
    const int rows = static_cast<int>(max(int64_t{0}, min(int64_t{sweep.tile_rows}, end - row)));
    const int x_rows = reads_x ? rows : 0;
    const int before_weights = x_rows + (has_loss && rows > 0 ? 2 * in.heads.count : 0);
    T* const tile = tiles + stage * sweep.tile_rows * pitch;
    char* const targets = target_tiles + stage * sweep.tile_rows * sweep.target_bytes;
    const int row_bytes = width_of(slice) * int{sizeof(T)};
    for (int i = warp_id(); i < before_weights + weight_rows; i += warps) {
      const void* from;
      void* to;
      int bytes = row_bytes;
      if (i < x_rows) {
        to = tile + i * pitch;
        from = in.x + (row + i) * in.features + slice * sweep.slice_features;
      } else if (i < before_weights) {
        const Head<T>& head = in.heads.head[(i - x_rows) / 2];
        const bool is_target = (i - x_rows) % 2 == 0;
        const int of_row = is_target ? head.target_bytes()
            : head.sample_weight     ? head.weights_of_row() * int{sizeof(A)}
                                     : 0;
        bytes = rows * of_row;
        to = targets + sweep.tile_rows * (is_target ? head.target_at : head.weight_at);
        from = static_cast<const char*>(is_target ? head.target : head.sample_weight) + row * of_row;
      } else {
        const int c = i - before_weights;
        const Head<T>& head = in.heads.head[in.heads.of_column(c)];
        to = weight + c * pitch;
        from = head.weight + (c - head.begin) * int64_t{in.features} + slice * sweep.slice_features;
      }
      copy_to_shared(static_cast<char*>(to), static_cast<const char*>(from), bytes);
    }
    __pipeline_commit();  // these copies are one group
  };

  Tile tile(sweep, shared);

  // Of a head's logits: that of a row of mean weight, times a number that is seldom much above 1. No weight is more
  // times the mean than there are rows. A sum takes weights as they are.
  const auto usual_gradient = [&](const RowLoss<T>* of_heads, int h) {
    const Head<T>& head = in.heads.head[h];
    const int outputs = of_heads[h].by_output() ? head.size() : 1;
    return in.norms.mean ? static_cast<A>(head.weight_in_loss() / (static_cast<double>(in.rows) * outputs))
                         : of_heads[h].share;
  };

  // The block's columns, norms and losses, which are read after the next barrier.
  const auto set_up = [&] {
    if (warp_id() == 0) {
      columns[lane_id()] = column_of_lane(in.heads, in.columns, sweep.row_lanes);
    }
    if constexpr (kWithLoss) {
      if (has_loss) {
        find_norms(norms, scratch, in.norms, in.heads, in.rows);
        if (static_cast<int>(threadIdx.x) < in.heads.count) {
          losses[threadIdx.x] = row_loss(in.heads.head[threadIdx.x], norms[threadIdx.x]);
        }
      }
    }
    if constexpr (Tile::kHasUnits) {
      __syncthreads();
      tile.set_unit_of_column(has_loss ? usual_gradient(losses, columns[lane_id()].head) : A(0));
    }
  };

  A db = 0;
  double loss = 0;
  bool targets_exist = true;
  const int ahead = sweep.stages - 1;  // tiles that are copied before the one that is computed with
  const int first_slice = static_cast<int>(blockIdx.y);
  for (int slice = first_slice; slice < sweep.slices; slice += static_cast<int>(gridDim.y)) {
    const int first = slice * sweep.slice_features;
    const int width = width_of(slice);
    int stage = 0;
    int64_t row = begin - ahead * sweep.tile_rows;  // of the tile that is computed with
    for (bool is_first = true; row < end; row += sweep.tile_rows, is_first = false) {
      // 1. Start to copy a tile; with the first one, the weights. Meanwhile the block sets up its columns, norms and
      // losses.
      start_copies(slice, stage, row + ahead * sweep.tile_rows, is_first && reads_weight ? in.columns : 0);
      stage ^= ahead;
      if (is_first) {
        zero_row_ends<Tile::kWidthMultiple>(weight, pitch, in.columns, width);
        zero_row_ends<Tile::kWidthMultiple>(tiles, pitch, sweep.stages * sweep.tile_rows, width);
        if (slice == first_slice) {
          set_up();
        }
        tile.begin_slice(width);
      }
      if (row < begin) {
        continue;
      }

      // 2. Wait for the tile to compute with: that before the latest where there are two stages.
      const int rows = static_cast<int>(min(int64_t{sweep.tile_rows}, end - row));
      T* const x = tiles + stage * sweep.tile_rows * pitch;
      const char* const targets = target_tiles + stage * sweep.tile_rows * sweep.target_bytes;
      if (ahead == 1) {
        __pipeline_wait_prior(1);  // all but the latest group of this thread; the barrier: of the others too
      } else {
        __pipeline_wait_prior(0);
      }
      __syncthreads();

      // 3. The logits of the tile, as sums over parts of the features.
      if (multiplies) {
        tile.multiply(x, rows, in.columns, width);
        __syncthreads();
      }

      // 4. Row by row, a lane for each column and a warp for as many rows as it has lanes for: logits, loss, g. The
      // lanes of a row past the last stay with their warp, whose shuffles need them. Their g is 0: a tile has room for
      // it.
      const Column<T> column = columns[lane_id()];
      const int lane = lane_id() & (sweep.row_lanes - 1);
      const int row_of_lane = lane_id() * sweep.rows_at_once / kWarpSize;
      for (int first_row = warp_id() * sweep.rows_at_once; first_row < rows; first_row += warps * sweep.rows_at_once) {
        const int r = first_row + row_of_lane;
        const bool exists = column.exists && r < rows;
        const int64_t at = (row + r) * in.columns + lane;
        const int64_t in_head = (row + r) * (column.end_lane - column.first_lane);
        A z = 0;
        if (multiplies && exists) {
          z = tile.logit(r, lane) + (slice == 0 ? column.bias : in.z[at]);
          if (in.z) {
            in.z[at] = z;
          }
          if (slice == sweep.slices - 1) {
            column.logits[in_head] = Arithmetic<T>::narrow(z);
          }
        }
        A dz = 0;
        if constexpr (kWithLoss) {
          if (has_loss) {
            z = in.pass == Pass::kLossOfLogits && exists ? in.z[at] : z;
            const RowLoss<T>& head = losses[column.head];
            RowTarget<T> target;
            if (exists) {
              const int bytes = head.kind == TargetKind::kClasses
                  ? 8
                  : (column.end_lane - column.first_lane) * int{sizeof(A)};
              const char* const own = targets + sweep.tile_rows * column.target_at + r * bytes;
              const auto* const weights = reinterpret_cast<const A*>(targets + sweep.tile_rows * column.weight_at);
              const int entry = column.weight_pitch > 1 ? lane_id() - column.first_lane : 0;
              target = RowTarget<T>(head, own, column.weight_at < 0 ? A(1) : weights[r * column.weight_pitch + entry]);
            }
            targets_exist &= target.exists;
            dz = loss_of_lane(loss, z, head, target, exists, column.first_lane, column.end_lane, in.sums);
          }
        } else if (in.pass == Pass::kGradients && exists) {
          dz = Arithmetic<T>::widen(column.grad_logits[in_head]);
        }
        db += dz;
        if (in.pass != Pass::kLogits) {
          tile.keep_gradient(r, lane, dz, column.factor);
        }
      }
      const unsigned of_first_row = ~0u >> (kWarpSize - sweep.row_lanes);
      const unsigned dx_columns = __ballot_sync(kWholeWarp, column.exists && column.factor != 0) & of_first_row;
      __syncthreads();

      // 5. The gradients, while the tile is in shared memory.
      if (in.pass != Pass::kLogits) {
        T* const dx = in.dx ? in.dx + row * in.features + first : nullptr;
        tile.template gradients<kWithLoss>(dx, in.features, dx_columns, in.weight_columns, x, rows, in.columns, width);
      }
      __syncthreads();
    }
    if (in.weight_columns != 0) {
      tile.write_weight_gradient(
          in.partial + blockIdx.x * in.partial_stride + first, in.features, in.weight_columns, in.columns, width);
    }
  }

  // 6. The block's sums over its rows. The blocks of all slices have the same g, so that those of slice 0 write them.
  const Column<T> column = columns[lane_id()];
  const auto of_all_rows = [&](double value) {
    return over_lanes_in_steps(sum_over_warps(value, scratch), sweep.row_lanes);
  };
  if (in.partial) {
    const auto total = static_cast<A>(of_all_rows(static_cast<double>(db)));
    if (blockIdx.y == 0 && warp_id() == 0 && lane_id() < in.columns) {
      const int64_t dw_size = in.weight_columns != 0 ? int64_t{in.columns} * in.features : 0;
      in.partial[blockIdx.x * in.partial_stride + dw_size + lane_id()] = total;
    }
  }
  if (has_loss) {
    check_target(targets_exist);
    const double total = over_head(of_all_rows(loss), column.first_lane, column.end_lane, in.sums.widest, Sum{});
    if (blockIdx.y == 0 && warp_id() == 0 && lane_id() < in.columns && lane_id() == column.first_lane) {
      in.losses[blockIdx.x * in.heads.count + column.head] = norms[column.head] == 0 ? 0.0 : total / norms[column.head];
    }
  }
}

}  // namespace grl_ext
