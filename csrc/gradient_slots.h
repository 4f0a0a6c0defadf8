// The order in which autograd and the kernels list the gradients of linear layers: that of x, those of the weights,
// those of the biases. `needs` of an operator and the edges of a node have the same order.
#pragma once

#include <cstddef>

namespace grl_ext {

struct GradientSlots {
  size_t layers;

  static constexpr size_t x() { return 0; }

  constexpr size_t weight(size_t layer) const { return 1 + layer; }

  constexpr size_t bias(size_t layer) const { return 1 + layers + layer; }

  constexpr size_t count() const { return 1 + 2 * layers; }
};

}  // namespace grl_ext
