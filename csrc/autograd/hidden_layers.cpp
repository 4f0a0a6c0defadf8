// The hidden layers of a head: ReLU of z, the output of its first layer, then linear layers, each with its ReLU.
//
// A node of its own, because the same layers one by one took 1.04 to 1.25 of this one's time and 1.25 of its memory:
// here every ReLU overwrites its input, and in the backward the gradient of a hidden layer is written over its output,
// a quarter of the rows at a time, so that a step with large hidden layers never holds both.
#include <pytorch.h>

#include <ATen/ops/alias.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/threshold_backward.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <iterator>

#include "../accepted.h"
#include "../ops.h"
#include "autocast.h"
#include "heads.h"
#include "node.h"
#include "scale.h"

namespace grl_ext {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

// Whether `tensor` may be overwritten: nobody else has it and nothing is recorded. What comes from the engine may be
// overwritten on the CPU only: see Made in scale.h.
bool is_ours(const Tensor& tensor, Made made) {
  return !at::GradMode::is_enabled() && is_plain(tensor) && !is_batched_or_dual(tensor) && is_unshared(tensor) &&
      (made == Made::kByThisNode || tensor.is_cpu());
}

// The gradient of ReLU's input.
Tensor relu_gradient(Tensor grad, const Tensor& output, Made made) {
  return is_ours(grad, made) ? at::threshold_backward_out(grad, grad, output, 0)
                             : at::threshold_backward(grad, output, 0);
}

// The gradient of the layer below, before its ReLU, from that of this one: (grad weight) where `below` is positive.
Tensor gradient_below(const Tensor& grad, const Tensor& weight, Tensor below) {
  constexpr int64_t kPieces = 4, kRowsOfPiece = 256;  // fewer rows would make slower products
  const bool overwrite = below.is_cpu() && !is_batched_or_dual(grad) && is_ours(below, Made::kElsewhere);
  if (!overwrite || below.size(0) < kPieces * kRowsOfPiece) {
    return relu_gradient(grad.mm(weight), below, Made::kByThisNode);
  }
  const int64_t rows = below.size(0);
  for (int64_t i = 0; i < kPieces; ++i) {
    const int64_t begin = rows * i / kPieces, count = rows * (i + 1) / kPieces - begin;
    auto piece = below.narrow(0, begin, count);
    at::threshold_backward_out(piece, grad.narrow(0, begin, count).mm(weight), piece, 0);
  }
  return below;
}

// The output of each ReLU, the first of them of z. Overwrites z where nothing is recorded.
std::vector<Tensor> outputs_of(const Tensor& z, at::TensorList weight, const OptionalTensors& bias) {
  const bool in_place = !at::GradMode::is_enabled();
  Tensor input = z;
  std::vector<Tensor> outputs{in_place ? input.relu_() : input.relu()};
  for (size_t l = 0; l < weight.size(); ++l) {
    auto output = at::linear(outputs.back(), weight[l], bias.get(l));
    outputs.push_back(in_place ? output.relu_() : output.relu());
  }
  return outputs;
}

// From the gradient of the last output; `needs` has the order of GradientSlots. Consumes `outputs`.
variable_list gradients_of_layers(
    Tensor grad, std::vector<Tensor> outputs, const std::vector<Tensor>& weight, const std::vector<bool>& needs) {
  const GradientSlots slots{weight.size()};
  variable_list result(needs.size());
  // Whether the gradient of layer l's input is needed.
  const auto is_needed = [&](size_t l) {
    bool needed = needs[slots.x()];
    for (size_t i = 0; i < l; ++i) {
      needed = needed || needs[slots.weight(i)] || needs[slots.bias(i)];
    }
    return needed;
  };
  grad = relu_gradient(std::move(grad), outputs.back(), Made::kElsewhere);
  outputs.pop_back();
  for (size_t l = weight.size(); l-- > 0;) {
    if (needs[slots.weight(l)]) {
      result[slots.weight(l)] = grad.t().mm(outputs[l]);
    }
    if (needs[slots.bias(l)]) {
      result[slots.bias(l)] = grad.sum(0);
    }
    if (!is_needed(l)) {
      return result;
    }
    auto below = std::move(outputs[l]);
    outputs.pop_back();
    grad = gradient_below(grad, weight[l], std::move(below));
  }
  if (needs[slots.x()]) {
    result[slots.x()] = std::move(grad);
  }
  return result;
}

class HiddenLayersBackward : public TraceableNode<HiddenLayersBackward> {
 public:
  // z holds the first output by now. As ReLU of it is the same, it is differentiated through that.
  HiddenLayersBackward(const HeadInputs& inputs, const std::vector<Tensor>& outputs) : layers_(inputs.count()) {
    saved_.reserve(2 + 3 * layers_);
    saved_.save(inputs.x);
    for (size_t l = 0; l < layers_; ++l) {
      saved_.save(inputs.weight[l]);
      saved_.save(inputs.bias.get(l));
    }
    for (size_t l = 1; l < layers_; ++l) {
      saved_.save(outputs[l]);
    }
  }

  // Called after set_history: a saved output must know that this node made it.
  void save_output(const Tensor& output) { saved_.save(output, /*is_output=*/true); }

  std::string name() const override { return "HiddenLayersBackward"; }

  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) {
      return variable_list(num_outputs());
    }
    std::vector<Tensor> saved;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      saved = saved_.unpack(*this);
      if (!torch::autograd::get_current_graph_task_keep_graph()) {
        saved_.release();  // what nobody else has is overwritten
      }
    }
    auto grad = std::move(grads[0]);
    return backward(std::move(grad), std::move(saved), layers_, needs());
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    saved_.release();
  }

  template <class Visit>
  void each_saved(Visit visit) {
    saved_.each(visit);
  }

  void collect_constants(torch::dynamo::autograd::CompiledNodeArgs&) const {}

  TracedBackward traced() const {
    return [layers = layers_, needs = needs_when_traced()](const variable_list& grads, const variable_list& saved) {
      return grads[0].defined() ? backward(grads[0], saved, layers, needs) : variable_list(needs.size());
    };
  }

 private:
  static variable_list backward(Tensor grad, std::vector<Tensor> saved, size_t layers, const std::vector<bool>& needs) {
    // A forward outside an autocast region keeps its dtype, also where its backward runs inside one.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    std::vector<Tensor> weight, outputs;
    OptionalTensors bias;
    for (size_t l = 0; l < layers; ++l) {
      weight.push_back(saved[1 + 2 * l]);
      bias.push_back(to_optional(saved[2 + 2 * l]));
    }
    std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
    if (at::GradMode::is_enabled()) {
      outputs = outputs_of(saved[0], weight, bias);
    } else {
      outputs.push_back(std::move(saved[0]));
      std::move(saved.begin() + 1 + 2 * static_cast<std::ptrdiff_t>(layers), saved.end(), std::back_inserter(outputs));
      if (!is_batched_or_dual(grad)) {
        below_autograd.emplace();  // a dozen operators, of which each would look for a graph
      }
    }
    saved.clear();
    return gradients_of_layers(std::move(grad), std::move(outputs), weight, needs);
  }

  const size_t layers_;
  SavedList saved_;  // z, weight and bias of each layer, the outputs above z's
};

}  // namespace

std::optional<Tensor> hidden_layers(const Tensor& z, at::TensorList weight_, const OptionalTensors& bias_) {
  const Autocast cast(z.device().type());
  HeadInputs inputs{z, {}, OptionalTensors(), {}};
  for (size_t l = 0; l < weight_.size(); ++l) {
    inputs.weight.push_back(cast(weight_[l]));
    inputs.bias.push_back(cast(bias_.get(l)));
  }
  if (!has_kernel(z) || !accepts_layers(z, inputs.weight, inputs.bias)) {
    return std::nullopt;
  }
  inputs.x = as_rows(z);
  const auto needs = recorded(inputs);
  std::vector<Tensor> outputs;
  Tensor hidden;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const at::NoGradGuard nothing_recorded;
    outputs = outputs_of(inputs.x, inputs.weight, inputs.bias);
    hidden = at::alias(outputs.back());  // which may be z
  }
  if (any(needs)) {
    auto node = make_node<HiddenLayersBackward>(inputs, outputs);
    node->set_next_edges(edges_of(inputs));
    torch::autograd::set_history(hidden, node);
    node->save_output(hidden);
  }
  return with_leading_sizes(hidden, z);
}

}  // namespace grl_ext
