// The logits of all heads for one block of rows: z = x W^T + bias. Meanwhile the features of the next block are
// prefetched, row by row, which keeps the memory busy.

// z[c][r] = bias[c] + sum_d x[r][d] w[c][d] for R rows and C columns: a step has R + C loads for R * C products.
// With kPrefetch it prefetches `next`, which has x's layout.
template <bool kPrefetch, class T, int R, int C>
void logits_tile(T* z, const T* x, const T* next, const T* w, const T* bias, long features) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  Vector<T> sum[R][C] = {};
  const auto multiply = [&](auto lanes, long d) {
    if constexpr (kHoldsRows) {
      Vector<T> xs[R];
      GRL_EXT_UNROLL
      for (int r = 0; r < R; ++r) {
        xs[r] = lanes.fresh_or(lanes.get(x + r * features + d), Vector<T>{});
      }
      GRL_EXT_UNROLL
      for (int c = 0; c < C; ++c) {
        const Vector<T> ws = lanes.fresh_or(lanes.get(w + c * features + d), Vector<T>{});
        GRL_EXT_UNROLL
        for (int r = 0; r < R; ++r) {
          sum[r][c] += xs[r] * ws;
        }
      }
    } else {
      Vector<T> ws[C];
      GRL_EXT_UNROLL
      for (int c = 0; c < C; ++c) {
        ws[c] = lanes.fresh_or(lanes.get(w + c * features + d), Vector<T>{});
      }
      GRL_EXT_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vector<T> xs = lanes.fresh_or(lanes.get(x + r * features + d), Vector<T>{});
        GRL_EXT_UNROLL
        for (int c = 0; c < C; ++c) {
          sum[r][c] += xs * ws[c];
        }
      }
    }
  };
  // The rest comes before the loop. If more multiplications came after it, the compiler would not keep all sums in
  // registers in it.
  const long rest = features % kLanes;
  if (rest > 0 && features > kLanes) {
    multiply(Lanes<T, Edge::kOverlap>(rest), features - kLanes);
  } else if (rest > 0) {
    multiply(Lanes<T, Edge::kShort>(rest), 0);
  }
  for (long d = 0; d + kLanes <= features; d += kLanes) {
    multiply(Lanes<T, Edge::kNone>(0), d);
    if constexpr (kPrefetch) {
      GRL_EXT_UNROLL
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(next + r * features + d, 0, 2);
      }
    }
  }
  T lanes[R][C][kLanes];
  GRL_EXT_UNROLL
  for (int c = 0; c < C; ++c) {
    GRL_EXT_UNROLL
    for (int r = 0; r < R; ++r) {
      store(lanes[r][c], sum[r][c]);
    }
  }
  for (int c = 0; c < C; ++c) {
    for (int r = 0; r < R; ++r) {
      z[c * kMaxBlockRows + r] = sum_lanes<T, kLanes>(lanes[r][c]) + (bias ? bias[c] : T(0));
    }
  }
}

// All rows for C columns, from c on.
template <bool kPrefetch, class T, int C>
void logits_columns(T* z, const T* x, const T* next, const T* w, const T* bias, long rows, long features) {
  for (long r = 0; r < rows;) {
    const int height = rows - r >= kTileRows ? kTileRows : 1;
    const auto tile = height == 1 ? logits_tile<kPrefetch, T, 1, C> : logits_tile<kPrefetch, T, kTileRows, C>;
    tile(z + r, x + r * features, next + r * features, w, bias, features);
    r += height;
  }
}

// Columns outside, rows inside: the weight of some columns stays in the L1 cache while the block's rows pass by from
// L2.
template <class T>
void logits(T* z, const T* x, const T* next, const T* w, const T* bias, long rows, long features, long columns) {
  for (long c = 0; c < columns; c += kForwardColumns) {
    with_constant<kForwardColumns>(columns - c < kForwardColumns ? columns - c : kForwardColumns, [&](auto constant) {
      constexpr int C = decltype(constant)::kValue;
      const T* of_bias = bias ? bias + c : nullptr;
      const auto columns_of = kPrefetchesAgain || c == 0 ? logits_columns<true, T, C> : logits_columns<false, T, C>;
      columns_of(z + c * kMaxBlockRows, x, next, w + c * features, of_bias, rows, features);
    });
  }
}
