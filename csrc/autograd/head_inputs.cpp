#include "head_inputs.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <algorithm>

#include "../heads_checks.h"
#include "node.h"

namespace grl_ext {

using at::Tensor;

HeadInputs prepare(const Tensor& x, at::TensorList weight, const OptionalTensors& bias) {
  HeadInputs inputs{x, x, {weight.vec(), bias}};
  if (const Autocast cast(x.device().type()); cast.is_on()) {
    inputs.features = cast(x);
    inputs.layers.bias = OptionalTensors();
    for (size_t i = 0; i < weight.size(); ++i) {
      inputs.layers.weight[i] = cast(weight[i]);
      inputs.layers.bias.push_back(i < bias.size() ? cast(bias.get(i)) : std::nullopt);
    }
  }
  return inputs;
}

bool any_requires_grad(const Tensor& x, const HeadLayers& layers) {
  bool any = x.requires_grad();
  for (size_t i = 0; !any && i < layers.weight.size(); ++i) {
    const auto bias = layers.bias.get(i);
    any = layers.weight[i].requires_grad() || (bias && bias->requires_grad());
  }
  return at::GradMode::is_enabled() && any;
}

torch::autograd::edge_list edges_of(const Tensor& x, const HeadLayers& layers) {
  using torch::autograd::impl::gradient_edge;
  torch::autograd::edge_list edges;
  edges.reserve(1 + 2 * layers.weight.size());
  edges.push_back(gradient_edge(x));
  for (const auto& weight : layers.weight) {
    edges.push_back(gradient_edge(weight));
  }
  for (size_t i = 0; i < layers.bias.size(); ++i) {
    const auto bias = layers.bias.get(i);
    edges.push_back(bias ? gradient_edge(*bias) : torch::autograd::Edge());
  }
  return edges;
}

Tensor numbers_now(const Tensor& values) {
  if (!values.is_cpu()) {
    return values.detach();
  }
  if (!is_plain(values) || !values.is_contiguous() || values.scalar_type() != at::kDouble ||
      c10::impl::dispatch_mode_enabled()) {
    return values.detach().clone();
  }
  // The same copy without the dispatcher's overhead, which would take longer than copying a few numbers.
  Tensor copy = at::detail::empty_cpu(values.sizes(), values.options());
  std::copy_n(values.const_data_ptr<double>(), values.numel(), copy.mutable_data_ptr<double>());
  return copy;
}

Factor factor_of(const Tensor& lambda, int64_t index) {
  if (index < 0) {
    return {};
  }
  if (lambda.is_cpu() && is_plain(lambda) && lambda.is_contiguous() && lambda.scalar_type() == at::kDouble &&
      !c10::impl::dispatch_mode_enabled()) {
    return reversed(lambda.const_data_ptr<double>()[index]);  // without the dispatcher's overhead
  }
  return reversed(lambda.select(0, index));
}

KernelFactors kernel_factors(const Tensor& lambda, at::IntArrayRef lambda_index) {
  KernelFactors factors;
  factors.factor.reserve(lambda_index.size());
  factors.lambda.reserve(lambda_index.size());
  for (const auto index : lambda_index) {
    const auto factor = factor_of(lambda, index);
    factors.factor.push_back(factor.value);
    factors.lambda.push_back(factor.tensor);
  }
  return factors;
}

c10::List<bool> to_list(const std::vector<bool>& values) {
  c10::List<bool> list;
  list.reserve(values.size());
  for (const bool value : values) {
    list.push_back(value);
  }
  return list;
}

}  // namespace grl_ext
