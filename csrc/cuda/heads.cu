// The heads' operators on CUDA: tensors to pointers, memory for the results, and matrix products for heads too wide for the
// kernels. Everything is enqueued on the current stream and nothing waits, so that it can be captured in a CUDA graph.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <limits>
#include <vector>

#include "heads.cuh"

namespace grl_ext {
namespace {

using at::Tensor;

HeadsDevice limits_of(const Tensor& x) {
  HeadsDevice device{};
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&device.sm_count, cudaDevAttrMultiProcessorCount, x.get_device()));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, x.get_device()));
  return device;
}

// Scratch memory of one operator: PyTorch may give it to the next one on this stream as soon as this one is enqueued.
class Scratch {
 public:
  explicit Scratch(const Tensor& x) : options_(x.options().dtype(at::kByte)) {}

  void* operator()(int64_t bytes) const {
    memory_ = at::empty({bytes}, options_);
    return memory_.mutable_data_ptr();
  }

 private:
  const at::TensorOptions options_;
  mutable Tensor memory_;
};

// A tensor of one number for each head, as the kernels read it: in place where it is on the device.
class HeadNumbers {
 public:
  explicit HeadNumbers(const Tensor& values) {
    const bool readable = values.is_cuda() && (values.scalar_type() == at::kFloat || values.scalar_type() == at::kDouble);
    values_ = (readable ? values : values.to(at::kDouble)).contiguous();
  }

  PerHead from(int64_t first, int64_t count) const {
    PerHead numbers{};
    if (values_.is_cuda() && values_.scalar_type() == at::kFloat) {
      numbers.floats = values_.const_data_ptr<float>() + first;
    } else if (values_.is_cuda()) {
      numbers.doubles = values_.const_data_ptr<double>() + first;
    } else {
      std::copy_n(values_.const_data_ptr<double>() + first, count, numbers.values);
    }
    return numbers;
  }

 private:
  Tensor values_;
};

PerHead ones() {
  PerHead numbers{};
  std::fill(std::begin(numbers.values), std::end(numbers.values), 1.0);
  return numbers;
}

// All heads, kHeadsPerLaunch at a time.
std::vector<Heads> launches_of(at::IntArrayRef sizes, const HeadNumbers& grad_scale, const std::optional<HeadNumbers>& loss_weight) {
  std::vector<Heads> launches;
  const auto count = static_cast<int64_t>(sizes.size());
  int column = 0;
  for (int64_t first = 0; first < count; first += kHeadsPerLaunch) {
    Heads& heads = launches.emplace_back();
    heads.first = static_cast<int>(first);
    heads.count = static_cast<int>(std::min<int64_t>(kHeadsPerLaunch, count - first));
    heads.begin[0] = column;
    for (int h = 0; h < heads.count; ++h) {
      heads.begin[h + 1] = column += static_cast<int>(sizes[first + h]);
    }
    heads.grad_scale = grad_scale.from(first, heads.count);
    heads.loss_weight = loss_weight ? loss_weight->from(first, heads.count) : ones();
  }
  return launches;
}

// f(T) for the kernels' name of the dtype.
template <class F>
auto dispatch(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kHalf:
      return f(__half());
    case at::kBFloat16:
      return f(__nv_bfloat16());
    case at::kDouble:
      return f(double());
    default:
      TORCH_CHECK_TYPE(dtype == at::kFloat, "no kernel for ", dtype);
      return f(float());
  }
}

template <typename T>
T* data(const Tensor& tensor) {
  return tensor.numel() > 0 ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

template <typename T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

struct Sizes {
  int64_t rows, features, columns;
};

// The inputs, contiguous. What a kernel does not read may be left out.
struct Inputs {
  Sizes sizes;
  Tensor x, weight, bias;

  Inputs(Sizes sizes, const std::optional<Tensor>& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias)
      : sizes(sizes), x(contiguous(x)), weight(contiguous(weight)), bias(contiguous(bias)) {
    constexpr int64_t kMaxFeatures = std::numeric_limits<int>::max() / 64;
    TORCH_CHECK_VALUE(
        sizes.features <= kMaxFeatures, "x has ", sizes.features, " features; the CUDA kernels take up to ", kMaxFeatures);
  }

  template <typename T>
  HeadsInput<T> as() const {
    const auto pointer = [](const Tensor& tensor) { return tensor.defined() ? const_data<T>(tensor) : nullptr; };
    return {
        pointer(x), pointer(weight), pointer(bias), sizes.rows, static_cast<int>(sizes.features),
        static_cast<int>(sizes.columns)};
  }

 private:
  static Tensor contiguous(const std::optional<Tensor>& tensor) {
    return tensor ? tensor->contiguous() : Tensor();
  }
};

// The gradients that are needed; the others empty.
struct Gradients {
  Tensor dx, dw, db;

  Gradients(Sizes sizes, const at::TensorOptions& options, std::array<bool, 3> needs)
      : dx(needs[0] ? at::empty({sizes.rows, sizes.features}, options) : at::empty({0}, options)),
        dw(needs[1] ? at::empty({sizes.columns, sizes.features}, options) : at::empty({0}, options)),
        db(needs[2] ? at::empty({sizes.columns}, options) : at::empty({0}, options)) {}

  template <typename T>
  HeadsGradients<T> as() const {
    return {data<T>(dx), data<T>(dw), data<T>(db)};
  }
};

Sizes sizes_of(const Tensor& x, const Tensor& weight) {
  return {x.size(0), x.size(1), weight.size(0)};
}

// `scaled` is g with each head's gradient scale. x and weight where needed.
std::tuple<Tensor, Tensor, Tensor> gradients_by_products(
    const Tensor& g, const Tensor& scaled, const std::optional<Tensor>& x, const std::optional<Tensor>& weight,
    std::array<bool, 3> needs) {
  const auto none = [&] { return at::empty({0}, g.options()); };
  return {needs[0] ? at::mm(scaled, *weight) : none(), needs[1] ? at::mm(g.t(), *x) : none(), needs[2] ? at::sum(g, 0) : none()};
}

Tensor heads_logits_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const c10::cuda::CUDAGuard guard(x.device());
  if (weight.size(0) > kMaxSweepColumns) {
    return at::linear(x, weight, bias);
  }
  const Inputs inputs(sizes_of(x, weight), x, weight, bias);
  auto logits = at::empty({x.size(0), weight.size(0)}, x.options());
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    C10_CUDA_CHECK(
        heads_logits(data<T>(logits), inputs.as<T>(), limits_of(x), c10::cuda::getCurrentCUDAStream(), Scratch(x)));
  });
  return logits;
}

std::tuple<Tensor, Tensor, Tensor> heads_gradients_cuda(
    const Tensor& grad_logits, const std::optional<Tensor>& x, const std::optional<Tensor>& weight, at::IntArrayRef head_sizes,
    const Tensor& grad_scale, std::array<bool, 3> needs) {
  const c10::cuda::CUDAGuard guard(grad_logits.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto g = grad_logits.contiguous();
  const HeadNumbers scale(grad_scale);
  const auto heads = launches_of(head_sizes, scale, std::nullopt);
  if (g.size(1) > kMaxSweepColumns) {
    const auto scaled = at::empty(needs[0] ? g.sizes() : at::IntArrayRef{0}, g.options());
    dispatch(g.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      if (needs[0]) {
        C10_CUDA_CHECK(heads_scale(
            data<T>(scaled), const_data<T>(g), g.size(0), static_cast<int>(g.size(1)), heads, limits_of(g), stream));
      }
    });
    return gradients_by_products(g, scaled, x, weight, needs);
  }
  const Sizes sizes{g.size(0), needs[0] ? weight->size(1) : needs[1] ? x->size(1) : 0, g.size(1)};
  const Inputs inputs(sizes, x, weight, std::nullopt);
  const Gradients gradients(sizes, g.options(), needs);
  dispatch(g.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    C10_CUDA_CHECK(heads_gradients(
        gradients.as<T>(), const_data<T>(g), inputs.as<T>(), heads.front(), limits_of(g), stream, Scratch(g)));
  });
  return {gradients.dx, gradients.dw, gradients.db};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> heads_cross_entropy_cuda(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& targets_, at::IntArrayRef head_sizes,
    const Tensor& grad_scale, const std::optional<Tensor>& loss_weight, int64_t ignore_index, double label_smoothing,
    std::array<bool, 3> needs) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto count = static_cast<int64_t>(head_sizes.size());
  const auto class_of = targets_.contiguous();
  const HeadNumbers scale(grad_scale);
  const auto weights = loss_weight ? std::optional<HeadNumbers>(*loss_weight) : std::nullopt;
  const auto heads = launches_of(head_sizes, scale, weights);
  Targets targets{};
  targets.classes = const_data<int64_t>(class_of);
  targets.stride = static_cast<int>(count);
  targets.rows = x.size(0);
  targets.ignore_index = ignore_index;
  targets.smoothing = label_smoothing;

  const auto loss_options = x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const auto loss = at::empty({}, loss_options);
  const auto head_losses = at::empty({count}, loss_options);
  if (weight.size(0) > kMaxSweepColumns) {
    const auto logits = at::linear(x, weight, bias).contiguous();
    const auto g = needs[1] || needs[2] ? at::empty_like(logits) : at::empty({0}, logits.options());
    const auto scaled = needs[0] ? at::empty_like(logits) : at::empty({0}, logits.options());
    dispatch(x.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      using A = typename Arithmetic<T>::type;
      C10_CUDA_CHECK(heads_cross_entropy_of_logits(
          HeadsLosses<A>{data<A>(loss), data<A>(head_losses)}, data<T>(g), data<T>(scaled), const_data<T>(logits),
          static_cast<int>(weight.size(0)), heads, targets, limits_of(x), stream, Scratch(x)));
    });
    const auto [dx, dw, db] = gradients_by_products(g, scaled, x, weight, needs);
    return {loss, head_losses, logits, dx, dw, db};
  }
  const Sizes sizes = sizes_of(x, weight);
  const Inputs inputs(sizes, x, weight, bias);
  const Gradients gradients(sizes, x.options(), needs);
  const auto logits = at::empty({x.size(0), weight.size(0)}, x.options());
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = typename Arithmetic<T>::type;
    C10_CUDA_CHECK(heads_cross_entropy(
        data<T>(logits), HeadsLosses<A>{data<A>(loss), data<A>(head_losses)}, gradients.as<T>(), inputs.as<T>(), heads.front(),
        targets, limits_of(x), stream, Scratch(x)));
  });
  return {loss, head_losses, logits, gradients.dx, gradients.dw, gradients.db};
}

}  // namespace

TORCH_LIBRARY_IMPL(grl_ext, CUDA, m) {
  m.impl("_heads_logits", heads_logits_cuda);
  m.impl("_heads_gradients", heads_gradients_cuda);
  m.impl("_heads_cross_entropy", heads_cross_entropy_cuda);
}

}  // namespace grl_ext
