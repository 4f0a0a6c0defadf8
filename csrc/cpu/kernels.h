// The CPU kernels as a table of plain functions, one table per instruction set, and the choice among them at run time.
//
// The kernels' source (csrc/cpu/kernels/) is compiled once per instruction set (csrc/cpu/isa/) and includes no header
// at all. An inline function of a header would be compiled for AVX-512 too, and that copy could be the one that the
// linker keeps for everybody.
#pragma once

namespace grl_ext::cpu {

// out[i] = grad[i] * factor, in scale_each times each[i]; zero where the factor, or that product, is zero. out may be
// grad. `each` and the arithmetic are double for double, float otherwise; half types are 16-bit patterns.
struct ScaleKernels {
  void (*scale)(void* out, const void* grad, long n, double factor);
  void (*scale_each)(void* out, const void* grad, long n, double factor, const void* each);
};

// The most rows that the heads' kernels take at a time. It is also the distance between two columns of a block's
// matrices.
constexpr long kMaxBlockRows = 64;

template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using Type = int;
};
template <>
struct IntegerOf<double> {
  using Type = long;
};
template <class T>
using Integer = typename IntegerOf<T>::Type;  // as wide as T

// Columns [begin, end) of the heads' logits.
struct Columns {
  long begin, end;
};

// One head's logits and targets in a block of rows. A matrix has its columns kMaxBlockRows apart. Rows after the last
// one, up to a whole vector, have a row weight of 0.
template <class T>
struct HeadBlock {
  const T* logits;
  T* grad_logits;
  T* scaled;  // grad_logits times factor
  long rows, columns;
  const Integer<T>* label;  // each row's class; null: read target instead
  const T* target;  // a matrix of probabilities or values
  const T* row_weight;  // 0 in rows that do not count
  const T* entry_weight;  // a matrix in place of it, for losses by output; or null
  const T* class_weight;  // null: all 1
  double smoothing;
  double grad_factor;  // of a row of weight 1 in the total loss: loss_weight / norm
  double factor;  // the head's, in the features' gradient
};

// What a block's gradients are computed from. A gradient whose pointer is null is not computed.
template <class T>
struct GradientsBlock {
  T* dx;
  T* dw;  // added to
  const T* grad_logits;
  const T* scaled;
  const T* x;
  const T* weight;
  long rows, features, columns;
  const Columns* dx_columns;  // ranges of the columns that go into dx
  long dx_runs;
  const Columns* dw_columns;  // ranges of the columns whose dw is needed
  long dw_runs;
  bool dx_streams;  // dx is too large for the caches: stored past them, where the kernels can
};

// Each takes a block of at most kMaxBlockRows rows. csrc/cpu/kernels/heads_logits.h, heads_loss.h and heads_gradients.h
// say what it computes.
template <class T>
struct HeadsKernels {
  void (*logits)(
      T* z, const T* x, const T* next, const T* weight, const T* bias, long rows, long features, long columns);
  double (*cross_entropy)(const HeadBlock<T>& head);
  double (*squared_error)(const HeadBlock<T>& head);
  double (*binary_cross_entropy)(const HeadBlock<T>& head);
  void (*gradients)(const GradientsBlock<T>& block);
};

struct ConvertKernels {
  void (*widen)(float* out, const void* in, long n);
  void (*narrow)(void* out, const float* in, long n);
};

struct Kernels {
  const char* isa;
  long block_elements;  // of the features that a block of rows should have
  ScaleKernels scale_half, scale_bfloat16, scale_float, scale_double;
  HeadsKernels<float> heads_float;
  HeadsKernels<double> heads_double;
  ConvertKernels half, bfloat16;
};

// One for each instruction set that the machine may have (csrc/cpu/isa/).
extern const Kernels kKernelsBaseline;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2, kKernelsAvx512;
#endif

// The table of the widest instruction set that this machine has; GRL_EXT_CPU_ISA=avx512|avx2|baseline chooses another
// one that it has.
const Kernels& kernels();

}  // namespace grl_ext::cpu
