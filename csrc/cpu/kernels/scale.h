// out = grad * factor. Traffic: one read and one write per element, the arithmetic hides behind it.
// Plain loops: the compiler vectorises them fully for each instruction set.

// The pointers may be equal (in place) but never overlap otherwise, which is what ivdep says.
#if defined(__clang__)
#define GRL_EXT_VECTORISE _Pragma("clang loop vectorize(assume_safety)")
#else
#define GRL_EXT_VECTORISE _Pragma("GCC ivdep")
#endif

template <class T, class Wide>
void scale(void* out_, const void* grad_, long n, double factor_) {
  auto* out = static_cast<T*>(out_);
  const auto* grad = static_cast<const T*>(grad_);
  const auto factor = static_cast<Wide>(factor_);
  if (factor == 0) {
    __builtin_memset(out, 0, n * sizeof(T));
    return;
  }
  GRL_EXT_VECTORISE
  for (long i = 0; i < n; ++i) {
    out[i] = narrow<T, Wide>(factor * widen(grad[i]));
  }
}

template <class T, class Wide>
void scale_each(void* out_, const void* grad_, long n, double factor_, const void* each_) {
  auto* out = static_cast<T*>(out_);
  const auto* grad = static_cast<const T*>(grad_);
  const auto* each = static_cast<const Wide*>(each_);
  const auto factor = static_cast<Wide>(factor_);
  GRL_EXT_VECTORISE
  for (long i = 0; i < n; ++i) {
    const Wide product = factor * each[i];
    out[i] = narrow<T, Wide>(unless(product == 0, product * widen(grad[i])));
  }
}
