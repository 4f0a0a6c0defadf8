// _heads_loss on CUDA: by the sweep, or by matrix products for heads too wide for it. Everything is enqueued on the
// current stream, and the host never waits, so that it can be captured in a CUDA graph.
#include <ATen/ops/addmm.h>
#include <torch/library.h>

#include <tuple>

#include "../arithmetic_type.h"
#include "heads_tensors.h"

namespace grl_ext {
namespace {

TargetKind target_kind(int64_t kind, const Tensor& target) {
  return kind == kSquaredError            ? TargetKind::kValues
      : target.scalar_type() == at::kLong ? TargetKind::kClasses
                                          : TargetKind::kProbabilities;
}

using Output = std::tuple<Tensor, Tensor, std::vector<Tensor>, Tensor, std::vector<Tensor>, std::vector<Tensor>>;

Output heads_loss_cuda(
    const Tensor& x_, at::TensorList weight_, const OptionalTensors& bias_, at::TensorList targets_,
    const OptionalTensors& sample_weight_, const OptionalTensors& class_weight_, const Tensor& lambda,
    at::IntArrayRef lambda_index, const std::optional<Tensor>& loss_weight, at::IntArrayRef kind,
    at::ArrayRef<double> label_smoothing, at::IntArrayRef ignore_index, bool mean, const c10::List<bool>& needs) {
  const c10::cuda::CUDAGuard guard(x_.device());
  const auto sizes = sizes_of(x_, weight_);
  check_features(sizes);
  const auto x = x_.contiguous();
  const auto weight = contiguous(weight_), targets = contiguous(targets_);
  const auto bias = contiguous(bias_), sample_weight = contiguous(sample_weight_),
             class_weight = contiguous(class_weight_);
  const auto loss_options = x.options().dtype(arithmetic_type(x.scalar_type()));
  const auto loss = at::empty({}, loss_options);
  const auto head_losses = at::empty({static_cast<int64_t>(sizes.heads.size())}, loss_options);
  std::vector<Tensor> logits;
  for (const auto size : sizes.heads) {
    logits.push_back(at::empty({sizes.rows, size}, x.options()));
  }
  Gradients gradients(sizes, x.options(), needs);
  const Numbers numbers(lambda);
  const auto queue = queue_for(x);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = typename Arithmetic<T>::type;
    const auto weights = loss_weight ? std::optional<Numbers>(*loss_weight) : std::nullopt;
    const auto optional = [](const Tensor& tensor) { return tensor.defined() ? const_data<A>(tensor) : nullptr; };
    auto heads = launches_of<T>(sizes, numbers, lambda_index, [&](Head<T>& head, size_t h) {
      head.weight = const_data<T>(weight[h]);
      head.bias = bias[h].defined() ? const_data<T>(bias[h]) : nullptr;
      head.logits = data<T>(logits[h]);
      head.grad_weight = data<T>(gradients.dw[h]);
      head.grad_bias = data<T>(gradients.db[h]);
      head.kind = target_kind(kind[h], targets[h]);
      head.target = targets[h].const_data_ptr();
      head.sample_weight = optional(sample_weight[h]);
      head.class_weight = optional(class_weight[h]);
      head.ignore_index = ignore_index[h];
      head.smoothing = label_smoothing[h];
      head.loss_weight = weights ? weights->on_host(static_cast<int64_t>(h)) : 1.0;
    });
    for (auto& launch : heads) {
      launch.loss_weight = weights ? weights->on_device() : DeviceNumbers{};
    }
    const HeadsLosses<A> losses{data<A>(loss), data<A>(head_losses)};
    const HeadsCall<T> call{
        const_data<T>(x),
        data<T>(gradients.dx),
        sizes.rows,
        static_cast<int>(sizes.features),
        static_cast<int>(sizes.columns()),
        heads[0]};
    if (sizes.columns() <= kMaxSweepColumns &&
        plan_heads(problem_with_loss(call, mean), queue.device).form != HeadsForm::kProducts) {
      C10_CUDA_CHECK(heads_loss(call, mean, losses, queue, Scratch(x)));
      return;
    }
    ProductBuffers buffers(sizes);
    buffers.weight = at::empty({buffers.pitch, sizes.features}, x.options());
    buffers.bias = at::empty({buffers.pitch}, x.options());
    C10_CUDA_CHECK(gather_weights(buffers.as<T>(), heads, queue));
    buffers.z = at::addmm(buffers.bias, x, buffers.weight.t());
    if (gradients.any_of_parameters()) {
      buffers.g = at::empty({sizes.rows, buffers.pitch}, x.options());
    }
    if (gradients.dx.numel() > 0) {
      buffers.scaled = at::empty({sizes.rows, buffers.pitch}, x.options());
      C10_CUDA_CHECK(silence_weights(buffers.as<T>(), heads, queue));  // after the logits, which need the whole weight
    }
    C10_CUDA_CHECK(heads_loss_of_products(
        buffers.as<T>(), heads, static_cast<int>(sizes.heads.size()), mean, losses, queue, Scratch(x)));
    buffers.write_gradients(gradients, x);
  });
  return {loss, head_losses, logits, gradients.dx, gradients.dw, gradients.db};
}

}  // namespace

TORCH_LIBRARY_IMPL(grl_ext, CUDA, m) {
  m.impl("_heads_loss", heads_loss_cuda);
}

}  // namespace grl_ext
