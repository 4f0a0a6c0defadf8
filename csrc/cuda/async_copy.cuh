// Copies from global to shared memory that run while the thread computes: cp.async under the names of the PTX manual.
//
//   cp_async<16>(...); cp_async<16>(...); cp_async_commit();   // this tile's copies are one group
//   cp_async_wait<1>();                                        // all but this thread's latest group have arrived
//   __syncthreads();                                           // and so have those of the other threads
#pragma once

#include <cuda_pipeline_primitives.h>

namespace grl_ext {

// 16, 8 or 4 bytes, both ends aligned to as many. Only copies of 16 bypass the L1 cache (cp.async.cg), as data that is
// read once should.
template <int kBytes>
__device__ inline void cp_async(void* shared, const void* global) {
  __pipeline_memcpy_async(shared, global, kBytes);
}

__device__ inline void cp_async_commit() {
  __pipeline_commit();
}

template <int kPendingGroups>
__device__ inline void cp_async_wait() {
  __pipeline_wait_prior(kPendingGroups);
}

}  // namespace grl_ext
