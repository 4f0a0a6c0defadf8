// heads_cross_entropy: all heads' logits, losses and gradients in one pass over the features.
//
// The gradients are made in the forward, while the features are at hand; the backward multiplies them by the incoming number.
// Float16 is too narrow for that: a gradient that vanishes in it cannot be saved by a loss scale that comes later. There the
// forward makes the loss only, and the backward goes over the features once more when the scale is known.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "../checks.h"
#include "../ops.h"
#include "heads.h"
#include "linear.h"
#include "node.h"
#include "scale_negate.h"

namespace grl_ext {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// The gradient of the loss for the logits, in ATen operators:
//   (softmax(z_h) - y_h) * loss_weight_h / valid_h, with y the smoothed targets, 0 in rows that are not valid.
// Not rounded to half types: the loss scale comes later.
Tensor grad_logits_composite(const Tensor& logits, const Tensor& targets, const LossOptions& options) {
  const auto z = logits.to(c10::promoteTypes(logits.scalar_type(), at::kFloat));
  std::vector<Tensor> parts;
  int64_t start = 0;
  for (size_t h = 0; h < options.head_sizes.size(); ++h) {
    const auto size = options.head_sizes[h];
    const auto target = targets.select(1, static_cast<int64_t>(h));
    const auto valid = target.ne(options.ignore_index);
    auto zh = z.narrow(1, start, size);
    start += size;
    if (size == 1) {
      zh = at::cat({at::zeros_like(zh), zh}, 1);  // binary: the softmax over 0 and z
    }
    const auto classes = zh.size(1);
    const auto y = at::one_hot(target.masked_fill(valid.logical_not(), 0), classes).to(zh.scalar_type()) *
            (1 - options.label_smoothing) +
        options.label_smoothing / static_cast<double>(classes);
    auto weight = valid.to(zh.scalar_type()) / valid.sum().clamp_min(1);
    if (options.loss_weight) {
      weight = weight * options.loss_weight->select(0, static_cast<int64_t>(h)).to(zh.options());
    }
    const auto dz = (zh.softmax(1) - y) * weight.unsqueeze(1);
    parts.push_back(size == 1 ? dz.narrow(1, 1, 1) : dz);
  }
  return at::cat(parts, 1);
}

using Kernel = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const std::optional<Tensor>&, const Tensor&, at::IntArrayRef, const Tensor&,
    const std::optional<Tensor>&, int64_t, double, std::array<bool, 3>);

// loss, head_losses, logits, dx, dw, db
auto call_kernel(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& targets, const LossOptions& options,
    const std::optional<Tensor>& loss_weight, std::array<bool, 3> needs) {
  static const auto kernel = c10::Dispatcher::singleton().findSchemaOrThrow("grl_ext::_heads_cross_entropy", "").typed<Kernel>();
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return kernel.call(
      x, weight, bias, targets, options.head_sizes, options.grad_scale, loss_weight, options.ignore_index,
      options.label_smoothing, needs);
}

// loss_weight times a number, without a copy between devices.
Tensor times(const std::optional<Tensor>& loss_weight, const Tensor& number, int64_t heads) {
  const auto wide = number.to(at::kDouble);
  if (!loss_weight) {
    return wide.expand({heads});
  }
  if (loss_weight->device() == wide.device()) {
    return loss_weight->to(at::kDouble) * wide;
  }
  std::vector<Tensor> products;
  for (int64_t h = 0; h < heads; ++h) {
    products.push_back(wide * loss_weight->select(0, h).item<double>());
  }
  return at::stack(products);
}

class HeadsCrossEntropyBackward : public torch::autograd::Node {
 public:
  HeadsCrossEntropyBackward(
      const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& targets, LossOptions options,
      variable_list gradients)
      : x_(x, /*is_output=*/false), weight_(weight, /*is_output=*/false), targets_(targets, /*is_output=*/false),
        options_(std::move(options)), gradients_(std::move(gradients)) {
    if (bias) {
      bias_ = SavedVariable(*bias, /*is_output=*/false);
    }
  }

  std::string name() const override {
    return "HeadsCrossEntropyBackward";
  }

  variable_list apply(variable_list&& grads) override {
    const Tensor& grad = grads[0];
    if (!grad.defined()) {
      return variable_list(num_outputs());
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto x = x_.unpack();  // also where its value is not needed: this is what reports a second backward and changed inputs
    const auto targets = targets_.unpack();
    const bool made = has_gradients();
    const bool as_operators = at::GradMode::is_enabled() || (!made && is_batched(grad));
    return as_operators ? in_operators(grad, x, targets) : made ? scaled(grad) : made_now(grad, x, targets);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    x_.reset_data();
    weight_.reset_data();
    bias_.reset_data();
    targets_.reset_data();
    for (auto& gradient : gradients_) {
      gradient.reset();
    }
  }

 private:
  // Whether all that are needed were made in the forward and are still here: a backward that fails on the way may have used them up.
  bool has_gradients() const {
    for (size_t i = 0; i < num_outputs(); ++i) {
      if (needs()[i] && (gradients_.empty() || !gradients_[i].defined())) {
        return false;
      }
    }
    return true;
  }

  // The gradients times the incoming number: in place where this is their last use.
  variable_list scaled(const Tensor& grad) {
    const bool last = !torch::autograd::get_current_graph_task_keep_graph();
    Lambda lambda = read_lambda(grad);
    lambda.value *= -1;
    variable_list result(num_outputs());
    for (size_t i = 0; i < num_outputs(); ++i) {
      if (needs()[i]) {
        result[i] = scale_negate(last ? std::move(gradients_[i]) : gradients_[i], lambda, Made::kByThisNode);
      }
    }
    return result;
  }

  // The gradients from the features, the incoming number on the heads' weights.
  variable_list made_now(const Tensor& grad, const Tensor& x, const Tensor& targets) {
    const auto weights = times(options_.loss_weight, grad, static_cast<int64_t>(options_.head_sizes.size()));
    const auto [loss, head_losses, logits, dx, dw, db] =
        call_kernel(x, weight_.unpack(), bias(), targets, options_, weights, needs());
    return selected({dx, dw, db});
  }

  // The same in differentiable operators.
  variable_list in_operators(const Tensor& grad, const Tensor& x, const Tensor& targets) {
    const auto weight = weight_.unpack();
    const auto logits = at::GradMode::is_enabled()
        ? linear_heads(x, weight, bias(), options_.head_sizes, options_.grad_scale)
        : at::linear(x, weight, bias());
    const auto grad_logits = (grad_logits_composite(logits, targets, options_) * grad).to(logits.scalar_type());
    const auto [dx, dw, db] = heads_gradients(grad_logits, x, weight, options_.head_sizes, options_.grad_scale, needs());
    return selected({dx, dw, db});
  }

  std::optional<Tensor> bias() const {
    return num_outputs() > 2 ? std::optional(bias_.unpack()) : std::nullopt;
  }

  std::array<bool, 3> needs() const {
    return {should_compute_output(0), should_compute_output(1), num_outputs() > 2 && should_compute_output(2)};
  }

  // Those that are needed.
  variable_list selected(std::array<Tensor, 3> gradients) const {
    variable_list result(num_outputs());
    for (size_t i = 0; i < num_outputs(); ++i) {
      result[i] = needs()[i] ? std::move(gradients[i]) : Tensor();
    }
    return result;
  }

  SavedVariable x_, weight_, bias_, targets_;
  const LossOptions options_;
  variable_list gradients_;  // empty: they are made in the backward
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> heads_cross_entropy(
    const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_, const Tensor& targets, LossOptions options) {
  refuse_functorch();
  refuse_forward_mode(x_, weight_, bias_);
  const auto [inputs_x, weight, bias] = autocast(x_, weight_, bias_);
  check_heads(inputs_x, weight, bias, options.head_sizes, options.grad_scale);
  check_targets(inputs_x, targets, options.head_sizes.size(), options.loss_weight, options.label_smoothing);

  const auto x = as_rows(inputs_x);
  const auto class_of = as_rows(targets);
  const bool now = at::GradMode::is_enabled() && x.scalar_type() != at::kHalf;
  const std::array<bool, 3> needs{
      now && x.requires_grad(), now && weight.requires_grad(), now && bias && bias->requires_grad()};
  auto [loss, head_losses, logits, dx, dw, db] = call_kernel(x, weight, bias, class_of, options, options.loss_weight, needs);
  if (any_requires_grad(x, weight, bias)) {
    variable_list gradients;
    if (now) {
      gradients = {needs[0] ? std::move(dx) : Tensor(), needs[1] ? std::move(dw) : Tensor(), needs[2] ? std::move(db) : Tensor()};
    }
    auto node = make_node<HeadsCrossEntropyBackward>(x, weight, bias, class_of, std::move(options), std::move(gradients));
    node->set_next_edges(
        bias ? torch::autograd::collect_next_edges(x, weight, *bias) : torch::autograd::collect_next_edges(x, weight));
    torch::autograd::set_history(loss, node);
  }
  return {loss, head_losses, with_leading_sizes(logits, inputs_x)};
}

std::tuple<Tensor, Tensor, Tensor> heads_cross_entropy(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& targets, at::IntArrayRef head_sizes,
    const Tensor& grad_scale, const std::optional<Tensor>& loss_weight, int64_t ignore_index, double label_smoothing) {
  return heads_cross_entropy(
      x, weight, bias, targets,
      {head_sizes.vec(), per_head_now(grad_scale), loss_weight ? std::optional(per_head_now(*loss_weight)) : std::nullopt,
       ignore_index, label_smoothing});
}

}  // namespace grl_ext
