// linear_heads: linear layers over the same features. In the features' gradient each adversary's part is multiplied by
// its -lambda.
#include <pytorch.h>

#include <torch/csrc/autograd/functions/utils.h>

#include "../ops.h"
#include "heads.h"
#include "node.h"
#include "scale.h"

namespace grl_ext {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

class LinearHeadsBackward : public TraceableNode<LinearHeadsBackward> {
 public:
  LinearHeadsBackward(const HeadInputs& inputs, const std::vector<bool>& needs)
      : factors_(inputs.factors.begin(), inputs.factors.end()), passed_(inputs.count()) {
    const auto slots = inputs.slots();
    bool any_weight = false;
    for (size_t h = 0; h < inputs.count(); ++h) {
      any_weight = any_weight || needs[slots.weight(h)];
    }
    saved_.reserve(1 + inputs.count());
    saved_.save(any_weight ? inputs.x : Tensor());
    for (const auto& weight : inputs.weight) {
      saved_.save(needs[slots.x()] ? weight : Tensor());
    }
  }

  std::string name() const override { return "LinearHeadsBackward"; }

  variable_list apply(variable_list&& grads) override {
    const auto needs = this->needs();
    const auto heads = factors_.size();
    const GradientSlots slots{heads};
    HeadInputs inputs{Tensor(), std::vector<Tensor>(heads), OptionalTensors(), {}};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      passed_.begin([&](size_t h) { return grads[h].defined(); });
      for (size_t h = 0; h < heads; ++h) {
        inputs.factors.push_back(factors_[h].unpack());
        if (grads[h].defined()) {  // what is not read may have changed
          inputs.weight[h] = needs[slots.x()] ? saved_.unpack(1 + h, *this) : Tensor();
          inputs.x = needs[slots.weight(h)] && !inputs.x.defined() ? saved_.unpack(0, *this) : inputs.x;
        }
      }
    }
    return gradients_of_heads(grads, inputs, needs);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!passed_.end_in_part()) {
      saved_.release();
    }
  }

  template <class Visit>
  void each_saved(Visit visit) {
    saved_.each(visit);
    for (auto& factor : factors_) {
      factor.each_saved(visit);
    }
  }

  void collect_constants(torch::dynamo::autograd::CompiledNodeArgs& args) const {
    for (const auto& factor : factors_) {
      factor.collect_constants(args);
    }
  }

  TracedBackward traced() const {
    return [factors = traced_factors(factors_), needs = needs_when_traced()](
               const variable_list& grads, const variable_list& saved) {
      const auto at_factors = saved.begin() + 1 + static_cast<std::ptrdiff_t>(grads.size());
      const std::vector<Tensor> weight(saved.begin() + 1, at_factors);
      return gradients_of_heads(grads, {saved[0], weight, OptionalTensors(), factors(at_factors)}, needs);
    };
  }

 private:
  SavedList saved_;  // x, the weights
  std::vector<SavedFactor> factors_;
  HeadsPassed passed_;
};

}  // namespace

std::optional<std::vector<Tensor>> linear_heads(
    const Tensor& x, at::TensorList weight, const OptionalTensors& bias, std::vector<Factor> factors) {
  static const auto kernel = find_kernel<std::vector<Tensor>(const Tensor&, at::TensorList, const OptionalTensors&)>(
      "_heads_logits");
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
