// heads_loss: all heads' logits, losses and gradients. Linear heads are computed together, in one pass over the
// features.
//
// The forward computes the gradients too, in the same pass over the features; the backward multiplies them by the
// loss's incoming gradient. Not in float16: a gradient that underflows in the forward cannot be recovered by a loss
// scale that comes in the backward. There the forward computes the losses only, and the backward goes over the features
// once more, with the scale. The backward also does that where a single head's loss or the logits have an incoming
// gradient of their own.
#include <ATen/ATen.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>
#include <numeric>

#include "../arithmetic_type.h"
#include "../heads_checks.h"
#include "../ops.h"
#include "heads_loss_backward.h"
#include "heads_loss_forward.h"
#include "node.h"
#include "scale.h"

namespace grl_ext {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

using SavedList = std::vector<SavedVariable>;

class HeadsLossBackward : public TraceableNode<HeadsLossBackward> {
 public:
  // Saves the tensors of `heads`. The numbers stay in options_.
  HeadsLossBackward(const Tensor& x, HeadsOfLoss heads, variable_list gradients)
      : heads_(heads.count()), depth_(heads.depth()), options_(heads.take_options()), x_(x, /*is_output=*/false),
        gradients_(std::move(gradients)) {
    const auto& layers = heads.layers();
    layers_.reserve(2 * layers.weight.size());
    for (size_t l = 0; l < layers.weight.size(); ++l) {
      layers_.emplace_back(layers.weight[l], /*is_output=*/false);
      layers_.emplace_back(layers.bias.get(l).value_or(Tensor()), /*is_output=*/false);
    }
    data_.reserve(3 * heads_);
    for (size_t h = 0; h < heads_; ++h) {
      data_.emplace_back(options_.targets[h], /*is_output=*/false);
      data_.emplace_back(options_.sample_weight.get(h).value_or(Tensor()), /*is_output=*/false);
      data_.emplace_back(options_.class_weight.get(h).value_or(Tensor()), /*is_output=*/false);
    }
    options_.targets.clear();
    options_.sample_weight = OptionalTensors();
    options_.class_weight = OptionalTensors();
  }

  // Called after set_history: saved logits must know that this node made them.
  void save_logits(const std::vector<Tensor>& logits) {
    logits_.reserve(logits.size());
    for (const auto& own : logits) {
      logits_.emplace_back(own, /*is_output=*/true);
    }
  }

  std::string name() const override { return "HeadsLossBackward"; }

  variable_list apply(variable_list&& grads) override {
    const IncomingGradients incoming{grads, heads_};
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto needs = this->needs();
    if (can_reuse(incoming, needs, gradients_)) {
      return scaled(grads[0], needs, !torch::autograd::get_current_graph_task_keep_graph(), gradients_);
    }
    std::vector<Tensor> saved;
    for (const auto* list : {&layers_, &data_}) {
      for (const auto& own : *list) {
        saved.push_back(own.unpack());
      }
    }
    const auto logits = [this](size_t h) { return logits_[h].unpack(holder_of(*this)).detach(); };
    return recomputed(incoming, heads_of(saved, depth_, options_), x_.unpack(), logits, needs);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    x_.reset_data();
    for (auto* list : {&layers_, &data_, &logits_}) {
      for (auto& saved : *list) {
        saved.reset_data();
      }
    }
    for (auto& gradient : gradients_) {
      gradient.reset();
    }
  }

  // In the order in which traced() reads them.
  template <class Visit>
  void each_saved(Visit visit) {
    for (auto* list : {&layers_, &data_}) {
      std::for_each(list->begin(), list->end(), visit);
    }
    visit(x_);
    std::for_each(logits_.begin(), logits_.end(), visit);
    visit(options_.lambda);
    if (options_.loss_weight) {
      visit(*options_.loss_weight);
    }
    std::for_each(gradients_.begin(), gradients_.end(), visit);
  }

  void collect_constants(torch::dynamo::autograd::CompiledNodeArgs& args) const {
    args.collect(depth_);
    args.collect(options_.lambda_index);
    args.collect(options_.loss_weight.has_value());
    args.collect(options_.kind);
    args.collect(options_.label_smoothing);
    args.collect(options_.ignore_index);
    args.collect(options_.mean);
    args.collect(gradients_.empty());
  }

  TracedBackward traced() const {
    return [heads = heads_, depth = depth_, options = options_, at_x = layers_.size() + data_.size(),
            with_gradients = !gradients_.empty(),
            needs = needs_when_traced()](const variable_list& grads, const variable_list& saved) -> variable_list {
      const IncomingGradients incoming{grads, heads};
      const auto at_lambda = at_x + 1 + heads;
      auto own = options;
      own.lambda = saved[at_lambda];
      if (own.loss_weight) {
        own.loss_weight = saved[at_lambda + 1];
      }
      variable_list gradients(
          saved.end() - static_cast<std::ptrdiff_t>(with_gradients ? needs.size() : 0), saved.end());
      if (can_reuse(incoming, needs, gradients)) {
        return scaled(grads[0], needs, /*last=*/false, gradients);
      }
      const auto logits = [&](size_t h) { return saved[at_x + 1 + h].detach(); };
      return recomputed(incoming, heads_of(saved, depth, own), saved[at_x], logits, needs);
    };
  }

 private:
  // Whether the forward's gradients can be returned: they are what is asked for, and an earlier backward that failed
  // has not consumed them.
  static bool can_reuse(
      const IncomingGradients& incoming, const std::vector<bool>& needs, const variable_list& gradients) {
    if (!incoming.of_loss().defined() || incoming.any_of_head_losses() || incoming.any_of_logits() ||
        is_batched(incoming.of_loss()) || at::GradMode::is_enabled()) {
      return false;
    }
    for (size_t i = 0; i < needs.size(); ++i) {
      if (needs[i] && (gradients.empty() || !gradients[i].defined())) {
        return false;
      }
    }
    return true;
  }

  // The forward's gradients times the loss's incoming gradient; in place where this is their last use.
  static variable_list scaled(const Tensor& grad, const std::vector<bool>& needs, bool last, variable_list& gradients) {
    variable_list result(needs.size());
    for (size_t i = 0; i < needs.size(); ++i) {
      if (needs[i]) {
        result[i] = last ? std::move(gradients[i]) : gradients[i];
      }
    }
    scale_list(result, read_factor(grad));
    return result;
  }

  static variable_list recomputed(
      const IncomingGradients& incoming, const HeadsOfLoss& heads, const Tensor& x,
      const std::function<Tensor(size_t h)>& logits, const std::vector<bool>& needs) {
    if (!incoming.of_loss().defined() && !incoming.any_of_head_losses() && !incoming.any_of_logits()) {
      return variable_list(needs.size());
    }
    // A forward outside an autocast region keeps its dtype, also where its backward runs inside one.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    if (incoming.any_of_logits() || incoming.any_batched() || at::GradMode::is_enabled()) {
      return heads_loss_backward_composite(incoming, heads, x, logits, needs);
    }
    return heads_loss_backward(incoming, heads, x, needs);
  }

  // The heads as the forward had them. `saved`: weight and bias of each layer; target, sample and class weights of each
  // head.
  static HeadsOfLoss heads_of(
      const std::vector<Tensor>& saved, const std::vector<int64_t>& depth, HeadsOptions options) {
    const auto optional = [](const Tensor& tensor) { return tensor.defined() ? std::optional(tensor) : std::nullopt; };
    HeadLayers layers;
    size_t next = 0;
    for (int64_t l = std::accumulate(depth.begin(), depth.end(), int64_t{0}); l > 0; --l, next += 2) {
      layers.weight.push_back(saved[next]);
      layers.bias.push_back(optional(saved[next + 1]));
    }
    options.sample_weight = OptionalTensors();  // lists are shared, not copied
    options.class_weight = OptionalTensors();
    for (size_t h = 0; h < depth.size(); ++h, next += 3) {
      options.targets.push_back(saved[next]);
      options.sample_weight.push_back(optional(saved[next + 1]));
      options.class_weight.push_back(optional(saved[next + 2]));
    }
    return {std::move(layers), depth, std::move(options)};
  }

  const size_t heads_;
  const std::vector<int64_t> depth_;
  HeadsOptions options_;  // without the tensors that are saved
  SavedVariable x_;
  SavedList layers_;  // weight and bias of each layer
  SavedList data_;  // target, sample weight and class weight of each head
  SavedList logits_;
  variable_list gradients_;  // by GradientSlots; empty: the backward computes them
};

// Targets and weights as the kernels read them: rows, contiguous, in the type that the loss is computed in.
void prepare(HeadsOptions& options, const Tensor& x, const std::vector<c10::SymInt>& sizes) {
  const auto dtype = arithmetic_type(x.scalar_type());
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

// The kernels check values too, but count the heads of their own call. With hidden layers a call has only some of the
// heads, and the kernels' errors would name the wrong one. So the values are checked here, where h is right.
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
  std::vector<c10::SymInt> sizes;
  sizes.reserve(depth.size());
  size_t layer = 0;
  for (const auto layers_of_head : depth) {
    layer += static_cast<size_t>(layers_of_head);
    sizes.push_back(weight[layer - 1].sym_size(0));
  }
  check_options(inputs.features, sizes, options);
  options.lambda = numbers_now(options.lambda);
  if (options.loss_weight) {
    const auto& given = *options.loss_weight;
    const bool readable = given.scalar_type() == at::kFloat ||
        given.scalar_type() == at::kDouble;  // by the kernels, as it is
    options.loss_weight = numbers_now(readable ? given : given.to(at::kDouble));
  }

  inputs.x = as_rows(inputs.features);
  prepare(options, inputs.x, sizes);
  const bool recorded = any_requires_grad(inputs.x, inputs.layers);
  const bool now = recorded && inputs.x.scalar_type() != at::kHalf;
  auto edges = recorded ? edges_of(inputs.x, inputs.layers) : torch::autograd::edge_list();
  std::vector<bool> needs{now && inputs.x.requires_grad()};
  needs.reserve(GradientSlots{weight.size()}.count());
  for (const auto& own : inputs.layers.weight) {
    needs.push_back(now && own.requires_grad());
  }
  for (size_t l = 0; l < inputs.layers.weight.size(); ++l) {
    const auto own = inputs.layers.bias.get(l);
    needs.push_back(now && own && own->requires_grad());
  }
  HeadsOfLoss heads(std::move(inputs.layers), depth, std::move(options));
  if (heads.count() > 1 && !heads.all_linear()) {
    check_values(heads.options(), sizes);
  }
  HeadsOfLoss::Result result;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const at::NoGradGuard nothing_recorded;
    result = heads.compute(heads.all(), inputs.x, heads.options().loss_weight, needs);
  }
  if (recorded) {
    auto node = make_node<HeadsLossBackward>(
        inputs.x, std::move(heads), now ? std::move(result.gradients) : variable_list());
    node->set_next_edges(std::move(edges));
    torch::autograd::set_history(result.loss, node);
    torch::autograd::set_history(result.head_losses, node);
    torch::autograd::set_history(result.logits, node);
    node->save_logits(result.logits);
  }
  for (auto& logits : result.logits) {
    if (inputs.features.dim() !=
        2) {  // a view, so that the node, which has saved the rows, notices if they are modified in place
      logits = logits.view_symint(leading_sizes(logits, inputs.features));
    }
  }
  return {result.loss, result.head_losses, result.logits};
}

LossAndLogits heads_loss_of_lists(
    const Tensor& x, at::TensorList weight, const OptionalTensors& bias, at::IntArrayRef depth, at::TensorList targets,
    const OptionalTensors& sample_weight, const OptionalTensors& class_weight, const Tensor& lambda,
    at::IntArrayRef lambda_index, const std::optional<Tensor>& loss_weight, at::IntArrayRef kind,
    at::ArrayRef<double> label_smoothing, at::IntArrayRef ignore_index, bool mean) {
  return heads_loss(
      x, weight, bias, depth,
      {targets.vec(), sample_weight.copy(), class_weight.copy(), lambda, lambda_index.vec(), loss_weight, kind.vec(),
       label_smoothing.vec(), ignore_index.vec(), mean});
}

}  // namespace grl_ext
