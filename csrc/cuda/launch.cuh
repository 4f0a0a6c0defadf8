// The one way to start a kernel, and the kernel's end of the dynamic shared memory asked for there. No <<<>>> anywhere: these
// are plain function calls, so that the CPU tests (tests/cuda_on_cpu) compile the very same text with a C++ compiler.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <mutex>
#include <set>
#include <utility>

namespace grl_ext {

// Lets the kernel have all the dynamic shared memory that the current device gives a block. Without this a block gets 48 KB, of
// which the kernel's static shared arrays are a part.
// The setting is one per device and kernel, for all host threads. So it is made once and to the most there is: a setting to each
// launch's own size would let one thread lower it between another's setting and launch.
inline cudaError_t allow_all_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> allowed;
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) {
    return status;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({device, kernel}) > 0) {
    return cudaSuccess;
  }
  int most = 0;
  if (const cudaError_t status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      status != cudaSuccess) {
    return status;
  }
  cudaFuncAttributes attributes{};
  if (const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel); status != cudaSuccess) {
    return status;
  }
  const int dynamic = most - static_cast<int>(attributes.sharedSizeBytes);
  if (const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic);
      status != cudaSuccess) {
    return status;
  }
  allowed.insert({device, kernel});
  return cudaSuccess;
}

// On the current device.
template <typename... Params, typename... Args>
cudaError_t launch(
    void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  if (shared_bytes > 0) {
    if (const cudaError_t status = allow_all_shared_memory(reinterpret_cast<const void*>(kernel)); status != cudaSuccess) {
      return status;
    }
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

// The block's dynamic shared memory, aligned for 16-byte accesses.
__device__ inline char* dynamic_shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) char dynamic_shared_bytes[];
  return dynamic_shared_bytes;
#else
  return cuda_emulation::dynamic_shared_memory();
#endif
}

}  // namespace grl_ext
