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

// The first n lanes; the others are 0 (load) or left alone (store).
template <class T>
inline Vector<T> load_part(const T* from, long n) {
  Vector<T> v = {};
  __builtin_memcpy(&v, from, n * sizeof(T));
  return v;
}

template <class T>
inline void store_part(T* to, Vector<T> v, long n) {
  __builtin_memcpy(to, &v, n * sizeof(T));
}

template <class T>
inline Vector<T> broadcast(T x) {
  return x - Vector<T>{};
}

// The sum of N lanes by halves, so that many of these sums overlap in the processor.
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

inline Vector<double> exp_nonpositive(Vector<double> x) {
  for (int i = 0; i < VectorOf<double>::kLanes; ++i) {
    x[i] = __builtin_exp(x[i]);
  }
  return x;
}
