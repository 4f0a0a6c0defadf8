// linear_heads: linear layers over the same features, whose gradient to the features counts each adversary with its -lambda.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>

#include "../heads_checks.h"
#include "../ops.h"
#include "heads.h"
#include "node.h"
#include "scale_negate.h"

namespace grl_ext {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

using Gradients = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>>;

// Head by head, as the layers would do it, so that gradients of gradients cross each head's reversal where the layers' would.
Gradients heads_gradients_composite(
    const std::vector<Tensor>& grad_logits, const Tensor& x, const std::vector<Tensor>& weight, const Tensor& lambda,
    const std::vector<int64_t>& lambda_index, const std::vector<bool>& needs) {
  const auto heads = grad_logits.size();
  Tensor dx;
  std::vector<Tensor> dw(heads), db(heads);
  for (size_t h = 0; h < heads; ++h) {
    const auto& dz = grad_logits[h];
    const bool adversary = lambda_index[h] >= 0;
    const auto own = lambda_of(lambda, lambda_index[h]);
    if (needs[0]) {
      const auto part = dz.mm(weight[h]);
      const auto scaled = adversary ? scale_negate_composite(part, {1.0, own}) : part;
      dx = dx.defined() ? dx + scaled : scaled;
    }
    if (needs[1 + h]) {
      dw[h] = dz.t().mm(adversary && at::GradMode::is_enabled() ? gradient_reversal(x, own) : x);
    }
    if (needs[1 + heads + h]) {
      db[h] = dz.sum(0);
    }
  }
  return {dx, dw, db};
}

class LinearHeadsBackward : public torch::autograd::Node {
 public:
  LinearHeadsBackward(const Tensor& x, const HeadLayers& layers, const Tensor& lambda, at::IntArrayRef lambda_index)
      : heads_(layers.weight.size()), lambda_(numbers_now(lambda)), lambda_index_(lambda_index.vec()) {
    for (const auto& weight : layers.weight) {
      weight_.emplace_back(x.requires_grad() ? weight : Tensor(), /*is_output=*/false);
      needs_x_ = needs_x_ || weight.requires_grad();
    }
    x_ = SavedVariable(needs_x_ ? x : Tensor(), /*is_output=*/false);
  }

  std::string name() const override { return "LinearHeadsBackward"; }

  // Only the heads that have a gradient take part.
  variable_list apply(variable_list&& grads) override {
    variable_list result(num_outputs());
    std::vector<size_t> heads;
    for (size_t h = 0; h < heads_; ++h) {
      if (grads[h].defined()) {
        heads.push_back(h);
      }
    }
    if (heads.empty()) {
      return result;
    }
    std::vector<bool> needs{should_compute_output(0)};
    for (const auto h : heads) {
      needs.push_back(should_compute_output(1 + h));
    }
    const bool any_weight = std::find(needs.begin() + 1, needs.end(), true) != needs.end();
    for (const auto h : heads) {
      needs.push_back(should_compute_output(1 + heads_ + h));
    }
    // What was computed in float32 outside of an autocast region stays so where its backward runs inside one.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    Tensor x;
    std::vector<Tensor> grad_logits, weight;
    std::vector<int64_t> lambda_index;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      x = any_weight ? x_.unpack() : Tensor();
      for (const auto h : heads) {
        grad_logits.push_back(grads[h]);
        lambda_index.push_back(lambda_index_[h]);
        if (needs[0]) {
          weight.push_back(weight_[h].unpack());
        }
      }
    }
    const auto [dx, dw, db] = heads_gradients(grad_logits, x, weight, lambda_, lambda_index, needs);
    result[0] = dx;
    for (size_t i = 0; i < heads.size(); ++i) {
      result[1 + heads[i]] = dw[i];
      result[1 + heads_ + heads[i]] = db[i];
    }
    return result;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    x_.reset_data();
    for (auto& weight : weight_) {
      weight.reset_data();
    }
  }

 private:
  const size_t heads_;
  bool needs_x_ = false;
  SavedVariable x_;
  std::vector<SavedVariable> weight_;
  const Tensor lambda_;
  const std::vector<int64_t> lambda_index_;
};

}  // namespace

Gradients heads_gradients(
    const std::vector<Tensor>& grad_logits, const Tensor& x, const std::vector<Tensor>& weight, const Tensor& lambda,
    const std::vector<int64_t>& lambda_index, const std::vector<bool>& needs) {
  static const auto kernel = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("grl_ext::_heads_gradients", "")
                                 .typed<Gradients(
                                     at::TensorList, const std::optional<Tensor>&, at::TensorList, const Tensor&, at::IntArrayRef,
                                     const c10::List<bool>&)>();
  if (at::GradMode::is_enabled() || std::any_of(grad_logits.begin(), grad_logits.end(), is_batched)) {
    return heads_gradients_composite(grad_logits, x, weight, lambda, lambda_index, needs);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto [dx, dw, db] = kernel.call(
      grad_logits, x.defined() ? std::optional(x) : std::nullopt, weight, lambda, lambda_index, to_list(needs));
  const auto heads = grad_logits.size();
  dx = needs[0] ? dx : Tensor();
  for (size_t h = 0; h < heads; ++h) {
    dw[h] = needs[1 + h] ? std::move(dw[h]) : Tensor();
    db[h] = needs[1 + heads + h] ? std::move(db[h]) : Tensor();
  }
  return {std::move(dx), std::move(dw), std::move(db)};
}

std::vector<Tensor> linear_heads(
    const Tensor& x, at::TensorList weight, const OptionalTensors& bias, const Tensor& lambda, at::IntArrayRef lambda_index) {
  static const auto kernel = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("grl_ext::_heads_logits", "")
                                 .typed<std::vector<Tensor>(const Tensor&, at::TensorList, const OptionalTensors&)>();
  refuse_functorch();
  refuse_forward_mode(x, weight, bias);
  auto inputs = prepare(x, weight, bias);
  check_layers(inputs.features, inputs.layers.weight, inputs.layers.bias, std::vector<int64_t>(weight.size(), 1));
  check_lambda_of_heads(x, lambda, lambda_index, weight.size());
  refuse_gradient("lambda_", lambda);
  inputs.x = as_rows(inputs.features);
  std::vector<Tensor> logits;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    logits = kernel.call(inputs.x, inputs.layers.weight, inputs.layers.bias);
  }
  if (any_requires_grad(inputs.x, inputs.layers)) {
    auto node = make_node<LinearHeadsBackward>(inputs.x, inputs.layers, lambda, lambda_index);
    node->set_next_edges(edges_of(inputs.x, inputs.layers));
    torch::autograd::set_history(logits, node);
  }
  for (auto& own : logits) {
    own = with_leading_sizes(own, inputs.features);
  }
  return logits;
}

}  // namespace grl_ext
