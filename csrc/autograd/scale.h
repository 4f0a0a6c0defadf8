// A gradient times a factor, for the nodes: the kernel in place, the kernel into a new tensor, or ATen operators. The
// factor of a reversal is -lambda; its minus is made here, in reversed(), and nowhere else.
#pragma once

#include <ATen/ops/scalar_tensor.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <functional>
#include <optional>
#include <vector>

#include "../heads_options.h"

namespace grl_ext {

// The factor as a node keeps it. A 0-d CPU tensor becomes a number now: reading it is cheap, and later changes of the
// tensor do not reach a graph already built. Where its value cannot be read (a tracer, a subclass), a copy does the
// same. A tensor that requires grad stays a tensor, because gradients of gradients need it. Its value is read when the
// backward runs, from the host if it is there: copying it to a GPU would wait for the GPU, and fail during the capture
// of a CUDA graph.
Factor read_factor(const at::Tensor& factor);

// -lambda, in the same form.
Factor reversed(const at::Tensor& lambda);
Factor reversed(double lambda);

// Who made a gradient. On this depends whether it may be overwritten when it has a single owner on the host.
//
// Kernels queued on a CUDA stream are not counted as owners. Take z = a + reversal(b), with a made on one stream and b
// on another. The engine hands the same gradient to both branches. a's backward queues its kernels on a's stream and
// releases the gradient. Then b's node, on its own stream, is the only owner of memory that the other stream still has
// to read. A node cannot tell this from the harmless case:
// - the stream of the gradient's producer may be the node's own, and so may the default stream, which waits for no
// other;
// - whoever else got the gradient comes later in the forward and is gone in the backward;
// - record_stream keeps the allocator from handing the memory on, but not this node from writing to it.
// So a gradient from the engine is overwritten only on the CPU, where operators have ended when they return. On CUDA a
// pass in place moves as many bytes as one out of place; it would only save memory until the incoming gradient is
// freed.
enum class Made {
  kElsewhere,   // it comes from the engine
  kByThisNode,  // and nobody else ever had it
};

// Takes `grad` over: pass it by std::move, so that its use count is true and it can be scaled in place.
at::Tensor scale(at::Tensor grad, const Factor& factor, Made made = Made::kElsewhere);

// The same for all gradients that a node has made, by one factor. They have one dtype, and some may be undefined. Those
// that may be overwritten are scaled in one call, which on CUDA is one launch.
void scale_list(std::vector<at::Tensor>& grads, const Factor& factor);

// The same in ATen operators, as in grl_ext/_reversal.py: differentiable, traceable, for every device and layout.
at::Tensor scale_composite(const at::Tensor& grad, const Factor& factor);

// x, whose gradient will be multiplied by the factor. Defined beside gradient_reversal.
at::Tensor with_scaled_gradient(const at::Tensor& x, const Factor& factor);

// A node's factor between forward and backward.
class SavedFactor {
 public:
  explicit SavedFactor(const Factor& factor) : value_(factor.value), has_tensor_(factor.tensor.has_value()) {
    if (has_tensor_) {
      // A 0-d tensor is a setting that may change, like a capturable optimizer's learning rate: the kernel reads what
      // it holds when it runs, also in a replayed CUDA graph. Saved with a version counter of its own, so that a change
      // raises no error. Any other tensor is data, which must not change.
      const auto& tensor = *factor.tensor;
      const bool live = tensor.dim() == 0 && !tensor.requires_grad();
      tensor_ = torch::autograd::SavedVariable(live ? tensor.variable_data() : tensor, /*is_output=*/false);
    }
  }

  // The caller of this and of release() holds the node's mutex.
  Factor unpack() const { return {value_, has_tensor_ ? std::optional(tensor_.unpack()) : std::nullopt}; }

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
  // Makes the factor of a traced backward from the two tensors that each_saved visits.
  std::function<Factor(const at::Tensor& tensor, const at::Tensor& number)> traced() const {
    return [value = value_, has_tensor = has_tensor_](const at::Tensor& tensor, const at::Tensor& number) -> Factor {
      return has_tensor ? Factor{value, tensor} : Factor{1, number};
    };
  }

  void release() { tensor_.reset_data(); }

 private:
  double value_;
  bool has_tensor_;
  torch::autograd::SavedVariable tensor_;
  at::Tensor number_;
};

// Makes several factors from the tensors that their each_saved visit, one factor after the other.
inline std::function<std::vector<Factor>(std::vector<at::Tensor>::const_iterator saved)> traced_factors(
    const std::vector<SavedFactor>& factors) {
  std::vector<std::function<Factor(const at::Tensor&, const at::Tensor&)>> makers;
  for (const auto& factor : factors) {
    makers.push_back(factor.traced());
  }
  return [makers = std::move(makers)](auto saved) {
    std::vector<Factor> made;
    for (const auto& make : makers) {
      made.push_back(make(saved[0], saved[1]));
      saved += 2;
    }
    return made;
  };
}

}  // namespace grl_ext
