// Runs CUDA kernels on the CPU, one fibre per CUDA thread, so that their logic can be tested under sanitizers without a
// GPU.
//
// Put tests/cuda_on_cpu/include first on the include path. The headers there have the names of the toolkit's
// (cuda_runtime.h, cuda_fp16.h, ...) and lead here, so that a .cuh of csrc/cuda compiles unchanged with g++ (C++17 or
// later, -pthread). It must
// - launch through launch() and reach its dynamic shared memory through dynamic_shared_memory(), both in launch.cuh;
// - align shared arrays with __align__: __shared__ __align__(16) float tile[32];
// - use no more of CUDA than is here, in cuda_types.h and in half_types.h: what a new kernel needs is added there.
// A test is a program that launches the kernel on ordinary host memory and exits with 0, named in
// tests/cuda_on_cpu/test_cuda_on_cpu.py.
//
// What is found that a GPU may let pass:
// - AddressSanitizer: accesses outside global buffers and outside the dynamic shared memory that was asked for.
// - UndefinedBehaviorSanitizer: misaligned vector accesses, indices outside static shared arrays.
// - ThreadSanitizer: races between the threads of a block (a missing __syncthreads or __syncwarp) and between blocks.
//   Each CUDA thread is a thread of its own to it, ordered with others by barriers and __threadfence only: a shuffle
//   orders no memory. The fibres run one at a time and in a fixed order, so what it reports does not depend on luck.
//   8000 threads a grid at most.
// - Here: threads that wait for one that has returned or waits elsewhere (the message lists the places), lanes outside
//   the mask they name, misaligned asynchronous copies.
// - Launches that a device refuses (device_limits.h): threads, grid, parameters, static and dynamic shared memory
//   together. Not registers, of which only the compiler knows: tests/project/test_cuda_code.py looks at those.
// - Dynamic shared memory begins as NaN. The target of an asynchronous copy is NaN until the copy has been waited for.
//
// Another may run the launches instead, with what nvcc made of the same kernels: elsewhere.h.
//
// What differs from a GPU: blocks run one after another, the last one first, so that they cannot wait for each other;
// there is no timing and there are no streams; every lane that a mask names must arrive, at the same line, or the block
// hangs (and says so).
#pragma once

#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda_types.h"
#include "half_types.h"
#include "machine.h"
#include "matrix_units.h"

// ---- The runtime
// ------------------------------------------------------------------------------------------------------------

inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_emulation::device.id;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = static_cast<int>(cuda_emulation::device.shared_bytes);
  return cudaSuccess;
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  attributes->sharedSizeBytes = cuda_emulation::static_shared_bytes(function);
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int bytes) {
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) {
    cuda_emulation::carveout_asked_for[{cuda_emulation::device.id, function}] = bytes;
    return cudaSuccess;
  }
  if (!cuda_emulation::may_ask_for(function, bytes)) {
    return cudaErrorInvalidValue;
  }
  cuda_emulation::dynamic_bytes_asked_for[{cuda_emulation::device.id, function}] = bytes;
  return cudaSuccess;
}

namespace cuda_emulation {

// What is launched while this is set is kept in it, to be launched again as it was: a CUDA graph.
inline std::vector<std::function<cudaError_t()>>* recorded = nullptr;

}  // namespace cuda_emulation

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const std::tuple<Params...> parameters(std::forward<Args>(args)...);
  const auto run = [config = *config, kernel, parameters] {
    const auto bytes = std::apply(cuda_emulation::parameter_bytes<Params...>, parameters);
    return cuda_emulation::run_grid(
        config, reinterpret_cast<const void*>(kernel), bytes, [&] { std::apply(kernel, parameters); });
  };
  if (cuda_emulation::recorded) {
    cuda_emulation::recorded->emplace_back(run);
  }
  return run();
}

// ---- Threads together
// -------------------------------------------------------------------------------------------------------

// Default arguments are evaluated where the call is written: this is how the messages know their line.
#define CUDA_EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_EMULATION_SITE) {
  cuda_emulation::sync_block({"__syncthreads", file, line});
}

inline void __syncwarp(unsigned mask = ~0u, CUDA_EMULATION_SITE) {
  cuda_emulation::exchange(mask, 0, {"__syncwarp", file, line}, /*orders=*/true);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_EMULATION_SITE) {
  const unsigned first = cuda_emulation::this_thread->lane / width * width;
  return cuda_emulation::shuffle(mask, value, first + unsigned(source) % width, true, {"__shfl_sync", file, line});
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUDA_EMULATION_SITE) {
  const unsigned end = cuda_emulation::this_thread->lane / width * width + width;
  const unsigned source = cuda_emulation::this_thread->lane ^ lane_mask;
  return cuda_emulation::shuffle(mask, value, source, source < end, {"__shfl_xor_sync", file, line});
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_EMULATION_SITE) {
  const unsigned end = cuda_emulation::this_thread->lane / width * width + width;
  const unsigned source = cuda_emulation::this_thread->lane + delta;
  return cuda_emulation::shuffle(mask, value, source, source < end, {"__shfl_down_sync", file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_EMULATION_SITE) {
  const cuda_emulation::Lanes votes = cuda_emulation::exchange(mask, predicate != 0, {"__ballot_sync", file, line});
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < cuda_emulation::kWarpSize; ++lane) {
    ballot |= unsigned(votes.of[lane] == 1) << lane;
  }
  return ballot;
}

inline void __threadfence() {
  cuda_emulation::tsan_release(&cuda_emulation::fence_clock);
  cuda_emulation::tsan_acquire(&cuda_emulation::fence_clock);
}

template <typename T>
T atomicAdd(T* address, decltype(T{} + T{}) value) {
  T old;
  T sum;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    sum = old + value;
  } while (!__atomic_compare_exchange(address, &old, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

// ---- Memory
// -----------------------------------------------------------------------------------------------------------------

template <typename T>
T __ldg(const T* address) {
  return *address;
}

template <typename T>
T __ldcg(const T* address) {
  return *address;
}

template <typename T>
void __stcg(T* address, T value) {
  *address = value;
}

inline void __pipeline_memcpy_async(void* to, const void* from, std::size_t bytes) {
  const auto misaligned = (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes;
  if ((bytes != 4 && bytes != 8 && bytes != 16) || misaligned) {
    cuda_emulation::fail(
        "an asynchronous copy of %zu bytes from %p to %p: 4, 8 or 16, both ends aligned to it", bytes, from, to);
  }
  std::memset(to, 0xff, bytes);
  cuda_emulation::this_thread->open_copies.push_back({to, from, bytes});
}

inline void __pipeline_commit() {
  cuda_emulation::this_thread->committed_copies.push_back(std::exchange(cuda_emulation::this_thread->open_copies, {}));
}

inline void __pipeline_wait_prior(std::size_t pending) {
  auto& committed = cuda_emulation::this_thread->committed_copies;
  for (; committed.size() > pending; committed.erase(committed.begin())) {
    for (const auto& copy : committed.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}
