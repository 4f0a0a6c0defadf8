// The options of heads_loss, as schema and kernels take them. Element h of each list belongs to head h.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace grl_ext {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

enum LossKind : int64_t { kCrossEntropy = 0, kSquaredError = 1 };

struct HeadsOptions {
  std::vector<at::Tensor> targets; // (N): classes; (N, size): probabilities, or a squared error's values
  OptionalTensors sample_weight;   // (N), or none: 1
  OptionalTensors class_weight;    // (classes), or none: 1; a head of size 1 has two classes
  at::Tensor lambda;               // (adversaries): one number each
  std::vector<int64_t> lambda_index;  // which of them is the head's; -1 for a predictor, which has none
  std::optional<at::Tensor> loss_weight;  // (heads), or none: 1
  std::vector<int64_t> kind;              // LossKind
  std::vector<double> label_smoothing;
  std::vector<int64_t> ignore_index;
  bool mean = true;  // over the rows; false: their sum
};

// What the operators return: the gradients of the features, of each head's weight and of each head's bias,
using HeadsGradients = std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>>;
// and the loss, each head's loss, each head's logits, and then those gradients.
using HeadsLossResult = std::tuple<
    at::Tensor, at::Tensor, std::vector<at::Tensor>, at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>>;

inline int64_t classes_of(int64_t head_size) {
  return head_size > 1 ? head_size : 2;
}

}  // namespace grl_ext
