// The skinny matrix products of the heads and their cross entropy, for one block of rows at a time.
//
// With N rows, D features and K columns (all heads together) the arithmetic is 6 N D K and the least traffic 2 N D elements.
// A block of rows stays in the L2 cache from the product forward to the one backward, so that memory sees the features once.
// z, g: K x kMaxBlockRows, one column after the other, so that the cross entropy's vectors run over rows.

// Tiles: as many sums as the registers hold beside what the loops need (32 registers of AVX-512, 16 of the others).
#if GRL_EXT_VECTOR_BYTES == 64
constexpr int kForwardColumns = 6;  // times kTileRows
constexpr int kTileVectors = 4;     // times kTileRows
constexpr int kWeightColumns = 12;
constexpr int kWeightSums = 24;
#else
constexpr int kForwardColumns = 3;
constexpr int kTileVectors = 2;
constexpr int kWeightColumns = 6;
constexpr int kWeightSums = 12;
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

// Calls f with the compile-time constant equal to n, 1 <= n <= Max.
template <int Max, class F>
inline void with_constant(int n, F f) {
  if constexpr (Max > 1) {
    if (n < Max) {
      return with_constant<Max - 1>(n, f);
    }
  }
  f(Constant<Max>{});
}

// z[c][r] = bias[c] + sum_d x[r][d] w[c][d] for R rows and C columns: R * C accumulators in registers, R + C loads a step.
template <class T, int R, int C>
void logits_tile(T* z, const T* x, const T* w, const T* bias, long features) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  Vector<T> sum[R][C] = {};
  long d = 0;
  for (; d + kLanes <= features; d += kLanes) {
    Vector<T> xs[R];
    GRL_EXT_UNROLL
    for (int r = 0; r < R; ++r) {
      xs[r] = load(x + r * features + d);
    }
    GRL_EXT_UNROLL
    for (int c = 0; c < C; ++c) {
      const Vector<T> ws = load(w + c * features + d);
      GRL_EXT_UNROLL
      for (int r = 0; r < R; ++r) {
        sum[r][c] += xs[r] * ws;
      }
    }
  }
  // Out of the registers before anything else happens: a value that lives on makes the compiler give up registers in the loop.
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
      T total = sum_lanes<T, kLanes>(lanes[r][c]) + (bias ? bias[c] : T(0));
      for (long rest = d; rest < features; ++rest) {
        total += x[r * features + rest] * w[c * features + rest];
      }
      z[c * kMaxBlockRows + r] = total;
    }
  }
}

template <class T>
void logits(T* z, const T* x, const T* w, const T* bias, long rows, long features, long columns) {
  for (long r = 0; r < rows;) {
    const int height = rows - r >= kTileRows ? kTileRows : 1;
    for (long c = 0; c < columns; c += kForwardColumns) {
      const long width = columns - c < kForwardColumns ? columns - c : kForwardColumns;
      with_constant<kForwardColumns>(width, [&](auto constant) {
        constexpr int C = decltype(constant)::kValue;
        const auto tile = height == 1 ? logits_tile<T, 1, C> : logits_tile<T, kTileRows, C>;
        tile(z + c * kMaxBlockRows + r, x + r * features, w + c * features, bias ? bias + c : nullptr, features);
      });
    }
    r += height;
  }
}

// dx[r] = sum_c scaled[c][r] w[c] for R rows and S vectors of features, the sums in registers over all columns: dx is written
// once. kPart: one vector of which only `part` features exist.
template <class T, int R, int S, bool kPart>
void features_tile(T* dx, const T* scaled, const T* w, long features, long columns, long part) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  Vector<T> sum[R][S] = {};
  for (long c = 0; c < columns; ++c) {
    GRL_EXT_UNROLL
    for (int s = 0; s < S; ++s) {
      const T* from = w + c * features + s * kLanes;
      const Vector<T> ws = kPart ? load_part(from, part) : load(from);
      GRL_EXT_UNROLL
      for (int r = 0; r < R; ++r) {
        sum[r][s] += scaled[c * kMaxBlockRows + r] * ws;
      }
    }
  }
  GRL_EXT_UNROLL
  for (int r = 0; r < R; ++r) {
    GRL_EXT_UNROLL
    for (int s = 0; s < S; ++s) {
      T* to = dx + r * features + s * kLanes;
      kPart ? store_part(to, sum[r][s], part) : store(to, sum[r][s]);
    }
  }
}

// Row by row, not strip by strip: the stores run along memory, where the processor fetches the lines ahead of them; down a
// column each store would wait for its own line. The weights, read again for each tile of rows, come from the L2 cache.
template <class T, int R>
void features_rows(T* dx, const T* scaled, const T* w, long features, long columns) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  long d = 0;
  for (; d + kTileVectors * kLanes <= features; d += kTileVectors * kLanes) {
    features_tile<T, R, kTileVectors, false>(dx + d, scaled, w + d, features, columns, 0);
  }
  for (; d + kLanes <= features; d += kLanes) {
    features_tile<T, R, 1, false>(dx + d, scaled, w + d, features, columns, 0);
  }
  if (d < features) {
    features_tile<T, R, 1, true>(dx + d, scaled, w + d, features, columns, features - d);
  }
}

template <class T>
void features_gradient(T* dx, const T* scaled, const T* w, long rows, long features, long columns) {
  long r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) {
    features_rows<T, kTileRows>(dx + r * features, scaled + r, w, features, columns);
  }
  for (; r < rows; ++r) {
    features_rows<T, 1>(dx + r * features, scaled + r, w, features, columns);
  }
}

// dw[c] += sum_r g[c][r] x[r] for C columns and S vectors of features, the sums in registers over all rows of the block.
template <class T, int C, int S, bool kPart>
void weight_tile(T* dw, const T* g, const T* x, long rows, long features, long part) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  const auto get = [part](const T* from) { return kPart ? load_part(from, part) : load(from); };
  Vector<T> sum[C][S] = {};
  for (long r = 0; r < rows; ++r) {
    GRL_EXT_UNROLL
    for (int s = 0; s < S; ++s) {
      const Vector<T> xs = get(x + r * features + s * kLanes);
      GRL_EXT_UNROLL
      for (int c = 0; c < C; ++c) {
        sum[c][s] += g[c * kMaxBlockRows + r] * xs;
      }
    }
  }
  GRL_EXT_UNROLL
  for (int c = 0; c < C; ++c) {
    GRL_EXT_UNROLL
    for (int s = 0; s < S; ++s) {
      T* to = dw + c * features + s * kLanes;
      const Vector<T> total = get(to) + sum[c][s];
      kPart ? store_part(to, total, part) : store(to, total);
    }
  }
}

template <class T, int C>
void weight_columns(T* dw, const T* g, const T* x, long rows, long features) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  constexpr int kVectors = C <= kWeightSums / 4 ? 4 : C <= kWeightSums / 2 ? 2 : 1;  // few columns leave registers for more features
  long d = 0;
  for (; d + kVectors * kLanes <= features; d += kVectors * kLanes) {
    weight_tile<T, C, kVectors, false>(dw + d, g, x + d, rows, features, 0);
  }
  for (; d + kLanes <= features; d += kLanes) {
    weight_tile<T, C, 1, false>(dw + d, g, x + d, rows, features, 0);
  }
  if (d < features) {
    weight_tile<T, C, 1, true>(dw + d, g, x + d, rows, features, features - d);
  }
}

template <class T>
void weight_gradient(T* dw, const T* g, const T* x, long rows, long features, long columns) {
  for (long c = 0; c < columns; c += kWeightColumns) {
    const long width = columns - c < kWeightColumns ? columns - c : kWeightColumns;
    with_constant<kWeightColumns>(width, [&](auto constant) {
      weight_columns<T, decltype(constant)::kValue>(dw + c * features, g + c * kMaxBlockRows, x, rows, features);
    });
  }
}

// What float holds with room to spare; and double, times one more of them.
constexpr double kLargestProduct = 1e30;

// The sum of the lanes' logarithms; each lane is between 1 and kLargestProduct, or NaN.
template <class T>
inline double sum_of_logarithms(Vector<T> product) {
  double sum = 0, together = 1;
  for (int i = 0; i < VectorOf<T>::kLanes; ++i) {
    together *= product[i];
    if (together > 1e270) {
      sum += __builtin_log(together);
      together = 1;
    }
  }
  return sum + __builtin_log(together);
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
  double loss = 0;
  // The sums of exponentials, each between 1 and the number of classes, are multiplied up: one logarithm serves many of them.
  Vector<T> product = broadcast(T(1));
  double bound = 1;
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
    bound *= columns + 1;
    if (bound > kLargestProduct) {
      loss += sum_of_logarithms<T>(product);
      product = broadcast(T(1));
      bound = columns + 1;
    }
    product *= valid ? sum : broadcast(T(1));
    loss -= sum_lanes<T>(valid ? expected : zero);
  }
  return loss + sum_of_logarithms<T>(product);
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
