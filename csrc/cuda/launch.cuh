// The one way to start a kernel, and the kernel's end of the dynamic shared memory asked for there. No <<<>>> anywhere: these
// are plain function calls, so that the CPU tests (tests/cuda_on_cpu) compile the very same text with a C++ compiler.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

namespace grl_ext {

// Dynamic shared memory that any kernel may use; above it the kernel must be told first.
constexpr std::size_t kDefaultSharedBytes = 48 * 1024;

template <typename... Params, typename... Args>
cudaError_t launch(
    void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t status = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) {
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
