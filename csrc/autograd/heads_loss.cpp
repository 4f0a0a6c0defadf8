// heads_loss: all heads' logits, losses and gradients; those of linear heads in one pass over the features.
//
// The gradients are made in the forward, while the features are at hand; the backward multiplies them by the incoming number.
// Float16 is too narrow for that: a gradient that vanishes in it cannot be saved by a loss scale that comes later. There the
// forward makes the loss only, and the backward goes over the features once more when the scale is known. So it does when a single
// head's loss or the logits have a gradient of their own.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>
#include <iterator>
#include <numeric>

#include "../heads_checks.h"
#include "../ops.h"
#include "head_layers.h"
#include "head_loss.h"
#include "heads.h"
#include "node.h"
#include "scale_negate.h"

namespace grl_ext {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Where in a flat list of results the gradients of x, the layers' weights and their biases are.
struct Slots {
  size_t layers;

  size_t weight(size_t layer) const { return 1 + layer; }

  size_t bias(size_t layer) const { return 1 + layers + layer; }

  size_t count() const { return 1 + 2 * layers; }
};

struct Result {
  Tensor loss;
  std::vector<Tensor> head_losses, logits;
  variable_list gradients;  // by Slots; undefined where not needed
};

// tensor.unbind(), without the dispatcher's time where nobody is to see it.
std::vector<Tensor> elements_of(const Tensor& tensor) {
  if (!is_plain(tensor) || c10::impl::dispatch_mode_enabled()) {
    return tensor.unbind();
  }
  std::vector<Tensor> elements;
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    elements.push_back(at::detail::make_tensor<c10::TensorImpl>(c10::Storage(tensor.storage()), tensor.key_set(), tensor.dtype()));
    elements.back().unsafeGetTensorImpl()->set_sizes_and_strides(c10::IntArrayRef{}, c10::IntArrayRef{}, i);
  }
  return elements;
}

// The heads of one loss: their layers and what is said of them.
class Heads {
 public:
  Heads(HeadLayers layers, at::IntArrayRef depth, HeadsOptions options) : layers_(std::move(layers)), options_(std::move(options)) {
    size_t layer = 0;
    for (const auto layers_of_head : depth) {
      first_.push_back(layer);
      layer += static_cast<size_t>(layers_of_head);
    }
    first_.push_back(layer);
  }

  size_t count() const { return first_.size() - 1; }

  Slots slots() const { return {first_.back()}; }

  const HeadLayers& layers() const { return layers_; }

  std::vector<int64_t> depth() const {
    std::vector<int64_t> depth;
    for (size_t h = 0; h < count(); ++h) {
      depth.push_back(static_cast<int64_t>(first_[h + 1] - first_[h]));
    }
    return depth;
  }

  HeadsOptions take_options() { return std::move(options_); }

  const HeadsOptions& options() const { return options_; }

  // The head's first layer among all.
  size_t first(size_t h) const { return first_[h]; }

  size_t last(size_t h) const { return first_[h + 1] - 1; }

  bool is_linear(size_t h) const { return first(h) == last(h); }

  std::vector<size_t> all() const {
    std::vector<size_t> heads(count());
    std::iota(heads.begin(), heads.end(), 0);
    return heads;
  }

  std::vector<size_t> linear_of(const std::vector<size_t>& heads) const {
    std::vector<size_t> linear;
    std::copy_if(heads.begin(), heads.end(), std::back_inserter(linear), [&](size_t h) { return is_linear(h); });
    return linear;
  }

  LayersOfHead layers_of(size_t h, const std::vector<bool>& needs) const {
    LayersOfHead own;
    for (size_t l = first(h); l <= last(h); ++l) {
      own.weight.push_back(layers_.weight[l]);
      own.bias.push_back(layers_.bias.get(l));
      own.needs_weight.push_back(needs[slots().weight(l)]);
      own.needs_bias.push_back(needs[slots().bias(l)]);
    }
    own.needs_x = needs[0];
    return own;
  }

  // What is said of some of the heads.
  HeadsOptions options_of(const std::vector<size_t>& heads, const std::optional<Tensor>& loss_weight) const {
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

  // The losses of some heads, and the gradients that are needed, each head's with its loss_weight.
  Result compute(
      const std::vector<size_t>& asked, const Tensor& x, const std::optional<Tensor>& loss_weight,
      const std::vector<bool>& needs) const {
    Result result{{}, std::vector<Tensor>(count()), std::vector<Tensor>(count()), variable_list(slots().count())};
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

 private:
  // All linear heads in one pass over x.
  void compute_linear(
      Result& result, const std::vector<size_t>& heads, const Tensor& x, const std::optional<Tensor>& loss_weight,
      const std::vector<bool>& needs) const {
    auto [loss, head_losses, logits, dx, dw, db] = heads.size() == count()
        ? call_kernel(x, layers_.weight, layers_.bias, options_, loss_weight, needs)
        : call_kernel_for(heads, x, loss_weight, needs);
    result.loss = loss;
    result.gradients[0] = needs[0] ? std::move(dx) : Tensor();
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

  // A head of several layers: matrix products, and the last layer with the loss as a linear head over the layer before.
  void compute_layers(
      Result& result, size_t h, const Tensor& x, const std::optional<Tensor>& loss_weight, const std::vector<bool>& needs) const {
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
    if (needs[0]) {
      const auto index = options_.lambda_index[h];
      const auto lambda = index < 0 ? Lambda{-1.0, std::nullopt} : read_lambda(options_.lambda.select(0, index));
      add_reversed_product(result.gradients[0], gradients.first, layers.weight[0], lambda);
    }
  }

  // loss, head_losses, logits, dx, dw, db
  using Output = std::tuple<Tensor, Tensor, std::vector<Tensor>, Tensor, std::vector<Tensor>, std::vector<Tensor>>;

  // For some of the heads, all of them linear.
  Output call_kernel_for(
      const std::vector<size_t>& heads, const Tensor& x, const std::optional<Tensor>& loss_weight,
      const std::vector<bool>& needs) const {
    std::vector<bool> own_needs{needs[0]};
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
  }

  static Output call_kernel(
      const Tensor& x, at::TensorList weight, const OptionalTensors& bias, const HeadsOptions& options,
      const std::optional<Tensor>& loss_weight, const std::vector<bool>& needs) {
    static const auto kernel =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("grl_ext::_heads_loss", "")
            .typed<Output(
                const Tensor&, at::TensorList, const OptionalTensors&, at::TensorList, const OptionalTensors&,
                const OptionalTensors&, const Tensor&, at::IntArrayRef, const std::optional<Tensor>&, at::IntArrayRef,
                at::ArrayRef<double>, at::IntArrayRef, bool, const c10::List<bool>&)>();
    return kernel.call(
        x, weight, bias, options.targets, options.sample_weight, options.class_weight, options.lambda, options.lambda_index,
        loss_weight, options.kind, options.label_smoothing, options.ignore_index, options.mean, to_list(needs));
  }

  HeadLayers layers_;
  HeadsOptions options_;
  std::vector<size_t> first_;  // layer of each head; and the number of layers
};

// A list of tensors, some of them undefined, between forward and backward.
class SavedList {
 public:
  void reserve(size_t count) { saved_.reserve(count); }

  void save(const Tensor& tensor, bool is_output = false) { saved_.emplace_back(tensor, is_output); }

  Tensor unpack(size_t i) const { return saved_[i].unpack(); }

  template <class Node>
  Tensor unpack(size_t i, Node owner) const {
    return saved_[i].unpack(owner);
  }

  void release() {
    for (auto& saved : saved_) {
      saved.reset_data();
    }
  }

 private:
  std::vector<SavedVariable> saved_;
};

class HeadsLossBackward : public torch::autograd::Node {
 public:
  // Of the heads the tensors are taken out and saved; what stays are the numbers.
  HeadsLossBackward(const Tensor& x, Heads heads, variable_list gradients)
      : heads_(heads.count()), depth_(heads.depth()), options_(heads.take_options()), gradients_(std::move(gradients)) {
    const auto& layers = heads.layers();
    x_.reserve(1);
    x_.save(x);
    layers_.reserve(2 * layers.weight.size());
    for (size_t l = 0; l < layers.weight.size(); ++l) {
      layers_.save(layers.weight[l]);
      layers_.save(layers.bias.get(l).value_or(Tensor()));
    }
    data_.reserve(3 * heads_);
    for (size_t h = 0; h < heads_; ++h) {
      data_.save(options_.targets[h]);
      data_.save(options_.sample_weight.get(h).value_or(Tensor()));
      data_.save(options_.class_weight.get(h).value_or(Tensor()));
    }
    options_.targets.clear();
    options_.sample_weight = OptionalTensors();
    options_.class_weight = OptionalTensors();
  }

  // After the node has become the logits' own.
  void save_logits(const std::vector<Tensor>& logits) {
    logits_.reserve(logits.size());
    for (const auto& own : logits) {
      logits_.save(own, /*is_output=*/true);
    }
  }

  std::string name() const override { return "HeadsLossBackward"; }

  // grads: of the loss, each head's loss, each head's logits.
  variable_list apply(variable_list&& grads) override {
    const auto is_defined = [](const Tensor& grad) { return grad.defined(); };
    const auto logits_begin = grads.begin() + 1 + static_cast<std::ptrdiff_t>(heads_);
    const bool of_loss = grads[0].defined();
    const bool of_head_losses = std::any_of(grads.begin() + 1, logits_begin, is_defined);
    const bool of_logits = std::any_of(logits_begin, grads.end(), is_defined);
    if (!of_loss && !of_head_losses && !of_logits) {
      return variable_list(num_outputs());
    }
    // What was computed in float32 outside of an autocast region stays so where its backward runs inside one.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool batched = std::any_of(
        grads.begin(), grads.end(), [](const Tensor& grad) { return grad.defined() && is_batched(grad); });
    const bool only_loss = of_loss && !of_head_losses && !of_logits;
    if (only_loss && has_gradients() && !at::GradMode::is_enabled()) {
      return scaled(grads[0]);
    }
    if (of_logits || batched || at::GradMode::is_enabled()) {
      return in_operators(grads);
    }
    return made_now(grads);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto* list : {&x_, &layers_, &data_, &logits_}) {
      list->release();
    }
    for (auto& gradient : gradients_) {
      gradient.reset();
    }
  }

 private:
  std::vector<bool> needs() const {
    std::vector<bool> needs;
    for (size_t i = 0; i < num_outputs(); ++i) {
      needs.push_back(should_compute_output(i));
    }
    return needs;
  }

  // Whether all that are needed were made in the forward and are still here: a backward that fails on the way may have used them up.
  bool has_gradients() const {
    for (size_t i = 0; i < num_outputs(); ++i) {
      if (should_compute_output(i) && (gradients_.empty() || !gradients_[i].defined())) {
        return false;
      }
    }
    return true;
  }

  // The heads as the forward had them.
  Heads heads() const {
    HeadLayers layers;
    const auto count = (num_outputs() - 1) / 2;
    for (size_t l = 0; l < count; ++l) {
      layers.weight.push_back(layers_.unpack(2 * l));
      layers.bias.push_back(optional(layers_.unpack(2 * l + 1)));
    }
    auto options = options_;
    options.sample_weight = OptionalTensors();  // lists are shared, not copied
    options.class_weight = OptionalTensors();
    for (size_t h = 0; h < heads_; ++h) {
      options.targets.push_back(data_.unpack(3 * h));
      options.sample_weight.push_back(optional(data_.unpack(3 * h + 1)));
      options.class_weight.push_back(optional(data_.unpack(3 * h + 2)));
    }
    return {std::move(layers), depth_, std::move(options)};
  }

  static std::optional<Tensor> optional(Tensor tensor) {
    return tensor.defined() ? std::optional(std::move(tensor)) : std::nullopt;
  }

  // What head h's loss counts with: its gradient, and the total's times its loss weight. Undefined if neither has one.
  Tensor factor(const variable_list& grads, size_t h) const {
    Tensor factor = grads[1 + h];
    if (grads[0].defined()) {
      const auto own = options_.loss_weight
          ? grads[0] * options_.loss_weight->select(0, static_cast<int64_t>(h)).to(grads[0].scalar_type())  // wherever it is
          : grads[0];
      factor = factor.defined() ? factor + own : own;
    }
    return factor;
  }

  // The gradients times the incoming number: in place where this is their last use.
  variable_list scaled(const Tensor& grad) {
    const bool last = !torch::autograd::get_current_graph_task_keep_graph();
    Lambda lambda = read_lambda(grad);
    lambda.value *= -1;
    variable_list result(num_outputs());
    for (size_t i = 0; i < num_outputs(); ++i) {
      if (should_compute_output(i)) {
        result[i] = last ? std::move(gradients_[i]) : gradients_[i];
      }
    }
    scale_negate_list(result, lambda);
    return result;
  }

  // The gradients from the features, the incoming numbers on the heads' losses. A head without one takes no part: what it holds may
  // be infinite, and its parameters get no gradient, not zeros.
  variable_list made_now(const variable_list& grads) {
    const auto own = heads();
    const auto x = x_.unpack(0);
    std::vector<size_t> asked;
    std::vector<Tensor> factors;
    for (size_t h = 0; h < heads_; ++h) {
      const auto weight = factor(grads, h);
      if (weight.defined()) {
        asked.push_back(h);
      }
      factors.push_back(
          weight.defined() ? weight : at::zeros({}, x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat)));
    }
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    // Most often it is one number for all, the gradient of the loss, which the kernels read where it is.
    const bool one = std::all_of(factors.begin(), factors.end(), [&](const Tensor& own) { return own.is_same(factors[0]); });
    const auto weights = one ? factors[0].expand({static_cast<int64_t>(heads_)}) : at::stack(factors);
    return own.compute(asked, x, weights, needs()).gradients;
  }

  // The same in operators, differentiable where gradients of gradients are asked for, and with the logits' own gradients.
  variable_list in_operators(const variable_list& grads) {
    const bool twice = at::GradMode::is_enabled();
    const auto own = heads();
    const auto& options = own.options();
    const auto x = x_.unpack(0);
    const auto needed = needs();
    variable_list result(num_outputs());

    // The gradient of a head's logits; undefined if it has none.
    const auto grad_logits = [&](size_t h, const Tensor& logits) {
      Tensor dz;
      if (const auto weight = factor(grads, h); weight.defined()) {
        dz = (grad_logits_composite(logits, options, h) * weight).to(logits.scalar_type());
      }
      const auto& given = grads[1 + heads_ + h];
      return given.defined() ? dz.defined() ? dz + given : given : dz;
    };

    const auto linear = own.linear_of(own.all());
    std::vector<Tensor> logits, weight, dz;
    OptionalTensors bias;
    std::vector<int64_t> lambda_index;
    std::vector<size_t> asked;
    for (const auto h : linear) {
      weight.push_back(own.layers().weight[own.first(h)]);
      bias.push_back(own.layers().bias.get(own.first(h)));
      lambda_index.push_back(options.lambda_index[h]);
    }
    if (twice && !linear.empty()) {
      logits = linear_heads(x, weight, bias, options.lambda, lambda_index);
    }
    weight.clear();
    lambda_index.clear();
    std::vector<bool> own_needs{needed[0]};
    for (size_t i = 0; i < linear.size(); ++i) {
      const auto h = linear[i];
      const auto grad = grad_logits(h, twice ? logits[i] : logits_.unpack(h, holder_of(*this)).detach());
      if (grad.defined()) {
        dz.push_back(grad);
        asked.push_back(h);
        weight.push_back(own.layers().weight[own.first(h)]);
        lambda_index.push_back(options.lambda_index[h]);
        own_needs.push_back(needed[own.slots().weight(own.first(h))]);
      }
    }
    for (const auto h : asked) {
      own_needs.push_back(needed[own.slots().bias(own.first(h))]);
    }
    if (!asked.empty()) {
      const auto [dx, dw, db] = heads_gradients(dz, x, weight, options.lambda, lambda_index, own_needs);
      result[0] = dx;
      for (size_t i = 0; i < asked.size(); ++i) {
        result[own.slots().weight(own.first(asked[i]))] = dw[i];
        result[own.slots().bias(own.first(asked[i]))] = db[i];
      }
    }

    for (size_t h = 0; h < heads_; ++h) {
      if (own.is_linear(h) || !(grads[0].defined() || grads[1 + h].defined() || grads[1 + heads_ + h].defined())) {
        continue;
      }
      const auto layers = own.layers_of(h, needed);
      const auto index = options.lambda_index[h];
      const auto lambda = index < 0 ? Lambda{-1.0, std::nullopt} : read_lambda(options.lambda.select(0, index));
      // A gradient of a weight's gradient reaches x through the reversal, as it would layer by layer.
      const auto seen = twice && index >= 0 ? gradient_reversal(x, lambda_of(options.lambda, index)) : x;
      const auto inputs = inputs_of_layers(seen, layers);
      const auto top = layers.depth() - 1;
      const auto grad = grad_logits(h, at::linear(inputs[top], layers.weight[top], layers.bias[top]));
      GradientsOfLayers gradients{std::vector<Tensor>(top + 1), std::vector<Tensor>(top + 1), {}};
      gradients_of_layers(gradients, grad, inputs, layers, layers.depth());
      for (size_t l = 0; l <= top; ++l) {
        result[own.slots().weight(own.first(h) + l)] = gradients.dw[l];
        result[own.slots().bias(own.first(h) + l)] = gradients.db[l];
      }
      if (needed[0]) {
        add_reversed_product(result[0], gradients.first, layers.weight[0], lambda);
      }
    }
    return result;
  }

  const size_t heads_;
  const std::vector<int64_t> depth_;
  HeadsOptions options_;  // without the tensors that are saved
  SavedList x_, layers_, data_, logits_;
  variable_list gradients_;  // empty: they are made in the backward
};

// Targets and weights as the kernels read them: rows, contiguous, in the type that the loss is computed in.
void prepare(HeadsOptions& options, const Tensor& x, const std::vector<c10::SymInt>& sizes) {
  const auto dtype = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto rows = x.sym_size(0);
  const auto converted = [&](const std::optional<Tensor>& tensor, c10::SymIntArrayRef shape) {
    return tensor ? std::optional(tensor->to(dtype).reshape_symint(shape).contiguous()) : std::nullopt;
  };
  for (size_t h = 0; h < sizes.size(); ++h) {
    auto& target = options.targets[h];
    if (target.scalar_type() == at::kLong) {
      target = (target.dim() == 1 ? target : target.reshape_symint({rows})).contiguous();
    } else {
      target = *converted(target, {rows, sizes[h]});
    }
    if (const auto given = options.sample_weight.get(h)) {
      options.sample_weight.set(h, converted(given, {rows}));
    }
    if (const auto given = options.class_weight.get(h)) {
      options.class_weight.set(h, converted(given, {sizes[h] > 1 ? sizes[h] : c10::SymInt(2)}));
    }
  }
}

// The kernels look at the values of what they are given. Where those are some of the heads only, they would name the wrong head.
void check_values(const HeadsOptions& options, const std::vector<c10::SymInt>& sizes) {
  const auto readable = [](const Tensor& tensor) {
    return tensor.is_cpu() && is_plain(tensor) && !c10::impl::dispatch_mode_enabled();
  };
  for (size_t h = 0; h < sizes.size(); ++h) {
    if (const auto given = options.sample_weight.get(h); given && readable(*given)) {
      const auto weights = given->to(at::kDouble);
      for (int64_t r = 0; r < weights.numel(); ++r) {
        check_sample_weight(weights.const_data_ptr<double>()[r], h);
      }
    }
    const auto& target = options.targets[h];
    if (target.scalar_type() == at::kLong && readable(target)) {
      const auto classes = classes_of(sizes[h].expect_int());
      for (int64_t r = 0; r < target.numel(); ++r) {
        check_class(target.const_data_ptr<int64_t>()[r], h, classes, options.ignore_index[h]);
      }
    }
  }
}

}  // namespace

LossAndLogits heads_loss(
    const Tensor& x, at::TensorList weight, const OptionalTensors& bias, at::IntArrayRef depth, HeadsOptions options) {
  refuse_functorch();
  refuse_forward_mode(x, weight, bias);
  auto inputs = prepare(x, weight, bias);
  check_layers(inputs.features, inputs.layers.weight, inputs.layers.bias, depth);
  check_lambda_of_heads(x, options.lambda, options.lambda_index, depth.size());
  refuse_gradient("lambda_", options.lambda);
  std::vector<c10::SymInt> sizes;
  size_t layer = 0;
  for (const auto layers_of_head : depth) {
    layer += static_cast<size_t>(layers_of_head);
    sizes.push_back(weight[layer - 1].sym_size(0));
  }
  check_options(inputs.features, sizes, options);
  options.lambda = numbers_now(options.lambda);
  if (options.loss_weight) {
    options.loss_weight = numbers_now(*options.loss_weight);
  }

  inputs.x = as_rows(inputs.features);
  prepare(options, inputs.x, sizes);
  const bool recorded = any_requires_grad(inputs.x, inputs.layers);
  const bool now = recorded && inputs.x.scalar_type() != at::kHalf;
  const auto edges = recorded ? edges_of(inputs.x, inputs.layers) : torch::autograd::edge_list();
  std::vector<bool> needs{now && inputs.x.requires_grad()};
  for (const auto& own : inputs.layers.weight) {
    needs.push_back(now && own.requires_grad());
  }
  for (size_t l = 0; l < inputs.layers.weight.size(); ++l) {
    const auto own = inputs.layers.bias.get(l);
    needs.push_back(now && own && own->requires_grad());
  }
  Heads heads(std::move(inputs.layers), depth, std::move(options));
  if (heads.count() > 1 && heads.linear_of(heads.all()).size() < heads.count()) {
    check_values(heads.options(), sizes);
  }
  Result result;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const at::NoGradGuard nothing_recorded;
    result = heads.compute(heads.all(), inputs.x, heads.options().loss_weight, needs);
  }
  if (recorded) {
    auto node = make_node<HeadsLossBackward>(inputs.x, std::move(heads), now ? std::move(result.gradients) : variable_list());
    node->set_next_edges(torch::autograd::edge_list(edges));
    torch::autograd::set_history(result.loss, node);
    torch::autograd::set_history(result.head_losses, node);
    torch::autograd::set_history(result.logits, node);
    node->save_logits(result.logits);
  }
  for (auto& logits : result.logits) {
    logits = with_leading_sizes(logits, inputs.features);
  }
  return {result.loss, result.head_losses, result.logits};
}

LossAndLogits heads_loss_of_lists(
    const Tensor& x, at::TensorList weight, const OptionalTensors& bias, at::IntArrayRef depth, at::TensorList targets,
    const OptionalTensors& sample_weight, const OptionalTensors& class_weight, const Tensor& lambda, at::IntArrayRef lambda_index,
    const std::optional<Tensor>& loss_weight, at::IntArrayRef kind, at::ArrayRef<double> label_smoothing,
    at::IntArrayRef ignore_index, bool mean) {
  return heads_loss(
      x, weight, bias, depth,
      {targets.vec(), sample_weight.copy(), class_weight.copy(), lambda, lambda_index.vec(), loss_weight, kind.vec(),
       label_smoothing.vec(), ignore_index.vec(), mean});
}

}  // namespace grl_ext
