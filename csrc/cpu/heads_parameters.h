// The weights and biases of the heads that the fused kernels take, and the sums that become their gradients. The threads' sums are
// added in the threads' order, so that the result depends on the number of threads and on nothing else.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "../arithmetic_type.h"
#include "../heads_options.h"
#include "heads_common.h"

namespace grl_ext::cpu {

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

}  // namespace grl_ext::cpu
