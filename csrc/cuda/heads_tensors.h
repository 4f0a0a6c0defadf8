// From tensors to the arguments of the heads' kernels, and the matrix products between those kernels.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>
#include <vector>

#include "../gradient_slots.h"
#include "../heads_options.h"
#include "dispatch.h"
#include "heads_products_launches.cuh"
#include "heads_sweep_launches.cuh"

namespace grl_ext {

using at::Tensor;

// The current stream of the tensor's device, which must be the current device.
inline HeadsQueue queue_for(const Tensor& x) {
  HeadsQueue queue{};
  queue.stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&queue.device.sm_count, cudaDevAttrMultiProcessorCount, x.get_device()));
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&queue.device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, x.get_device()));
  return queue;
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

// Null for a tensor without elements: one that is not needed.
template <typename T>
T* data(const Tensor& tensor) {
  return tensor.numel() > 0 ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

template <typename T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

inline std::vector<Tensor> contiguous(at::TensorList tensors) {
  std::vector<Tensor> result;
  for (const auto& tensor : tensors) {
    result.push_back(tensor.contiguous());
  }
  return result;
}

inline std::vector<Tensor> contiguous(const OptionalTensors& tensors) {
  std::vector<Tensor> result;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto tensor = tensors.get(i);
    result.push_back(tensor ? tensor->contiguous() : Tensor());
  }
  return result;
}

// One number for each head or adversary. Those on a device are read there by the kernels, the others here.
class Numbers {
 public:
  // A number that was expanded to all heads stays one number on the device: a contiguous copy would be one more launch.
  explicit Numbers(const Tensor& values)
      : values_(
            !values.is_cuda()           ? values.contiguous().to(at::kDouble)
                : values.stride(0) == 0 ? values
                                        : values.contiguous()) {}

  DeviceNumbers on_device() const {
    DeviceNumbers numbers{};
    numbers.stride = static_cast<int>(values_.stride(0));
    if (values_.is_cuda() && values_.scalar_type() == at::kFloat) {
      numbers.floats = values_.const_data_ptr<float>();
    } else if (values_.is_cuda()) {
      numbers.doubles = values_.const_data_ptr<double>();
    }
    return numbers;
  }

  double on_host(int64_t i) const { return values_.is_cuda() ? 0.0 : values_.const_data_ptr<double>()[i]; }

 private:
  Tensor values_;
};

struct Sizes {
  int64_t rows, features;
  std::vector<int64_t> heads;

  int64_t columns() const {
    int64_t sum = 0;
    for (const auto size : heads) {
      sum += size;
    }
    return sum;
  }
};

inline Sizes sizes_of(const Tensor& x, at::TensorList weight) {
  Sizes sizes{x.size(0), x.size(1), {}};
  for (const auto& matrix : weight) {
    sizes.heads.push_back(matrix.size(0));
  }
  return sizes;
}

inline void check_features(const Sizes& sizes) {
  TORCH_CHECK_VALUE(
      sizes.features <= kMaxFeatures, "x has ", sizes.features, " features; the CUDA kernels take up to ",
      kMaxFeatures);
}

// Tensors for the gradients that the operator's `needs` asks for: of x, of each weight, of each bias. The others are
// empty.
struct Gradients {
  Tensor dx;
  std::vector<Tensor> dw, db;

  Gradients(const Sizes& sizes, const at::TensorOptions& options, const c10::List<bool>& needs) {
    const auto needed = [&](size_t slot, at::IntArrayRef shape) {
      return at::empty(needs.get(slot) ? shape : at::IntArrayRef{0}, options);
    };
    const GradientSlots slots{sizes.heads.size()};
    dx = needed(slots.x(), {sizes.rows, sizes.features});
    for (size_t h = 0; h < sizes.heads.size(); ++h) {
      dw.push_back(needed(slots.weight(h), {sizes.heads[h], sizes.features}));
      db.push_back(needed(slots.bias(h), {sizes.heads[h]}));
    }
  }

  bool any_of_parameters() const {
    const auto has_elements = [](const Tensor& tensor) { return tensor.numel() > 0; };
    return std::any_of(dw.begin(), dw.end(), has_elements) || std::any_of(db.begin(), db.end(), has_elements);
  }
};

// All heads, kHeadsPerLaunch at a time, with their columns and scales. describe(head, h) sets the other fields of head
// h.
template <typename T, class Describe>
std::vector<Heads<T>> launches_of(
    const Sizes& sizes, const Numbers& lambda, at::IntArrayRef lambda_index, const Describe& describe) {
  std::vector<Heads<T>> launches;
  int column = 0;
  for (size_t h = 0; h < sizes.heads.size(); ++h) {
    if (h % kHeadsPerLaunch == 0) {
      launches.emplace_back();
      launches.back().first = static_cast<int>(h);
      launches.back().lambda = lambda.on_device();
    }
    Heads<T>& heads = launches.back();
    Head<T>& head = heads.head[heads.count++];
    head.begin = column;
    head.end = column += static_cast<int>(sizes.heads[h]);
    head.lambda_index = static_cast<int16_t>(lambda_index[h]);
    head.scale = lambda_index[h] < 0 ? 1.0 : -lambda.on_host(lambda_index[h]);
    head.loss_weight = 1;
    describe(head, h);
  }
  return launches;
}

// ---------------------------------------------------------------------------------------------------------------------
// Products
// ---------------------------------------------------------------------------------------------------------------------

// The buffers of Products as tensors. Those that an operator does not need stay undefined.
struct ProductBuffers {
  Sizes sizes;
  int64_t pitch;
  Tensor weight, bias, z, g, scaled;

  ProductBuffers(const Sizes& sizes) : sizes(sizes), pitch(round_up(sizes.columns(), kProductColumns)) {}

  template <typename T>
  Products<T> as() const {
    const auto pointer = [](const Tensor& tensor) { return tensor.defined() ? data<T>(tensor) : nullptr; };
    return {
        sizes.rows,
        static_cast<int>(sizes.features),
        static_cast<int>(sizes.columns()),
        static_cast<int>(pitch),
        pointer(weight),
        pointer(bias),
        pointer(z),
        pointer(g),
        pointer(scaled)};
  }

  // Computes the gradients of all heads from g, scaled and weight, and copies each head's part into its tensor.
  void write_gradients(Gradients& gradients, const std::optional<Tensor>& x) const {
    if (scaled.defined()) {
      gradients.dx = at::mm(scaled, weight);
    }
    write_rows(gradients.dw, [&] { return at::mm(g.t(), *x); });
    write_rows(gradients.db, [&] { return at::sum(g, 0); });
  }

 private:
  // all() computes the rows of all heads, one head after the other.
  template <class All>
  void write_rows(std::vector<Tensor>& heads, const All& all) const {
    Tensor rows;
    int64_t begin = 0;
    for (size_t h = 0; h < heads.size(); ++h) {
      if (heads[h].numel() > 0) {
        rows = rows.defined() ? rows : all();
        heads[h].copy_(rows.narrow(0, begin, sizes.heads[h]));
      }
      begin += sizes.heads[h];
    }
  }
};

}  // namespace grl_ext
