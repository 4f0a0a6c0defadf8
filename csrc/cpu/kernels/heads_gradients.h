// The gradients of all heads for one block of rows: dx = scaled^T w and dw += g x, strip by strip over the features, for
// vectors as wide as a cache line.

// dx[r] = sum_c scaled[c][r] w[c] for R rows and S vectors of features: a step has S + R loads for S * R products.
// Columns that do not go into dx are left out, not multiplied by 0: their weight may be infinite.
template <class T, int R, int S, Edge kEdge>
void features_gradient_tile(
    T* dx, const T* scaled, const T* w, long features, const Columns* dx_columns, long runs, Lanes<T, kEdge> lanes) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  Vector<T> sum[R][S] = {};
  const auto add = [&](long c) {
    Vector<T> ws[S];
    GRL_EXT_UNROLL
    for (int s = 0; s < S; ++s) {
      ws[s] = lanes.get(w + c * features + s * kLanes);
    }
    GRL_EXT_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vector<T> factor = broadcast(scaled[c * kMaxBlockRows + r]);
      GRL_EXT_UNROLL
      for (int s = 0; s < S; ++s) {
        sum[r][s] += factor * ws[s];
      }
    }
  };
  for (long i = 0; i < runs; ++i) {
    for (long c = dx_columns[i].begin; c < dx_columns[i].end; ++c) {
      add(c);
    }
  }
  GRL_EXT_UNROLL
  for (int r = 0; r < R; ++r) {
    GRL_EXT_UNROLL
    for (int s = 0; s < S; ++s) {
      lanes.put(dx + r * features + s * kLanes, sum[r][s]);  // overlapped lanes get the same value again
    }
  }
}

// dw[c] += sum_r g[c][r] x[r] for C columns and S vectors of features: a step has S + C loads for S * C products. With
// kPrefetch it prefetches `next`, which has x's layout and will be written.
template <bool kPrefetch, class T, int C, int S, Edge kEdge>
void weight_gradient_tile(
    T* dw, const T* g, const T* x, const T* next, long rows, long features, Lanes<T, kEdge> lanes) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  Vector<T> sum[C][S] = {};
  for (long r = 0; r < rows; ++r) {
    Vector<T> xs[S];
    GRL_EXT_UNROLL
    for (int s = 0; s < S; ++s) {
      xs[s] = lanes.get(x + r * features + s * kLanes);
      if constexpr (kPrefetch) {
        __builtin_prefetch(next + r * features + s * kLanes, 1);
      }
    }
    GRL_EXT_UNROLL
    for (int c = 0; c < C; ++c) {
      const Vector<T> factor = broadcast(g[c * kMaxBlockRows + r]);
      GRL_EXT_UNROLL
      for (int s = 0; s < S; ++s) {
        sum[c][s] += factor * xs[s];
      }
    }
  }
  GRL_EXT_UNROLL
  for (int c = 0; c < C; ++c) {
    GRL_EXT_UNROLL
    for (int s = 0; s < S; ++s) {
      T* to = dw + c * features + s * kLanes;
      lanes.put(to, lanes.get(to) + lanes.fresh_or(sum[c][s], Vector<T>{}));
    }
  }
}

// S vectors of features, from `at` on. The strip is narrow, so that what its tiles read again is still in the L1 cache.
template <class T, int S, Edge kEdge>
void gradients_strip(const GradientsBlock<T>& b, long at, Lanes<T, kEdge> lanes) {
  const auto of_features = [&] {
    for (long r = 0; b.dx && r < b.rows;) {
      const int height = b.rows - r >= kTileRows ? kTileRows : 1;
      const auto tile = height == 1 ? features_gradient_tile<T, 1, S, kEdge>
                                    : features_gradient_tile<T, kTileRows, S, kEdge>;
      tile(b.dx + r * b.features + at, b.scaled + r, b.weight + at, b.features, b.dx_columns, b.dx_runs, lanes);
      r += height;
    }
  };
  const auto of_weight = [&](auto prefetch) {
    constexpr bool kPrefetch = decltype(prefetch)::kValue != 0;
    for (long i = 0; b.dw && i < b.dw_runs; ++i) {
      const long end = b.dw_columns[i].end;
      for (long c = b.dw_columns[i].begin; c < end; c += kWeightColumns) {
        with_constant<kWeightColumns>(end - c < kWeightColumns ? end - c : kWeightColumns, [&](auto constant) {
          constexpr int C = decltype(constant)::kValue;
          weight_gradient_tile<kPrefetch, T, C, S>(
              b.dw + c * b.features + at, b.grad_logits + c * kMaxBlockRows, b.x + at, kPrefetch ? b.dx + at : nullptr,
              b.rows, b.features, lanes);
        });
      }
    }
  };
  if (b.dx && b.columns <= kFewColumns) {
    of_weight(Constant<true>{});
    of_features();
  } else {
    of_features();  // what it writes goes to memory while the weight's gradient is computed
    of_weight(Constant<false>{});
  }
}

// dx = scaled^T w and dw += g x, strip by strip over the features.
template <class T>
void gradients(const GradientsBlock<T>& b) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  const long features = b.features;
  const auto strip = [&](auto vectors, long at, auto lanes) {
    gradients_strip<T, decltype(vectors)::kValue>(b, at, lanes);
  };
  long d = 0;
  for (; d + kStripVectors * kLanes <= features; d += kStripVectors * kLanes) {
    strip(Constant<kStripVectors>{}, d, Lanes<T, Edge::kNone>(0));
  }
  for (; d + kLanes <= features; d += kLanes) {
    strip(Constant<1>{}, d, Lanes<T, Edge::kNone>(0));
  }
  if (d < features && features > kLanes) {
    strip(Constant<1>{}, features - kLanes, Lanes<T, Edge::kOverlap>(features - d));
  } else if (d < features) {
    strip(Constant<1>{}, 0, Lanes<T, Edge::kShort>(features));
  }
}
