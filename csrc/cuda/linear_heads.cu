// _heads_logits and _heads_gradients on CUDA: by the sweep, or by matrix products where choose_units says so.
// Everything is enqueued on the current stream, and the host never waits, so that it can be captured in a CUDA graph.
#include <torch/library.h>

#include "heads_products.h"

namespace grl_ext {
namespace {

std::vector<Tensor> heads_logits_cuda(const Tensor& x_, at::TensorList weight_, const OptionalTensors& bias_) {
  const c10::cuda::CUDAGuard guard(x_.device());
  const Sizes sizes(x_.size(0), x_.size(1), weight_, 0);
  const auto x = x_.contiguous();
  const auto weight = contiguous(weight_);
  const auto bias = contiguous(bias_);
  auto logits = empty_logits(sizes, x.options());
  auto stream = current_stream(x);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto all_heads = describe_heads<T>(sizes, [&](Head<T>& head, size_t h) {
      head.weight = const_data<T>(weight[h]);
      head.bias = const_data<T>(bias[h]);
      head.logits = data<T>(logits[h]);
    });
    const auto call = call_of(sizes, x, Tensor(), all_heads);
    if (choose_units(logits_problem(problem_of(call)), stream.device) != HeadsUnits::kProducts) {
      return heads_logits(call, stream, allocator_like(x));
    }
    if (sizes.heads.size() == 1) {
      return logits_of_one_head(logits[0], x, weight[0], bias[0]);
    }
    HeadsProducts<T> products(sizes, all_heads, x.options());
    products.compute_logits(x, stream);
    split_logits(products.buffers(), all_heads, stream);
  });
  C10_CUDA_CHECK(stream.status);
  return logits;
}

HeadsGradients heads_gradients_cuda(
    at::TensorList grad_logits_, const std::optional<Tensor>& x_, at::TensorList weight_, at::ArrayRef<double> factor,
    const OptionalTensors& lambda, const c10::List<bool>& needs) {
  const c10::cuda::CUDAGuard guard(grad_logits_[0].device());
  const auto grad_logits = contiguous(grad_logits_);
  const auto weight = contiguous(weight_);
  const auto x = x_ ? x_->contiguous() : Tensor();
  const auto& like = grad_logits[0];
  const int64_t features = !weight.empty() ? weight[0].size(1) : x.defined() ? x.size(1) : 0;
  const Sizes sizes(like.size(0), features, grad_logits, 1);
  GradientTensors gradients(sizes, like.options(), needs);
  auto stream = current_stream(like);
  dispatch(like.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto all_heads = describe_heads<T>(sizes, [&](Head<T>& head, size_t h) {
      head.weight = weight.empty() ? nullptr : const_data<T>(weight[h]);
      head.grad_logits = const_data<T>(grad_logits[h]);
      head.grad_weight = data<T>(gradients.dw[h]);
      head.grad_bias = data<T>(gradients.db[h]);
      head.factor = factor[h];
      set_number(head.lambda, head.lambda_form, lambda.get(h));
    });
    const auto call = call_of(sizes, x, gradients.dx, all_heads);
    if (choose_units(problem_of(call), stream.device) != HeadsUnits::kProducts) {
      return heads_gradients(call, stream, allocator_like(like));
    }
    if (sizes.heads.size() == 1) {
      if (gradients.dw[0].numel() > 0) {
        at::mm_out(gradients.dw[0], like.t(), x);
      }
      if (gradients.db[0].numel() > 0) {
        at::sum_out(gradients.db[0], like, 0);
      }
      if (gradients.dx.numel() > 0) {
        feature_gradient_of_one_head<T>(gradients, like, weight[0], factor[0], lambda.get(0), sizes, all_heads, stream);
      }
      return;
    }
    HeadsProducts<T> products(sizes, all_heads, like.options());
    products.prepare_gradients(gradients, stream);
    gather_gradients(products.buffers(), all_heads, stream);
    products.write_gradients(gradients, x);
  });
  C10_CUDA_CHECK(stream.status);
  return {gradients.dx, gradients.dw, gradients.db};
}

}  // namespace

TORCH_LIBRARY_IMPL(grl_ext, CUDA, m) {
  m.impl("_heads_logits", heads_logits_cuda);
  m.impl("_heads_gradients", heads_gradients_cuda);
}

}  // namespace grl_ext
