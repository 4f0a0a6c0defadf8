// From tensors to the arguments of the heads' kernels.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string_view>
#include <vector>

#include "../gradient_slots.h"
#include "../heads_options.h"
#include "dispatch.h"
#include "heads_sweep_launches.cuh"

namespace grl_ext {

using at::Tensor;

// What GRL_EXT_CUDA_HEADS asks for.
inline HeadsUnits units_asked_for() {
  static const HeadsUnits asked = [] {
    const char* const variable = std::getenv("GRL_EXT_CUDA_HEADS");
    const std::string_view value = variable ? variable : "";
    TORCH_CHECK_VALUE(
        value.empty() || value == "lanes" || value == "matrix" || value == "products", "GRL_EXT_CUDA_HEADS is '", value,
        "'; it can be lanes, matrix or products");
    return value.empty()    ? HeadsUnits::kBest
        : value == "lanes"  ? HeadsUnits::kLanes
        : value == "matrix" ? HeadsUnits::kMatrix
                            : HeadsUnits::kProducts;
  }();
  return asked;
}

// The current stream of the tensor's device, which must be the current device.
inline Stream current_stream(const Tensor& x) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, x.get_device()));
    return value;
  };
  Stream stream{};
  stream.handle = c10::cuda::getCurrentCUDAStream();
  stream.device.sm_count = attribute(cudaDevAttrMultiProcessorCount);
  stream.device.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  stream.device.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
      attribute(cudaDevAttrComputeCapabilityMinor);
  stream.device.asked = units_asked_for();
  return stream;
}

// Allocates the workspace of one operator: PyTorch may give it to the next one on this stream as soon as this one is
// enqueued.
inline auto allocator_like(const Tensor& x) {
  return [options = x.options().dtype(at::kByte), memory = Tensor()](int64_t bytes) mutable {
    memory = at::empty({bytes}, options);
    return memory.mutable_data_ptr();
  };
}

// Null for a tensor that is not there or has no elements: one that is not needed.
template <typename T>
T* data(const Tensor& tensor) {
  return tensor.defined() && tensor.numel() > 0 ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

template <typename T>
const T* const_data(const Tensor& tensor) {
  return tensor.defined() ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
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

// Element i of a tensor of floats or doubles as a number of a head; without a tensor, 1.
inline void set_number(Number& number, NumberForm& form, const std::optional<Tensor>& tensor, int64_t i = 0) {
  const int64_t at = tensor && tensor->dim() > 0 ? i * tensor->stride(0) : 0;
  const bool is_float = tensor && tensor->scalar_type() == at::kFloat;
  if (!tensor) {
    number.value = 1;
  } else if (!tensor->is_cuda()) {
    number.value = is_float ? tensor->const_data_ptr<float>()[at] : tensor->const_data_ptr<double>()[at];
  } else if (is_float) {
    form = NumberForm::kFloatAt;
    number.float_at = tensor->const_data_ptr<float>() + at;
  } else {
    form = NumberForm::kDoubleAt;
    number.double_at = tensor->const_data_ptr<double>() + at;
  }
}

struct Sizes {
  int64_t rows;
  int features, columns = 0;
  std::vector<int64_t> heads;

  // A head's size is that of its tensor along `dim`.
  Sizes(int64_t rows, int64_t features, at::TensorList head_tensors, int64_t dim)
      : rows(rows), features(static_cast<int>(features)) {
    TORCH_CHECK_VALUE(
        features <= kMaxFeatures, "x has ", features, " features; the CUDA kernels take up to ", kMaxFeatures);
    for (const auto& tensor : head_tensors) {
      heads.push_back(tensor.size(dim));
      columns += static_cast<int>(heads.back());
    }
  }
};

inline std::vector<Tensor> empty_logits(const Sizes& sizes, const at::TensorOptions& options) {
  std::vector<Tensor> logits;
  for (const auto size : sizes.heads) {
    logits.push_back(at::empty({sizes.rows, size}, options));
  }
  return logits;
}

// Tensors for the gradients that the operator's `needs` asks for: of x, of each weight, of each bias. The others are
// empty.
struct GradientTensors {
  Tensor dx;
  std::vector<Tensor> dw, db;

  GradientTensors(const Sizes& sizes, const at::TensorOptions& options, const c10::List<bool>& needs) {
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
};

// All heads, kHeadsPerLaunch at a time, with their columns. describe(head, h) sets the other fields of head h.
template <typename T, class Describe>
std::vector<Heads<T>> describe_heads(const Sizes& sizes, const Describe& describe) {
  std::vector<Heads<T>> all_heads;
  int column = 0;
  for (size_t h = 0; h < sizes.heads.size(); ++h) {
    if (h % kHeadsPerLaunch == 0) {
      all_heads.emplace_back();
      all_heads.back().first = static_cast<int>(h);
    }
    Heads<T>& heads = all_heads.back();
    Head<T>& head = heads.head[heads.count++];
    head.begin = column;
    head.end = column += static_cast<int>(sizes.heads[h]);
    describe(head, h);
  }
  return all_heads;
}

template <typename T>
HeadsCall<T> call_of(const Sizes& sizes, const Tensor& x, const Tensor& dx, const std::vector<Heads<T>>& all_heads) {
  return {const_data<T>(x), data<T>(dx), sizes.rows, sizes.features, sizes.columns, all_heads[0]};
}

}  // namespace grl_ext
