// launch(), the only way to start a kernel here, and dynamic_shared_memory(), by which the kernel gets the memory asked
// for there. These are plain function calls and no <<<>>>, so that the tests in tests/cuda_on_cpu compile the same text
// with a C++ compiler.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <mutex>
#include <set>
#include <utility>

namespace grl_ext {

// Allows the kernel all the dynamic shared memory that the current device can give a block. Without this a block gets
// 48 KB, of which the kernel's static shared arrays are a part. All host threads share the setting of a device and
// kernel. So it is set once, to the largest size. If each launch set its own size, one thread could lower it between
// another thread's setting and launch.
// What a multiprocessor has is divided between shared memory and cache. It is all asked for, because the driver's own
// choice looks at one block, and the plans count on two.
inline cudaError_t allow_all_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> allowed;
  cudaError_t status = cudaSuccess;
  const auto succeeds = [&status](cudaError_t result) {
    status = result;
    return result == cudaSuccess;
  };
  int device = 0;
  if (!succeeds(cudaGetDevice(&device))) {
    return status;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  int most = 0;
  cudaFuncAttributes attributes{};
  if (allowed.count({device, kernel}) == 0 &&
      succeeds(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) &&
      succeeds(cudaFuncGetAttributes(&attributes, kernel)) &&
      succeeds(cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most - static_cast<int>(attributes.sharedSizeBytes))) &&
      succeeds(cudaFuncSetAttribute(
          kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared))) {
    allowed.insert({device, kernel});
  }
  return status;
}

// On the current device.
template <typename... Params, typename... Args>
cudaError_t launch(
    void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  if (shared_bytes > 0) {
    if (const cudaError_t status = allow_all_shared_memory(reinterpret_cast<const void*>(kernel));
        status != cudaSuccess) {
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
