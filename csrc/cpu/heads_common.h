// What the heads' operators on the CPU share: which heads the fused kernels take, how rows are divided among the
// threads and into blocks, and which gradients are needed. heads_rows.h reads and writes rows, heads_parameters.h
// weights and biases.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

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
      dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble, "no kernel for ",
      dtype);
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
//
// Make the largest tensor last. What glibc's malloc takes from the end of its heap, and gets back while it is still the
// last block there, serves the next step again. Below other blocks it leaves a gap, too small for the next tensor of
// its size, which has to be aligned. The heap then grows instead, and when it shrinks again its pages go to the system
// and come back to be filled with zeros.
inline Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::detail::empty_cpu(sizes, dtype);
}

// Some of the operator's heads, their columns side by side: which heads they are, and the columns of each.
class HeadColumns {
 public:
  explicit HeadColumns(int64_t most) {
    heads_.reserve(most);
    begin_.reserve(most + 1);
    begin_.push_back(0);
  }

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
  std::vector<int64_t> heads_, begin_;
};

// The heads that the fused kernels take, which is each one for which there is still room, and those left to matrix
// products.
struct Division {
  HeadColumns fused;
  std::vector<int64_t> by_products;
};

template <class F>
Division divide(int64_t heads, const F& size_of) {
  Division division{HeadColumns(heads), {}};
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

// The factor of each head's part in the features' gradient.
inline std::vector<double> head_factors(at::ArrayRef<double> factor, const OptionalTensors& lambda) {
  auto factors = factor.vec();
  for (size_t h = 0; h < factors.size(); ++h) {
    if (const auto tensor = lambda.get(h)) {
      factors[h] *= tensor->item<double>();
    }
  }
  return factors;
}

// Adds factor * g W to dx by a matrix product. `dx_begun`: whether dx holds values yet.
inline void add_features_gradient(Tensor& dx, bool& dx_begun, const Tensor& g, const Tensor& weight, double factor) {
  if (factor != 0) {  // not multiplied by 0: the weight may be infinite
    at::addmm_out(dx, dx, g, weight, /*beta=*/dx_begun ? 1 : 0, /*alpha=*/factor);
    dx_begun = true;
  }
}

}  // namespace grl_ext::cpu
