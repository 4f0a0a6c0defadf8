// Forward and backward of a head that has several linear layers with ReLU between them, by matrix products.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "scale.h"

namespace grl_ext {

// One head's layers, and which gradients are needed.
struct LayersOfHead {
  std::vector<at::Tensor> weight;
  std::vector<std::optional<at::Tensor>> bias;
  std::vector<bool> needs_weight, needs_bias;
  bool needs_x;

  size_t depth() const { return weight.size(); }

  // Whether the gradient of layer l's input is needed.
  bool needs_input(size_t l) const;
};

struct GradientsOfLayers {
  std::vector<at::Tensor> dw, db;  // undefined where not needed
  at::Tensor first;                // of the first layer's output; undefined if x needs none
};

// Each layer's input: x, then the outputs of the hidden layers, after their ReLU.
std::vector<at::Tensor> inputs_of_layers(const at::Tensor& x, const LayersOfHead& layers);

// The gradient of ReLU's input, from `grad`, that of its `output`. Overwrites `grad` where no graph is recorded.
at::Tensor relu_gradient(at::Tensor grad, const at::Tensor& output);

// Backward through the first `depth` layers. `grad` is the gradient of layer depth-1's output. Consumes `inputs`.
void gradients_of_layers(
    GradientsOfLayers& gradients, at::Tensor grad, std::vector<at::Tensor> inputs, const LayersOfHead& layers,
    size_t depth);

// Adds factor * grad weight to dx, which may be undefined.
void add_scaled_product(at::Tensor& dx, const at::Tensor& grad, const at::Tensor& weight, const Factor& factor);

}  // namespace grl_ext
