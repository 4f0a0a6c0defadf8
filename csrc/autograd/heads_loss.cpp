// heads_loss: the logits, losses and gradients of linear heads, in one pass over the features.
//
// The forward computes the gradients too; the backward multiplies them by the loss's incoming gradient. Not in float16:
// a gradient that underflows in the forward cannot be recovered by a loss scale that comes in the backward. There the
// forward keeps the gradients of the logits in float32 (on CUDA it keeps nothing), and the backward goes over the
// features once more, with the scale. So does the backward where single heads' losses have incoming gradients. Where
// logits have some and nothing was kept, or the gradients are to be differentiated, it is made of ATen operators and
// linear_heads.
#include <pytorch.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/stack.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <numeric>

#include "../accepted.h"
#include "../arithmetic_type.h"
#include "../ops.h"
#include "heads.h"
#include "loss_gradient.h"
#include "node.h"
#include "scale.h"

namespace grl_ext {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

HeadsLossResult call_kernel(
    const HeadInputs& inputs, const HeadsOptions& options, const std::optional<Tensor>& loss_weight,
    bool with_grad_logits, const std::vector<bool>& needs) {
  static const auto kernel = find_kernel<HeadsLossResult(
      const Tensor&, at::TensorList, const OptionalTensors&, at::TensorList, const OptionalTensors&,
      const OptionalTensors&, at::ArrayRef<double>, const OptionalTensors&, const std::optional<Tensor>&,
      at::IntArrayRef, at::ArrayRef<double>, at::IntArrayRef, bool, bool, const c10::List<bool>&)>("_heads_loss");
  const auto [factor, lambda] = to_lists(inputs.factors);
  return kernel.call(
      inputs.x, inputs.weight, inputs.bias, options.targets, options.sample_weight, options.class_weight, factor,
      lambda, loss_weight, options.kind, options.label_smoothing, options.ignore_index, options.mean, with_grad_logits,
      to_list(needs));
}

// Undefined where there is none.
struct IncomingGradients {
  const Tensor& loss;
  at::TensorList head_losses, logits;

  IncomingGradients(const variable_list& grads, size_t heads)
      : loss(grads[0]), head_losses(at::TensorList(grads).slice(1, heads)),
        logits(at::TensorList(grads).slice(1 + heads)) {}

  bool is_of_loss_alone() const { return loss.defined() && !any_defined(head_losses) && !any_defined(logits); }

  // Of head h's loss in all: its own, plus the total's times the head's loss weight.
  Tensor of_head(size_t h, const std::optional<Tensor>& loss_weight) const {
    if (!loss.defined()) {
      return head_losses[h];
    }
    const auto part = loss_weight
        ? loss * loss_weight->select(0, static_cast<int64_t>(h)).to(loss.scalar_type())  // on whichever device
        : loss;
    return head_losses[h].defined() ? head_losses[h] + part : part;
  }
};

// By the kernel, in one more pass over the features. The logits have no incoming gradients. A head whose loss has none
// is left out: its values may be infinite, and its parameters get no gradient instead of zeros.
variable_list backward_by_kernel(
    const IncomingGradients& incoming, const HeadInputs& inputs, const HeadsOptions& options,
    const std::vector<bool>& needs) {
  std::vector<size_t> asked;
  std::vector<Tensor> weights;
  for (size_t h = 0; h < inputs.count(); ++h) {
    if (auto weight = incoming.of_head(h, options.loss_weight); weight.defined()) {
      asked.push_back(h);
      weights.push_back(std::move(weight));
    }
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  // Most often all heads have the same one, the gradient of the total. Kernels read an expanded tensor where it is.
  const auto same = [&](const Tensor& weight) { return weight.is_same(weights[0]); };
  const auto weight = std::all_of(weights.begin(), weights.end(), same)
      ? weights[0].expand({static_cast<int64_t>(weights.size())})
      : at::stack(weights);
  auto [loss, head_losses, logits, grad_logits, dx, dw, db] = call_kernel(
      some(inputs, asked), some(options, asked), weight, /*with_grad_logits=*/false, needs_of(needs, asked));
  return among_all({std::move(dx), std::move(dw), std::move(db)}, asked, needs);
}

// From the gradients of the logits: those that the forward has kept, one for each head and for its own loss, or those
// that ATen operators make, which are differentiable. With the logits' incoming gradients. The logits are made again
// then: those of the forward belong to the user, who may have changed them in place.
variable_list backward_by_logits(
    const IncomingGradients& incoming, const HeadInputs& inputs, const HeadsOptions& options,
    const std::vector<Tensor>& kept, const std::vector<bool>& needs) {
  std::vector<Tensor> logits;
  if (at::GradMode::is_enabled()) {
    logits = *linear_heads(inputs.x, inputs.weight, inputs.bias, inputs.factors);
  }
  const auto of_own_loss = [&](size_t h, const Tensor& weight) {
    if (!kept.empty()) {
      return kept[h] * weight;
    }
    const auto z = logits.empty() ? at::linear(inputs.x, inputs.weight[h], inputs.bias.get(h)) : logits[h];
    return (loss_gradient(z, options, h) * weight).to(z.scalar_type());
  };
  variable_list grad_logits(incoming.logits.begin(), incoming.logits.end());
  for (size_t h = 0; h < inputs.count(); ++h) {
    if (const auto weight = incoming.of_head(h, options.loss_weight); weight.defined()) {
      const auto own = of_own_loss(h, weight);
      grad_logits[h] = grad_logits[h].defined() ? own + grad_logits[h] : own;
    }
  }
  return gradients_of_heads(grad_logits, inputs, needs);
}

// Whether the forward's gradients can be returned: they are what is asked for, and an earlier backward that failed has
// not consumed them.
bool can_reuse(const IncomingGradients& incoming, const std::vector<bool>& needs, const variable_list& gradients) {
  if (!incoming.is_of_loss_alone() || is_batched_or_dual(incoming.loss) || at::GradMode::is_enabled()) {
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
variable_list scaled(const Tensor& grad, const std::vector<bool>& needs, bool last, variable_list& gradients) {
  variable_list result(needs.size());
  for (size_t i = 0; i < needs.size(); ++i) {
    if (needs[i]) {
      result[i] = last ? std::move(gradients[i]) : gradients[i];
    }
  }
  scale_list(result, read_factor(grad));
  return result;
}

class HeadsLossBackward : public TraceableNode<HeadsLossBackward> {
 public:
  HeadsLossBackward(
      const HeadInputs& inputs, HeadsOptions options, variable_list gradients, const std::vector<Tensor>& grad_logits)
      : heads_(inputs.count()), factors_(inputs.factors.begin(), inputs.factors.end()), options_(std::move(options)),
        gradients_(std::move(gradients)), passed_(inputs.count()) {
    saved_.reserve(1 + 5 * heads_ + grad_logits.size());
    saved_.save(inputs.x);
    for (size_t h = 0; h < heads_; ++h) {
      saved_.save(inputs.weight[h]);
      saved_.save(inputs.bias.get(h));
      saved_.save(options_.targets[h]);
      saved_.save(options_.sample_weight.get(h));
      saved_.save(options_.class_weight.get(h));
    }
    for (const auto& kept : grad_logits) {
      saved_.save(kept);
    }
    // What is saved stays nowhere else.
    options_.targets.clear();
    options_.sample_weight = OptionalTensors();
    options_.class_weight = OptionalTensors();
  }

  std::string name() const override { return "HeadsLossBackward"; }

  variable_list apply(variable_list&& grads) override {
    const IncomingGradients incoming(grads, heads_);
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto needs = this->needs();
    passed_.begin([&](size_t h) {
      return incoming.loss.defined() || incoming.head_losses[h].defined() || incoming.logits[h].defined();
    });
    if (can_reuse(incoming, needs, gradients_)) {
      return scaled(grads[0], needs, !torch::autograd::get_current_graph_task_keep_graph(), gradients_);
    }
    std::vector<Factor> factors;
    for (const auto& factor : factors_) {
      factors.push_back(factor.unpack());
    }
    return backward(heads_, grads, saved_.unpack(*this), options_, std::move(factors), needs);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (passed_.end_in_part()) {
      return;
    }
    saved_.release();
    std::fill(gradients_.begin(), gradients_.end(), Tensor());
  }

  // In the order in which traced() reads them.
  template <class Visit>
  void each_saved(Visit visit) {
    saved_.each(visit);
    for (auto& factor : factors_) {
      factor.each_saved(visit);
    }
    if (options_.loss_weight) {
      visit(*options_.loss_weight);
    }
    std::for_each(gradients_.begin(), gradients_.end(), visit);
  }

  void collect_constants(torch::dynamo::autograd::CompiledNodeArgs& args) const {
    for (const auto& factor : factors_) {
      factor.collect_constants(args);
    }
    args.collect(options_.loss_weight.has_value());
    args.collect(options_.kind);
    args.collect(options_.label_smoothing);
    args.collect(options_.ignore_index);
    args.collect(options_.mean);
    args.collect(gradients_.empty());
    args.collect(saved_.size());
  }

  TracedBackward traced() const {
    return [heads = heads_, at_factors = saved_.size(), options = options_, factors = traced_factors(factors_),
            needs = needs_when_traced()](const variable_list& grads, const variable_list& saved) {
      const auto at = [begin = saved.begin()](size_t i) { return begin + static_cast<std::ptrdiff_t>(i); };
      const size_t after_factors = at_factors + 2 * heads;
      auto own = options;
      if (own.loss_weight) {
        own.loss_weight = saved[after_factors];
      }
      const IncomingGradients incoming(grads, heads);
      variable_list gradients(at(after_factors + own.loss_weight.has_value()), saved.end());
      if (can_reuse(incoming, needs, gradients)) {
        return scaled(grads[0], needs, /*last=*/false, gradients);
      }
      return backward(heads, grads, {at(0), at(at_factors)}, own, factors(at(at_factors)), needs);
    };
  }

 private:
  // From what the constructor saves.
  static variable_list backward(
      size_t heads, const variable_list& grads, const std::vector<Tensor>& saved, HeadsOptions options,
      std::vector<Factor> factors, const std::vector<bool>& needs) {
    if (!any_defined(grads)) {
      return variable_list(needs.size());
    }
    const IncomingGradients incoming(grads, heads);
    HeadInputs inputs{saved[0], {}, OptionalTensors(), std::move(factors)};
    options.sample_weight = OptionalTensors();  // lists are shared, not copied
    options.class_weight = OptionalTensors();
    const size_t at_kept = 1 + 5 * heads;
    for (size_t next = 1; next < at_kept; next += 5) {
      inputs.weight.push_back(saved[next]);
      inputs.bias.push_back(to_optional(saved[next + 1]));
      options.targets.push_back(saved[next + 2]);
      options.sample_weight.push_back(to_optional(saved[next + 3]));
      options.class_weight.push_back(to_optional(saved[next + 4]));
    }
    // A forward outside an autocast region keeps its dtype, also where its backward runs inside one.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const bool plain = !any_batched_or_dual(grads) && !at::GradMode::is_enabled();
    std::vector<Tensor> kept;
    if (plain) {
      kept.assign(saved.begin() + static_cast<std::ptrdiff_t>(at_kept), saved.end());
    }
    return plain && kept.empty() && !any_defined(incoming.logits)
        ? backward_by_kernel(incoming, inputs, options, needs)
        : backward_by_logits(incoming, inputs, options, kept, needs);
  }

  const size_t heads_;
  std::vector<SavedFactor> factors_;
  HeadsOptions options_;  // without the tensors that are saved
  SavedList saved_;  // x; of each head weight, bias, target, sample and class weight; gradients of logits, where kept
  variable_list gradients_;  // by GradientSlots; empty: the backward computes them
  HeadsPassed passed_;
};

// Targets and weights as the kernels read them: rows, contiguous, in the type that the loss is computed in.
void to_rows(HeadsOptions& options, const HeadInputs& inputs, const Tensor& features) {
  const auto dtype = arithmetic_type(inputs.x.scalar_type());
  const auto rows = inputs.x.sym_size(0);
  const auto converted = [&](const std::optional<Tensor>& tensor, c10::SymIntArrayRef shape) {
    return tensor ? std::optional(tensor->to(dtype).reshape_symint(shape).contiguous()) : std::nullopt;
  };
  for (size_t h = 0; h < inputs.count(); ++h) {
    const auto size = inputs.weight[h].sym_size(0);
    auto& target = options.targets[h];
    if (options.kind[h] == kCrossEntropy && target.scalar_type() == at::kLong) {
      target = (target.dim() == 1 ? target : target.reshape_symint({rows})).contiguous();
    } else {
      target = *converted(target, {rows, size});
    }
    if (const auto weights = options.sample_weight.get(h)) {
      const bool of_entries = weights->dim() == features.dim() && size != 1;
      options.sample_weight.set(h, of_entries ? converted(weights, {rows, size}) : converted(weights, {rows}));
    }
    if (const auto weights = options.class_weight.get(h)) {
      options.class_weight.set(h, converted(weights, {size > 1 ? size : c10::SymInt(2)}));
    }
  }
  if (options.loss_weight) {
    const auto& weights = *options.loss_weight;
    const bool readable = weights.scalar_type() == at::kFloat || weights.scalar_type() == at::kDouble;
    // From the CPU a copy: it may change before the backward. On a GPU kernels read what it holds when they run.
    const auto numbers = (readable ? weights : weights.to(at::kDouble)).detach();
    options.loss_weight = numbers.is_cpu() ? numbers.clone() : numbers;
  }
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

std::optional<LossAndLogits> heads_loss(
    const Tensor& x, at::TensorList weight, const OptionalTensors& bias, std::vector<Factor> factors,
    HeadsOptions options) {
  auto inputs = prepare(x, weight, bias, std::move(factors));
  std::vector<c10::SymInt> sizes;
  sizes.reserve(weight.size());
  for (const auto& matrix : weight) {
    sizes.push_back(matrix.sym_size(0));
  }
  if (!inputs || !accepts_options(inputs->x, sizes, options)) {
    return std::nullopt;
  }
  const auto features = inputs->x;
  inputs->x = as_rows(features);
  to_rows(options, *inputs, features);
  const auto recording = recorded(*inputs);
  const bool now = inputs->x.scalar_type() != at::kHalf;
  const auto needs = now ? recording : std::vector<bool>(recording.size());
  const bool keep = !now && any(recording) && inputs->x.is_cpu();
  auto [loss, all_losses, logits, grad_logits, dx, dw, db] = [&] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    return call_kernel(*inputs, options, options.loss_weight, keep, needs);
  }();
  auto head_losses = [&all_losses = all_losses] {  // clang before 16 captures no name of a binding by itself
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return elements_of(all_losses);
  }();
  if (any(recording)) {
    std::vector<size_t> heads(inputs->count());
    std::iota(heads.begin(), heads.end(), 0);
    auto gradients = now ? among_all({std::move(dx), std::move(dw), std::move(db)}, heads, needs) : variable_list();
    auto edges = edges_of(*inputs);
    auto node = make_node<HeadsLossBackward>(*inputs, std::move(options), std::move(gradients), grad_logits);
    node->set_next_edges(std::move(edges));
    torch::autograd::set_history(loss, node);
    torch::autograd::set_history(head_losses, node);
    torch::autograd::set_history(logits, node);
  }
  for (auto& own : logits) {
    own = with_leading_sizes(own, features);
  }
  return LossAndLogits{std::move(loss), std::move(head_losses), std::move(logits)};
}

}  // namespace grl_ext
