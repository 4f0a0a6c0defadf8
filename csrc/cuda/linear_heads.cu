// _heads_logits and _heads_gradients on CUDA: by the sweep, or by matrix products for heads too wide for it. Everything
// is enqueued on the current stream, and the host never waits, so that it can be captured in a CUDA graph.
#include <ATen/ops/addmm.h>
#include <torch/library.h>

#include <tuple>

#include "heads_tensors.h"

namespace grl_ext {
namespace {

std::vector<Tensor> heads_logits_cuda(const Tensor& x_, at::TensorList weight_, const OptionalTensors& bias_) {
  const c10::cuda::CUDAGuard guard(x_.device());
  const auto sizes = sizes_of(x_, weight_);
  check_features(sizes);
  const auto x = x_.contiguous();
  const auto weight = contiguous(weight_);
  const auto bias = contiguous(bias_);
  std::vector<Tensor> logits;
  for (const auto size : sizes.heads) {
    logits.push_back(at::empty({sizes.rows, size}, x.options()));
  }
  const auto queue = queue_for(x);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Numbers no_lambda(at::empty({0}, at::kDouble));
    const std::vector<int64_t> predictors(sizes.heads.size(), -1);
    const auto heads = launches_of<T>(sizes, no_lambda, predictors, [&](Head<T>& head, size_t h) {
      head.weight = const_data<T>(weight[h]);
      head.bias = bias[h].defined() ? const_data<T>(bias[h]) : nullptr;
      head.logits = data<T>(logits[h]);
    });
    if (sizes.columns() <= kMaxSweepColumns) {
      const HeadsCall<T> call{
          const_data<T>(x), nullptr, sizes.rows, static_cast<int>(sizes.features), static_cast<int>(sizes.columns()),
          heads[0]};
      C10_CUDA_CHECK(heads_logits(call, queue, Scratch(x)));
      return;
    }
    ProductBuffers buffers(sizes);
    buffers.weight = at::empty({buffers.pitch, sizes.features}, x.options());
    buffers.bias = at::empty({buffers.pitch}, x.options());
    C10_CUDA_CHECK(gather_weights(buffers.as<T>(), heads, queue));
    buffers.z = at::addmm(buffers.bias, x, buffers.weight.t());
    C10_CUDA_CHECK(split_logits(buffers.as<T>(), heads, queue));
  });
  return logits;
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> heads_gradients_cuda(
    at::TensorList grad_logits_, const std::optional<Tensor>& x_, at::TensorList weight_, const Tensor& lambda,
    at::IntArrayRef lambda_index, const c10::List<bool>& needs) {
  const c10::cuda::CUDAGuard guard(grad_logits_[0].device());
  const auto grad_logits = contiguous(grad_logits_);
  const auto weight = contiguous(weight_);
  const auto x = x_ ? std::optional(x_->contiguous()) : std::nullopt;
  Sizes sizes{grad_logits[0].size(0), !weight.empty() ? weight[0].size(1) : x ? x->size(1) : 0, {}};
  for (const auto& g : grad_logits) {
    sizes.heads.push_back(g.size(1));
  }
  check_features(sizes);
  const auto options = grad_logits[0].options();
  Gradients gradients(sizes, options, needs);
  const Numbers numbers(lambda);
  const auto queue = queue_for(grad_logits[0]);
  dispatch(grad_logits[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto heads = launches_of<T>(sizes, numbers, lambda_index, [&](Head<T>& head, size_t h) {
      head.weight = weight.empty() ? nullptr : const_data<T>(weight[h]);
      head.grad_logits = const_data<T>(grad_logits[h]);
      head.grad_weight = data<T>(gradients.dw[h]);
      head.grad_bias = data<T>(gradients.db[h]);
    });
    if (sizes.columns() <= kMaxSweepColumns) {
      const HeadsCall<T> call{
          x ? const_data<T>(*x) : nullptr,
          data<T>(gradients.dx),
          sizes.rows,
          static_cast<int>(sizes.features),
          static_cast<int>(sizes.columns()),
          heads[0]};
      C10_CUDA_CHECK(heads_gradients(call, queue, Scratch(grad_logits[0])));
      return;
    }
    ProductBuffers buffers(sizes);
    if (gradients.any_of_parameters()) {
      buffers.g = at::empty({sizes.rows, buffers.pitch}, options);
    }
    if (gradients.dx.numel() > 0) {
      buffers.scaled = at::empty({sizes.rows, buffers.pitch}, options);
      buffers.weight = at::empty({buffers.pitch, sizes.features}, options);
      C10_CUDA_CHECK(gather_weights(buffers.as<T>(), heads, queue));
      C10_CUDA_CHECK(silence_weights(buffers.as<T>(), heads, queue));
    }
    C10_CUDA_CHECK(gather_gradients(buffers.as<T>(), heads, queue));
    buffers.write_gradients(gradients, x);
  });
  return {gradients.dx, gradients.dw, gradients.db};
}

}  // namespace

TORCH_LIBRARY_IMPL(grl_ext, CUDA, m) {
  m.impl("_heads_logits", heads_logits_cuda);
  m.impl("_heads_gradients", heads_gradients_cuda);
}

}  // namespace grl_ext
