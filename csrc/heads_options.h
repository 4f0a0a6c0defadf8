// What describes heads, as schema and kernels take it. Element h of each list belongs to head h.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace grl_ext {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

enum LossKind : int64_t { kCrossEntropy = 0, kSquaredError = 1, kBinaryCrossEntropy = 2 };

// Whether each output has a target and a loss of its own, over which a row's loss is summed. Otherwise a softmax joins
// them.
inline bool is_by_output(int64_t kind) {
  return kind == kSquaredError || kind == kBinaryCrossEntropy;
}

// What a gradient is multiplied by: value, times the tensor if there is one.
struct Factor {
  double value = 1;
  std::optional<at::Tensor> tensor;
};

struct HeadsOptions {
  std::vector<at::Tensor> targets;  // (N): classes; (N, size): probabilities, or what is_by_output() kinds compare with
  OptionalTensors sample_weight;  // (N), or none: 1; (N, size) where the loss is by output
  OptionalTensors class_weight;  // (classes), or none: 1; a head of size 1 has two classes
  std::optional<at::Tensor> loss_weight;  // (heads), or none: 1
  std::vector<int64_t> kind;  // LossKind
  std::vector<double> label_smoothing;
  std::vector<int64_t> ignore_index;
  bool mean = true;  // over the rows; false: their sum
};

// grad_x, grad_weight, grad_bias
using HeadsGradients = std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>>;

// loss, head_losses, logits, grad_logits, grad_x, grad_weight, grad_bias
using HeadsLossResult = std::tuple<
    at::Tensor, at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor, std::vector<at::Tensor>,
    std::vector<at::Tensor>>;

// Of the gradients that are made from those of the logits, which may have the wider type that they are computed in.
inline at::ScalarType gradients_type(
    const at::Tensor& grad_logits, const std::optional<at::Tensor>& x, at::TensorList weight) {
  return x ? x->scalar_type() : !weight.empty() ? weight[0].scalar_type() : grad_logits.scalar_type();
}

inline int64_t classes_of(int64_t head_size) {
  return head_size > 1 ? head_size : 2;
}

}  // namespace grl_ext
