// Every operator on one screen.
//
// The public ones are composite: they check their arguments, join the autograd graph and call the kernels below them,
// so that tracing (torch.compile, make_fx, export) sees through them. The kernels, whose names begin with an
// underscore, know no autograd; csrc/cpu and csrc/cuda implement them, and csrc/shapes.cpp says what they return.
//
// Element h of a list that describes heads belongs to head h. lambda_[h] is an adversary's 0-d lambda; a predictor has
// none.
#include <pytorch.h>

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "ops.h"

namespace grl_ext {

TORCH_LIBRARY(grl_ext, m) {
  m.def("gradient_reversal(Tensor(a) x, Tensor lambda_) -> Tensor(a)");
  m.def("grl_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lambda_) -> Tensor");
  m.def("linear_heads(Tensor x, Tensor[] weight, Tensor?[] bias, Tensor?[] lambda_) -> Tensor[]");
  m.def(
      "heads_loss(Tensor x, Tensor[] weight, Tensor?[] bias, Tensor[] targets, Tensor?[] lambda_, "
      "Tensor?[] sample_weight, Tensor?[] class_weight, Tensor? loss_weight, int[] kind, float[] label_smoothing, "
      "int[] ignore_index, bool mean) -> (Tensor loss, Tensor[] head_losses, Tensor[] logits)");

  // grad * factor, times `tensor`, which has one element or broadcasts; zeros where that product is 0, whatever grad
  // is.
  m.def("_scale(Tensor grad, float factor, Tensor? tensor) -> Tensor");
  m.def("_scale_(Tensor(a!) grad, float factor, Tensor? tensor) -> ()");
  // The same for several gradients of one dtype and one number: on CUDA one launch.
  m.def("_scale_list_(Tensor(a!)[] grads, float factor, Tensor? tensor) -> ()");

  // x is (N, D). `needs` says which gradients are needed: that of x, then those of the weights, then those of the
  // biases. The others come back empty. x may be left out where no weight needs a gradient, and weight where x needs
  // none: nothing else reads them. On the CPU grad_logits may have the wider type that they are computed in. factor[h]
  // is the head's factor in the gradient of x: 1 for a predictor, -lambda for an adversary. Where the host does not
  // know lambda, lambda_[h] holds it, 0-d, and factor[h] is -1.
  // with_grad_logits, where no other gradient is needed: for each head the gradient of its own loss, without
  // loss_weight, in the type that it is computed in. Else that list is empty.
  m.def("_heads_logits(Tensor x, Tensor[] weight, Tensor?[] bias) -> Tensor[]");
  m.def(
      "_heads_gradients(Tensor[] grad_logits, Tensor? x, Tensor[] weight, float[] factor, Tensor?[] lambda_, "
      "bool[] needs) -> (Tensor grad_x, Tensor[] grad_weight, Tensor[] grad_bias)");
  m.def(
      "_heads_loss(Tensor x, Tensor[] weight, Tensor?[] bias, Tensor[] targets, Tensor?[] sample_weight, "
      "Tensor?[] class_weight, float[] factor, Tensor?[] lambda_, Tensor? loss_weight, int[] kind, "
      "float[] label_smoothing, int[] ignore_index, bool mean, bool with_grad_logits, bool[] needs) "
      "-> (Tensor loss, Tensor head_losses, Tensor[] logits, Tensor[] grad_logits, Tensor grad_x, "
      "Tensor[] grad_weight, Tensor[] grad_bias)");
}

namespace {

// A registered operator has no plain PyTorch to turn to.
template <class T>
T or_refuse(const char* name, std::optional<T> result) {
  TORCH_CHECK_VALUE(result, "torch.ops.grl_ext.", name, " does not take these; grl_ext.", name, " says why");
  return std::move(*result);
}

at::Tensor gradient_reversal_operator(const at::Tensor& x, const at::Tensor& lambda) {
  return or_refuse("gradient_reversal", gradient_reversal(x, lambda));
}

at::Tensor grl_linear_operator(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& lambda) {
  return or_refuse("grl_linear", grl_linear(x, weight, bias, lambda));
}

std::vector<Factor> factors_of(const char* name, const at::Tensor& x, const OptionalTensors& lambda) {
  std::vector<Factor> factors;
  for (size_t h = 0; h < lambda.size(); ++h) {
    factors.push_back(or_refuse(name, factor_of(x, lambda.get(h))));
  }
  return factors;
}

std::vector<at::Tensor> linear_heads_operator(
    const at::Tensor& x, at::TensorList weight, const OptionalTensors& bias, const OptionalTensors& lambda) {
  return or_refuse("linear_heads", linear_heads(x, weight, bias, factors_of("linear_heads", x, lambda)));
}

LossAndLogits heads_loss_operator(
    const at::Tensor& x, at::TensorList weight, const OptionalTensors& bias, at::TensorList targets,
    const OptionalTensors& lambda, const OptionalTensors& sample_weight, const OptionalTensors& class_weight,
    const std::optional<at::Tensor>& loss_weight, at::IntArrayRef kind, at::ArrayRef<double> label_smoothing,
    at::IntArrayRef ignore_index, bool mean) {
  HeadsOptions options{targets.vec(), sample_weight.copy(),  class_weight.copy(), loss_weight,
                       kind.vec(),    label_smoothing.vec(), ignore_index.vec(),  mean};
  auto factors = factors_of("heads_loss", x, lambda);
  return or_refuse("heads_loss", heads_loss(x, weight, bias, std::move(factors), std::move(options)));
}

}  // namespace

TORCH_LIBRARY_IMPL(grl_ext, CompositeImplicitAutograd, m) {
  m.impl("gradient_reversal", TORCH_FN(gradient_reversal_operator));
  m.impl("grl_linear", TORCH_FN(grl_linear_operator));
  m.impl("linear_heads", TORCH_FN(linear_heads_operator));
  m.impl("heads_loss", TORCH_FN(heads_loss_operator));
}

TORCH_LIBRARY_IMPL(grl_ext, Autograd, m) {
  for (const char* kernel : {"_scale", "_scale_", "_scale_list_", "_heads_logits", "_heads_gradients", "_heads_loss"}) {
    m.impl(kernel, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace grl_ext
