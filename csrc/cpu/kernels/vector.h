// Vectors of the instruction set's width, as the compiler's own vector types: +, *, < and ?: work on all lanes.

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

// A vector of which only the lanes under the mask, the first `part`, exist in memory; the others are loaded as 0. By
// instructions where there are some: copying `part` elements takes as long as a whole row of products. The compiler is
// told that they may read and write any memory.
template <class T>
inline Vector<T> load_part(const T* from, [[maybe_unused]] Vector<Integer<T>> mask, [[maybe_unused]] long part) {
  Vector<T> v = {};
#if defined(__x86_64__) && GRL_EXT_VECTOR_BYTES == 64
  const auto bits = static_cast<unsigned short>((1u << part) - 1);
  if constexpr (sizeof(T) == 4) {
    __asm__ volatile("vmovups (%1), %0%{%2%}%{z%}" : "=v"(v) : "r"(from), "Yk"(bits) : "memory");
  } else {
    __asm__ volatile("vmovupd (%1), %0%{%2%}%{z%}" : "=v"(v) : "r"(from), "Yk"(bits) : "memory");
  }
#elif defined(__x86_64__) && GRL_EXT_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    __asm__ volatile("vmaskmovps (%1), %2, %0" : "=x"(v) : "r"(from), "x"(mask) : "memory");
  } else {
    __asm__ volatile("vmaskmovpd (%1), %2, %0" : "=x"(v) : "r"(from), "x"(mask) : "memory");
  }
#else
  __builtin_memcpy(&v, from, part * sizeof(T));
#endif
  return v;
}

template <class T>
inline void store_part(T* to, Vector<T> v, [[maybe_unused]] Vector<Integer<T>> mask, [[maybe_unused]] long part) {
#if defined(__x86_64__) && GRL_EXT_VECTOR_BYTES == 64
  const auto bits = static_cast<unsigned short>((1u << part) - 1);
  if constexpr (sizeof(T) == 4) {
    __asm__ volatile("vmovups %1, (%0)%{%2%}" : : "r"(to), "v"(v), "Yk"(bits) : "memory");
  } else {
    __asm__ volatile("vmovupd %1, (%0)%{%2%}" : : "r"(to), "v"(v), "Yk"(bits) : "memory");
  }
#elif defined(__x86_64__) && GRL_EXT_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    __asm__ volatile("vmaskmovps %1, %2, (%0)" : : "r"(to), "x"(v), "x"(mask) : "memory");
  } else {
    __asm__ volatile("vmaskmovpd %1, %2, (%0)" : : "r"(to), "x"(v), "x"(mask) : "memory");
  }
#else
  __builtin_memcpy(to, &v, part * sizeof(T));
#endif
}

// Loads and stores a vector, depending on where in the row it lies.
template <class T, Edge kEdge>
class Lanes {
 public:
  explicit Lanes(long part)
      : part_(part), fresh_(load(kRamp<T>.steps + part)), first_(~load(kRamp<T>.steps + VectorOf<T>::kLanes - part)) {}

  Vector<T> get(const T* from) const {
    if constexpr (kEdge == Edge::kShort) {
      return load_part(from, first_, part_);
    }
    return load(from);
  }

  void put(T* to, Vector<T> v) const {
    if constexpr (kEdge == Edge::kShort) {
      store_part(to, v, first_, part_);
    } else {
      store(to, v);
    }
  }

  // a in the new lanes, b in those that overlap the vector before.
  Vector<T> fresh_or(Vector<T> a, Vector<T> b) const { return kEdge == Edge::kOverlap ? fresh_ ? a : b : a; }

 private:
  const long part_;
  const Vector<Integer<T>> fresh_, first_;
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

// exp(x) for x <= 0: 2^n * p(r) with x = n ln2 + r, |r| <= ln2/2. Relative error below 2e-7; below -87 the result is 0.
inline Vector<float> exp_nonpositive(Vector<float> x) {
  typedef int Ints __attribute__((vector_size(GRL_EXT_VECTOR_BYTES)));
  const Ints vanishes = x < -87.0f;
  x = vanishes ? broadcast(-87.0f) : x;
  const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
  const Vector<float> count = __builtin_convertvector(n, Vector<float>);
  const Vector<float> r = (x - count * 0.693359375f) + count * 2.12194440e-4f;
  // Taylor to the seventh power: the remainder r^8/8! is below 6e-9 of the result.
  Vector<float> p = broadcast(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Ints bits = (n + 127) << 23;
  Vector<float> scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return vanishes ? Vector<float>{} : p * scale;
}

// The same. Relative error below 4e-16; below -708 the result is 0. Rounded by adding 1.5 * 2^52, which leaves n in the
// lowest bits: most instruction sets do not convert doubles to 64-bit integers.
inline Vector<double> exp_nonpositive(Vector<double> x) {
  typedef long Longs __attribute__((vector_size(GRL_EXT_VECTOR_BYTES)));
  const Longs vanishes = x < -708.0;
  x = vanishes ? broadcast(-708.0) : x;
  const Vector<double> shifted = x * 1.4426950408889634 + 0x1.8p52;
  const Vector<double> count = shifted - 0x1.8p52;
  const Vector<double> r = (x - count * 0x1.62e42fee00000p-1) - count * 0x1.a39ef35793c76p-33;
  // Taylor to the 13th power: the remainder r^14/14! is below 5e-18 of the result.
  Vector<double> p = broadcast(1.0 / 6227020800);
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
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
  typedef int Ints __attribute__((vector_size(GRL_EXT_VECTOR_BYTES)));
  Ints bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const Ints n = (bits - 0x3f3504f3) >> 23;  // the bits of sqrt(1/2): m is between it and sqrt(2)
  bits -= n << 23;
  Vector<float> m;
  __builtin_memcpy(&m, &bits, sizeof(m));
  const Vector<float> s = (m - 1.0f) / (m + 1.0f);
  const Vector<float> square = s * s;
  Vector<float> p = broadcast(2.0f / 9);
  p = p * square + 2.0f / 7;
  p = p * square + 2.0f / 5;
  p = p * square + 2.0f / 3;
  p = p * square + 2.0f;
  const Vector<float> count = __builtin_convertvector(n, Vector<float>);
  return x == x ? count * 0.693147181f + p * s : x;
}

// The same; the series to s^21 leaves less than 1e-18 of the result. n comes as a double by the bits of 2^52 + n.
inline Vector<double> log_at_least_one(Vector<double> x) {
  typedef long Longs __attribute__((vector_size(GRL_EXT_VECTOR_BYTES)));
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
  Vector<double> p = broadcast(2.0 / 21);
  p = p * square + 2.0 / 19;
  p = p * square + 2.0 / 17;
  p = p * square + 2.0 / 15;
  p = p * square + 2.0 / 13;
  p = p * square + 2.0 / 11;
  p = p * square + 2.0 / 9;
  p = p * square + 2.0 / 7;
  p = p * square + 2.0 / 5;
  p = p * square + 2.0 / 3;
  p = p * square + 2.0;
  return x == x ? count * 0.6931471805599453 + p * s : x;
}
