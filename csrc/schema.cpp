// Every operator on one screen.
//
// The public ones are composite: they check their arguments, join the autograd graph and call the kernels below them, so that
// tracing (torch.compile, make_fx, export) sees through them. The kernels, whose names begin with an underscore, know no
// autograd; csrc/cpu and csrc/cuda implement them, and csrc/shapes.cpp says what they return.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "ops.h"

namespace grl_ext {

TORCH_LIBRARY(grl_ext, m) {
  m.def("gradient_reversal(Tensor(a) x, Tensor lambda_) -> Tensor(a)");
  m.def("grl_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lambda_) -> Tensor");
  m.def("linear_heads(Tensor x, Tensor weight, Tensor? bias, int[] head_sizes, Tensor grad_scale) -> Tensor");
  m.def(
      "heads_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor targets, int[] head_sizes, Tensor grad_scale, "
      "Tensor? loss_weight=None, int ignore_index=-100, float label_smoothing=0.0) "
      "-> (Tensor loss, Tensor head_losses, Tensor logits)");

  // -lambda * grad; lambda is `value`, times `lambda_` if that has one element, or `lambda_` alone if it has more.
  m.def("_scale_negate(Tensor grad, float value, Tensor? lambda_) -> Tensor");
  m.def("_scale_negate_(Tensor(a!) grad, float value, Tensor? lambda_) -> ()");

  // x (N, D). A gradient that is not needed comes back empty, and what it alone would read may be left out: x serves grad_weight,
  // weight grad_x.
  m.def("_heads_logits(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "_heads_gradients(Tensor grad_logits, Tensor? x, Tensor? weight, int[] head_sizes, Tensor grad_scale, bool[3] needs) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "_heads_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor targets, int[] head_sizes, Tensor grad_scale, "
      "Tensor? loss_weight, int ignore_index, float label_smoothing, bool[3] needs) "
      "-> (Tensor loss, Tensor head_losses, Tensor logits, Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
}

TORCH_LIBRARY_IMPL(grl_ext, CompositeImplicitAutograd, m) {
  m.impl("gradient_reversal", TORCH_FN(gradient_reversal));
  m.impl("grl_linear", TORCH_FN(grl_linear));
  m.impl("linear_heads", TORCH_FN(linear_heads));
  m.impl("heads_cross_entropy", TORCH_FN(heads_cross_entropy));
}

TORCH_LIBRARY_IMPL(grl_ext, Autograd, m) {
  for (const char* kernel : {"_scale_negate", "_scale_negate_", "_heads_logits", "_heads_gradients", "_heads_cross_entropy"}) {
    m.impl(kernel, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace grl_ext
