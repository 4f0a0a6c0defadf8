// The matrix units, for cuda_emulation.h: what csrc/cuda/matrix_units.cuh needs in place of its instructions. Every
// lane reads and multiplies what is its own share of the result, so that the sanitizers see who reads what.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "half_types.h"
#include "machine.h"

namespace cuda_emulation {

// Lane 8 m + r gives the address of row r of matrix m. Word m: two neighbours of the lane's row of that matrix, or of
// its column.
inline void load_matrices(uint32_t* to, int matrices, const void* row, bool transposed, Site site) {
  const unsigned lane = this_thread->lane;
  if (lane < unsigned(8 * matrices) && reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    fail("lane %u gives %s the misaligned address %p, %s:%d", lane, site.call, row, site.file, site.line);
  }
  const Lanes rows = exchange(~0u, reinterpret_cast<uintptr_t>(row), site);
  const unsigned own = lane / 4, pair = lane % 4 * 2;
  for (int m = 0; m < matrices; ++m) {
    uint16_t two[2];
    for (unsigned e = 0; e < 2; ++e) {
      const unsigned r = transposed ? pair + e : own, c = transposed ? own : pair + e;
      two[e] = reinterpret_cast<const uint16_t*>(rows.of[8 * m + r])[c];
    }
    to[m] = two[0] | uint32_t{two[1]} << 16;
  }
}

template <typename T>
float element_of_word(uint64_t word, unsigned which) {
  const auto bits = static_cast<uint16_t>(word >> 16 * which);
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float({bits});
  } else {
    return __bfloat162float({bits});
  }
}

// Sums of exact products, rounded once to float as they join C.
template <typename T>
void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  const Lanes left = exchange(~0u, a[0] | uint64_t{a[1]} << 32, site);  // columns 0 to 7: a row, and the one 8 below
  const Lanes right = exchange(~0u, a[2] | uint64_t{a[3]} << 32, site);
  const Lanes b = exchange(~0u, b0 | uint64_t{b1} << 32, site);
  const unsigned row = this_thread->lane / 4, pair = this_thread->lane % 4 * 2;
  for (unsigned i = 0; i < 4; ++i) {
    double sum = 0;
    for (unsigned k = 0; k < 16; ++k) {
      const Lanes& half = k < 8 ? left : right;
      const float x = element_of_word<T>(half.of[4 * row + k % 8 / 2], 2 * (i / 2) + k % 2);
      const float y = element_of_word<T>(b.of[4 * (pair + i % 2) + k % 8 / 2], 2 * (k / 8) + k % 2);
      sum += double{x} * y;
    }
    c[i] = static_cast<float>(c[i] + sum);
  }
}

}  // namespace cuda_emulation
