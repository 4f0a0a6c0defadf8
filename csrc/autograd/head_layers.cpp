#include "head_layers.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "node.h"

namespace grl_ext {

using at::Tensor;

namespace {

// Whether a gradient may be overwritten: no graph is recorded, and it is not a batch of gradients (vmap).
bool in_place(const Tensor& grad) {
  return !at::GradMode::is_enabled() && !is_batched(grad);
}

// The gradient of a hidden layer's output from that of the layer above. Where no graph is recorded it is written over
// the output, some rows at a time: a step with large hidden layers then never holds both.
Tensor hidden_gradient(const Tensor& grad, const Tensor& weight, const Tensor& output) {
  constexpr int64_t kPieces = 4, kRowsOfPiece = 256;  // fewer rows would make slower products
  if (!in_place(grad) || !is_plain(output) || output.size(0) < kPieces * kRowsOfPiece) {
    return relu_gradient(grad.mm(weight), output);
  }
  const int64_t rows = output.size(0);
  for (int64_t i = 0; i < kPieces; ++i) {
    const int64_t begin = rows * i / kPieces, count = rows * (i + 1) / kPieces - begin;
    auto piece = output.narrow(0, begin, count);
    at::threshold_backward_out(piece, grad.narrow(0, begin, count).mm(weight), piece, 0);
  }
  return output;
}

}  // namespace

bool LayersOfHead::needs_input(size_t l) const {
  const auto any = [&](const std::vector<bool>& needs) {
    return std::find(needs.begin(), needs.begin() + static_cast<std::ptrdiff_t>(l), true) !=
        needs.begin() + static_cast<std::ptrdiff_t>(l);
  };
  return needs_x || any(needs_weight) || any(needs_bias);
}

std::vector<Tensor> inputs_of_layers(const Tensor& x, const LayersOfHead& layers) {
  std::vector<Tensor> inputs{x};
  for (size_t l = 0; l + 1 < layers.depth(); ++l) {
    auto output = at::linear(inputs.back(), layers.weight[l], layers.bias[l]);
    inputs.push_back(at::GradMode::is_enabled() ? output.relu() : output.relu_());
  }
  return inputs;
}

Tensor relu_gradient(Tensor grad, const Tensor& output) {
  return in_place(grad) ? at::threshold_backward_out(grad, grad, output, 0) : at::threshold_backward(grad, output, 0);
}

void gradients_of_layers(
    GradientsOfLayers& gradients, Tensor grad, std::vector<Tensor> inputs, const LayersOfHead& layers, size_t depth) {
  for (size_t l = depth; l-- > 0;) {
    if (layers.needs_weight[l]) {
      gradients.dw[l] = grad.t().mm(inputs[l]);
    }
    if (layers.needs_bias[l]) {
      gradients.db[l] = grad.sum(0);
    }
    if (l > 0 && layers.needs_input(l)) {
      grad = hidden_gradient(grad, layers.weight[l], inputs[l]);
      inputs.pop_back();
    } else {
      gradients.first = l == 0 && layers.needs_x ? std::move(grad) : Tensor();
      return;
    }
  }
}

void add_scaled_product(Tensor& dx, const Tensor& grad, const Tensor& weight, const Factor& factor) {
  const bool add_in_place = in_place(grad) && (!dx.defined() || in_place(dx));
  if (!factor.tensor && factor.value == 0) {  // not multiplied by 0: the weight may be infinite
    dx = dx.defined() ? dx : grad.new_zeros_symint({grad.sym_size(0), weight.sym_size(1)});
  } else if (!factor.tensor && dx.defined()) {
    dx = add_in_place ? dx.addmm_(grad, weight, 1, factor.value) : dx.addmm(grad, weight, 1, factor.value);
  } else if (!factor.tensor) {
    // With beta = 0 the values of the first argument are ignored. Under vmap they are multiplied all the same, hence
    // zeros.
    dx = at::addmm(grad.new_zeros({1, 1}), grad, weight, /*beta=*/0, /*alpha=*/factor.value);
  } else {
    const auto part = scale(grad.mm(weight), factor, Made::kByThisNode);
    dx = !dx.defined() ? part : add_in_place ? dx.add_(part) : dx + part;
  }
}

}  // namespace grl_ext
