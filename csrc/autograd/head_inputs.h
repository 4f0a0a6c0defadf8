// What linear_heads and heads_loss share: their inputs as rows, their edges in the graph, and lambda.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <optional>
#include <vector>

#include "../heads_options.h"
#include "linear.h"
#include "scale.h"

namespace grl_ext {

// The linear layers of all heads: those of head 0, then those of head 1, and so on.
struct HeadLayers {
  std::vector<at::Tensor> weight;
  OptionalTensors bias;
};

// Features as rows, and the layers; in autocast's dtype where autocast is on.
struct HeadInputs {
  at::Tensor features;  // as given, for its leading sizes
  at::Tensor x;         // (N, D)
  HeadLayers layers;
};

HeadInputs prepare(const at::Tensor& x, at::TensorList weight, const OptionalTensors& bias);

bool any_requires_grad(const at::Tensor& x, const HeadLayers& layers);

// A node's edges: to x, to each weight, to each bias.
torch::autograd::edge_list edges_of(const at::Tensor& x, const HeadLayers& layers);

// Lambda or loss weights, to be read later. From the CPU a copy, because they may change before the backward. On a GPU
// the tensor itself: kernels read what it holds when they run.
at::Tensor numbers_now(const at::Tensor& values);

// A head's factor in the features' gradient: -lambda for an adversary, 1 for a predictor, whose index is -1.
Factor factor_of(const at::Tensor& lambda, int64_t index);

// The same for all heads, as the kernels take it.
struct KernelFactors {
  std::vector<double> factor;
  OptionalTensors lambda;
};
KernelFactors kernel_factors(const at::Tensor& lambda, at::IntArrayRef lambda_index);

c10::List<bool> to_list(const std::vector<bool>& values);

}  // namespace grl_ext
