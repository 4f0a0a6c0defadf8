// What the heads' operators on the CPU share: which heads the fused kernels take, how rows are divided among the threads and into
// blocks, how rows of any dtype are read and written, and how the threads' partial sums are added: in their order, so that the
// result depends on the number of threads and on nothing else.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "../arithmetic_type.h"
#include "../gradient_slots.h"
#include "../heads_options.h"
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

// Elements of a block of features. Such a block and one of their gradient fit into the L2 cache with room to spare.
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

// f(T()) with the type that a dtype is computed in.
template <class F>
auto dispatch_arithmetic(at::ScalarType dtype, const F& f) {
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

// at::empty without the dispatcher's overhead.
inline Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::detail::empty_cpu(sizes, dtype);
}

// Null for dtypes that need no conversion.
inline const ConvertKernels* convert_kernels(at::ScalarType dtype) {
  return dtype == at::kHalf ? &kernels().half : dtype == at::kBFloat16 ? &kernels().bfloat16 : nullptr;
}

// Some of the operator's heads, their columns side by side: which heads they are, and the columns of each.
class HeadColumns {
 public:
  void add(int64_t head, int64_t size) {
    heads_.push_back(head);
    begin_.push_back(total() + size);
  }

  int64_t count() const { return static_cast<int64_t>(heads_.size()); }

  int64_t head(int64_t i) const { return heads_[i]; }

  int64_t begin(int64_t i) const { return begin_[i]; }

  int64_t size(int64_t i) const { return begin_[i + 1] - begin_[i]; }

  int64_t total() const { return begin_.back(); }

  // The columns of the heads for which wanted(head) holds, as ranges; neighbouring ranges are joined.
  template <class F>
  std::vector<Columns> runs(const F& wanted) const {
    std::vector<Columns> runs;
    for (int64_t i = 0; i < count(); ++i) {
      if (!wanted(heads_[i])) {
        continue;
      }
      if (!runs.empty() && runs.back().end == begin_[i]) {
        runs.back().end = begin_[i + 1];
      } else {
        runs.push_back({static_cast<long>(begin_[i]), static_cast<long>(begin_[i + 1])});
      }
    }
    return runs;
  }

 private:
  std::vector<int64_t> heads_, begin_{0};
};

// The heads that the fused kernels take, which is each one for which there is still room, and those left to matrix products.
struct Division {
  HeadColumns fused;
  std::vector<int64_t> by_products;
};

template <class F>
Division divide(int64_t heads, const F& size_of) {
  Division division;
  for (int64_t h = 0; h < heads; ++h) {
    if (division.fused.total() + size_of(h) <= kMaxFusedColumns) {
      division.fused.add(h, size_of(h));
    } else {
      division.by_products.push_back(h);
    }
  }
  return division;
}

// Which gradients an operator has to compute: that of x, those of the H weights, those of the H biases.
class Needs {
 public:
  explicit Needs(const c10::List<bool>& needs) : needs_(needs.begin(), needs.end()), slots_{(needs_.size() - 1) / 2} {}

  bool x() const { return needs_[slots_.x()]; }

  bool weight(int64_t head) const { return needs_[slots_.weight(head)]; }

  bool bias(int64_t head) const { return needs_[slots_.bias(head)]; }

  bool any_weight() const { return any(slots_.weight(0), slots_.bias(0)); }

  bool any() const { return any(0, needs_.size()); }

 private:
  bool any(size_t begin, size_t end) const {
    return std::find(needs_.begin() + begin, needs_.begin() + end, true) != needs_.begin() + end;
  }

  const std::vector<bool> needs_;
  const GradientSlots slots_;
};

// The factor of each head's part in the features' gradient: -lambda for an adversary, 1 for a predictor.
inline std::vector<double> head_scales(const Tensor& lambda, at::IntArrayRef lambda_index) {
  const auto values = lambda.scalar_type() == at::kDouble ? lambda.contiguous() : lambda.to(at::kDouble).contiguous();
  std::vector<double> scales;
  scales.reserve(lambda_index.size());
  for (const auto index : lambda_index) {
    scales.push_back(index < 0 ? 1.0 : -values.const_data_ptr<double>()[index]);
  }
  return scales;
}

// The heads' parameters as T, one below the other: a single head's own memory, or a copy.
template <class T>
class Parameters {
 public:
  Parameters(const HeadColumns& columns, at::TensorList weight, const OptionalTensors& bias) {
    const int64_t features = weight[0].size(1);
    if (columns.count() == 1) {
      only_ = in_type(weight[columns.head(0)]);
    } else {
      gathered_.reset(new T[columns.total() * features]);
    }
    for (int64_t i = 0; i < columns.count(); ++i) {
      const auto head = columns.head(i);
      if (gathered_) {
        copy(gathered_.get() + columns.begin(i) * features, weight[head]);
      }
      if (const auto given = bias.empty() ? std::nullopt : bias.get(head)) {
        bias_.resize(columns.total());  // zeros for the heads without one
        copy(bias_.data() + columns.begin(i), *given);
      }
    }
  }

  const T* weight() const { return gathered_ ? gathered_.get() : only_.const_data_ptr<T>(); }

  const T* bias() const {  // null if there is none
    return bias_.empty() ? nullptr : bias_.data();
  }

 private:
  static Tensor in_type(const Tensor& tensor) {
    const auto dtype = arithmetic_type(tensor.scalar_type());
    return tensor.scalar_type() == dtype && tensor.is_contiguous() ? tensor : tensor.to(dtype).contiguous();
  }

  static void copy(T* to, const Tensor& from) {
    const auto values = in_type(from);
    std::copy_n(values.const_data_ptr<T>(), values.numel(), to);
  }

  Tensor only_;
  std::unique_ptr<T[]> gathered_;
  std::vector<T> bias_;
};

// Rows of `tensor` as T: its own memory, or a converted copy.
template <class T>
class Rows {
 public:
  Rows(const Tensor& tensor, int64_t width)
      // const_data_ptr also where rows are written, which happens only to tensors that the operator made. For others
      // mutable_data_ptr could copy the tensor (copy-on-write).
      : data_(static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()))), row_bytes_(width * tensor.element_size()),
        width_(width), convert_(convert_kernels(tensor.scalar_type())), copy_(convert_ ? kMaxBlockRows * width : 0) {}

  const T* read(int64_t row, int64_t rows) {
    if constexpr (std::is_same_v<T, float>) {
      if (convert_) {
        convert_->widen(copy_.data(), data_ + row * row_bytes_, rows * width_);
        return copy_.data();
      }
    }
    return reinterpret_cast<const T*>(data_ + row * row_bytes_);
  }

  // Where to write rows; written() must follow.
  T* write(int64_t row) { return convert_ ? copy_.data() : reinterpret_cast<T*>(data_ + row * row_bytes_); }

  // Where read(row) will find its rows, for prefetching. A converted copy is always at the same place.
  const T* ahead(int64_t row) const { return convert_ ? copy_.data() : reinterpret_cast<const T*>(data_ + row * row_bytes_); }

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

// From a row-major matrix to the kernels' columns, which are kMaxBlockRows apart, and back.
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

// The heads' (N, size) matrices, such as their logits, and a block of their rows as the kernels' columns.
template <class T>
class HeadRows {
 public:
  HeadRows(const HeadColumns& columns, at::TensorList matrices) : columns_(columns) {
    rows_.reserve(columns.count());
    for (int64_t i = 0; i < columns.count(); ++i) {
      rows_.emplace_back(matrices[columns.head(i)], columns.size(i));
    }
  }

  void read(T* block, int64_t row, int64_t rows) {
    for (int64_t i = 0; i < columns_.count(); ++i) {
      to_columns(block + columns_.begin(i) * kMaxBlockRows, rows_[i].read(row, rows), rows, columns_.size(i));
    }
  }

  void write(const T* block, int64_t row, int64_t rows) {
    for (int64_t i = 0; i < columns_.count(); ++i) {
      to_rows(rows_[i].write(row), block + columns_.begin(i) * kMaxBlockRows, rows, columns_.size(i));
      rows_[i].written(row, rows);
    }
  }

 private:
  const HeadColumns& columns_;
  std::vector<Rows<T>> rows_;
};

// After this many blocks a thread puts its sums aside and begins new ones. A float32 sum over millions of rows, one after the
// other, would lose four digits.
constexpr int64_t kBlocksPerSum = 256;

// The gradients of weights and biases: each thread's sums, and their total.
template <class T>
class ParameterGradients {
 public:
  ParameterGradients(const HeadColumns& columns, int64_t threads, int64_t features, at::ScalarType dtype, const Needs& needs)
      : columns_(columns), features_(features), dtype_(dtype), needs_(needs),
        weight_runs_(columns.runs([&](int64_t head) { return needs.weight(head); })), threads_(threads) {
    for (auto& thread : threads_) {
      thread.sums = Sums(weight_runs_.empty() ? 0 : columns.total() * features, columns.total());
    }
  }

  // The columns whose weight is to have a gradient.
  const std::vector<Columns>& weight_columns() const { return weight_runs_; }

  // The thread's sums for the weights, to which a block's are added; null if none are needed.
  T* weight(int64_t thread) { return weight_runs_.empty() ? nullptr : threads_[thread].sums.weight.data(); }

  // Adds a block's sums for the biases. The block's last step.
  void end_block(int64_t thread, const T* grad_logits, int64_t rows) {
    auto& own = threads_[thread];
    for (int64_t c = 0; c < columns_.total(); ++c) {
      T sum = 0;
      for (int64_t r = 0; r < rows; ++r) {
        sum += grad_logits[c * kMaxBlockRows + r];
      }
      own.sums.bias[c] += sum;
    }
    if (++own.blocks == kBlocksPerSum) {
      own.blocks = 0;
      own.put_aside();
    }
  }

  // Adds the threads' sums up, and sets those elements of dw and db that are needed.
  void total(std::vector<Tensor>& dw, std::vector<Tensor>& db) {
    for (auto& thread : threads_) {
      if (thread.aside) {
        thread.put_aside();
        thread.sums = std::move(*thread.aside);
      }
    }
    for (int64_t i = 0; i < columns_.count(); ++i) {
      const auto head = columns_.head(i), begin = columns_.begin(i), size = columns_.size(i);
      if (needs_.weight(head)) {
        dw[head] = sum_of_threads({size, features_}, begin * features_, &Sums::weight);
      }
      if (needs_.bias(head)) {
        db[head] = sum_of_threads({size}, begin, &Sums::bias);
      }
    }
  }

 private:
  struct Sums {
    std::vector<T> weight, bias;

    Sums() = default;
    Sums(int64_t weights, int64_t biases) : weight(weights), bias(biases) {}

    void add(const Sums& other) {
      for (size_t i = 0; i < weight.size(); ++i) {
        weight[i] += other.weight[i];
      }
      for (size_t i = 0; i < bias.size(); ++i) {
        bias[i] += other.bias[i];
      }
    }
  };

  struct Thread {
    Sums sums;
    std::optional<Sums> aside;
    int64_t blocks = 0;

    void put_aside() {
      if (aside) {
        aside->add(sums);
        std::fill(sums.weight.begin(), sums.weight.end(), T(0));
        std::fill(sums.bias.begin(), sums.bias.end(), T(0));
      } else {
        Sums zeros(static_cast<int64_t>(sums.weight.size()), static_cast<int64_t>(sums.bias.size()));
        aside = std::exchange(sums, std::move(zeros));
      }
    }
  };

  Tensor sum_of_threads(at::IntArrayRef sizes, int64_t offset, std::vector<T> Sums::* part) const {
    const auto dtype = arithmetic_type(dtype_);
    auto result = empty(sizes, dtype);
    T* to = result.template mutable_data_ptr<T>();
    const int64_t n = result.numel();
    std::copy_n((threads_[0].sums.*part).data() + offset, n, to);
    for (size_t t = 1; t < threads_.size(); ++t) {
      const T* from = (threads_[t].sums.*part).data() + offset;
      for (int64_t i = 0; i < n; ++i) {
        to[i] += from[i];
      }
    }
    return dtype_ == dtype ? result : result.to(dtype_);
  }

  const HeadColumns& columns_;
  const int64_t features_;
  const at::ScalarType dtype_;
  const Needs& needs_;
  const std::vector<Columns> weight_runs_;
  std::vector<Thread> threads_;
};

// Adds scale * g W to dx by a matrix product. `dx_begun`: whether dx holds values yet.
inline void add_features_gradient(Tensor& dx, bool& dx_begun, const Tensor& g, const Tensor& weight, double scale) {
  if (scale != 0) {  // not multiplied by 0: the weight may be infinite
    at::addmm_out(dx, dx, g, weight, /*beta=*/dx_begun ? 1 : 0, /*alpha=*/scale);
    dx_begun = true;
  }
}

}  // namespace grl_ext::cpu
