// -lambda * grad for the nodes: the kernel in place, the kernel into a new tensor, or ATen operators.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <mutex>
#include <optional>

namespace grl_ext {

// A number; times a tensor for the backward to read, if there is one. Where that has more than one element the number is 1.
struct Lambda {
  double value = 1.0;
  std::optional<at::Tensor> tensor;
};

// Takes `grad` over: pass it by std::move, so that its use count is true and it can be scaled in place.
at::Tensor scale_negate(at::Tensor grad, const Lambda& lambda);

// In ATen operators, as _reference.scale_negate has it: differentiable, traceable, for every device and layout.
at::Tensor scale_negate_composite(const at::Tensor& grad, const Lambda& lambda);

// A 0-d CPU lambda becomes a number now: reading it is cheap, and later changes of it cannot reach into a graph already built.
Lambda read_lambda(const at::Tensor& lambda);

// A node's lambda between forward and backward.
class SavedLambda {
 public:
  explicit SavedLambda(const Lambda& lambda) : value_(lambda.value), has_tensor_(lambda.tensor.has_value()) {
    if (has_tensor_) {
      // A 0-d tensor is a live setting, as a capturable optimizer's learning rate: the kernel reads what it holds by then,
      // also in a replayed CUDA graph. Hence its own version counter. Any other is data, and must not change.
      const auto& tensor = *lambda.tensor;
      const bool live = tensor.dim() == 0 && !tensor.requires_grad();
      tensor_ = torch::autograd::SavedVariable(live ? tensor.variable_data() : tensor, /*is_output=*/false);
    }
  }

  Lambda unpack(std::mutex& mutex) const {
    if (!has_tensor_) {
      return {value_, std::nullopt};
    }
    const std::lock_guard<std::mutex> lock(mutex);
    return {value_, tensor_.unpack()};
  }

  // The caller holds the node's mutex.
  void release() {
    tensor_.reset_data();
  }

 private:
  double value_;
  bool has_tensor_;
  torch::autograd::SavedVariable tensor_;
};

}  // namespace grl_ext
