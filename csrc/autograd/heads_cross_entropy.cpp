// heads_cross_entropy: all heads' logits, losses and gradients in one pass over the features.
//
// The gradients are made in the forward, while the features are at hand; the backward multiplies them by the incoming number.
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

struct Options {
  Tensor targets;  // (N, H)
  std::vector<int64_t> head_sizes;
  Tensor grad_scale;
  std::optional<Tensor> loss_weight;
  int64_t ignore_index;
  double label_smoothing;
};

// The gradient of the loss for the logits, in ATen operators:
//   (softmax(z_h) - y_h) * loss_weight_h / valid_h, with y the smoothed targets, 0 in rows that are not valid.
Tensor grad_logits_composite(const Tensor& logits, const Options& options) {
  const auto z = logits.to(c10::promoteTypes(logits.scalar_type(), at::kFloat));
  std::vector<Tensor> parts;
  int64_t start = 0;
  for (size_t h = 0; h < options.head_sizes.size(); ++h) {
    const auto size = options.head_sizes[h];
    const auto target = options.targets.select(1, static_cast<int64_t>(h));
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
  return at::cat(parts, 1).to(logits.scalar_type());
}

class HeadsCrossEntropyBackward : public torch::autograd::Node {
 public:
  HeadsCrossEntropyBackward(
      const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Options options, variable_list gradients)
      : x_(x, /*is_output=*/false), weight_(weight, /*is_output=*/false), options_(std::move(options)),
        gradients_(std::move(gradients)) {
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
    return at::GradMode::is_enabled() ? differentiable(grad, x) : scaled(grad);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    x_.reset_data();
    weight_.reset_data();
    bias_.reset_data();
    gradients_.clear();
  }

 private:
  // The gradients times the incoming number: in place where this is their last use.
  variable_list scaled(const Tensor& grad) {
    const bool last = !torch::autograd::get_current_graph_task_keep_graph();
    const bool is_one = grad.is_cpu() && has_kernel(grad) && grad.item<double>() == 1.0;
    const Lambda lambda = is_one ? Lambda{-1.0, std::nullopt} : read_lambda(grad.detach().neg());
    variable_list result;
    for (size_t i = 0; i < num_outputs(); ++i) {
      const bool wanted = should_compute_output(i) && gradients_[i].defined();
      if (!wanted) {
        result.emplace_back();
      } else if (last) {
        result.push_back(is_one ? std::move(gradients_[i]) : scale_negate(std::move(gradients_[i]), lambda));
      } else {
        result.push_back(is_one ? gradients_[i].clone() : scale_negate(gradients_[i], lambda));
      }
    }
    return result;
  }

  // The same once more from the features, in differentiable operators.
  variable_list differentiable(const Tensor& grad, const Tensor& x) {
    const auto weight = weight_.unpack();
    const bool has_bias = num_outputs() > 2;
    const auto bias = has_bias ? std::optional(bias_.unpack()) : std::nullopt;
    const auto logits = linear_heads(x, weight, bias, options_.head_sizes, options_.grad_scale);
    const auto grad_logits = (grad_logits_composite(logits, options_) * grad).to(logits.scalar_type());
    auto [dx, dw, db] = heads_gradients(
        grad_logits, x, weight, options_.head_sizes, options_.grad_scale,
        {should_compute_output(0), should_compute_output(1), has_bias && should_compute_output(2)});
    return has_bias ? variable_list{dx, dw, db} : variable_list{dx, dw};
  }

  SavedVariable x_, weight_, bias_;
  const Options options_;
  variable_list gradients_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> heads_cross_entropy(
    const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_, const Tensor& targets,
    at::IntArrayRef head_sizes, const Tensor& grad_scale, const std::optional<Tensor>& loss_weight, int64_t ignore_index,
    double label_smoothing) {
  static const auto kernel =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("grl_ext::_heads_cross_entropy", "")
          .typed<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
              const Tensor&, const Tensor&, const std::optional<Tensor>&, const Tensor&, at::IntArrayRef, const Tensor&,
              const std::optional<Tensor>&, int64_t, double, std::array<bool, 3>)>();
  refuse_functorch();
  const auto [inputs_x, weight, bias] = autocast(x_, weight_, bias_);
  check_heads(inputs_x, weight, bias, head_sizes, grad_scale);
  check_targets(inputs_x, targets, head_sizes.size(), loss_weight, label_smoothing);

  const auto x = as_rows(inputs_x);
  const Options options{as_rows(targets), head_sizes.vec(), grad_scale.detach(), loss_weight, ignore_index, label_smoothing};
  const bool enabled = at::GradMode::is_enabled();
  const std::array<bool, 3> needs{
      enabled && x.requires_grad(), enabled && weight.requires_grad(), enabled && bias && bias->requires_grad()};
  Tensor loss, head_losses, logits, dx, dw, db;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    std::tie(loss, head_losses, logits, dx, dw, db) = kernel.call(
        x, weight, bias, options.targets, head_sizes, grad_scale, loss_weight, ignore_index, label_smoothing, needs);
  }
  if (any_requires_grad(x, weight, bias)) {
    variable_list gradients{needs[0] ? dx : Tensor(), needs[1] ? dw : Tensor(), needs[2] ? db : Tensor()};
    auto node = make_node<HeadsCrossEntropyBackward>(x, weight, bias, options, std::move(gradients));
    node->set_next_edges(
        bias ? torch::autograd::collect_next_edges(x, weight, *bias) : torch::autograd::collect_next_edges(x, weight));
    torch::autograd::set_history(loss, node);
  }
  return {loss, head_losses, with_leading_sizes(logits, inputs_x)};
}

}  // namespace grl_ext
