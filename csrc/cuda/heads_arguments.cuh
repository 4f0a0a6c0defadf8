// The description of the heads that a kernel gets among its arguments.
#pragma once

#include <cstdint>

#include "arithmetic.cuh"
#include "heads_plan.h"

namespace grl_ext {

// The most heads of one launch. Their descriptions are among the kernel's arguments, which may have 4096 bytes. They
// hold pointers, so that weights and targets need not be copied into one buffer first.
constexpr int kHeadsPerLaunch = kMaxSweepColumns;

enum class TargetKind : uint8_t {
  kNone,
  kClasses,        // int64 (rows): cross entropy
  kProbabilities,  // A (rows, size): cross entropy
  kValues,         // A (rows, size): squared error of each output
  kIndicators,     // A (rows, size): how much each output holds, in [0, 1]: binary cross entropy of each
};

// A number that the host knows, or where the device holds it: then it is read when the kernel runs, so that nothing
// waits for it and a replayed CUDA graph sees its changes.
union Number {
  double value;
  const float* float_at;
  const double* double_at;
};

enum class NumberForm : uint8_t { kValue, kFloatAt, kDoubleAt };

__device__ inline double read(Number number, NumberForm form) {
  return form == NumberForm::kValue  ? number.value
      : form == NumberForm::kFloatAt ? double{*number.float_at}
                                     : *number.double_at;
}

template <typename T>
struct Head {
  using A = typename Arithmetic<T>::type;
  const T* weight;  // (size, features)
  const T* bias;    // (size), or null
  union {           // (rows, size)
    T* logits;
    const T* grad_logits;  // for the gradients alone: then there are neither logits nor targets
  };
  T* grad_weight;  // null where not needed
  T* grad_bias;    // null where not needed
  const void* target;
  const A* sample_weight;  // (rows), or null: 1; of entries (rows, size)
  const A* class_weight;   // (classes), or null: 1
  int64_t ignore_index;
  double smoothing;
  double factor;   // in dx, times `lambda`: 1 for a predictor, -lambda for an adversary
  Number lambda;   // 1 where `factor` says all
  Number loss_weight;
  int begin, end;  // columns, among those of all heads
  uint16_t target_at;  // bytes from the beginning of a row's targets to this head's, in the sweep's tiles
  uint16_t weight_at;  // the same for its sample weight
  TargetKind kind;
  bool of_entries;  // the sample weights, for the kinds with a loss for each output
  NumberForm lambda_form, loss_weight_form;

  __host__ __device__ int size() const { return end - begin; }
  // A head of one column is binary: its softmax is over 0 and z, and the column stands for class 1.
  __host__ __device__ bool binary() const { return end - begin == 1; }
  __host__ __device__ int classes() const { return binary() ? 2 : end - begin; }
  __host__ __device__ int target_bytes() const {  // of a row
    return kind == TargetKind::kNone ? 0 : kind == TargetKind::kClasses ? 8 : size() * static_cast<int>(sizeof(A));
  }
  __host__ __device__ int weights_of_row() const { return of_entries ? size() : 1; }
  __device__ double factor_in_dx() const { return factor * read(lambda, lambda_form); }
  __device__ double weight_in_loss() const { return read(loss_weight, loss_weight_form); }
};

template <typename T>
struct Heads {
  int count;
  int first;  // the index of head[0] among the heads of all launches
  Head<T> head[kHeadsPerLaunch];

  // Which head has column c.
  __device__ int of_column(int c) const {
    int h = 0;
    while (c >= head[h].end) {
      ++h;
    }
    return h;
  }
};

}  // namespace grl_ext
