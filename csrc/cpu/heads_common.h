// What the heads' operators on the CPU share: which heads the sweep takes, which gradients are needed, and the tensors
// that hold those. heads_rows.h reads and writes rows, heads_parameters.h weights and biases; heads_sweep.h is the loop
// around them.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "../gradient_slots.h"
#include "../heads_options.h"
#include "heads_limits.h"
#include "kernels.h"

namespace grl_ext::cpu {

using at::Tensor;

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

// Makes the swept heads' logits.
inline void make_logits(std::vector<Tensor>& logits, const HeadColumns& columns, const Tensor& x) {
  for (int64_t i = 0; i < columns.count(); ++i) {
    logits[columns.head(i)] = empty({x.size(0), columns.size(i)}, x.scalar_type());
  }
}

// The heads that a sweep takes together, which is each one for which there is still room, and those left to matrix
// products.
struct Division {
  HeadColumns swept;
  std::vector<int64_t> by_products;

  // size_of(head): its columns.
  template <class F>
  Division(size_t heads, const F& size_of) {
    for (size_t h = 0; h < heads; ++h) {
      if (swept.total() + size_of(h) <= kMaxFusedColumns) {
        swept.add(static_cast<int64_t>(h), size_of(h));
      } else {
        by_products.push_back(static_cast<int64_t>(h));
      }
    }
  }
};

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

// The gradients that an operator returns.
struct Gradients {
  const Needs needs;
  const std::vector<double> factors;
  const at::ScalarType dtype;
  Tensor x;
  std::vector<Tensor> weight, bias;
  bool x_has_values = false;

  // Those that are not needed become an empty tensor each: results must not share memory.
  Gradients(const c10::List<bool>& needs_, std::vector<double> factors_, at::ScalarType dtype_)
      : needs(needs_), factors(std::move(factors_)), dtype(dtype_) {
    const auto none_unless = [&](bool needed) { return needed ? Tensor() : empty({0}, dtype); };
    x = none_unless(needs.x());
    for (size_t h = 0; h < factors.size(); ++h) {
      weight.push_back(none_unless(needs.weight(h)));
      bias.push_back(none_unless(needs.bias(h)));
    }
  }

  // The gradients of head h by matrix products. `features` is read if the weight's gradient is needed.
  void add_products(int64_t h, const Tensor& grad_logits, const Tensor& features, at::TensorList weights) {
    if (needs.x() && factors[h] != 0) {  // not multiplied by 0: the weight may be infinite
      if (!x.defined()) {
        x = empty({grad_logits.size(0), weights[h].size(1)}, dtype);
      }
      at::addmm_out(x, x, grad_logits, weights[h], /*beta=*/x_has_values ? 1 : 0, /*alpha=*/factors[h]);
      x_has_values = true;
    }
    if (needs.weight(h)) {
      weight[h] = grad_logits.t().mm(features);
    }
    if (needs.bias(h)) {
      bias[h] = grad_logits.sum(0);
    }
  }

  // After the last head: of (rows, features) zeros if no head has added to them.
  void finish(int64_t rows, int64_t features) {
    if (!x.defined()) {
      x = empty({rows, features}, dtype).zero_();
    }
  }
};

}  // namespace grl_ext::cpu
