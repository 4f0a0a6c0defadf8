// Half types as bit patterns, converted by integer arithmetic without branches, so that loops over them vectorise for
// every instruction set. Round to nearest even; NaN stays NaN; right also where the processor flushes denormals.

struct Half {
  unsigned short bits;
};

struct BFloat16 {
  unsigned short bits;
};

inline unsigned bits_of(float x) {
  return __builtin_bit_cast(unsigned, x);
}

inline float float_of(unsigned bits) {
  return __builtin_bit_cast(float, bits);
}

// yes ? a : b without a branch, which a loop needs to vectorise.
inline unsigned select(bool yes, unsigned a, unsigned b) {
  const unsigned mask = -static_cast<unsigned>(yes);
  return (a & mask) | (b & ~mask);
}

// zero ? 0 : x without a branch.
inline float unless(bool zero, float x) {
  return float_of(bits_of(x) & (static_cast<unsigned>(zero) - 1));
}

inline double unless(bool zero, double x) {
  return __builtin_bit_cast(double, __builtin_bit_cast(unsigned long, x) & (static_cast<unsigned long>(zero) - 1));
}

inline float widen(float x) {
  return x;
}

inline double widen(double x) {
  return x;
}

inline float widen(BFloat16 x) {
  return float_of(static_cast<unsigned>(x.bits) << 16);
}

inline float widen(Half x) {
  const unsigned magnitude = x.bits & 0x7fffu;
  const unsigned sign = (x.bits & 0x8000u) << 16;
  const unsigned normal = (magnitude << 13) + (112u << 23);  // exponent bias 15 -> 127
  const unsigned special = (magnitude << 13) | 0x7f800000u;  // infinity, NaN
  const unsigned tiny = bits_of(
      static_cast<float>(static_cast<int>(magnitude)) * 0x1p-24f);  // denormal: a count of 2^-24
  return float_of(sign | select(magnitude >= 0x7c00u, special, select(magnitude >= 0x0400u, normal, tiny)));
}

template <class T, class Wide>
inline T narrow(Wide x) {
  return x;
}

template <>
inline BFloat16 narrow<BFloat16, float>(float x) {
  const unsigned bits = bits_of(x);
  const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const unsigned quiet_nan = (bits >> 16) | 0x0040u;
  return {static_cast<unsigned short>(select((bits & 0x7fffffffu) > 0x7f800000u, quiet_nan, rounded))};
}

template <>
inline Half narrow<Half, float>(float x) {
  const unsigned bits = bits_of(x);
  const unsigned sign = (bits >> 16) & 0x8000u;
  const unsigned magnitude = bits & 0x7fffffffu;
  const unsigned normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the result is a count of 2^-24, which is what adding 0.5 leaves in the low bits, rounded.
  const unsigned tiny = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const unsigned special = select(magnitude > 0x7f800000u, 0x7e00u, 0x7c00u);
  const unsigned finite = select(magnitude < 0x38800000u, tiny, normal);
  return {static_cast<unsigned short>(sign | select(magnitude >= 0x47800000u, special, finite))};
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
