// linear_heads: linear layers over the same features. In the features' gradient each adversary's part is multiplied by
// its -lambda.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>

#include "../gradient_slots.h"
#include "../heads_checks.h"
#include "../ops.h"
#include "head_inputs.h"
#include "linear_heads.h"
#include "node.h"
#include "scale.h"

namespace grl_ext {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Head by head, as separate layers would do it, so that gradients of gradients pass through each head's reversal as
// they would there.
HeadsGradients heads_gradients_composite(
    const std::vector<Tensor>& grad_logits, const Tensor& x, const std::vector<Tensor>& weight, const Tensor& lambda,
    const std::vector<int64_t>& lambda_index, const std::vector<bool>& needs) {
  const auto heads = grad_logits.size();
  const GradientSlots slots{heads};
  Tensor dx;
  std::vector<Tensor> dw(heads), db(heads);
  for (size_t h = 0; h < heads; ++h) {
    const auto& dz = grad_logits[h];
    const bool adversary = lambda_index[h] >= 0;
    const auto factor = factor_of(lambda, lambda_index[h]);
    if (needs[slots.x()]) {
      const auto part = dz.mm(weight[h]);
      const auto scaled = adversary ? scale_composite(part, factor) : part;
      dx = dx.defined() ? dx + scaled : scaled;
    }
    if (needs[slots.weight(h)]) {
      dw[h] = dz.t().mm(adversary && at::GradMode::is_enabled() ? with_scaled_gradient(x, factor) : x);
    }
    if (needs[slots.bias(h)]) {
      db[h] = dz.sum(0);
    }
  }
  return {dx, dw, db};
}

class LinearHeadsBackward : public TraceableNode<LinearHeadsBackward> {
 public:
  LinearHeadsBackward(const Tensor& x, const HeadLayers& layers, const Tensor& lambda, at::IntArrayRef lambda_index)
      : lambda_(numbers_now(lambda)), lambda_index_(lambda_index.vec()) {
    bool needs_x = false;
    for (const auto& weight : layers.weight) {
      weight_.emplace_back(x.requires_grad() ? weight : Tensor(), /*is_output=*/false);
      needs_x = needs_x || weight.requires_grad();
    }
    x_ = SavedVariable(needs_x ? x : Tensor(), /*is_output=*/false);
  }

  std::string name() const override { return "LinearHeadsBackward"; }

  variable_list apply(variable_list&& grads) override {
    const auto needs = this->needs();
    const auto heads = lambda_index_.size();
    const GradientSlots slots{heads};
    Tensor x;
    std::vector<Tensor> weight(heads);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t h = 0; h < heads; ++h) {
        if (grads[h].defined()) {
          weight[h] = needs[slots.x()] ? weight_[h].unpack() : Tensor();
          x = needs[slots.weight(h)] && !x.defined() ? x_.unpack() : x;
        }
      }
    }
    return gradients(grads, x, weight, lambda_, lambda_index_, needs);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    x_.reset_data();
    for (auto& weight : weight_) {
      weight.reset_data();
    }
  }

  template <class Visit>
  void each_saved(Visit visit) {
    visit(x_);
    visit(lambda_);
    std::for_each(weight_.begin(), weight_.end(), visit);
  }

  void collect_constants(torch::dynamo::autograd::CompiledNodeArgs& args) const { args.collect(lambda_index_); }

  TracedBackward traced() const {
    return [lambda_index = lambda_index_, needs = needs_when_traced()](
               const variable_list& grads, const variable_list& saved) {
      return gradients(grads, saved[0], {saved.begin() + 2, saved.end()}, saved[1], lambda_index, needs);
    };
  }

 private:
  // Only the heads that have a gradient take part.
  static variable_list gradients(
      const variable_list& grads, const Tensor& x, const std::vector<Tensor>& all_weights, const Tensor& lambda,
      const std::vector<int64_t>& all_indices, const std::vector<bool>& needs) {
    const GradientSlots slots{all_indices.size()};
    variable_list result(needs.size());
    std::vector<size_t> asked;
    std::vector<Tensor> grad_logits, weight;
    std::vector<int64_t> lambda_index;
    std::vector<bool> own_needs{needs[slots.x()]};
    for (size_t h = 0; h < slots.layers; ++h) {
      if (grads[h].defined()) {
        asked.push_back(h);
        grad_logits.push_back(grads[h]);
        lambda_index.push_back(all_indices[h]);
        own_needs.push_back(needs[slots.weight(h)]);
        if (needs[slots.x()]) {
          weight.push_back(all_weights[h]);
        }
      }
    }
    if (asked.empty()) {
      return result;
    }
    for (const auto h : asked) {
      own_needs.push_back(needs[slots.bias(h)]);
    }
    // A forward outside an autocast region keeps its dtype, also where its backward runs inside one.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto [dx, dw, db] = heads_gradients(grad_logits, x, weight, lambda, lambda_index, own_needs);
    result[slots.x()] = dx;
    for (size_t i = 0; i < asked.size(); ++i) {
      result[slots.weight(asked[i])] = dw[i];
      result[slots.bias(asked[i])] = db[i];
    }
    return result;
  }

  SavedVariable x_;
  std::vector<SavedVariable> weight_;
  Tensor lambda_;
  const std::vector<int64_t> lambda_index_;
};

}  // namespace

HeadsGradients heads_gradients(
    const std::vector<Tensor>& grad_logits, const Tensor& x, const std::vector<Tensor>& weight, const Tensor& lambda,
    const std::vector<int64_t>& lambda_index, const std::vector<bool>& needs) {
  static const auto kernel = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("grl_ext::_heads_gradients", "")
                                 .typed<HeadsGradients(
                                     at::TensorList, const std::optional<Tensor>&, at::TensorList, at::ArrayRef<double>,
                                     const OptionalTensors&, const c10::List<bool>&)>();
  if (at::GradMode::is_enabled() || std::any_of(grad_logits.begin(), grad_logits.end(), is_batched)) {
    return heads_gradients_composite(grad_logits, x, weight, lambda, lambda_index, needs);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto factors = kernel_factors(lambda, lambda_index);
  auto [dx, dw, db] = kernel.call(
      grad_logits, x.defined() ? std::optional(x) : std::nullopt, weight, factors.factor, factors.lambda,
      to_list(needs));
  const GradientSlots slots{grad_logits.size()};
  dx = needs[slots.x()] ? dx : Tensor();
  for (size_t h = 0; h < slots.layers; ++h) {
    dw[h] = needs[slots.weight(h)] ? std::move(dw[h]) : Tensor();
    db[h] = needs[slots.bias(h)] ? std::move(db[h]) : Tensor();
  }
  return {std::move(dx), std::move(dw), std::move(db)};
}

std::vector<Tensor> linear_heads(
    const Tensor& x, at::TensorList weight, const OptionalTensors& bias, const Tensor& lambda,
    at::IntArrayRef lambda_index) {
  static const auto kernel = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("grl_ext::_heads_logits", "")
                                 .typed<std::vector<Tensor>(const Tensor&, at::TensorList, const OptionalTensors&)>();
  refuse_functorch();
  refuse_forward_mode(x, weight, bias);
  auto inputs = prepare(x, weight, bias);
  check_layers(inputs.features, inputs.layers.weight, inputs.layers.bias, std::vector<int64_t>(weight.size(), 1));
  check_lambda_of_heads(x, lambda, lambda_index, weight.size());
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
