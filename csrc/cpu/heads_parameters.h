// The weights and biases of the heads that a sweep takes, and the sums that become their gradients. The
// threads' sums are added in the threads' order, so that the result depends on the number of threads and on nothing
// else.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "../arithmetic_type.h"
#include "../heads_options.h"
#include "heads_common.h"

namespace grl_ext::cpu {

// The heads' parameters as T, one below the other: a single head's memory as it is, or a copy.
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

// After this many blocks a thread adds its sums to its totals and begins new ones. A float32 sum over millions of rows,
// one after the other, would lose four digits.
constexpr int64_t kBlocksPerSum = 256;

// The gradients of weights and biases: each thread's sums, and their total.
template <class T>
class ParameterGradients {
 public:
  // Makes the tensors that are needed; total() fills them.
  ParameterGradients(Gradients& gradients, const HeadColumns& columns, int64_t threads, int64_t features)
      : gradients_(gradients), columns_(columns), features_(features),
        weight_runs_(columns.runs([&](int64_t head) { return gradients.needs.weight(head); })),
        weights_(weight_runs_.empty() ? 0 : columns.total() * features), threads_(threads) {
    for (int64_t i = 0; i < columns.count(); ++i) {
      const auto head = columns.head(i), size = columns.size(i);
      if (gradients.needs.weight(head)) {
        gradients.weight[head] = empty({size, features}, gradients.dtype);
      }
      if (gradients.needs.bias(head)) {
        gradients.bias[head] = empty({size}, gradients.dtype);
      }
    }
    for (auto& thread : threads_) {
      thread.sums.resize(weights_ + columns.total());
    }
  }

  // The columns whose weight is to have a gradient.
  const std::vector<Columns>& weight_columns() const { return weight_runs_; }

  // The thread's sums for the weights, to which a block's are added; null if none are needed.
  T* weight(int64_t thread) { return weights_ == 0 ? nullptr : threads_[thread].sums.data(); }

  // Adds a block's sums for the biases. The block's last step.
  void end_block(int64_t thread, const T* grad_logits, int64_t rows) {
    auto& [sums, totals, blocks] = threads_[thread];
    for (int64_t c = 0; c < columns_.total(); ++c) {
      sums[weights_ + c] += sum(grad_logits + c * kMaxBlockRows, rows);
    }
    if (++blocks == kBlocksPerSum) {
      blocks = 0;
      threads_[thread].add_to_totals();
    }
  }

  // Adds the threads' sums up.
  void total() {
    for (auto& thread : threads_) {
      if (!thread.totals.empty()) {
        thread.add_to_totals();
        thread.sums = std::move(thread.totals);
      }
    }
    for (int64_t i = 0; i < columns_.count(); ++i) {
      const auto head = columns_.head(i), begin = columns_.begin(i);
      if (gradients_.needs.weight(head)) {
        sum_of_threads(gradients_.weight[head], begin * features_);
      }
      if (gradients_.needs.bias(head)) {
        sum_of_threads(gradients_.bias[head], weights_ + begin);
      }
    }
  }

 private:
  using Sums = std::vector<T>;  // of the weights, then of the biases

  struct Thread {
    Sums sums, totals;
    int64_t blocks = 0;

    void add_to_totals() {
      if (totals.empty()) {
        totals.swap(sums);
        sums.resize(totals.size());
        return;
      }
      for (size_t i = 0; i < sums.size(); ++i) {
        totals[i] += sums[i];
      }
      std::fill(sums.begin(), sums.end(), T(0));
    }
  };

  // Several chains of additions, because each waits for the one before it.
  static T sum(const T* values, int64_t n) {
    constexpr int kChains = 16;
    std::array<T, kChains> chains{};
    int64_t i = 0;
    for (; i + kChains <= n; i += kChains) {
      for (int j = 0; j < kChains; ++j) {
        chains[j] += values[i + j];
      }
    }
    for (int j = 0; i + j < n; ++j) {
      chains[j] += values[i + j];
    }
    return std::accumulate(chains.begin(), chains.end(), T(0));
  }

  void sum_of_threads(const Tensor& result, int64_t offset) const {
    const int64_t n = result.numel();
    const bool converted = result.scalar_type() != c10::CppTypeToScalarType<T>::value;
    const auto sums = converted ? empty(result.sizes(), c10::CppTypeToScalarType<T>::value) : result;
    T* to = sums.template mutable_data_ptr<T>();
    std::copy_n(threads_[0].sums.data() + offset, n, to);
    for (size_t t = 1; t < threads_.size(); ++t) {
      const T* from = threads_[t].sums.data() + offset;
      for (int64_t i = 0; i < n; ++i) {
        to[i] += from[i];
      }
    }
    if (converted) {
      result.copy_(sums);
    }
  }

  Gradients& gradients_;
  const HeadColumns& columns_;
  const int64_t features_;
  const std::vector<Columns> weight_runs_;
  const int64_t weights_;  // elements of all heads' weights; 0 if none needs a gradient
  std::vector<Thread> threads_;
};

}  // namespace grl_ext::cpu
