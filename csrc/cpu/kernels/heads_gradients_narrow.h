// The gradients of all heads for one block of rows: dx = scaled^T w and dw += g x, for vectors narrower than a cache
// line.
//
// heads_gradients.h walks strips of features down the rows. With these vectors a strip would be a cache line wide. If
// the rows are a power of two apart, its lines all fall into one set of the L1 cache, and each lies in a page of its
// own. Therefore dx is written along its rows here, and a strip of x is read once, into a copy without gaps.

// dx[r] = sum_c scaled[c][r] w[c] for R rows and S vectors of features: a step has S + R loads for S * R products.
// Columns that do not go into dx are left out, not multiplied by 0: their weight may be infinite. kStream: dx is
// aligned.
template <bool kStream, class T, int R, int S, Edge kEdge>
inline void features_gradient_tile(
    const GradientsBlock<T>& b, long row, const T* w, long w_stride, long at, Lanes<T, kEdge> lanes) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  Vector<T> sum[R][S] = {};
  for (long i = 0; i < b.dx_runs; ++i) {
    for (long c = b.dx_columns[i].begin; c < b.dx_columns[i].end; ++c) {
      Vector<T> ws[S];
      GRL_EXT_UNROLL
      for (int s = 0; s < S; ++s) {
        ws[s] = lanes.get(w + c * w_stride + at + s * kLanes);
      }
      GRL_EXT_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vector<T> factor = broadcast(b.scaled[c * kMaxBlockRows + row + r]);
        GRL_EXT_UNROLL
        for (int s = 0; s < S; ++s) {
          sum[r][s] += factor * ws[s];
        }
      }
    }
  }
  GRL_EXT_UNROLL
  for (int r = 0; r < R; ++r) {
    GRL_EXT_UNROLL
    for (int s = 0; s < S; ++s) {
      T* to = b.dx + (row + r) * b.features + at + s * kLanes;
      if constexpr (kStream) {
        stream(to, sum[r][s]);
      } else {
        lanes.put(to, sum[r][s]);  // overlapped lanes get the same value again
      }
    }
  }
}

// The same for the features from `begin` to `end`.
template <bool kStream, class T, int R>
void features_gradient_rows(const GradientsBlock<T>& b, long row, const T* w, long w_stride, long begin, long end) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  const Lanes<T, Edge::kNone> inside(0);
  long at = begin;
  for (; at + kFeatureVectors * kLanes <= end; at += kFeatureVectors * kLanes) {
    features_gradient_tile<kStream, T, R, kFeatureVectors>(b, row, w, w_stride, at, inside);
  }
  for (; at + kLanes <= end; at += kLanes) {
    features_gradient_tile<kStream, T, R, 1>(b, row, w, w_stride, at, inside);
  }
  if (at < end && end >= kLanes) {
    const Lanes<T, Edge::kOverlap> overlap(end - at);
    features_gradient_tile<false, T, R, 1>(b, row, w, w_stride, end - kLanes, overlap);
  } else if (at < end) {
    features_gradient_tile<false, T, R, 1>(b, row, w, w_stride, 0, Lanes<T, Edge::kShort>(end));
  }
}

// Copies the weight of the columns that go into dx, `width` features of each.
template <class T>
void copy_weight(T* to, const GradientsBlock<T>& b, long at, long width, long stride) {
  for (long i = 0; i < b.dx_runs; ++i) {
    for (long c = b.dx_columns[i].begin; c < b.dx_columns[i].end; ++c) {
      __builtin_memcpy(to + c * stride, b.weight + c * b.features + at, width * sizeof(T));
    }
  }
}

// dx panel by panel: a panel is as many features as have their weight in the L1 cache while the rows pass by.
template <bool kStream, class T>
void features_gradient(const GradientsBlock<T>& b) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  constexpr long kStep = 2 * kFeatureVectors * kLanes;  // whole tiles and whole cache lines
  constexpr long kRoom = kPanelBytes / sizeof(T);
  const long steps = (kRoom / (b.columns > 0 ? b.columns : 1) - kLanes) / kStep;
  const long panel = steps > 1 ? steps * kStep : kStep;
  const bool copies = b.columns > kPanelColumnsInPlace && steps > 0;
  alignas(64) T copy[kRoom];
  for (long begin = 0; begin < b.features;) {
    // What would be less than a vector is joined to the panel before.
    const long end = b.features - begin < panel + kLanes ? b.features : begin + panel;
    const T* w = b.weight;
    long w_stride = b.features;
    if (copies) {
      w_stride = panel + kLanes;
      copy_weight(copy, b, begin, end - begin, w_stride);
      w = copy - begin;
    }
    for (long row = 0; row < b.rows;) {
      const bool whole = b.rows - row >= kTileRows;
      const auto rows = whole ? features_gradient_rows<kStream, T, kTileRows> : features_gradient_rows<kStream, T, 1>;
      rows(b, row, w, w_stride, begin, end);
      row += whole ? kTileRows : 1;
    }
    begin = end;
  }
}

// dw[c] += sum_r g[c][r] x[r] for C columns and S vectors of features: a step has S + C loads for S * C products.
// kCopies: writes what it reads of x to `copy`, without gaps.
template <bool kCopies, class T, int C, int S, Edge kEdge>
void weight_gradient_tile(
    T* dw, const T* g, const T* x, long x_stride, T* copy, long rows, long features, Lanes<T, kEdge> lanes) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  Vector<T> sum[C][S] = {};
  for (long r = 0; r < rows; ++r) {
    Vector<T> xs[S];
    GRL_EXT_UNROLL
    for (int s = 0; s < S; ++s) {
      xs[s] = lanes.get(x + r * x_stride + s * kLanes);
      if constexpr (kCopies) {
        store(copy + (r * S + s) * kLanes, xs[s]);
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

// S vectors of features, from `at` on, C columns at a time.
template <int C, int S, class T, Edge kEdge>
void weight_gradient_strip(const GradientsBlock<T>& b, long at, Lanes<T, kEdge> lanes) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  alignas(64) T copy[kMaxBlockRows * S * kLanes];
  const T* x = b.x + at;
  long x_stride = b.features;
  for (long i = 0; i < b.dw_runs; ++i) {
    const long end = b.dw_columns[i].end;
    for (long c = b.dw_columns[i].begin; c < end; c += C) {
      const bool copies = b.columns > kStripColumnsInPlace && x != copy;
      with_constant<C>(end - c < C ? end - c : C, [&](auto constant) {
        constexpr int N = decltype(constant)::kValue;
        const auto tile = copies ? weight_gradient_tile<true, T, N, S, kEdge>
                                 : weight_gradient_tile<false, T, N, S, kEdge>;
        T* dw = b.dw + c * b.features + at;
        tile(dw, b.grad_logits + c * kMaxBlockRows, x, x_stride, copy, b.rows, b.features, lanes);
      });
      if (copies) {
        x = copy;
        x_stride = S * kLanes;
      }
    }
  }
}

// dw strip by strip. With few columns the strips are wider, for as many sums.
template <class T>
void weight_gradient(const GradientsBlock<T>& b) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  const long features = b.features;
  with_constant<kWeightColumns>(b.columns < kWeightColumns ? b.columns : kWeightColumns, [&](auto constant) {
    constexpr int C = decltype(constant)::kValue, S = kWeightSums / C < 6 ? kWeightSums / C : 6;
    long at = 0;
    for (; at + S * kLanes <= features; at += S * kLanes) {
      weight_gradient_strip<C, S>(b, at, Lanes<T, Edge::kNone>(0));
    }
    for (; at + kLanes <= features; at += kLanes) {
      weight_gradient_strip<C, 1>(b, at, Lanes<T, Edge::kNone>(0));
    }
    if (at < features && features > kLanes) {
      weight_gradient_strip<C, 1>(b, features - kLanes, Lanes<T, Edge::kOverlap>(features - at));
    } else if (at < features) {
      weight_gradient_strip<C, 1>(b, 0, Lanes<T, Edge::kShort>(features));
    }
  });
}

template <class T>
void gradients(const GradientsBlock<T>& b) {
  if (b.dw) {
    weight_gradient(b);
  }
  // Streaming stores need aligned addresses. Where only some rows are aligned, they would take longer than others.
  const auto address = reinterpret_cast<unsigned long>(b.dx);
  const long row_bytes = b.features * static_cast<long>(sizeof(T));
  if (b.dx && b.dx_streams && address % GRL_EXT_VECTOR_BYTES == 0 && row_bytes % GRL_EXT_VECTOR_BYTES == 0) {
    features_gradient<true>(b);
    finish_streaming();
  } else if (b.dx) {
    features_gradient<false>(b);
  }
}
