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
  kValues,         // A (rows, size): squared error
};

template <typename T>
struct Head {
  using A = typename Arithmetic<T>::type;
  const T* weight;         // (size, features)
  const T* bias;           // (size), or null
  T* logits;               // (rows, size)
  const T* grad_logits;    // (rows, size), for the gradients alone; then there are no targets
  T* grad_weight;          // null where not needed
  T* grad_bias;            // null where not needed
  const void* target;
  const A* sample_weight;  // (rows), or null: 1
  const A* class_weight;   // (classes), or null: 1
  int64_t ignore_index;
  double smoothing;
  double scale;  // the head's factor in dx: 1 for a predictor, -lambda for an adversary; not read if the device holds
                 // lambda
  double loss_weight;  // not read if the device holds it
  int begin, end;  // columns, among those of all heads
  int16_t lambda_index;  // in `lambda` of the launch; -1 for a predictor
  uint16_t target_at;  // bytes from the beginning of a row's targets to this head's, in the sweep's tiles
  uint16_t weight_at;  // the same for its sample weight
  TargetKind kind;

  __host__ __device__ int size() const { return end - begin; }
  // A head of one column is binary: its softmax is over 0 and z, and the column stands for class 1.
  __host__ __device__ bool binary() const { return end - begin == 1; }
  __host__ __device__ int classes() const { return binary() ? 2 : end - begin; }
  __host__ __device__ int target_bytes() const {  // of a row
    return kind == TargetKind::kNone ? 0 : kind == TargetKind::kClasses ? 8 : size() * static_cast<int>(sizeof(A));
  }
};

// Numbers that the device holds, or null. They are read when the kernel runs, so that nothing waits for them and a
// replayed CUDA graph sees their changes.
struct DeviceNumbers {
  const float* floats;
  const double* doubles;
  int stride;  // 0: one number for all

  __device__ bool exist() const { return floats || doubles; }
  __device__ double operator[](int i) const { return doubles ? doubles[i * stride] : double{floats[i * stride]}; }
};

template <typename T>
struct Heads {
  int count;
  int first;  // the index of head[0] among the heads of all launches
  DeviceNumbers lambda;  // of all adversaries
  DeviceNumbers loss_weight;  // of the heads of all launches
  Head<T> head[kHeadsPerLaunch];

  __device__ double scale_of(int h) const {
    return head[h].lambda_index >= 0 && lambda.exist() ? -lambda[head[h].lambda_index] : head[h].scale;
  }
  __device__ double loss_weight_of(int h) const {
    return loss_weight.exist() ? loss_weight[first + h] : head[h].loss_weight;
  }
};

}  // namespace grl_ext
