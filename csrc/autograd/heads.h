// What the operations on linear layers share: features as rows, the edges of their nodes, the heads' factors, and what
// is computed for some of the heads only.
#pragma once

#include <ATen/core/List.h>
#include <ATen/ops/_unsafe_view.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "../gradient_slots.h"
#include "../heads_options.h"

namespace grl_ext {

// (..., D) -> (N, D)
inline at::Tensor as_rows(const at::Tensor& x) {
  if (x.dim() == 2) {
    return x;
  }
  c10::SymInt rows = 1;  // not -1, which is ambiguous without features
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    rows *= x.sym_size(d);
  }
  return x.reshape_symint({rows, x.sym_size(-1)});
}

// The sizes (..., K) for rows (N, K), with the leading sizes of `like`.
inline std::vector<c10::SymInt> leading_sizes(const at::Tensor& rows, const at::Tensor& like) {
  auto sizes = like.sym_sizes().vec();
  sizes.back() = rows.sym_size(-1);
  return sizes;
}

// Rows in that shape, which nobody else may hold: the result is not marked as a view. Neither is F.linear's. A view
// would lose its hooks when it is modified in place.
inline at::Tensor with_leading_sizes(const at::Tensor& rows, const at::Tensor& like) {
  return like.dim() == 2 ? rows : at::_unsafe_view_symint(rows, leading_sizes(rows, like));
}

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
bool any_defined(at::TensorList tensors);
bool any_batched_or_dual(at::TensorList tensors);

// A node's edges: to x, to each weight, to each bias.
torch::autograd::edge_list edges_of(const HeadInputs& inputs);

// Which heads of a node a backward that frees the graph has gone through. It can go through each once, as through
// separate layers; what they share is freed after the last of them. The caller holds the node's mutex.
class HeadsPassed {
 public:
  explicit HeadsPassed(size_t heads) : begun_(heads), passed_(heads) {}

  // At the beginning of a backward: is_asked(h) says whether it goes through head h.
  template <class F>
  void begin(const F& is_asked) {
    const bool frees = !torch::autograd::get_current_graph_task_keep_graph();
    for (size_t h = 0; h < passed_.size(); ++h) {
      if (is_asked(h)) {
        TORCH_CHECK(!passed_[h], torch::autograd::ERR_BACKWARD_TWICE);
        begun_[h] = begun_[h] || frees;
      }
    }
  }

  // After one that has succeeded: whether some heads are still to come.
  bool end_in_part() {
    passed_ = begun_;
    const auto count = std::count(passed_.begin(), passed_.end(), true);
    return count > 0 && static_cast<size_t>(count) < passed_.size();
  }

 private:
  std::vector<bool> begun_, passed_;
};

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

HeadsOptions some(const HeadsOptions& options, const std::vector<size_t>& heads);

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
