// _heads_logits and _heads_gradients on the CPU: narrow heads together, in one pass over the features; each wide one by
// matrix products.
#include <pytorch.h>

#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "heads_sweep.h"

namespace grl_ext::cpu {
namespace {

std::vector<Tensor> heads_logits(const Tensor& x_, at::TensorList weight, const OptionalTensors& bias) {
  const Division division(weight.size(), [&](size_t h) { return weight[h].size(0); });
  const auto& columns = division.swept;
  const auto x = x_.contiguous();
  const int64_t n = x.size(0), d = x.size(1);
  std::vector<Tensor> logits(weight.size());
  if (columns.count() > 0) {
    make_logits(logits, columns, x);
    dispatch_arithmetic(x.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const Parameters<T> parameters(columns, weight, bias);
      const auto threads = thread_count(n, d, columns.total(), /*passes=*/1);
      Sweep<T>{columns, n, d, threads, x, &parameters, logits}.run();
    });
  }
  for (const auto h : division.by_products) {
    logits[h] = at::linear(x, weight[h], bias.get(h));
  }
  return logits;
}

HeadsGradients heads_gradients(
    at::TensorList grad_logits_, const std::optional<Tensor>& x_, at::TensorList weight, at::ArrayRef<double> factor,
    const OptionalTensors& lambda, const c10::List<bool>& needs) {
  std::vector<Tensor> grad_logits;
  for (const auto& g : grad_logits_) {
    grad_logits.push_back(g.contiguous());
  }
  const Division division(grad_logits.size(), [&](size_t h) { return grad_logits[h].size(1); });
  const auto& columns = division.swept;
  Gradients gradients(needs, head_factors(factor, lambda), gradients_type(grad_logits[0], x_, weight));
  const int64_t n = grad_logits[0].size(0), d = !weight.empty() ? weight[0].size(1) : x_ ? x_->size(1) : 0;
  const auto x = gradients.needs.any_weight() ? x_->contiguous() : Tensor();
  if (columns.count() > 0) {
    dispatch_arithmetic(gradients.dtype, [&](auto zero) {
      using T = decltype(zero);
      std::optional<Parameters<T>> parameters;
      if (gradients.needs.x()) {
        parameters.emplace(columns, weight, OptionalTensors());
      }
      Sweep<T> sweep{columns, n, d, thread_count(n, d, columns.total(), /*passes=*/2), x};
      sweep.parameters = parameters ? &*parameters : nullptr;
      sweep.grad_logits = grad_logits;
      sweep.gradients = &gradients;
      sweep.run();
    });
  }
  for (const auto h : division.by_products) {
    gradients.add_products(h, grad_logits[h].to(gradients.dtype), x, weight);
  }
  gradients.finish(n, d);
  return {gradients.x, gradients.weight, gradients.bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(grl_ext, CPU, m) {
  m.impl("_heads_logits", heads_logits);
  m.impl("_heads_gradients", heads_gradients);
}

}  // namespace grl_ext::cpu
