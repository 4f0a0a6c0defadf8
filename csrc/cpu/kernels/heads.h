// The skinny matrix products of the heads and their cross entropy, for one block of rows at a time.
//
// With N rows, D features and K columns (all heads together) the arithmetic is 6 N D K and the least traffic 2 N D elements.
// A block of rows stays in the L2 cache from the product forward to the one backward, so that memory sees the features once. The
// products wait for memory unless it works all the time: each asks, row by row, for the memory that comes `ahead`, the product
// forward for where the gradient of the features will be written, the one backward for the features of the next block.
// z, g: K x kMaxBlockRows, one column after the other, so that the cross entropy's vectors run over rows.

// Tiles: as many sums as the registers hold beside what the loops need (32 registers of AVX-512, 16 of the others).
#if GRL_EXT_VECTOR_BYTES == 64
constexpr int kForwardColumns = 6;    // times kTileRows
constexpr int kBackwardColumns = 12;  // times two: the weight and the sums of its gradient
constexpr int kRegisters = 32;
#else
constexpr int kForwardColumns = 3;
constexpr int kBackwardColumns = 6;
constexpr int kRegisters = 16;
#endif
constexpr int kTileRows = 4;

// An array of vectors is registers only if every loop over it is unrolled.
#if defined(__clang__)
#define GRL_EXT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define GRL_EXT_UNROLL _Pragma("GCC unroll 16")
#endif

template <int N>
struct Constant {
  static constexpr int kValue = N;
};

// Calls f with the compile-time constant equal to n, 1 <= n <= Max. By reference: copying a large closure that was just written
// stalls until the stores are through.
template <int Max, class F>
inline void with_constant(int n, const F& f) {
  if constexpr (Max > 1) {
    if (n < Max) {
      return with_constant<Max - 1>(n, f);
    }
  }
  f(Constant<Max>{});
}

// z[c][r] = bias[c] + sum_d x[r][d] w[c][d] for R rows and C columns: R * C accumulators in registers, R + C loads a step.
template <class T, int R, int C>
void logits_tile(T* z, const T* x, const T* ahead, const T* w, const T* bias, long features) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  Vector<T> sum[R][C] = {};
  const auto multiply = [&](auto lanes, long d) {
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
  };
  // The rest first: what comes after the loop must not need the sums, or the compiler gives up registers in it.
  const long rest = features % kLanes;
  if (rest > 0 && features > kLanes) {
    multiply(Lanes<T, Edge::kOverlap>(rest), features - kLanes);
  } else if (rest > 0) {
    multiply(Lanes<T, Edge::kShort>(rest), 0);
  }
  for (long d = 0; d + kLanes <= features; d += kLanes) {
    multiply(Lanes<T, Edge::kNone>(0), d);
    GRL_EXT_UNROLL
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(ahead + r * features + d, 0, 2);
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

// Columns outside, rows inside: the weight of some columns stays in the L1 cache while the block's rows pass by from L2.
template <class T>
void logits(T* z, const T* x, const T* ahead, const T* w, const T* bias, long rows, long features, long columns) {
  for (long c = 0; c < columns; c += kForwardColumns) {
    const long width = columns - c < kForwardColumns ? columns - c : kForwardColumns;
    with_constant<kForwardColumns>(width, [&](auto constant) {
      constexpr int C = decltype(constant)::kValue;
      for (long r = 0; r < rows;) {
        const int height = rows - r >= kTileRows ? kTileRows : 1;
        const auto tile = height == 1 ? logits_tile<T, 1, C> : logits_tile<T, kTileRows, C>;
        tile(
            z + c * kMaxBlockRows + r, x + r * features, ahead + r * features, w + c * features, bias ? bias + c : nullptr,
            features);
        r += height;
      }
    });
  }
}

// For C columns and S vectors of features, row after row, with the weight and the sums of its gradient in registers:
//   dx[r] = sum_c scaled[c][r] w[c]    if kDx; added to what is there unless `first`
//   dw[c] += sum_r g[c][r] x[r]        if kDw
template <class T, int C, int S, bool kDx, bool kDw, Edge kEdge>
void gradients_strip(
    T* dx, T* dw, const T* g, const T* scaled, const T* x, const T* ahead, const T* w, long rows, long features, bool first,
    long part) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  const Lanes<T, kEdge> lanes(part);
  Vector<T> ws[C][S];
  Vector<T> sum[C][S] = {};
  GRL_EXT_UNROLL
  for (int c = 0; c < C; ++c) {
    GRL_EXT_UNROLL
    for (int s = 0; s < S; ++s) {
      ws[c][s] = kDx ? lanes.get(w + c * features + s * kLanes) : Vector<T>{};
    }
  }
  for (long r = 0; r < rows; ++r) {
    Vector<T> xs[S], out[S];
    GRL_EXT_UNROLL
    for (int s = 0; s < S; ++s) {
      const long at = r * features + s * kLanes;
      xs[s] = kDw ? lanes.get(x + at) : Vector<T>{};
      out[s] = kDx && !first ? lanes.get(dx + at) : Vector<T>{};
      __builtin_prefetch(ahead + at, 0, 2);
    }
    GRL_EXT_UNROLL
    for (int c = 0; c < C; ++c) {
      const Vector<T> from_x = broadcast(g[c * kMaxBlockRows + r]);
      const Vector<T> to_x = broadcast(scaled[c * kMaxBlockRows + r]);
      GRL_EXT_UNROLL
      for (int s = 0; s < S; ++s) {
        if constexpr (kDx) {
          out[s] += to_x * ws[c][s];
        }
        if constexpr (kDw) {
          sum[c][s] += from_x * xs[s];
        }
      }
    }
    GRL_EXT_UNROLL
    for (int s = 0; kDx && s < S; ++s) {
      lanes.put(dx + r * features + s * kLanes, out[s]);  // of lanes done before, the same once more
    }
  }
  GRL_EXT_UNROLL
  for (int c = 0; c < C; ++c) {
    GRL_EXT_UNROLL
    for (int s = 0; kDw && s < S; ++s) {
      T* to = dw + c * features + s * kLanes;
      lanes.put(to, lanes.get(to) + lanes.fresh_or(sum[c][s], Vector<T>{}));
    }
  }
}

// As wide a strip as the registers hold: weights, sums, and a row's features and gradient, beside two factors.
constexpr int strip_vectors(int columns) {
  const auto fits = [columns](int vectors) { return 2 * columns * vectors + 2 * vectors + 2 <= kRegisters; };
  return fits(4) ? 4 : fits(2) ? 2 : 1;
}

// Strip by strip over the features, so that the weight and its gradient move once a block; within a strip all columns, while its
// rows are in the L1 cache.
template <class T, bool kDx, bool kDw>
void gradients_of_block(
    T* dx, T* dw, const T* g, const T* scaled, const T* x, const T* ahead, const T* w, long rows, long features, long columns) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  const long groups = (columns + kBackwardColumns - 1) / kBackwardColumns;
  for (long d = 0; d < features;) {
    long step = kLanes;
    for (long group = 0, c = 0, left = columns; group < groups; ++group) {
      const long width = (left + groups - group - 1) / (groups - group);
      with_constant<kBackwardColumns>(width, [&](auto constant) {
        constexpr int C = decltype(constant)::kValue;
        constexpr int S = strip_vectors(C);
        const auto run = [&](auto strip, long at, long part) {
          strip(
              dx + at, dw + c * features + at, g + c * kMaxBlockRows, scaled + c * kMaxBlockRows, x + at, ahead + at,
              w + c * features + at, rows, features, group == 0, part);
        };
        if (groups == 1 && d + S * kLanes <= features) {
          run(gradients_strip<T, C, S, kDx, kDw, Edge::kNone>, d, 0);
          step = S * kLanes;
        } else if (d + kLanes <= features) {
          run(gradients_strip<T, C, 1, kDx, kDw, Edge::kNone>, d, 0);
        } else if (features > kLanes) {
          run(gradients_strip<T, C, 1, kDx, kDw, Edge::kOverlap>, features - kLanes, features - d);
        } else {
          run(gradients_strip<T, C, 1, kDx, kDw, Edge::kShort>, 0, features);
        }
      });
      c += width;
      left -= width;
    }
    d += step;
  }
}

template <class T>
void gradients(
    T* dx, T* dw, const T* g, const T* scaled, const T* x, const T* ahead, const T* w, long rows, long features, long columns) {
  if (dx && dw) {
    gradients_of_block<T, true, true>(dx, dw, g, scaled, x, ahead, w, rows, features, columns);
  } else if (dx) {
    gradients_of_block<T, true, false>(dx, dw, g, scaled, x, ahead, w, rows, features, columns);
  } else {
    gradients_of_block<T, false, true>(dx, dw, g, scaled, x, ahead, w, rows, features, columns);
  }
}

// y * z, and nothing where y is 0, though z be infinite.
template <class T>
inline Vector<T> weighted(Vector<T> y, Vector<T> z) {
  return y == 0 ? Vector<T>{} : y * z;
}

// Softmax cross entropy of one head over a block of rows (columns == 1: binary, the softmax over the logits 0 and z).
//   y = (1 - smoothing) [c == target] + smoothing / classes
//   loss = sum over valid rows of log sum_c exp(z[c] - top) - sum_c y[c] (z[c] - top),   g[c] = (softmax(z)[c] - y[c]) * weight
// with top the row's largest logit; where y is 0 a class adds nothing to the loss, though its logit be -infinity. A target below zero marks a row that is not valid: no loss, g = 0; so must the rows after the last be marked, up to a whole
// vector. Returns the loss.
template <class T>
double cross_entropy(
    T* g, T* scaled, const T* z, const Integer<T>* target, long rows, long columns, double weight, double scale,
    double smoothing) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  using Integers = Vector<Integer<T>>;
  const bool binary = columns == 1;
  const T share = static_cast<T>(smoothing / (binary ? 2 : columns));
  const T rest = static_cast<T>(1 - smoothing);
  const Vector<T> zero = {};
  Vector<T> loss = zero;
  for (long r = 0; r < rows; r += kLanes) {
    const Integers wanted = load(target + r);
    const Integers valid = wanted >= 0;
    Vector<T> top = binary ? zero : load(z + r);
    for (long c = 0; c < columns; ++c) {
      const Vector<T> zs = load(z + c * kMaxBlockRows + r);
      top = zs <= top ? top : zs;  // NaN goes through
    }
    Vector<T> sum = zero;
    Vector<T> expected = zero;  // sum_c y[c] (z[c] - top)
    if (binary) {
      const Integers hit = wanted == 0;
      sum = exp_nonpositive(zero - top);
      expected = weighted<T>(share + (hit ? broadcast(rest) : zero), zero - top);
    }
    for (long c = 0; c < columns; ++c) {
      const Vector<T> shifted = load(z + c * kMaxBlockRows + r) - top;
      const Vector<T> e = exp_nonpositive(shifted);
      sum += e;
      const Integers hit = wanted == static_cast<Integer<T>>(binary ? 1 : c);
      expected += weighted<T>(share + (hit ? broadcast(rest) : zero), shifted);
      store(g + c * kMaxBlockRows + r, e);
    }
    const Vector<T> one_over_sum = T(1) / sum;
    for (long c = 0; c < columns; ++c) {
      const Integers hit = wanted == static_cast<Integer<T>>(binary ? 1 : c);
      const Vector<T> y = share + (hit ? broadcast(rest) : zero);
      const Vector<T> dz = valid ? (load(g + c * kMaxBlockRows + r) * one_over_sum - y) * static_cast<T>(weight) : zero;
      store(g + c * kMaxBlockRows + r, dz);
      store(scaled + c * kMaxBlockRows + r, scale == 0 ? zero : dz * static_cast<T>(scale));
    }
    loss += valid ? log_at_least_one(sum) - expected : zero;
  }
  return sum_lanes<T>(loss);
}

// Rows of a half type to float and back.
template <class H>
void widen_rows(float* out, const void* in, long n) {
  for (long i = 0; i < n; ++i) {
    out[i] = widen(static_cast<const H*>(in)[i]);
  }
}

template <class H>
void narrow_rows(void* out, const float* in, long n) {
  for (long i = 0; i < n; ++i) {
    static_cast<H*>(out)[i] = narrow<H, float>(in[i]);
  }
}
