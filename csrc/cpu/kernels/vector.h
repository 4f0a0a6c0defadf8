// Vectors of the instruction set's width, as the compiler's own vector types: +, *, < and ?: work on all lanes.

// The compiler keeps an array of vectors in registers only if every loop over it is unrolled.
#if defined(__clang__)
#define GRL_EXT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define GRL_EXT_UNROLL _Pragma("GCC unroll 16")
#endif

template <class T>
struct VectorOf {
  static constexpr int kLanes = GRL_EXT_VECTOR_BYTES / sizeof(T);
  typedef T Type __attribute__((vector_size(GRL_EXT_VECTOR_BYTES)));
};

template <class T>
using Vector = typename VectorOf<T>::Type;

template <class T>
inline Vector<T> load(const T* from) {
  Vector<T> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

template <class T>
inline void store(T* to, Vector<T> v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

// Stores a vector at an aligned address past the caches: the line is not read before it is written.
template <class T>
inline void stream(T* to, Vector<T> v) {
#if defined(__x86_64__)
  typedef float Floats __attribute__((vector_size(GRL_EXT_VECTOR_BYTES), may_alias));
  Floats bits;
  __builtin_memcpy(&bits, &v, sizeof(bits));
  // An instruction, not the compiler's builtin: clang and GCC name it differently.
#if GRL_EXT_VECTOR_BYTES == 16
  __asm__("movntps %1, %0" : "=m"(*reinterpret_cast<Floats*>(to)) : "x"(bits));
#else
  __asm__("vmovntps %1, %0" : "=m"(*reinterpret_cast<Floats*>(to)) : "x"(bits));
#endif
#else
  store(to, v);
#endif
}

// What was streamed is seen by other threads before anything that this one stores later.
inline void finish_streaming() {
#if defined(__x86_64__)
  __asm__ volatile("sfence" ::: "memory");
#endif
}

// Where in a row a vector lies.
enum class Edge {
  kNone,     // well inside
  kOverlap,  // at the row's end, overlapping the vector before: only its last `part` lanes are new
  kShort,    // in a row shorter than a vector: only its first `part` lanes exist
};

// Zeros, then -1, which is true. A vector loaded from element n on is the mask of its last n lanes.
template <class T>
struct Ramp {
  Integer<T> steps[2 * VectorOf<T>::kLanes];
  constexpr Ramp() : steps() {
    for (int i = VectorOf<T>::kLanes; i < 2 * VectorOf<T>::kLanes; ++i) {
      steps[i] = -1;
    }
  }
};

template <class T>
constexpr Ramp<T> kRamp;

// The first lanes of a vector, where only these exist in memory; the others are loaded as 0. By instructions with a mask
// where there are some, which know 4-byte lanes only: copying so few elements takes as long as a whole row of products.
// "memory", because the compiler cannot see what they read and write.
template <class T>
class FirstLanes {
 public:
  explicit FirstLanes(long count)
      : count_(count), bits_(static_cast<unsigned short>((1u << (count * sizeof(T) / 4)) - 1)),
        mask_(~load(kRamp<T>.steps + VectorOf<T>::kLanes - count)) {}

  Vector<T> get(const T* from) const {
    Vector<T> v = {};
#if defined(__x86_64__) && GRL_EXT_VECTOR_BYTES == 64
    __asm__ volatile("vmovups (%1), %0%{%2%}%{z%}" : "=v"(v) : "r"(from), "Yk"(bits_) : "memory");
#elif defined(__x86_64__) && GRL_EXT_VECTOR_BYTES == 32
    __asm__ volatile("vmaskmovps (%1), %2, %0" : "=x"(v) : "r"(from), "x"(mask_) : "memory");
#else
    __builtin_memcpy(&v, from, count_ * sizeof(T));
#endif
    return v;
  }

  void put(T* to, Vector<T> v) const {
#if defined(__x86_64__) && GRL_EXT_VECTOR_BYTES == 64
    __asm__ volatile("vmovups %1, (%0)%{%2%}" : : "r"(to), "v"(v), "Yk"(bits_) : "memory");
#elif defined(__x86_64__) && GRL_EXT_VECTOR_BYTES == 32
    __asm__ volatile("vmaskmovps %1, %2, (%0)" : : "r"(to), "x"(v), "x"(mask_) : "memory");
#else
    __builtin_memcpy(to, &v, count_ * sizeof(T));
#endif
  }

 private:
  [[maybe_unused]] const long count_;
  [[maybe_unused]] const unsigned short bits_;
  [[maybe_unused]] const Vector<Integer<T>> mask_;
};

// Loads and stores a vector, depending on where in the row it lies.
template <class T, Edge kEdge>
class Lanes {
 public:
  explicit Lanes(long part) : first_(part), fresh_(load(kRamp<T>.steps + part)) {}

  Vector<T> get(const T* from) const {
    if constexpr (kEdge == Edge::kShort) {
      return first_.get(from);
    }
    return load(from);
  }

  void put(T* to, Vector<T> v) const {
    if constexpr (kEdge == Edge::kShort) {
      first_.put(to, v);
    } else {
      store(to, v);
    }
  }

  // a in the new lanes, b in those that overlap the vector before.
  Vector<T> fresh_or(Vector<T> a, Vector<T> b) const { return kEdge == Edge::kOverlap ? fresh_ ? a : b : a; }

 private:
  const FirstLanes<T> first_;
  const Vector<Integer<T>> fresh_;
};

template <class T>
inline Vector<T> broadcast(T x) {
  return x - Vector<T>{};
}

// The sum of N lanes by halves: short chains of additions, so that the processor can work on many such sums at a time.
template <class T, int N>
inline T sum_lanes(const T* lanes) {
  if constexpr (N == 1) {
    return lanes[0];
  } else if constexpr (N == 2) {
    return lanes[0] + lanes[1];
  } else {
    typedef T Half __attribute__((vector_size(N / 2 * sizeof(T))));
    Half low, high;
    __builtin_memcpy(&low, lanes, sizeof(Half));
    __builtin_memcpy(&high, lanes + N / 2, sizeof(Half));
    low += high;
    return sum_lanes<T, N / 2>(reinterpret_cast<const T*>(&low));
  }
}

template <class T>
inline T sum_lanes(Vector<T> v) {
  return sum_lanes<T, VectorOf<T>::kLanes>(reinterpret_cast<const T*>(&v));
}

// From the highest power's coefficient to the lowest's.
template <class T, int N>
inline Vector<T> polynomial(Vector<T> x, const T (&coefficients)[N]) {
  Vector<T> p = broadcast(coefficients[0]);
  GRL_EXT_UNROLL
  for (int i = 1; i < N; ++i) {
    p = p * x + coefficients[i];
  }
  return p;
}

// exp(x) for x <= 0: 2^n * p(r) with x = n ln2 + r, |r| <= ln2/2. Relative error below 2e-7; below -87 the result is 0.
inline Vector<float> exp_nonpositive(Vector<float> x) {
  using Ints = Vector<Integer<float>>;
  const Ints vanishes = x < -87.0f;
  x = vanishes ? broadcast(-87.0f) : x;
  const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
  const Vector<float> count = __builtin_convertvector(n, Vector<float>);
  const Vector<float> r = (x - count * 0.693359375f) + count * 2.12194440e-4f;
  // Taylor to the seventh power: the remainder r^8/8! is below 6e-9 of the result.
  const Vector<float> p = polynomial<float>(
      r, {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f});
  const Ints bits = (n + 127) << 23;
  Vector<float> scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return vanishes ? Vector<float>{} : p * scale;
}

// The same. Relative error below 3e-16; below -708 the result is 0. n is rounded by adding 1.5 * 2^52, which leaves n in the
// lowest bits: most instruction sets do not convert doubles to 64-bit integers.
inline Vector<double> exp_nonpositive(Vector<double> x) {
  using Longs = Vector<Integer<double>>;
  const Longs vanishes = x < -708.0;
  x = vanishes ? broadcast(-708.0) : x;
  const Vector<double> shifted = x * 1.4426950408889634 + 0x1.8p52;
  const Vector<double> count = shifted - 0x1.8p52;
  const Vector<double> r = (x - count * 0x1.62e42fee00000p-1) - count * 0x1.a39ef35793c76p-33;
  // Taylor to the 13th power: the remainder r^14/14! is below 5e-18 of the result.
  const Vector<double> p = polynomial<double>(
      r,
      {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
       1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0});
  Longs bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 1023) << 52;
  Vector<double> scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return vanishes ? Vector<double>{} : p * scale;
}

// log(x) for finite x >= 1, or NaN: x = 2^n m with m around 1, and log m = 2 artanh(s), s = (m - 1) / (m + 1), |s| <
// 0.172. The series to s^9 leaves less than 3e-9 of the result; log(1) is exactly 0.
inline Vector<float> log_at_least_one(Vector<float> x) {
  using Ints = Vector<Integer<float>>;
  Ints bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const Ints n = (bits - 0x3f3504f3) >> 23;  // the bits of sqrt(1/2): m is between it and sqrt(2)
  bits -= n << 23;
  Vector<float> m;
  __builtin_memcpy(&m, &bits, sizeof(m));
  const Vector<float> s = (m - 1.0f) / (m + 1.0f);
  const Vector<float> square = s * s;
  const Vector<float> p = polynomial<float>(square, {2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f});
  const Vector<float> count = __builtin_convertvector(n, Vector<float>);
  return x == x ? count * 0.693147181f + p * s : x;
}

// The same; the series to s^21 leaves less than 1e-18 of the result. n comes as a double by the bits of 2^52 + n.
inline Vector<double> log_at_least_one(Vector<double> x) {
  using Longs = Vector<Integer<double>>;
  Longs bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const Longs n = (bits - 0x3fe6a09e667f3bcd) >> 52;  // at least 0, as x is at least 1
  bits -= n << 52;
  Vector<double> m, count;
  __builtin_memcpy(&m, &bits, sizeof(m));
  const Longs counted = n + 0x4330000000000000;
  __builtin_memcpy(&count, &counted, sizeof(count));
  count -= 0x1p52;
  const Vector<double> s = (m - 1.0) / (m + 1.0);
  const Vector<double> square = s * s;
  const Vector<double> p = polynomial<double>(
      square, {2.0 / 21, 2.0 / 19, 2.0 / 17, 2.0 / 15, 2.0 / 13, 2.0 / 11, 2.0 / 9, 2.0 / 7, 2.0 / 5, 2.0 / 3, 2.0});
  return x == x ? count * 0.6931471805599453 + p * s : x;
}
