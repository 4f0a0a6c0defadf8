// -lambda * grad for the nodes: the kernel in place, the kernel into a new tensor, or ATen operators.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <functional>
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

// A 0-d CPU lambda becomes a number now: reading it is cheap, and later changes of it cannot reach into a graph already built. Where
// its value cannot be looked at (a tracer, a subclass), a copy does the same.
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

  // For TraceableNode. A number is saved as a tensor there, so that one graph serves all its values.
  template <class Visit>
  void each_saved(Visit visit) {
    if (!has_tensor_ && !number_.defined()) {
      number_ = at::scalar_tensor(value_, at::kDouble);
    }
    visit(tensor_);
    visit(number_);
  }
  void collect_constants(torch::dynamo::autograd::CompiledNodeArgs& args) const {
    args.collect(has_tensor_);
    if (has_tensor_) {
      args.collect(value_);
    }
  }
  // The lambda in a traced backward, of the tensors that each_saved visited.
  std::function<Lambda(const at::Tensor& tensor, const at::Tensor& number)> traced() const {
    return [value = value_, has_tensor = has_tensor_](const at::Tensor& tensor, const at::Tensor& number) -> Lambda {
      return has_tensor ? Lambda{value, tensor} : Lambda{1.0, number};
    };
  }

  // The caller holds the node's mutex.
  void release() {
    tensor_.reset_data();
  }

 private:
  double value_;
  bool has_tensor_;
  torch::autograd::SavedVariable tensor_;
  at::Tensor number_;
};

}  // namespace grl_ext
