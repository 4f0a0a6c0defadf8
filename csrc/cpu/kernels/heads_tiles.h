// What the heads' matrix products share: loops over register tiles, unrolled. tuning.h has the tiles' shapes.
//
// The products take one block of rows at a time: the logits (heads_logits.h), then the losses (heads_loss.h), then the
// gradients (heads_gradients.h, or heads_gradients_narrow.h). With N rows, D features and K columns (all heads together)
// the arithmetic is 6 N D K and the least traffic 2 N D elements. A block of rows stays in the L2 cache from the logits
// to the gradients, so that features are read from memory once. z, g: K x kMaxBlockRows, one column after the other, so
// that the losses' vectors run over rows.

template <int N>
struct Constant {
  static constexpr int kValue = N;
};

// Calls f with the compile-time constant equal to n, 1 <= n <= Max. f is passed by reference: copying a large closure
// that was just written would wait for its stores.
template <int Max, class F>
inline void with_constant(int n, const F& f) {
  if constexpr (Max > 1) {
    if (n < Max) {
      return with_constant<Max - 1>(n, f);
    }
  }
  f(Constant<Max>{});
}
