// linear_heads: one linear layer for all heads, whose gradient to x counts each head with its own scale.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "../checks.h"
#include "../ops.h"
#include "heads.h"
#include "linear.h"
#include "node.h"
#include "scale_negate.h"

namespace grl_ext {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Head by head, as the layers would do it, so that gradients of gradients cross each head's scale where the layers' would.
std::tuple<Tensor, Tensor, Tensor> heads_gradients_composite(
    const Tensor& grad_logits, const Tensor& x, const Tensor& weight, at::IntArrayRef head_sizes, const Tensor& grad_scale,
    std::array<bool, 3> needs) {
  Tensor dx;
  std::vector<Tensor> dw;
  int64_t start = 0;
  for (size_t h = 0; h < head_sizes.size(); ++h) {
    const auto dz = grad_logits.narrow(1, start, head_sizes[h]);
    const auto lambda = grad_scale.select(0, static_cast<int64_t>(h)).neg();
    if (needs[0]) {
      const auto part = scale_negate_composite(dz, {1.0, lambda}).mm(weight.narrow(0, start, head_sizes[h]));
      dx = dx.defined() ? dx + part : part;
    }
    if (needs[1]) {
      dw.push_back(dz.t().mm(at::GradMode::is_enabled() ? gradient_reversal(x, lambda) : x));
    }
    start += head_sizes[h];
  }
  return {dx, needs[1] ? at::cat(dw) : Tensor(), needs[2] ? grad_logits.sum(0) : Tensor()};
}

class LinearHeadsBackward : public torch::autograd::Node {
 public:
  LinearHeadsBackward(const Tensor& x, const Tensor& weight, at::IntArrayRef head_sizes, const Tensor& grad_scale)
      : head_sizes_(head_sizes.vec()), grad_scale_(per_head_now(grad_scale)) {
    if (weight.requires_grad()) {
      x_ = SavedVariable(x, /*is_output=*/false);
    }
    if (x.requires_grad()) {
      weight_ = SavedVariable(weight, /*is_output=*/false);
    }
  }

  std::string name() const override {
    return "LinearHeadsBackward";
  }

  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) {
      return variable_list(num_outputs());
    }
    const bool has_bias = num_outputs() > 2;
    const std::array<bool, 3> needs{should_compute_output(0), should_compute_output(1), has_bias && should_compute_output(2)};
    Tensor x, weight;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      x = needs[1] ? x_.unpack() : Tensor();
      weight = needs[0] ? weight_.unpack() : Tensor();
    }
    auto [dx, dw, db] = heads_gradients(grads[0], x, weight, head_sizes_, grad_scale_, needs);
    return has_bias ? variable_list{dx, dw, db} : variable_list{dx, dw};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    x_.reset_data();
    weight_.reset_data();
  }

 private:
  SavedVariable x_, weight_;
  const std::vector<int64_t> head_sizes_;
  const Tensor grad_scale_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> heads_gradients(
    const Tensor& grad_logits, const Tensor& x, const Tensor& weight, at::IntArrayRef head_sizes, const Tensor& grad_scale,
    std::array<bool, 3> needs) {
  static const auto kernel = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("grl_ext::_heads_gradients", "")
                                 .typed<std::tuple<Tensor, Tensor, Tensor>(
                                     const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&, at::IntArrayRef,
                                     const Tensor&, std::array<bool, 3>)>();
  if (at::GradMode::is_enabled() || is_batched(grad_logits)) {
    return heads_gradients_composite(grad_logits, x, weight, head_sizes, grad_scale, needs);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto given = [](const Tensor& tensor) { return tensor.defined() ? std::optional(tensor) : std::nullopt; };
  auto [dx, dw, db] = kernel.call(grad_logits, given(x), given(weight), head_sizes, grad_scale, needs);
  return {needs[0] ? dx : Tensor(), needs[1] ? dw : Tensor(), needs[2] ? db : Tensor()};
}

Tensor linear_heads(
    const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_, at::IntArrayRef head_sizes,
    const Tensor& grad_scale) {
  static const auto kernel = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("grl_ext::_heads_logits", "")
                                 .typed<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&)>();
  refuse_functorch();
  refuse_forward_mode(x_, weight_, bias_);
  const auto [inputs_x, weight, bias] = autocast(x_, weight_, bias_);
  check_heads(inputs_x, weight, bias, head_sizes, grad_scale);
  const auto x = as_rows(inputs_x);
  Tensor logits;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    logits = kernel.call(x, weight, bias);
  }
  if (any_requires_grad(x, weight, bias)) {
    auto node = make_node<LinearHeadsBackward>(x, weight, head_sizes, grad_scale);
    node->set_next_edges(
        bias ? torch::autograd::collect_next_edges(x, weight, *bias) : torch::autograd::collect_next_edges(x, weight));
    torch::autograd::set_history(logits, node);
  }
  return with_leading_sizes(logits, inputs_x);
}

}  // namespace grl_ext
