// How the sweep copies numbers into shared memory, and how a thread loads and stores them: in pieces of kPiece.
#pragma once

#include <cuda_pipeline_primitives.h>

#include <cstdint>

#include "arithmetic.cuh"
#include "heads_plan.h"
#include "warp.cuh"

namespace grl_ext {

// kPiece neighbouring numbers, moved in as few instructions as there are.
template <typename T>
struct alignas(sizeof(T) * kPiece < 16 ? sizeof(T) * kPiece : 16) Piece {
  T elements[kPiece];
};

template <typename T, typename A>
__device__ void load_piece(A (&to)[kPiece], const T* from) {
  if constexpr (sizeof(T) == 2) {
    const auto pairs = *reinterpret_cast<const uint2*>(from);
    const float2 first = Arithmetic<T>::widen_pair(pairs.x);
    const float2 second = Arithmetic<T>::widen_pair(pairs.y);
    to[0] = first.x;
    to[1] = first.y;
    to[2] = second.x;
    to[3] = second.y;
  } else {
    const auto piece = *reinterpret_cast<const Piece<T>*>(from);
#pragma unroll
    for (int e = 0; e < kPiece; ++e) {
      to[e] = piece.elements[e];
    }
  }
}

// Stores the first `count` numbers of a piece. `whole`: every piece is complete and aligned, and can be stored at once.
template <typename T, typename A>
__device__ void store_piece(T* to, const A (&from)[kPiece], int count, bool whole) {
  Piece<T> piece;
#pragma unroll
  for (int e = 0; e < kPiece; ++e) {
    piece.elements[e] = Arithmetic<T>::narrow(from[e]);
  }
  if (whole) {
    *reinterpret_cast<Piece<T>*>(to) = piece;
    return;
  }
#pragma unroll
  for (int e = 0; e < kPiece; ++e) {
    if (e < count) {
      to[e] = piece.elements[e];
    }
  }
}

template <typename T>
__device__ bool pieces_are_whole(const T* base, int features) {
  return features % kPiece == 0 && reinterpret_cast<uintptr_t>(base) % alignof(Piece<T>) == 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Into shared memory
// ---------------------------------------------------------------------------------------------------------------------

// Starts to copy `bytes` to shared memory, by the whole warp, kBytes a lane at a time. Only the usual alignment is
// unrolled, because code takes room in the instruction cache.
template <int kBytes>
__device__ void copy_in_steps(char* to, const char* from, int bytes) {
#pragma unroll(kBytes == 16 ? 4 : 1)
  for (int i = lane_id() * kBytes; i < bytes; i += kWarpSize * kBytes) {
    if constexpr (kBytes < 4) {
      *reinterpret_cast<uint16_t*>(to + i) = *reinterpret_cast<const uint16_t*>(from + i);
    } else {
      __pipeline_memcpy_async(to + i, from + i, kBytes);
    }
  }
}

// The same in the widest asynchronous copies that both ends are aligned for. Only those of 16 bytes bypass the L1
// cache, as data that is read once should. Half types at odd multiples of 2 bytes have no such copy: the lanes load and
// store those. It is some hundred instructions wherever it stands, so that a kernel calls it in one place.
__device__ inline void copy_to_shared(char* to, const char* from, int bytes) {
  const auto alignment = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) |
      static_cast<unsigned>(bytes);
  if (alignment % 16 == 0) {
    copy_in_steps<16>(to, from, bytes);
  } else if (alignment % 8 == 0) {
    copy_in_steps<8>(to, from, bytes);
  } else if (alignment % 4 == 0) {
    copy_in_steps<4>(to, from, bytes);
  } else {
    copy_in_steps<2>(to, from, bytes);
  }
}

// Zeros each row from its end on to a multiple of kMultiple: the products run over whole ones.
template <int kMultiple, typename T>
__device__ void zero_row_ends(T* base, int pitch, int rows, int width) {
  for (int r = static_cast<int>(threadIdx.x); r < rows; r += static_cast<int>(blockDim.x)) {
    for (int i = width; i % kMultiple != 0; ++i) {
      base[r * pitch + i] = Arithmetic<T>::narrow(0);
    }
  }
}

}  // namespace grl_ext
