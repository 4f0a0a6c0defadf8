// linear_heads: linear layers over the same features. In the features' gradient each adversary's part is multiplied by
// its -lambda.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>

#include "../ops.h"
#include "heads.h"
#include "node.h"
#include "saved_factors.h"

namespace grl_ext {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

class LinearHeadsBackward : public TraceableNode<LinearHeadsBackward> {
 public:
  LinearHeadsBackward(const HeadInputs& inputs, const std::vector<bool>& needs) : factors_(inputs.factors) {
    const auto slots = inputs.slots();
    weight_.reserve(inputs.count());
    for (const auto& weight : inputs.weight) {
      weight_.emplace_back(needs[slots.x()] ? weight : Tensor(), /*is_output=*/false);
    }
    const bool any_weight =
        std::any_of(inputs.weight.begin(), inputs.weight.end(), [](const Tensor& w) { return w.requires_grad(); });
    x_ = SavedVariable(any_weight ? inputs.x : Tensor(), /*is_output=*/false);
  }

  std::string name() const override { return "LinearHeadsBackward"; }

  variable_list apply(variable_list&& grads) override {
    const auto needs = this->needs();
    const GradientSlots slots{weight_.size()};
    HeadInputs inputs{Tensor(), std::vector<Tensor>(weight_.size()), OptionalTensors(), factors_.get()};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t h = 0; h < weight_.size(); ++h) {
        if (grads[h].defined()) {
          inputs.weight[h] = needs[slots.x()] ? weight_[h].unpack() : Tensor();
          inputs.x = needs[slots.weight(h)] && !inputs.x.defined() ? x_.unpack() : inputs.x;
        }
      }
    }
    return gradients_of_heads(grads, inputs, needs);
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
    std::for_each(weight_.begin(), weight_.end(), visit);
    factors_.each_saved(visit);
  }

  void collect_constants(torch::dynamo::autograd::CompiledNodeArgs& args) const { factors_.collect_constants(args); }

  TracedBackward traced() const {
    return [heads = weight_.size(), factors = factors_.traced(),
            needs = needs_when_traced()](const variable_list& grads, const variable_list& saved) {
      const auto at_factors = saved.begin() + 1 + static_cast<std::ptrdiff_t>(heads);
      return gradients_of_heads(
          grads, {saved[0], {saved.begin() + 1, at_factors}, OptionalTensors(), factors({at_factors, saved.end()})}, needs);
    };
  }

 private:
  SavedVariable x_;
  std::vector<SavedVariable> weight_;
  SavedFactors factors_;
};

}  // namespace

std::optional<std::vector<Tensor>> linear_heads(
    const Tensor& x, at::TensorList weight, const OptionalTensors& bias, HeadFactors factors) {
  static const auto kernel = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("grl_ext::_heads_logits", "")
                                 .typed<std::vector<Tensor>(const Tensor&, at::TensorList, const OptionalTensors&)>();
  refuse_functorch();
  refuse_forward_mode(x, weight, bias);
  auto inputs = prepare(x, weight, bias, std::move(factors));
  if (!inputs) {
    return std::nullopt;
  }
  const auto features = inputs->x;
  inputs->x = as_rows(features);
  std::vector<Tensor> logits;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    logits = kernel.call(inputs->x, inputs->weight, inputs->bias);
  }
  if (const auto needs = recorded(*inputs); any(needs)) {
    auto node = make_node<LinearHeadsBackward>(*inputs, needs);
    node->set_next_edges(edges_of(*inputs));
    torch::autograd::set_history(logits, node);
  }
  for (auto& own : logits) {
    own = with_leading_sizes(own, features);
  }
  return logits;
}

}  // namespace grl_ext
