// grl_linear: F.linear whose gradient for x is multiplied by -lambda. If lambda is a number, the matrix product takes
// it as its factor.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "../checks.h"
#include "../ops.h"
#include "linear.h"
#include "node.h"
#include "scale.h"

namespace grl_ext {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// factor * (grad @ weight)
Tensor scaled_product(const Tensor& grad, const Tensor& weight, const Factor& factor) {
  if (!factor.tensor && factor.value != 0) {
    // With beta = 0 the values of the first argument are ignored. Under vmap they are multiplied all the same, hence
    // zeros.
    return at::addmm(grad.new_zeros({1, 1}), grad, weight, /*beta=*/0, /*alpha=*/factor.value);
  }
  if (!factor.tensor && !at::GradMode::is_enabled()) {  // gradients of gradients need the graph, of zeros too
    return grad.new_zeros_symint({grad.sym_size(0), weight.sym_size(1)});
  }
  // A matrix product cannot take its factor from a tensor. Scaling an operand instead of the result would be less work,
  // but would give NaN instead of 0 where the factor is 0 and the other operand holds an infinity.
  return scale(grad.mm(weight), factor, Made::kByThisNode);
}

// (dx, dw, db) as far as they are needed
variable_list gradients(
    const Tensor& grad, const Factor& factor, const Tensor& x, const Tensor& weight, const std::vector<bool>& needs) {
  variable_list result(needs.size());
  if (!grad.defined()) {
    return result;
  }
  // A forward outside an autocast region keeps its dtype, also where its backward runs inside one.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  if (needs[0]) {
    result[0] = scaled_product(grad, weight, factor);
  }
  if (needs[1]) {
    // A gradient of this gradient reaches x through the reversal, as it would layer by layer.
    result[1] = grad.t().mm(at::GradMode::is_enabled() ? with_scaled_gradient(x, factor) : x);
  }
  if (needs.size() > 2 && needs[2]) {
    result[2] = grad.sum(0);
  }
  return result;
}

class GrlLinearBackward : public TraceableNode<GrlLinearBackward> {
 public:
  GrlLinearBackward(const Tensor& x, const Tensor& weight, const Factor& factor) : factor_(factor) {
    if (weight.requires_grad()) {
      x_ = SavedVariable(x, /*is_output=*/false);
    }
    if (x.requires_grad()) {
      weight_ = SavedVariable(weight, /*is_output=*/false);
    }
  }

  std::string name() const override { return "GrlLinearBackward"; }

  variable_list apply(variable_list&& grads) override {
    const auto needs = this->needs();
    // Unpacking raises an error if lambda was modified since the forward. Where it is not read, that must be no error.
    const bool reads_factor = needs[0] || (needs[1] && at::GradMode::is_enabled());
    return gradients(
        grads[0], reads_factor ? factor_.unpack(mutex_) : Factor(), needs[1] ? unpack(x_) : Tensor(),
        needs[0] ? unpack(weight_) : Tensor(), needs);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    factor_.release();
    x_.reset_data();
    weight_.reset_data();
  }

  template <class Visit>
  void each_saved(Visit visit) {
    factor_.each_saved(visit);
    visit(x_);
    visit(weight_);
  }
  void collect_constants(torch::dynamo::autograd::CompiledNodeArgs& args) const { factor_.collect_constants(args); }
  TracedBackward traced() const {
    return [factor = factor_.traced(), needs = needs_when_traced()](
               const variable_list& grads, const variable_list& saved) {
      return gradients(grads[0], factor(saved[0], saved[1]), saved[2], saved[3], needs);
    };
  }

 private:
  Tensor unpack(const SavedVariable& saved) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return saved.unpack();
  }

  SavedFactor factor_;
  SavedVariable x_, weight_;
};

Tensor reversed_linear(
    const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_, const Factor& factor) {
  refuse_forward_mode(x_, weight_, bias_);
  const Autocast cast(x_.device().type());
  const auto inputs_x = cast(x_), weight = cast(weight_);
  const auto bias = cast(bias_);
  check_linear(inputs_x, weight, bias);
  const auto x = as_rows(inputs_x);
  Tensor y;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    y = at::linear(x, weight, bias);
  }
  if (any_requires_grad(x, weight, bias)) {
    auto node = make_node<GrlLinearBackward>(x, weight, factor);
    node->set_next_edges(
        bias ? torch::autograd::collect_next_edges(x, weight, *bias) : torch::autograd::collect_next_edges(x, weight));
    torch::autograd::set_history(y, node);
  }
  return with_leading_sizes(y, inputs_x);
}

}  // namespace

at::Tensor grl_linear_by_value(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double lambda) {
  return reversed_linear(x, weight, bias, reversed(lambda));
}

at::Tensor grl_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lambda) {
  refuse_functorch();
  check_lambda(x, lambda);
  if (lambda.dim() == 0) {
    return reversed_linear(x, weight, bias, reversed(lambda));
  }
  // One value per row, (..., 1), becomes a column beside the rows.
  auto sizes = x.sym_sizes().vec();
  sizes.back() = lambda.sym_size(-1);
  return reversed_linear(x, weight, bias, reversed(as_rows(lambda.expand_symint(sizes))));
}

}  // namespace grl_ext
