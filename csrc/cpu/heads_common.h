// What the heads' operators on the CPU share: how rows are split among the threads and walked in blocks, how rows of any dtype are
// read and written, and how the threads' partial sums are added: in their order, so that the result depends on the number of
// threads and on nothing else.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <vector>

#include "heads_limits.h"
#include "kernels.h"

namespace grl_ext::cpu {

using at::Tensor;

// Multiply-adds below which another thread costs more than it saves.
constexpr int64_t kWorkPerThread = 1 << 20;

inline int64_t thread_count(int64_t rows, int64_t features, int64_t columns) {
  const int64_t useful = rows * features * columns / kWorkPerThread;
  return std::max<int64_t>(1, std::min({static_cast<int64_t>(at::get_num_threads()), useful, (rows + 3) / 4}));
}

// Rows a block: a block of features and one of their gradient stay in the L2 cache with room to spare.
constexpr int64_t kBlockElements = 1 << 15;

inline int64_t block_rows(int64_t features) {
  return std::clamp<int64_t>(kBlockElements / std::max<int64_t>(1, features) / 4 * 4, 8, kMaxBlockRows);
}

// f(thread, first row, last row) on as many threads as given, in parallel.
template <class F>
void for_each_thread(int64_t threads, int64_t rows, const F& f) {
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      f(t, rows * t / threads, rows * (t + 1) / threads);
    }
  });
}

// The type that a dtype is computed in: double for double, float for all others.
inline at::ScalarType wide_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// f(T()) with the type that a dtype is computed in.
template <class F>
auto dispatch_wide(at::ScalarType dtype, const F& f) {
  TORCH_CHECK_TYPE(
      dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble, "no kernel for ", dtype);
  return dtype == at::kDouble ? f(double()) : f(float());
}

template <class T>
const HeadsKernels<T>& heads_kernels() {
  if constexpr (std::is_same_v<T, double>) {
    return kernels().heads_double;
  } else {
    return kernels().heads_float;
  }
}

// Null for the types that need no conversion.
inline const ConvertKernels* convert_kernels(at::ScalarType dtype) {
  return dtype == at::kHalf ? &kernels().half : dtype == at::kBFloat16 ? &kernels().bfloat16 : nullptr;
}

// A linear layer's parameters as T.
template <class T>
class Parameters {
 public:
  Parameters(const Tensor& weight, const std::optional<Tensor>& bias)
      : weight_(weight.to(wide_type(weight.scalar_type())).contiguous()),
        bias_(bias ? bias->to(wide_type(weight.scalar_type())).contiguous() : Tensor()) {}

  const T* weight() const {
    return weight_.const_data_ptr<T>();
  }

  const T* bias() const {  // null if there is none
    return bias_.defined() ? bias_.const_data_ptr<T>() : nullptr;
  }

 private:
  const Tensor weight_, bias_;
};

// Rows of `tensor` as T: its own memory, or a converted copy.
template <class T>
class Rows {
 public:
  Rows(const Tensor& tensor, int64_t width)
      : data_(static_cast<char*>(tensor.data_ptr())), row_bytes_(width * tensor.element_size()), width_(width),
        convert_(convert_kernels(tensor.scalar_type())), copy_(convert_ ? kMaxBlockRows * width : 0) {}

  const T* read(int64_t row, int64_t rows) {
    if constexpr (std::is_same_v<T, float>) {
      if (convert_) {
        convert_->widen(copy_.data(), data_ + row * row_bytes_, rows * width_);
        return copy_.data();
      }
    }
    return reinterpret_cast<const T*>(data_ + row * row_bytes_);
  }

  // Where to write rows, to be finished by `written`.
  T* write(int64_t row) {
    return convert_ ? copy_.data() : reinterpret_cast<T*>(data_ + row * row_bytes_);
  }

  // Where the kernels will read rows from this one on, to be asked for ahead of time. A converted copy is always the same.
  const T* ahead(int64_t row) const {
    return convert_ ? copy_.data() : reinterpret_cast<const T*>(data_ + row * row_bytes_);
  }

  void written(int64_t row, int64_t rows) {
    if constexpr (std::is_same_v<T, float>) {
      if (convert_) {
        convert_->narrow(data_ + row * row_bytes_, copy_.data(), rows * width_);
      }
    }
  }

 private:
  char* data_;
  const int64_t row_bytes_, width_;
  const ConvertKernels* convert_;
  std::vector<T> copy_;
};

// A piece of a row-major matrix as the kernels' columns, kMaxBlockRows apart, and back.
template <class T>
void to_columns(T* columns, const T* rows, int64_t height, int64_t width) {
  for (int64_t c = 0; c < width; ++c) {
    for (int64_t r = 0; r < height; ++r) {
      columns[c * kMaxBlockRows + r] = rows[r * width + c];
    }
  }
}

template <class T>
void to_rows(T* rows, const T* columns, int64_t height, int64_t width) {
  for (int64_t r = 0; r < height; ++r) {
    for (int64_t c = 0; c < width; ++c) {
      rows[r * width + c] = columns[c * kMaxBlockRows + r];
    }
  }
}

// The gradients of weight and bias: each thread's sums, and their total.
template <class T>
class ParameterGradients {
 public:
  ParameterGradients(
      int64_t threads, int64_t columns, int64_t features, at::ScalarType dtype, bool needs_weight, bool needs_bias)
      : columns_(columns), dtype_(dtype), needs_bias_(needs_bias), bias_(threads * columns) {
    for (int64_t t = 0; needs_weight && t < threads; ++t) {
      weight_.push_back(at::zeros({columns, features}, wide_type(dtype)));
    }
  }

  // The thread's sums for the weight; null if it needs none.
  T* weight(int64_t thread) {
    return weight_.empty() ? nullptr : weight_[thread].template data_ptr<T>();
  }

  void add_to_bias(int64_t thread, const T* g, int64_t rows) {
    for (int64_t c = 0; c < columns_; ++c) {
      T sum = 0;
      for (int64_t r = 0; r < rows; ++r) {
        sum += g[c * kMaxBlockRows + r];
      }
      bias_[thread * columns_ + c] += sum;
    }
  }

  // (dw, db), empty where not needed.
  std::pair<Tensor, Tensor> total() {
    auto dw = weight_.empty() ? at::empty({0}, dtype_) : weight_[0];
    for (size_t t = 1; t < weight_.size(); ++t) {
      dw.add_(weight_[t]);
    }
    auto db = at::empty({needs_bias_ ? columns_ : 0}, wide_type(dtype_));
    for (int64_t c = 0; needs_bias_ && c < columns_; ++c) {
      T sum = 0;
      for (size_t i = c; i < bias_.size(); i += columns_) {
        sum += bias_[i];
      }
      db.template data_ptr<T>()[c] = sum;
    }
    return {dw.to(dtype_), db.to(dtype_)};
  }

 private:
  const int64_t columns_;
  const at::ScalarType dtype_;
  const bool needs_bias_;
  std::vector<Tensor> weight_;
  std::vector<T> bias_;
};

// Each column's gradient scale, that of its head.
template <class T>
std::vector<T> column_scales(at::IntArrayRef head_sizes, const Tensor& grad_scale) {
  const auto values = grad_scale.to(at::kDouble).contiguous();
  std::vector<T> scales;
  for (size_t h = 0; h < head_sizes.size(); ++h) {
    scales.insert(scales.end(), head_sizes[h], static_cast<T>(values.const_data_ptr<double>()[h]));
  }
  return scales;
}

// By matrix products, for heads too wide for the skinny kernels; `scaled` is g with each column's scale. x and weight where needed.
inline std::tuple<Tensor, Tensor, Tensor> gradients_by_products(
    const Tensor& g, const Tensor& scaled, const std::optional<Tensor>& x, const std::optional<Tensor>& weight,
    std::array<bool, 3> needs) {
  const auto none = [&] { return g.new_empty({0}); };
  return {needs[0] ? scaled.mm(*weight) : none(), needs[1] ? g.t().mm(*x) : none(), needs[2] ? g.sum(0) : none()};
}

}  // namespace grl_ext::cpu
