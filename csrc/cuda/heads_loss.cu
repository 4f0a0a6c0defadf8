// _heads_loss on CUDA: by the sweep, or by matrix products for heads too wide for it. Everything is enqueued on the
// current stream, and the host never waits, so that it can be captured in a CUDA graph.
#include <torch/library.h>

#include "../arithmetic_type.h"
#include "heads_products.h"

namespace grl_ext {
namespace {

TargetKind target_kind(int64_t kind, const Tensor& target) {
  return kind == kSquaredError            ? TargetKind::kValues
      : kind == kBinaryCrossEntropy       ? TargetKind::kIndicators
      : target.scalar_type() == at::kLong ? TargetKind::kClasses
                                          : TargetKind::kProbabilities;
}

HeadsLossResult heads_loss_cuda(
    const Tensor& x_, at::TensorList weight_, const OptionalTensors& bias_, at::TensorList targets_,
    const OptionalTensors& sample_weight_, const OptionalTensors& class_weight_, at::ArrayRef<double> factor,
    const OptionalTensors& lambda, const std::optional<Tensor>& loss_weight, at::IntArrayRef kind,
    at::ArrayRef<double> label_smoothing, at::IntArrayRef ignore_index, bool mean, bool with_grad_logits,
    const c10::List<bool>& needs) {
  TORCH_CHECK_NOT_IMPLEMENTED(!with_grad_logits, "_heads_loss on CUDA returns no gradients of logits");
  const c10::cuda::CUDAGuard guard(x_.device());
  const Sizes sizes(x_.size(0), x_.size(1), weight_, 0);
  const auto x = x_.contiguous();
  const auto weight = contiguous(weight_), targets = contiguous(targets_);
  const auto bias = contiguous(bias_), sample_weight = contiguous(sample_weight_),
             class_weight = contiguous(class_weight_);
  const auto loss_options = x.options().dtype(arithmetic_type(x.scalar_type()));
  const auto loss = at::empty({}, loss_options);
  const auto head_losses = at::empty({static_cast<int64_t>(sizes.heads.size())}, loss_options);
  const auto logits = empty_logits(sizes, x.options());
  GradientTensors gradients(sizes, x.options(), needs);
  auto stream = current_stream(x);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = typename Arithmetic<T>::type;
    const auto all_heads = describe_heads<T>(sizes, [&](Head<T>& head, size_t h) {
      head.weight = const_data<T>(weight[h]);
      head.bias = const_data<T>(bias[h]);
      head.logits = data<T>(logits[h]);
      head.grad_weight = data<T>(gradients.dw[h]);
      head.grad_bias = data<T>(gradients.db[h]);
      head.kind = target_kind(kind[h], targets[h]);
      head.target = targets[h].const_data_ptr();
      head.sample_weight = const_data<A>(sample_weight[h]);
      head.of_entries = sample_weight[h].defined() && sample_weight[h].dim() == 2;
      head.class_weight = const_data<A>(class_weight[h]);
      head.ignore_index = ignore_index[h];
      head.smoothing = label_smoothing[h];
      head.factor = factor[h];
      set_number(head.lambda, head.lambda_form, lambda.get(h));
      set_number(head.loss_weight, head.loss_weight_form, loss_weight, static_cast<int64_t>(h));
    });
    const LossOutputs<A> outputs{data<A>(loss), data<A>(head_losses)};
    const auto call = call_of(sizes, x, gradients.dx, all_heads);
    const auto plan = plan_heads(problem_with_loss(call, mean), stream.device);
    if (plan.form != HeadsForm::kProducts) {
      return heads_loss(call, plan, mean, outputs, stream, allocator_like(x));
    }
    HeadsProducts<T> products(sizes, all_heads, x.options());
    products.compute_logits(x, stream);
    products.prepare_gradients(gradients, stream);
    heads_loss_between_products(
        products.buffers(), all_heads, static_cast<int>(sizes.heads.size()), mean, outputs, stream, allocator_like(x));
    products.write_gradients(gradients, x);
  });
  C10_CUDA_CHECK(stream.status);
  return {loss, head_losses, logits, {}, gradients.dx, gradients.dw, gradients.db};
}

}  // namespace

TORCH_LIBRARY_IMPL(grl_ext, CUDA, m) {
  m.impl("_heads_loss", heads_loss_cuda);
}

}  // namespace grl_ext
