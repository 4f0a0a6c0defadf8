// What linear_heads and heads_loss share: features as rows, the edges of their nodes, the heads' factors, and what is
// computed for some of the heads only.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/variable.h>

#include <optional>
#include <vector>

#include "../gradient_slots.h"
#include "../heads_options.h"
#include "linear.h"

namespace grl_ext {

struct HeadInputs {
  at::Tensor x;  // (N, D)
  std::vector<at::Tensor> weight;
  OptionalTensors bias;
  std::vector<Factor> factors;  // of each head's part in the gradient of x

  size_t count() const { return weight.size(); }

  GradientSlots slots() const { return {weight.size()}; }
};

// The arguments in autocast's dtype where autocast is on, x still with its leading sizes; nothing if the operators do not
// take them. Raises PyTorch's own error inside a torch.func transform, and one where forward mode is used.
std::optional<HeadInputs> prepare(
    const at::Tensor& x, at::TensorList weight, const OptionalTensors& bias, std::vector<Factor> factors);

// Which gradients are to be recorded, by GradientSlots; all false where none is.
std::vector<bool> recorded(const HeadInputs& inputs);

bool any(const std::vector<bool>& flags);

// A node's edges: to x, to each weight, to each bias.
torch::autograd::edge_list edges_of(const HeadInputs& inputs);

// As the kernels take them.
c10::List<bool> to_list(const std::vector<bool>& values);
std::pair<std::vector<double>, OptionalTensors> to_lists(const std::vector<Factor>& factors);

std::optional<at::Tensor> to_optional(const at::Tensor& tensor);

// Entries of some heads.
template <class T>
std::vector<T> some(const std::vector<T>& values, const std::vector<size_t>& heads) {
  std::vector<T> chosen;
  chosen.reserve(heads.size());
  for (const auto h : heads) {
    chosen.push_back(values[h]);
  }
  return chosen;
}

OptionalTensors some(const OptionalTensors& values, const std::vector<size_t>& heads);

HeadInputs some(const HeadInputs& inputs, const std::vector<size_t>& heads);

// The flags of some heads, by GradientSlots of those.
std::vector<bool> needs_of(const std::vector<bool>& needs, const std::vector<size_t>& heads);

// The gradients of some heads at their places among those of all; undefined where not needed.
torch::autograd::variable_list among_all(
    HeadsGradients gradients, const std::vector<size_t>& heads, const std::vector<bool>& needs);

// From the gradients of the heads' logits, of which some may be undefined: those heads are left out. By the kernel; by
// ATen operators for gradients of gradients and for batches of gradients. x may be undefined where no weight needs a
// gradient, and the weights where x needs none.
torch::autograd::variable_list gradients_of_heads(
    const torch::autograd::variable_list& grad_logits, const HeadInputs& inputs, const std::vector<bool>& needs);

}  // namespace grl_ext
