// The products of a tile of rows on the matrix units, for half types:
//
//   z = x W^T,   dx = (g * factor) W,   dW^T = x^T g
//
// x and W lie in shared memory once. All products read their operands from there, transposed where needed; the rows'
// pitch keeps two rows of a matrix out of the same banks. A warp has its own part of the features in all three
// products. It leaves dx in the place of its part of x, and from there it goes to memory in pieces of 16 bytes.
//
// g is computed in f32. It takes part as the sum of two numbers of type T, so that the gradients are those of an f32 g
// up to 2^-17 of its numbers (bf16) or 2^-22 (f16). f16 has too small a range for it: its numbers are divided by a
// power of two first, in dx one for each row, in dW one for each column. There small
// numbers are rounded to 2^-21 of a usual one.
//
// The products run over whole matrices. What is missing must be zero and not merely unused, as 0 * NaN is NaN: columns
// after the last and rows after the last are read from a row of zeros.
#pragma once

#include "arithmetic.cuh"
#include "heads_plan.h"
#include "matrix_units.cuh"
#include "warp.cuh"

namespace grl_ext {

// x = high + low, up to the rounding of `low`. An infinity or NaN is in `high` alone.
template <typename T>
__device__ void split(T& high, T& low, float x) {
  high = Arithmetic<T>::narrow(x);
  const float rest = x - Arithmetic<T>::widen(high);
  low = Arithmetic<T>::narrow(rest - rest == 0 ? rest : 0.0f);
}

// A power of two of the size of x, between 2^-100 and 2^100: x / unit is in [2^kBits, 2^(kBits + 1)) where x is not
// outside that. 1 for an infinity or NaN.
template <int kBits>
__device__ float unit_of(float x) {
  const auto exponent = static_cast<int>(__float_as_uint(x) >> 23 & 255) - 127;
  const int kept = exponent == 128 ? 0 : min(max(exponent - kBits, -100), 100);
  return __uint_as_float(static_cast<uint32_t>(kept + 127) << 23);
}

__device__ inline float inverse_of_unit(float unit) {
  return __uint_as_float((254u << 23) - __float_as_uint(unit));
}

// lane_id(), of which the compiler does not know that it is always the same: what follows from it is computed where it
// is used, and not kept in registers over a whole sweep.
__device__ inline int lane_id_again() {
  int lane = lane_id();
  asm volatile("" : "+r"(lane));
  return lane;
}

// For 8 kGroups columns.
template <typename T, int kGroups>
class MatrixTile {
 public:
  static constexpr int kColumns = kMatrixColumns * kGroups;
  static constexpr int kMaxThreads = 512;  // or two blocks of 256
  static constexpr int kMinBlocks = 1;
  static constexpr int kWidthMultiple = kMatrixSide;
  static constexpr bool kHasUnits = std::is_same_v<T, __half>;
  static constexpr bool kCompiles = kHasMatrixUnits;

  __device__ MatrixTile(const Sweep& sweep, char* shared) : sweep_(sweep), shared_(shared) {
    if (threadIdx.x < 16 / sizeof(T)) {
      at<T>(sweep.zeros_at)[threadIdx.x] = Arithmetic<T>::narrow(0);
    }
  }

  __device__ static int warps() { return static_cast<int>(blockDim.x) / kWarpSize; }

  // For the gradients of the lane's column, of which `usual` is a usual size; 0: they are of type T anyway.
  __device__ void set_unit_of_column(float usual) const {
    if (warp_id() == 0) {
      at<float>(sweep_.column_units_at)[lane_id()] = usual == 0 ? 1.0f : unit_of<-4>(usual);
    }
  }

  // Divides the features of a slice among the warps.
  __device__ void begin_slice(int width) {
    const int blocks = (width + kMatrixSide - 1) / kMatrixSide;
    const int each = (blocks + warps() - 1) / warps();
    begin_ = min(warp_id() * each, blocks) * kMatrixSide;
    end_ = min((warp_id() + 1) * each, blocks) * kMatrixSide;
    splits_ = each == 0 ? 0 : (blocks + each - 1) / each;
#pragma unroll
    for (auto& block : dw_) {
      for (auto& group : block) {
        for (float& element : group) {
          element = 0;
        }
      }
    }
  }

  // The tile's logits, as a sum over each warp's features. `x` is the tile.
  __device__ void multiply(const T* x, int, int columns, int) const {
    if (begin_ >= end_) {
      return;
    }
    const int lane = lane_id_again();
    const T* rows_at = x + lane % kMatrixSide * sweep_.pitch + lane / kMatrixSide * 8 + begin_;
    const T* weight_at[kLoads];
    int step[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int column = i * kMatrixSide + (kGroups == 1 ? 0 : lane / kMatrixSide * 8) + lane % 8;
      weight_at[i] = column < columns ? at<T>(sweep_.weight_at) + column * sweep_.pitch + lane / 8 % 2 * 8 + begin_
                                      : at<T>(sweep_.zeros_at);
      step[i] = column < columns ? kMatrixSide : 0;
    }
    float z[kGroups][4] = {};
#pragma unroll 4
    for (int d = begin_; d < end_; d += kMatrixSide) {
      uint32_t rows[4];
      load_matrices<false>(rows, rows_at);
      rows_at += kMatrixSide;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        uint32_t w[kGroups == 1 ? 2 : 4];
        load_matrices<false>(w, weight_at[i]);
        weight_at[i] += step[i];
        multiply_matrices<T>(z[2 * i], rows, w[0], w[1]);
        if constexpr (kGroups > 1) {
          multiply_matrices<T>(z[2 * i + 1], rows, w[2], w[3]);
        }
      }
    }
    float* const to = at<float>(sweep_.sums_at) + (warp_id() * kMatrixSide + lane / 4) * kSumsPitch + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      *reinterpret_cast<float2*>(to + j * 8) = make_float2(z[j][0], z[j][1]);
      *reinterpret_cast<float2*>(to + j * 8 + 8 * kSumsPitch) = make_float2(z[j][2], z[j][3]);
    }
  }

  __device__ float logit(int row, int column) const {
    float sum = 0;
    for (int split = 0; split < splits_; ++split) {
      sum += at<float>(sweep_.sums_at)[(split * kMatrixSide + row) * kSumsPitch + column];
    }
    return sum;
  }

  // Keeps the gradient of a logit: for dW over the column's unit, for dx times the head's factor. The whole warp calls
  // it, with kColumns lanes for each row.
  __device__ void keep_gradient(int row, int column, float dz, float factor) const {
    float scaled = factor == 0 ? 0.0f : dz * factor;  // a column that is left out of dx may have NaN
    if constexpr (kHasUnits) {
      dz *= inverse_of_unit(at<float>(sweep_.column_units_at)[column]);
      float largest = fabsf(scaled);
#pragma unroll
      for (int distance = 1; distance < kColumns; distance *= 2) {
        largest = Maximum{}(largest, __shfl_xor_sync(kWholeWarp, largest, distance));
      }
      const float unit = unit_of<14>(largest);
      scaled *= inverse_of_unit(unit);
      if (column == 0) {
        at<float>(sweep_.row_units_at)[row] = unit;
      }
    }
    const int of_column = row * kGradientsPitch + column;
    split(at<T>(sweep_.g_at)[of_column], at<T>(sweep_.g_at)[of_column + kColumns], dz);
    split(at<T>(sweep_.scaled_at)[of_column], at<T>(sweep_.scaled_at)[of_column + kColumns], scaled);
  }

  // dx of the tile's rows, over the columns whose bit is set in `dx_columns`: not over those of a head with factor 0,
  // whose weight may hold an infinity. And the rows' part of dW. Without a loss the gradients of the logits are of type
  // T anyway.
  template <bool kWithLoss>
  __device__ void gradients(
      T* dx, int stride, unsigned dx_columns, unsigned weight_columns, T* x, int rows, int, int width) {
    if (weight_columns != 0) {
      add_weight_gradient<!kWithLoss>(x, rows);
    }
    if (dx) {
      __syncwarp();  // all lanes have read their part of x
      multiply_back(x, dx_columns);
      __syncwarp();
      write_rows(dx, stride, x, rows, width, stride % 8 == 0 && reinterpret_cast<uintptr_t>(dx) % 16 == 0);
      zero_end(x, width);
    }
  }

  // The block's part of the weights' gradient.
  __device__ void write_weight_gradient(float* dw, int stride, unsigned weight_columns, int, int width) const {
    const int first = begin_ + lane_id() / 4;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int feature = first + i * kMatrixSide + e / 2 * 8;
          const int column = j * 8 + lane_id() % 4 * 2 + e % 2;
          if (begin_ + i * kMatrixSide < end_ && feature < width && (weight_columns >> column & 1) != 0) {
            const float unit = kHasUnits ? at<float>(sweep_.column_units_at)[column] : 1.0f;
            dw[int64_t{column} * stride + feature] = dw_[i][j][e] * unit;
          }
        }
      }
    }
  }

 private:
  static constexpr int kBlocks = kMatrixBlocks / kGroups;
  static constexpr int kSumsPitch = matrix_sums_pitch(kGroups);
  static constexpr int kGradientsPitch = matrix_gradients_pitch(kGroups);
  static constexpr int kLoads = kGroups == 1 ? 1 : kGroups / 2;  // of the weight, for one block of features

  template <typename U>
  __device__ U* at(int offset) const {
    return reinterpret_cast<U*>(shared_ + offset);
  }

  // kExact: g is of type T anyway.
  template <bool kExact>
  __device__ void add_weight_gradient(const T* x, int rows) {
    const int lane = lane_id_again();
    uint32_t g[kGroups][4];  // of both parts, the higher first
    const bool has_g = lane % kMatrixSide < rows;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const int own = lane % kMatrixSide * kGradientsPitch + lane / kMatrixSide * kColumns + j * 8;
      load_matrices<true>(g[j], has_g ? at<T>(sweep_.g_at) + own : at<T>(sweep_.zeros_at));
    }
    const int row = lane / kMatrixSide * 8 + lane % 8;
    const T* from = row < rows ? x + row * sweep_.pitch + lane / 8 % 2 * 8 + begin_ : at<T>(sweep_.zeros_at);
    const int step = row < rows ? kMatrixSide : 0;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      if (begin_ + i * kMatrixSide < end_) {
        uint32_t features[4];
        load_matrices<true>(features, from);
        from += step;
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
          multiply_matrices<T>(dw_[i][j], features, g[j][0], g[j][1]);
          if constexpr (!kExact) {
            multiply_matrices<T>(dw_[i][j], features, g[j][2], g[j][3]);
          }
        }
      }
    }
  }

  // dx of the tile's rows, in the place of the warp's part of x.
  __device__ void multiply_back(T* x, unsigned dx_columns) const {
    const int lane = lane_id_again();
    uint32_t scaled[kGroups][4];  // the higher parts of all columns, then the lower ones
#pragma unroll
    for (int s = 0; s < kGroups; ++s) {
      load_matrices<false>(
          scaled[s],
          at<T>(sweep_.scaled_at) + lane % kMatrixSide * kGradientsPitch + s * kMatrixSide + lane / kMatrixSide * 8);
    }
    const T* weight_at[kLoads];
    int step[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int column = kGroups == 1 ? lane % 8 : i * kMatrixSide + lane % kMatrixSide;
      const int feature = begin_ + (kGroups == 1 ? lane / 8 % 2 * 8 : lane / kMatrixSide * 8);
      const bool counts = dx_columns >> column & 1;
      weight_at[i] = counts ? at<T>(sweep_.weight_at) + column * sweep_.pitch + feature : at<T>(sweep_.zeros_at);
      step[i] = counts ? kMatrixSide : 0;
    }
    float unit[2] = {1, 1};
    if constexpr (kHasUnits) {
      unit[0] = at<float>(sweep_.row_units_at)[lane / 4];
      unit[1] = at<float>(sweep_.row_units_at)[lane / 4 + 8];
    }
    T* to = x + lane / 4 * sweep_.pitch + lane % 4 * 2 + begin_;
#pragma unroll 2
    for (int d = begin_; d < end_; d += kMatrixSide) {
      float dx[2][4] = {};  // of 8 features each
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        uint32_t w[kGroups == 1 ? 2 : 4];
        load_matrices<true>(w, weight_at[i]);
        weight_at[i] += step[i];
        if constexpr (kGroups == 1) {  // both parts of 8 columns at once
          multiply_matrices<T>(dx[0], scaled[0], w[0], w[0]);
          multiply_matrices<T>(dx[1], scaled[0], w[1], w[1]);
        } else {
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            multiply_matrices<T>(dx[0], scaled[part * kLoads + i], w[0], w[1]);
            multiply_matrices<T>(dx[1], scaled[part * kLoads + i], w[2], w[3]);
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int down = 0; down < 2; ++down) {
          const float first = dx[half][2 * down], second = dx[half][2 * down + 1];
          *reinterpret_cast<uint32_t*>(to + 8 * half + 8 * down * sweep_.pitch) = kHasUnits
              ? Arithmetic<T>::narrow_pair(first * unit[down], second * unit[down])
              : Arithmetic<T>::narrow_pair(first, second);
        }
      }
      to += kMatrixSide;
    }
  }

  // Copies the warp's features of the tile's rows to memory, after multiply_back. `whole`: in pieces of 16 bytes.
  __device__ void write_rows(T* dx, int64_t stride, const T* x, int rows, int width, bool whole) const {
    const int features = min(end_, width) - begin_;
    if (!whole) {
      for (int r = 0; r < rows; ++r) {
        for (int i = lane_id(); i < features; i += kWarpSize) {
          dx[r * stride + begin_ + i] = x[r * sweep_.pitch + begin_ + i];
        }
      }
      return;
    }
    const int pieces = features / 8;
    int doublings = 5;  // of the lanes of a row, which are enough for its pieces or a warp
    while (doublings > 0 && 1 << (doublings - 1) >= pieces) {
      --doublings;
    }
    const int lanes = 1 << doublings;
    for (int r = lane_id() >> doublings; r < rows; r += kWarpSize >> doublings) {
      for (int piece = lane_id() & (lanes - 1); piece < pieces; piece += lanes) {
        *reinterpret_cast<uint4*>(dx + r * stride + begin_ + piece * 8) = *reinterpret_cast<const uint4*>(
            x + r * sweep_.pitch + begin_ + piece * 8);
      }
    }
  }

  // dx has overwritten the zeros after the rows' ends, and where g is infinite they are NaN now.
  __device__ void zero_end(T* x, int width) const {
    for (int i = max(width, begin_); i < end_; ++i) {
      if (lane_id() < kMatrixSide) {
        x[lane_id() * sweep_.pitch + i] = Arithmetic<T>::narrow(0);
      }
    }
  }

  const Sweep& sweep_;
  char* shared_;
  int begin_, end_;  // the warp's features
  int splits_;  // warps that have features
  float dw_[kBlocks][kGroups][4];
};

}  // namespace grl_ext
