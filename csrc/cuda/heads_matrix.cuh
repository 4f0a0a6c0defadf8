// The sweep of heads_sweep.cuh with the products of its tiles on the matrix units, for half types.
#pragma once

#include "heads_matrix_tile.cuh"
#include "heads_sweep.cuh"

namespace grl_ext {

// Zeros the rows from their end to the end of the matrix that it is in.
template <typename T>
__device__ void zero_matrix_ends(T* base, int pitch, int rows, int width) {
  const int end = (width + kMatrixSide - 1) / kMatrixSide * kMatrixSide;
  for (int r = static_cast<int>(threadIdx.x); width < end && r < rows; r += static_cast<int>(blockDim.x)) {
    for (int i = width; i < end; ++i) {
      base[r * pitch + i] = Arithmetic<T>::narrow(0);
    }
  }
}

template <typename T, int kGroups, bool kWithLoss>
__global__ void __launch_bounds__(512) heads_matrix_kernel(const __grid_constant__ SweepArguments<T> in) {
  using A = typename Arithmetic<T>::type;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const Sweep& sweep = in.sweep;
  const int pitch = sweep.pitch;
  char* const shared = dynamic_shared_memory();
  T* const tiles = reinterpret_cast<T*>(shared);
  T* const weight = reinterpret_cast<T*>(shared + sweep.weight_at);
  char* const target_tiles = shared + sweep.targets_at;
  auto* const scratch = reinterpret_cast<double*>(shared + sweep.sums_at);
  __shared__ Column<T> columns[kMaxSweepColumns];
  __shared__ RowLoss<T> losses[kWithLoss ? kHeadsPerLaunch : 1];
  __shared__ double norms[kWithLoss ? kHeadsPerLaunch : 1];
  __shared__ float column_units[kMaxSweepColumns];
  static_assert(sizeof columns + sizeof losses + sizeof norms + sizeof column_units <= kStaticBytes);

  const bool multiplies = in.pass == Pass::kLogits || in.pass == Pass::kLoss;
  const bool has_loss = kWithLoss && in.pass != Pass::kLogits;
  const bool reads_x = multiplies || in.weight_columns != 0;
  const bool reads_weight = multiplies || in.dx;
  const int64_t begin = blockIdx.x * sweep.rows_per_block;
  const int64_t end = min(begin + sweep.rows_per_block, in.rows);

  const auto width_of = [&](int slice) {
    return min(sweep.slice_features, in.features - slice * sweep.slice_features);
  };
  const auto start_tile = [&](int slice, int stage, int64_t row) {
    const int rows = static_cast<int>(min(int64_t{kMatrixSide}, end - row));
    T* const to = tiles + stage * kMatrixSide * pitch;
    if (row < end && reads_x) {
      const T* const from = in.x + row * in.features + slice * sweep.slice_features;
      for (int r = warp_id(); r < rows; r += warps) {
        copy_row(to + r * pitch, from + r * int64_t{in.features}, width_of(slice));
      }
      zero_matrix_ends(to, pitch, rows, width_of(slice));  // dx was there
    }
    if (row < end && has_loss) {
      char* const targets_to = target_tiles + stage * kMatrixSide * sweep.target_bytes;
      for (int i = warp_id(); i < 2 * in.heads.count; i += warps) {  // a target or a sample weight
        const Head<T>& head = in.heads.head[i / 2];
        const int bytes = head.target_bytes();
        if (i % 2 == 0) {
          copy_row(
              targets_to + kMatrixSide * head.target_at, static_cast<const char*>(head.target) + row * bytes,
              rows * bytes);
        } else if (head.sample_weight) {
          const int count = head.weights_of_row();
          copy_row(
              reinterpret_cast<A*>(targets_to + kMatrixSide * head.weight_at), head.sample_weight + row * count,
              rows * count);
        }
      }
    }
    __pipeline_commit();  // this tile's copies are one group
  };
  const auto start_slice = [&](int slice, int head_of_lane) {
    for (int c = warp_id(); reads_weight && c < in.columns; c += warps) {
      const Head<T>& head = in.heads.head[__shfl_sync(kWholeWarp, head_of_lane, c)];
      copy_row(
          weight + c * pitch, head.weight + (c - head.begin) * int64_t{in.features} + slice * sweep.slice_features,
          width_of(slice));
    }
    zero_matrix_ends(weight, pitch, in.columns, width_of(slice));
    start_tile(slice, 0, begin);
  };

  // 1. The copies of the weights and of the first tile start. Meanwhile the block sets up its columns, norms and
  // losses.
  const int first_slice = static_cast<int>(blockIdx.y);
  {
    const auto mine = column_of_lane(in.heads, in.columns, sweep.row_lanes);
    start_slice(first_slice, mine.head);
    if (warp_id() == 0) {
      columns[lane_id()] = mine;
    }
  }
  if (threadIdx.x < 16 / sizeof(T)) {
    reinterpret_cast<T*>(shared + sweep.zeros_at)[threadIdx.x] = Arithmetic<T>::narrow(0);
  }
  if constexpr (kWithLoss) {
    if (has_loss) {
      find_norms(norms, scratch, in.norms, in.heads, in.rows);
      if (static_cast<int>(threadIdx.x) < in.heads.count) {
        losses[threadIdx.x] = row_loss(in.heads.head[threadIdx.x], norms[threadIdx.x]);
      }
      __syncthreads();
    }
  }
  if (MatrixTile<T, kGroups>::kHasUnits && threadIdx.x < kMaxSweepColumns) {
    // g is the share times a number that is seldom much above 1.
    column_units[threadIdx.x] = has_loss ? unit_of<-4>(losses[columns[threadIdx.x].head].share) : 1.0f;
  }
  __syncthreads();

  MatrixTile<T, kGroups> tile(sweep, shared);
  A db = 0;
  double loss = 0;
  for (int slice = first_slice; slice < sweep.slices; slice += static_cast<int>(gridDim.y)) {
    const int first = slice * sweep.slice_features;
    const int width = width_of(slice);
    if (slice != first_slice) {
      start_slice(slice, columns[lane_id()].head);
    }
    tile.begin_slice(width);

    int stage = 0;
    for (int64_t row = begin; row < end; row += kMatrixSide) {
      // 2. Start to copy the next tile, and wait for this one.
      const int rows = static_cast<int>(min(int64_t{kMatrixSide}, end - row));
      T* const x = tiles + stage * kMatrixSide * pitch;
      const char* const targets = target_tiles + stage * kMatrixSide * sweep.target_bytes;
      if (sweep.stages == 2) {
        stage ^= 1;
        start_tile(slice, stage, row + kMatrixSide);
        __pipeline_wait_prior(1);  // all but the latest group of this thread; the barrier: of the others too
      } else {
        __pipeline_wait_prior(0);
      }
      __syncthreads();

      // 3. The logits of the tile, as sums over parts of the features.
      if (multiplies) {
        tile.multiply(x, in.columns);
        __syncthreads();
      }

      // 4. Row by row, a lane for each column and a warp for as many rows as it has lanes for: logits, loss, g.
      const Column<T> column = columns[lane_id_again()];
      const int lane = lane_id_again() & (sweep.row_lanes - 1);
      const int rows_at_once = kWarpSize / sweep.row_lanes;
#pragma unroll 1
      for (int first_row = warp_id() * rows_at_once; first_row < rows; first_row += warps * rows_at_once) {
        const int r = first_row + lane_id() / sweep.row_lanes;
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
              const char* const own = targets + kMatrixSide * column.target_at + r * bytes;
              const auto* const weights = reinterpret_cast<const A*>(targets + kMatrixSide * column.weight_at);
              const int entry = column.weight_pitch > 1 ? lane_id() - column.first_lane : 0;
              target = RowTarget<T>(head, own, column.weight_at < 0 ? A(1) : weights[r * column.weight_pitch + entry]);
            }
            dz = loss_of_lane(loss, z, head, target, exists, column.first_lane, column.end_lane, in.sums);
          }
        } else if (in.pass == Pass::kGradients && exists) {
          dz = Arithmetic<T>::widen(column.grad_logits[in_head]);
        }
        db += dz;
        if (in.pass != Pass::kLogits) {
          tile.keep_gradient(
              r, lane, dz, column.factor == 0 ? A(0) : dz * column.factor,
              MatrixTile<T, kGroups>::kHasUnits ? inverse_of_unit(column_units[lane]) : 1.0f);
        }
      }
      const unsigned of_first_row = ~0u >> (kWarpSize - sweep.row_lanes);
      const unsigned dx_columns = __ballot_sync(kWholeWarp, column.exists && column.factor != 0) & of_first_row;
      __syncthreads();

      // 5. The gradients, while the tile is in shared memory.
      if (in.weight_columns != 0) {
        tile.template add_weight_gradient<!kWithLoss>(x, rows);
      }
      if (in.dx) {
        tile.multiply_back(x, dx_columns);
        tile.write_rows(
            in.dx + row * in.features + first, in.features, x, rows, width,
            in.features % 8 == 0 && reinterpret_cast<uintptr_t>(in.dx) % 16 == 0);
      }
      __syncthreads();
      if (sweep.stages == 1) {
        start_tile(slice, 0, row + kMatrixSide);
      }
    }
    if (in.weight_columns != 0) {
      tile.write_weight_gradient(
          in.partial + blockIdx.x * in.partial_stride + first, in.features, in.weight_columns, width, column_units);
    }
  }

  // 6. The block's sums over its rows. The blocks of all slices have the same g, so that those of slice 0 write them.
  const Column<T> column = columns[lane_id_again()];
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
    const double total = over_head(of_all_rows(loss), column.first_lane, column.end_lane, in.sums.widest, Sum{});
    if (blockIdx.y == 0 && warp_id() == 0 && lane_id() < in.columns && lane_id() == column.first_lane) {
      in.losses[blockIdx.x * in.heads.count + column.head] = norms[column.head] == 0 ? 0.0 : total / norms[column.head];
    }
  }
}

}  // namespace grl_ext
