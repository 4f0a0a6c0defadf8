// The matrix units' instructions, for 16-bit elements and sums in f32. A matrix product's operands and result are
// spread over the lanes of a warp, which all take part. With `row` = lane / 4 and `pair` = lane % 4 * 2 a lane holds
//
//   A (16 x 16)   in word 0 the elements pair and pair + 1 of row `row`; in word 1 those of row + 8; in words 2 and 3
//                 the same, 8 columns further
//   B (16 x 8)    in word 0 the rows pair and pair + 1 of column `row`; in word 1 the same, 8 rows further
//   C (16 x 8)    the columns pair and pair + 1 of row `row`, then those of row + 8
//
// From compute capability 8.0 on; plans do without them elsewhere. tests/cuda_on_cpu has a version of its own for C++
// compilers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace grl_ext {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasMatrixUnits = false;
#else
constexpr bool kHasMatrixUnits = true;
#endif

#ifdef __CUDACC__

// Loads kMatrices matrices of 8 x 8 elements from shared memory: lane 8 m + r gives the address of row r of matrix m,
// aligned to 16 bytes, and gets in word m the elements pair and pair + 1 of row `row`; those of the transposed matrix
// with kTransposed. The rows' addresses modulo 128 should differ within a matrix: then it is one access to the banks.
template <bool kTransposed, int kMatrices>
__device__ void load_matrices(uint32_t (&to)[kMatrices], const void* row) {
  static_assert(kMatrices == 2 || kMatrices == 4);
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kMatrices == 4 && kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kMatrices == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// C += A B, with B's two words apart, because they may come from different loads.
template <typename T>
__device__ void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

#else

template <bool kTransposed, int kMatrices>
void load_matrices(
    uint32_t (&to)[kMatrices], const void* row, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_emulation::load_matrices(to, kMatrices, row, kTransposed, {"load_matrices", file, line});
}

template <typename T>
void multiply_matrices(
    float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* file = __builtin_FILE(),
    int line = __builtin_LINE()) {
  cuda_emulation::multiply_matrices<T>(c, a, b0, b1, {"multiply_matrices", file, line});
}

#endif

}  // namespace grl_ext
