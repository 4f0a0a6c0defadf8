// What is said of the heads of a loss, from the operator's schema down to the kernels: element h of each list is head h's.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>
#include <vector>

namespace grl_ext {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

enum LossKind : int64_t { kCrossEntropy = 0, kSquaredError = 1 };

struct HeadsOptions {
  std::vector<at::Tensor> targets; // (N): classes; (N, size): probabilities, or a squared error's values
  OptionalTensors sample_weight;   // (N), or none: 1
  OptionalTensors class_weight;    // (classes), or none: 1; a head of size 1 has two classes
  at::Tensor lambda;               // the adversaries' numbers
  std::vector<int64_t> lambda_index;  // the head's number among them; -1 for a predictor
  std::optional<at::Tensor> loss_weight;
  std::vector<int64_t> kind;
  std::vector<double> label_smoothing;
  std::vector<int64_t> ignore_index;
  bool mean = true;  // or the sum over the rows
};

inline int64_t classes_of(int64_t head_size) {
  return head_size > 1 ? head_size : 2;
}

}  // namespace grl_ext
