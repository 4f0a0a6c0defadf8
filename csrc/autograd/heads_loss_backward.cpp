#include "heads_loss_backward.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "../arithmetic_type.h"
#include "../ops.h"
#include "grad_logits_composite.h"
#include "linear_heads.h"
#include "node.h"
#include "scale.h"

namespace grl_ext {

using at::Tensor;
using torch::autograd::variable_list;

bool IncomingGradients::any(size_t begin, size_t end) const {
  const auto at = [&](size_t i) { return grads.begin() + static_cast<std::ptrdiff_t>(i); };
  return std::any_of(at(begin), at(end), [](const Tensor& grad) { return grad.defined(); });
}

bool IncomingGradients::any_batched() const {
  return std::any_of(grads.begin(), grads.end(), [](const Tensor& grad) { return grad.defined() && is_batched(grad); });
}

namespace {

// The incoming gradient of head h's loss: its own, plus that of the total times the head's loss weight. Undefined if
// there is neither.
Tensor factor(const IncomingGradients& incoming, const HeadsOptions& options, size_t h) {
  Tensor factor = incoming.of_head_loss(h);
  if (const auto& total = incoming.of_loss(); total.defined()) {
    const auto own = options.loss_weight ? total *
            options.loss_weight->select(0, static_cast<int64_t>(h)).to(total.scalar_type())  // on whichever device
                                         : total;
    factor = factor.defined() ? factor + own : own;
  }
  return factor;
}

// The gradient of a head's logits; undefined if it has none.
Tensor grad_logits(const IncomingGradients& incoming, const HeadsOptions& options, size_t h, const Tensor& logits) {
  Tensor dz;
  if (const auto weight = factor(incoming, options, h); weight.defined()) {
    dz = (grad_logits_composite(logits, options, h) * weight).to(logits.scalar_type());
  }
  const auto& given = incoming.of_logits(h);
  return !given.defined() ? dz : dz.defined() ? dz + given : given;
}

void add_linear_heads(
    variable_list& result, const IncomingGradients& incoming, const HeadsOfLoss& heads, const Tensor& x,
    const std::function<Tensor(size_t h)>& saved_logits, const std::vector<bool>& needs) {
  const auto& options = heads.options();
  const auto& layers = heads.layers();
  const auto linear = heads.linear_of(heads.all());
  std::vector<Tensor> logits;
  if (at::GradMode::is_enabled() && !linear.empty()) {
    std::vector<Tensor> weight;
    OptionalTensors bias;
    std::vector<int64_t> lambda_index;
    for (const auto h : linear) {
      weight.push_back(layers.weight[heads.first(h)]);
      bias.push_back(layers.bias.get(heads.first(h)));
      lambda_index.push_back(options.lambda_index[h]);
    }
    logits = linear_heads(x, weight, bias, options.lambda, lambda_index);
  } else {
    std::transform(linear.begin(), linear.end(), std::back_inserter(logits), saved_logits);
  }
  std::vector<Tensor> dz, weight;
  std::vector<int64_t> lambda_index;
  std::vector<size_t> asked;
  std::vector<bool> own_needs{needs[heads.slots().x()]};
  for (size_t i = 0; i < linear.size(); ++i) {
    const auto h = linear[i];
    if (const auto grad = grad_logits(incoming, options, h, logits[i]); grad.defined()) {
      asked.push_back(h);
      dz.push_back(grad);
      weight.push_back(layers.weight[heads.first(h)]);
      lambda_index.push_back(options.lambda_index[h]);
      own_needs.push_back(needs[heads.slots().weight(heads.first(h))]);
    }
  }
  if (asked.empty()) {
    return;
  }
  for (const auto h : asked) {
    own_needs.push_back(needs[heads.slots().bias(heads.first(h))]);
  }
  const auto [dx, dw, db] = heads_gradients(dz, x, weight, options.lambda, lambda_index, own_needs);
  result[heads.slots().x()] = dx;
  for (size_t i = 0; i < asked.size(); ++i) {
    result[heads.slots().weight(heads.first(asked[i]))] = dw[i];
    result[heads.slots().bias(heads.first(asked[i]))] = db[i];
  }
}

// A head of several layers.
void add_layers(
    variable_list& result, const IncomingGradients& incoming, const HeadsOfLoss& heads, size_t h, const Tensor& x,
    const std::vector<bool>& needs) {
  const auto& options = heads.options();
  const auto layers = heads.layers_of(h, needs);
  const auto index = options.lambda_index[h];
  const auto factor = factor_of(options.lambda, index);
  // A gradient of a weight's gradient reaches x through the reversal, as it would layer by layer.
  const bool twice = at::GradMode::is_enabled();
  const auto seen = twice && index >= 0 ? with_scaled_gradient(x, factor) : x;
  const auto inputs = inputs_of_layers(seen, layers);
  const auto top = layers.depth() - 1;
  const auto dz = grad_logits(incoming, options, h, at::linear(inputs[top], layers.weight[top], layers.bias[top]));
  GradientsOfLayers gradients{std::vector<Tensor>(top + 1), std::vector<Tensor>(top + 1), {}};
  gradients_of_layers(gradients, dz, inputs, layers, layers.depth());
  for (size_t l = 0; l <= top; ++l) {
    result[heads.slots().weight(heads.first(h) + l)] = gradients.dw[l];
    result[heads.slots().bias(heads.first(h) + l)] = gradients.db[l];
  }
  if (needs[heads.slots().x()]) {
    add_scaled_product(result[heads.slots().x()], gradients.first, layers.weight[0], factor);
  }
}

}  // namespace

variable_list heads_loss_backward(
    const IncomingGradients& incoming, const HeadsOfLoss& heads, const Tensor& x, const std::vector<bool>& needs) {
  std::vector<size_t> asked;
  std::vector<Tensor> factors;
  for (size_t h = 0; h < heads.count(); ++h) {
    const auto weight = factor(incoming, heads.options(), h);
    if (weight.defined()) {
      asked.push_back(h);
    }
    factors.push_back(weight.defined() ? weight : at::zeros({}, x.options().dtype(arithmetic_type(x.scalar_type()))));
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  // Most often all heads have the same one, the gradient of the total. It is expanded and not copied: kernels read it
  // where it is.
  const bool one = std::all_of(
      factors.begin(), factors.end(), [&](const Tensor& own) { return own.is_same(factors[0]); });
  const auto weights = one ? factors[0].expand({static_cast<int64_t>(factors.size())}) : at::stack(factors);
  return heads.compute(asked, x, weights, needs).gradients;
}

variable_list heads_loss_backward_composite(
    const IncomingGradients& incoming, const HeadsOfLoss& heads, const Tensor& x,
    const std::function<Tensor(size_t h)>& logits, const std::vector<bool>& needs) {
  variable_list result(heads.slots().count());
  add_linear_heads(result, incoming, heads, x, logits, needs);
  for (size_t h = 0; h < heads.count(); ++h) {
    const bool asked = incoming.of_loss().defined() || incoming.of_head_loss(h).defined() ||
        incoming.of_logits(h).defined();
    if (asked && !heads.is_linear(h)) {
      add_layers(result, incoming, heads, h, x, needs);
    }
  }
  return result;
}

}  // namespace grl_ext
