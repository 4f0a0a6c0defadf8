#include <pytorch.h>

#include "heads.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "../accepted.h"
#include "../ops.h"
#include "autocast.h"
#include "node.h"
#include "scale.h"

namespace grl_ext {

using at::Tensor;
using torch::autograd::variable_list;

std::optional<HeadInputs> prepare(
    const Tensor& x, at::TensorList weight, const OptionalTensors& bias, std::vector<Factor> factors) {
  using torch::autograd::isFwGradDefined;
  refuse_functorch();
  bool tangent = isFwGradDefined(x);
  for (size_t h = 0; h < weight.size(); ++h) {
    const auto vector = h < bias.size() ? bias.get(h) : std::nullopt;
    tangent = tangent || isFwGradDefined(weight[h]) || (vector && isFwGradDefined(*vector));
  }
  // An error is better than a tangent that is silently lost. The Python functions take their other path.
  TORCH_CHECK_NOT_IMPLEMENTED(
      !tangent,
      "torch.ops.grl_ext has no forward-mode derivative for linear operators; call the functions of grl_ext instead");
  HeadInputs inputs{x, weight.vec(), bias, std::move(factors)};
  if (const Autocast cast(x.device().type()); cast.is_on()) {
    inputs.x = cast(x);
    inputs.bias = OptionalTensors();
    for (size_t h = 0; h < weight.size(); ++h) {
      inputs.weight[h] = cast(weight[h]);
      inputs.bias.push_back(h < bias.size() ? cast(bias.get(h)) : std::nullopt);
    }
  }
  return accepts_heads(inputs.x, inputs.weight, inputs.bias) && inputs.factors.size() == weight.size()
      ? std::optional(std::move(inputs))
      : std::nullopt;
}

std::vector<bool> recorded(const HeadInputs& inputs) {
  const bool on = at::GradMode::is_enabled();
  std::vector<bool> needs{on && inputs.x.requires_grad()};
  needs.reserve(inputs.slots().count());
  for (const auto& weight : inputs.weight) {
    needs.push_back(on && weight.requires_grad());
  }
  for (size_t h = 0; h < inputs.count(); ++h) {
    const auto bias = inputs.bias.get(h);
    needs.push_back(on && bias && bias->requires_grad());
  }
  return needs;
}

bool any(const std::vector<bool>& flags) {
  return std::find(flags.begin(), flags.end(), true) != flags.end();
}

bool any_defined(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& tensor) { return tensor.defined(); });
}

bool any_batched_or_dual(at::TensorList tensors) {
  const auto is_one = [](const Tensor& tensor) { return tensor.defined() && is_batched_or_dual(tensor); };
  return std::any_of(tensors.begin(), tensors.end(), is_one);
}

torch::autograd::edge_list edges_of(const HeadInputs& inputs) {
  using torch::autograd::impl::gradient_edge;
  torch::autograd::edge_list edges;
  edges.reserve(inputs.slots().count());
  edges.push_back(gradient_edge(inputs.x));
  for (const auto& weight : inputs.weight) {
    edges.push_back(gradient_edge(weight));
  }
  for (size_t h = 0; h < inputs.count(); ++h) {
    const auto bias = inputs.bias.get(h);
    edges.push_back(bias ? gradient_edge(*bias) : torch::autograd::Edge());
  }
  return edges;
}

c10::List<bool> to_list(const std::vector<bool>& values) {
  c10::List<bool> list;
  list.reserve(values.size());
  for (const bool value : values) {
    list.push_back(value);
  }
  return list;
}

std::optional<Tensor> to_optional(const Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

std::pair<std::vector<double>, OptionalTensors> to_lists(const std::vector<Factor>& factors) {
  std::pair<std::vector<double>, OptionalTensors> lists;
  lists.first.reserve(factors.size());
  lists.second.reserve(factors.size());
  for (const auto& factor : factors) {
    lists.first.push_back(factor.value);
    lists.second.push_back(factor.tensor);
  }
  return lists;
}

std::optional<Factor> factor_of(const Tensor& x, const std::optional<Tensor>& lambda) {
  if (!lambda) {
    return Factor{};
  }
  if (!accepts_lambda_of_head(x, *lambda)) {
    return std::nullopt;
  }
  // Kernels read float32 and float64.
  const bool readable = lambda->scalar_type() == at::kFloat || lambda->scalar_type() == at::kDouble;
  const auto factor = reversed(readable ? *lambda : lambda->to(at::kDouble));
  return std::isfinite(factor.value) ? std::optional(factor) : std::nullopt;
}

OptionalTensors some(const OptionalTensors& values, const std::vector<size_t>& heads) {
  OptionalTensors chosen;
  chosen.reserve(heads.size());
  for (const auto h : heads) {
    chosen.push_back(values.get(h));
  }
  return chosen;
}

HeadInputs some(const HeadInputs& inputs, const std::vector<size_t>& heads) {
  if (heads.size() == inputs.count()) {
    return inputs;
  }
  return {
      inputs.x, some(inputs.weight, heads), inputs.bias.empty() ? OptionalTensors() : some(inputs.bias, heads),
      some(inputs.factors, heads)};
}

HeadsOptions some(const HeadsOptions& options, const std::vector<size_t>& heads) {
  if (heads.size() == options.targets.size()) {
    return options;
  }
  HeadsOptions chosen{some(options.targets, heads),      some(options.sample_weight, heads),
                      some(options.class_weight, heads), std::nullopt,
                      some(options.kind, heads),         some(options.label_smoothing, heads),
                      some(options.ignore_index, heads), options.mean};
  if (options.loss_weight) {
    std::vector<Tensor> weights;
    for (const auto h : heads) {
      weights.push_back(options.loss_weight->narrow(0, static_cast<int64_t>(h), 1));
    }
    chosen.loss_weight = weights.size() == 1 ? weights[0] : at::cat(weights);
  }
  return chosen;
}

std::vector<bool> needs_of(const std::vector<bool>& needs, const std::vector<size_t>& heads) {
  const GradientSlots slots{(needs.size() - 1) / 2};
  std::vector<bool> chosen{needs[slots.x()]};
  for (const auto h : heads) {
    chosen.push_back(needs[slots.weight(h)]);
  }
  for (const auto h : heads) {
    chosen.push_back(needs[slots.bias(h)]);
  }
  return chosen;
}

variable_list among_all(HeadsGradients gradients, const std::vector<size_t>& heads, const std::vector<bool>& needs) {
  const GradientSlots slots{(needs.size() - 1) / 2};
  variable_list result(needs.size());
  auto& [dx, dw, db] = gradients;
  const auto put = [&](size_t slot, Tensor& gradient) {
    if (needs[slot]) {
      result[slot] = std::move(gradient);
    }
  };
  put(slots.x(), dx);
  for (size_t i = 0; i < heads.size(); ++i) {
    put(slots.weight(heads[i]), dw[i]);
    put(slots.bias(heads[i]), db[i]);
  }
  return result;
}

namespace {

// Head by head, as separate layers would do it, so that gradients of gradients pass through each head's reversal as
// they would there.
HeadsGradients composite(const variable_list& grad_logits, const HeadInputs& inputs, const std::vector<bool>& needs) {
  const auto slots = inputs.slots();
  Tensor dx;
  std::vector<Tensor> dw(inputs.count()), db(inputs.count());
  for (size_t h = 0; h < inputs.count(); ++h) {
    const auto& dz = grad_logits[h];
    const auto& factor = inputs.factors[h];
    const bool scaled = factor.tensor || factor.value != 1;
    if (needs[slots.x()]) {
      const auto part = dz.mm(inputs.weight[h]);
      const auto own = scaled ? scale_composite(part, factor) : part;
      dx = dx.defined() ? dx + own : own;
    }
    if (needs[slots.weight(h)]) {
      dw[h] = dz.t().mm(scaled && at::GradMode::is_enabled() ? with_scaled_gradient(inputs.x, factor) : inputs.x);
    }
    if (needs[slots.bias(h)]) {
      db[h] = dz.sum(0);
    }
  }
  return {dx, dw, db};
}

HeadsGradients by_kernel(const variable_list& grad_logits, const HeadInputs& inputs, const std::vector<bool>& needs) {
  static const auto kernel = find_kernel<HeadsGradients(
      at::TensorList, const std::optional<Tensor>&, at::TensorList, at::ArrayRef<double>, const OptionalTensors&,
      const c10::List<bool>&)>("_heads_gradients");
  const auto weight = needs[inputs.slots().x()] ? at::TensorList(inputs.weight) : at::TensorList();
  const auto [factor, lambda] = to_lists(inputs.factors);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return kernel.call(grad_logits, to_optional(inputs.x), weight, factor, lambda, to_list(needs));
}

}  // namespace

variable_list gradients_of_heads(
    const variable_list& grad_logits, const HeadInputs& inputs, const std::vector<bool>& needs) {
  std::vector<size_t> asked;
  variable_list grads;
  for (size_t h = 0; h < inputs.count(); ++h) {
    if (grad_logits[h].defined()) {
      asked.push_back(h);
      grads.push_back(grad_logits[h]);
    }
  }
  if (asked.empty()) {
    return variable_list(needs.size());
  }
  const auto chosen = some(inputs, asked);
  const auto chosen_needs = needs_of(needs, asked);
  // A forward outside an autocast region keeps its dtype, also where its backward runs inside one.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  auto gradients = at::GradMode::is_enabled() || any_batched_or_dual(grads) ? composite(grads, chosen, chosen_needs)
                                                                            : by_kernel(grads, chosen, chosen_needs);
  return among_all(std::move(gradients), asked, needs);
}

}  // namespace grl_ext
