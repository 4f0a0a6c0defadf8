// What the operators on several heads share.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../heads.h"
#include "linear.h"

namespace grl_ext {

// The linear layers of all heads, those of one head after the other.
struct HeadLayers {
  std::vector<at::Tensor> weight;
  OptionalTensors bias;
};

// Features as rows, and the layers, all in autocast's dtype where it is on.
struct HeadInputs {
  at::Tensor features;  // as given, for its leading sizes
  at::Tensor x;         // (N, D)
  HeadLayers layers;
};

HeadInputs prepare(const at::Tensor& x, at::TensorList weight, const OptionalTensors& bias);

bool any_requires_grad(const at::Tensor& x, const HeadLayers& layers);

// A node's edges: to x, to each weight, to each bias.
torch::autograd::edge_list edges_of(const at::Tensor& x, const HeadLayers& layers);

// (dx, dw, db) of linear heads from the gradients of their logits, dx with each head's scale. By the kernel, or by ATen operators
// where gradients of gradients or many gradients at once are asked for. What is not needed comes back undefined; x may be undefined
// where no weight needs it, weight empty where x does not.
std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> heads_gradients(
    const std::vector<at::Tensor>& grad_logits, const at::Tensor& x, const std::vector<at::Tensor>& weight,
    const at::Tensor& lambda, const std::vector<int64_t>& lambda_index, const std::vector<bool>& needs);

// The adversaries' numbers as they are now: what is on the CPU may change before the backward, what is on a device is read there.
at::Tensor numbers_now(const at::Tensor& values);

// A head's lambda; -1, which leaves the gradient alone, for a predictor.
at::Tensor lambda_of(const at::Tensor& lambda, int64_t index);

c10::List<bool> to_list(const std::vector<bool>& values);

}  // namespace grl_ext
