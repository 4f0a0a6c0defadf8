// The CPU kernels as a table of plain functions, one table per instruction set, and the choice among them at run time.
//
// The kernels' source (csrc/cpu/kernels/) includes no header at all and is compiled once per instruction set (csrc/cpu/isa/):
// an inline function shared with ordinary code, compiled here for AVX-512, could be the copy that the linker keeps for all.
#pragma once

namespace grl_ext::cpu {

// out[i] = -lambda * grad[i] for a number, or with lambda[i] for `scale_each`; zero where lambda is zero. out may be grad.
// Lambda and the arithmetic are double for double, float otherwise; half types are 16-bit patterns.
struct ScaleKernels {
  void (*scale)(void* out, const void* grad, long n, double lambda);
  void (*scale_each)(void* out, const void* grad, long n, const void* lambda);
};

// Rows that the heads' kernels take at a time, at most: the distance between two columns of logits.
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

// One head's logits and targets in a block of rows. A matrix has its columns kMaxBlockRows apart; what follows the last row, up to a
// whole vector, has a row weight of 0.
template <class T>
struct HeadBlock {
  const T* logits;
  T* grad_logits;
  T* scaled;  // grad_logits times scale
  long rows, columns;
  const Integer<T>* label;  // each row's class; or null, and
  const T* target;          // each row's probabilities or values, a matrix
  const T* row_weight;      // 0 in rows that take no part
  const T* class_weight;    // null: all 1
  double smoothing;
  double grad_factor;  // what the sum over the rows is multiplied by to give the loss
  double scale;        // what the gradient to the features counts with
};

// The products of a block's gradients, each unless its result is null.
template <class T>
struct GradientsBlock {
  T* dx;
  T* dw;  // added to
  const T* grad_logits;
  const T* scaled;
  const T* x;
  const T* weight;
  long rows, features, columns;
  const Columns* dx_columns;  // those that dx counts
  long dx_runs;
  const Columns* dw_columns;  // those that dw is needed of
  long dw_runs;
};

// A block of at most kMaxBlockRows rows; what each computes is said in csrc/cpu/kernels/heads.h and heads_loss.h.
template <class T>
struct HeadsKernels {
  void (*logits)(T* z, const T* x, const T* next, const T* weight, const T* bias, long rows, long features, long columns);
  double (*cross_entropy)(const HeadBlock<T>& head);
  double (*squared_error)(const HeadBlock<T>& head);
  void (*gradients)(const GradientsBlock<T>& block);
};

struct ConvertKernels {
  void (*widen)(float* out, const void* in, long n);
  void (*narrow)(void* out, const float* in, long n);
};

struct Kernels {
  const char* isa;
  ScaleKernels scale_half, scale_bfloat16, scale_float, scale_double;
  HeadsKernels<float> heads_float;
  HeadsKernels<double> heads_double;
  ConvertKernels half, bfloat16;
};

// The widest table that this machine can run; GRL_EXT_CPU_ISA=avx512|avx2|baseline asks for another that it can.
const Kernels& kernels();

}  // namespace grl_ext::cpu
