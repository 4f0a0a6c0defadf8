// What the launches of all heads' kernels need: a stream and its device, and a workspace. Like the launches
// (heads_sweep_launches.cuh, heads_products_launches.cuh) it takes plain pointers and knows no ATen, so that
// tests/cuda_on_cpu runs this text as it is. linear_heads.cu and heads_loss.cu bring the tensors.
//
// Nothing waits for the device, every sum has one fixed order, and all memory is the caller's.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "heads_plan.h"
#include "launch.cuh"

namespace grl_ext {

// The stream that an operator starts its kernels on. After one that could not start, no further one is started.
struct Stream {
  HeadsDevice device;
  cudaStream_t handle;
  cudaError_t status = cudaSuccess;

  template <typename... Params, typename... Args>
  void start(void (*kernel)(Params...), dim3 grid, int threads, std::size_t shared_bytes, Args&&... args) {
    if (status == cudaSuccess) {
      status = launch(
          kernel, grid, dim3(static_cast<unsigned>(threads)), shared_bytes, handle, std::forward<Args>(args)...);
    }
  }
};

// Hands out pieces of a workspace. Without memory it only adds up their sizes.
class Workspace {
 public:
  explicit Workspace(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }

  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

// Calls place(workspace) twice: to add up the pieces it takes, and to hand them out. allocate(bytes) returns memory on
// the device.
template <typename Allocate, typename Place>
void place_in_workspace(Allocate& allocate, const Place& place) {
  Workspace measured;
  place(measured);
  if (measured.bytes() > 0) {
    Workspace workspace(allocate(measured.bytes()));
    place(workspace);
  }
}

inline dim3 small_grid(int64_t blocks, const HeadsDevice& device, int heads = 1) {
  return dim3(
      static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, int64_t{kSmallBlocksPerSm} * device.sm_count)),
      static_cast<unsigned>(heads));
}

}  // namespace grl_ext
