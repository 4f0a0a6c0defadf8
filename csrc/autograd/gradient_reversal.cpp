// gradient_reversal: a view forward, -lambda * grad backward, in place where nobody else can see the gradient.
//
// A hand-made node instead of torch::autograd::Function: it costs half as much per call, and it receives the engine's
// own gradient list, so that the use counts in it are true (Function's wrapper holds a copy).
#include <pytorch.h>

#include <ATen/ops/alias.h>
#include <ATen/ops/isfinite.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <cmath>

#include "../accepted.h"
#include "../ops.h"
#include "node.h"
#include "scale.h"

namespace grl_ext {
namespace {

using torch::autograd::variable_list;

class GradientReversalBackward : public TraceableNode<GradientReversalBackward> {
 public:
  explicit GradientReversalBackward(const Factor& factor) : factor_(factor) {}

  std::string name() const override { return "GradientReversalBackward"; }

  variable_list apply(variable_list&& grads) override {
    at::Tensor grad = std::move(grads[0]);
    if (!grad.defined() || !should_compute_output(0)) {
      return {at::Tensor()};
    }
    const auto factor = [this] {
      const std::lock_guard<std::mutex> lock(mutex_);
      return factor_.unpack();
    }();
    return {scale(std::move(grad), factor)};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    factor_.release();
  }

  template <class Visit>
  void each_saved(Visit visit) {
    factor_.each_saved(visit);
  }
  void collect_constants(torch::dynamo::autograd::CompiledNodeArgs& args) const { factor_.collect_constants(args); }
  TracedBackward traced() const {
    return [factor = factor_.traced()](const variable_list& grads, const variable_list& saved) -> variable_list {
      return {grads[0].defined() ? scale(grads[0], factor(saved[0], saved[1])) : at::Tensor()};
    };
  }

 private:
  SavedFactor factor_;
};

}  // namespace

at::Tensor with_scaled_gradient(const at::Tensor& x, const Factor& factor) {
  const bool has_tangent = torch::autograd::isFwGradDefined(x);
  const bool needs_grad = at::GradMode::is_enabled() && x.requires_grad();
  if (!at::GradMode::is_enabled() && !has_tangent) {
    return at::alias(x);
  }
  at::Tensor y;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    y = at::alias(x);
  }
  // Marked like the view of a custom Function: an in-place operation on it raises PyTorch's own error instead of
  // bypassing the node. Marked also where x requires no gradient yet: after x.add_(w), with a w that requires one, a
  // plain view would pass the gradient on without reversing it.
  y = torch::autograd::as_view(
      x, y, /*is_bw_differentiable=*/true, /*is_fw_differentiable=*/false, /*view_func=*/nullptr,
      /*rev_view_func=*/nullptr, torch::autograd::CreationMeta::IN_CUSTOM_FUNCTION);
  if (needs_grad) {
    auto node = make_node<GradientReversalBackward>(factor);
    node->set_next_edges(torch::autograd::collect_next_edges(x));
    torch::autograd::set_history(y, node);
  }
  if (has_tangent) {
    y._set_fw_grad(scale_composite(x._fw_grad(/*level=*/0), factor), /*level=*/0, /*is_inplace_op=*/false);
  }
  return y;
}

namespace {

// As far as the host can tell without waiting.
bool is_finite(const Factor& factor) {
  if (!factor.tensor) {
    return std::isfinite(factor.value);
  }
  const bool readable = factor.tensor->is_cpu() && is_plain(*factor.tensor) && !c10::impl::dispatch_mode_enabled();
  return !readable || at::isfinite(factor.tensor->detach()).all().item<bool>();
}

}  // namespace

at::Tensor gradient_reversal_by_value(const at::Tensor& x, double lambda) {
  return with_scaled_gradient(x, reversed(lambda));
}

std::optional<at::Tensor> gradient_reversal(const at::Tensor& x, const at::Tensor& lambda) {
  refuse_functorch();
  if (!accepts_lambda(x, lambda)) {
    return std::nullopt;
  }
  const auto factor = reversed(lambda);
  return is_finite(factor) ? std::optional(with_scaled_gradient(x, factor)) : std::nullopt;
}

}  // namespace grl_ext
