#include "heads_loss_forward.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <iterator>
#include <numeric>

#include "node.h"

namespace grl_ext {
namespace {

using at::Tensor;

HeadsLossResult call_kernel(
    const Tensor& x, at::TensorList weight, const OptionalTensors& bias, const HeadsOptions& options,
    const std::optional<Tensor>& loss_weight, const std::vector<bool>& needs) {
  static const auto kernel =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("grl_ext::_heads_loss", "")
          .typed<HeadsLossResult(
              const Tensor&, at::TensorList, const OptionalTensors&, at::TensorList, const OptionalTensors&,
              const OptionalTensors&, at::ArrayRef<double>, const OptionalTensors&, const std::optional<Tensor>&,
              at::IntArrayRef, at::ArrayRef<double>, at::IntArrayRef, bool, const c10::List<bool>&)>();
  const auto factors = kernel_factors(options.lambda, options.lambda_index);
  return kernel.call(
      x, weight, bias, options.targets, options.sample_weight, options.class_weight, factors.factor, factors.lambda,
      loss_weight, options.kind, options.label_smoothing, options.ignore_index, options.mean, to_list(needs));
}

// tensor.unbind(), without the dispatcher's overhead where no subclass and no mode has to see the call.
std::vector<Tensor> elements_of(const Tensor& tensor) {
  if (!is_plain(tensor) || c10::impl::dispatch_mode_enabled()) {
    return tensor.unbind();
  }
  std::vector<Tensor> elements;
  elements.reserve(tensor.numel());
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    elements.push_back(
        at::detail::make_tensor<c10::TensorImpl>(c10::Storage(tensor.storage()), tensor.key_set(), tensor.dtype()));
    elements.back().unsafeGetTensorImpl()->set_sizes_and_strides(c10::IntArrayRef{}, c10::IntArrayRef{}, i);
  }
  return elements;
}

}  // namespace

HeadsOfLoss::HeadsOfLoss(HeadLayers layers, at::IntArrayRef depth, HeadsOptions options)
    : layers_(std::move(layers)), options_(std::move(options)) {
  first_.reserve(depth.size() + 1);
  size_t layer = 0;
  for (const auto layers_of_head : depth) {
    first_.push_back(layer);
    layer += static_cast<size_t>(layers_of_head);
  }
  first_.push_back(layer);
}

std::vector<int64_t> HeadsOfLoss::depth() const {
  std::vector<int64_t> depth;
  depth.reserve(count());
  for (size_t h = 0; h < count(); ++h) {
    depth.push_back(static_cast<int64_t>(first_[h + 1] - first_[h]));
  }
  return depth;
}

std::vector<size_t> HeadsOfLoss::all() const {
  std::vector<size_t> heads(count());
  std::iota(heads.begin(), heads.end(), 0);
  return heads;
}

std::vector<size_t> HeadsOfLoss::linear_of(const std::vector<size_t>& heads) const {
  std::vector<size_t> linear;
  linear.reserve(heads.size());
  std::copy_if(heads.begin(), heads.end(), std::back_inserter(linear), [&](size_t h) { return is_linear(h); });
  return linear;
}

LayersOfHead HeadsOfLoss::layers_of(size_t h, const std::vector<bool>& needs) const {
  LayersOfHead own;
  for (size_t l = first_[h]; l < first_[h + 1]; ++l) {
    own.weight.push_back(layers_.weight[l]);
    own.bias.push_back(layers_.bias.get(l));
    own.needs_weight.push_back(needs[slots().weight(l)]);
    own.needs_bias.push_back(needs[slots().bias(l)]);
  }
  own.needs_x = needs[slots().x()];
  return own;
}

// The options of some of the heads.
HeadsOptions HeadsOfLoss::options_of(const std::vector<size_t>& heads, const std::optional<Tensor>& loss_weight) const {
  HeadsOptions own;
  own.lambda = options_.lambda;
  own.mean = options_.mean;
  std::vector<Tensor> weights;
  for (const auto h : heads) {
    own.targets.push_back(options_.targets[h]);
    own.sample_weight.push_back(options_.sample_weight.get(h));
    own.class_weight.push_back(options_.class_weight.get(h));
    own.lambda_index.push_back(options_.lambda_index[h]);
    own.kind.push_back(options_.kind[h]);
    own.label_smoothing.push_back(options_.label_smoothing[h]);
    own.ignore_index.push_back(options_.ignore_index[h]);
    if (loss_weight) {
      weights.push_back(loss_weight->select(0, static_cast<int64_t>(h)));
    }
  }
  if (loss_weight) {
    own.loss_weight = at::stack(weights);
  }
  return own;
}

HeadsOfLoss::Result HeadsOfLoss::compute(
    const std::vector<size_t>& asked, const Tensor& x, const std::optional<Tensor>& loss_weight,
    const std::vector<bool>& needs) const {
  Result result{
      {}, std::vector<Tensor>(count()), std::vector<Tensor>(count()), torch::autograd::variable_list(slots().count())};
  if (const auto heads = linear_of(asked); !heads.empty()) {
    compute_linear(result, heads, x, loss_weight, needs);
  }
  for (const auto h : asked) {
    if (!is_linear(h)) {
      compute_layers(result, h, x, loss_weight, needs);
    }
  }
  return result;
}

// All linear heads in one pass over x.
void HeadsOfLoss::compute_linear(
    Result& result, const std::vector<size_t>& heads, const Tensor& x, const std::optional<Tensor>& loss_weight,
    const std::vector<bool>& needs) const {
  const auto call_for_some = [&]() -> HeadsLossResult {
    std::vector<bool> own_needs{needs[slots().x()]};
    std::vector<Tensor> weight;
    OptionalTensors bias;
    for (const auto h : heads) {
      weight.push_back(layers_.weight[first(h)]);
      bias.push_back(layers_.bias.get(first(h)));
      own_needs.push_back(needs[slots().weight(first(h))]);
    }
    for (const auto h : heads) {
      own_needs.push_back(needs[slots().bias(first(h))]);
    }
    const auto options = options_of(heads, loss_weight);
    return call_kernel(x, weight, bias, options, options.loss_weight, own_needs);
  };
  auto [loss, head_losses, logits, dx, dw, db] = heads.size() == count()
      ? call_kernel(x, layers_.weight, layers_.bias, options_, loss_weight, needs)
      : call_for_some();
  result.loss = loss;
  result.gradients[slots().x()] = needs[slots().x()] ? std::move(dx) : Tensor();
  auto losses = elements_of(head_losses);
  for (size_t i = 0; i < heads.size(); ++i) {
    const auto h = heads[i];
    result.head_losses[h] = std::move(losses[i]);
    result.logits[h] = std::move(logits[i]);
    if (const auto slot = slots().weight(first(h)); needs[slot]) {
      result.gradients[slot] = std::move(dw[i]);
    }
    if (const auto slot = slots().bias(first(h)); needs[slot]) {
      result.gradients[slot] = std::move(db[i]);
    }
  }
}

// A head of several layers: matrix products up to its last layer. That one and its loss are computed as those of a
// linear head.
void HeadsOfLoss::compute_layers(
    Result& result, size_t h, const Tensor& x, const std::optional<Tensor>& loss_weight,
    const std::vector<bool>& needs) const {
  const auto layers = layers_of(h, needs);
  const auto top = layers.depth() - 1;
  auto inputs = inputs_of_layers(x, layers);
  auto options = options_of({h}, loss_weight);
  options.lambda_index = {-1};
  OptionalTensors bias;
  bias.push_back(layers.bias[top]);
  const std::vector<bool> own_needs{layers.needs_input(top), layers.needs_weight[top], layers.needs_bias[top]};
  auto [loss, head_losses, logits, grad, dw, db] = call_kernel(
      inputs[top], layers.weight[top], bias, options, options.loss_weight, own_needs);
  result.loss = result.loss.defined() ? result.loss + loss : loss;
  result.head_losses[h] = elements_of(head_losses)[0];
  result.logits[h] = logits[0];

  GradientsOfLayers gradients{std::vector<Tensor>(top + 1), std::vector<Tensor>(top + 1), {}};
  gradients.dw[top] = own_needs[1] ? std::move(dw[0]) : Tensor();
  gradients.db[top] = own_needs[2] ? std::move(db[0]) : Tensor();
  if (own_needs[0]) {
    grad = relu_gradient(std::move(grad), inputs[top]);
    inputs.pop_back();
    gradients_of_layers(gradients, std::move(grad), std::move(inputs), layers, top);
  }
  for (size_t l = 0; l <= top; ++l) {
    result.gradients[slots().weight(first(h) + l)] = std::move(gradients.dw[l]);
    result.gradients[slots().bias(first(h) + l)] = std::move(gradients.db[l]);
  }
  if (needs[slots().x()]) {
    const auto factor = factor_of(options_.lambda, options_.lambda_index[h]);
    add_scaled_product(result.gradients[slots().x()], gradients.first, layers.weight[0], factor);
  }
}

}  // namespace grl_ext
