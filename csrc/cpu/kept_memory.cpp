#include "kept_memory.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <vector>

namespace grl_ext::cpu {
namespace {

constexpr size_t kSmallest = 32 << 20;  // where glibc's malloc stops to adapt its threshold for mapping a block by itself

struct Block {
  void* data;
  size_t bytes;
};

class Keeper {
 public:
  void* take(size_t bytes) {
    {
      // Without waiting: in a forked process the mutex may be locked for ever.
      const std::unique_lock lock(mutex_, std::try_to_lock);
      const auto found = lock ? find(bytes) : waiting_.end();
      if (lock && found != waiting_.end()) {
        void* data = found->data;
        waiting_.erase(found);
        waiting_bytes_ -= bytes;
        return data;
      }
    }
    return c10::alloc_cpu(bytes);
  }

  void give(Block block) {
    std::vector<Block> leaving;
    {
      const std::unique_lock lock(mutex_, std::try_to_lock);
      (lock ? waiting_ : leaving).push_back(block);
      waiting_bytes_ += lock ? block.bytes : 0;
      while (lock && waiting_bytes_ > limit_) {
        leaving.push_back(waiting_.front());
        waiting_bytes_ -= waiting_.front().bytes;
        waiting_.erase(waiting_.begin());
      }
    }
    for (const auto& old : leaving) {
      c10::free_cpu(old.data);
    }
  }

 private:
  std::vector<Block>::iterator find(size_t bytes) {
    return std::find_if(waiting_.begin(), waiting_.end(), [&](const Block& block) { return block.bytes == bytes; });
  }

  static size_t limit() {
    const char* megabytes = std::getenv("GRL_EXT_KEEP_MB");
    return static_cast<size_t>(megabytes ? std::strtoull(megabytes, nullptr, 10) : 256) << 20;
  }

  const size_t limit_ = limit();
  std::mutex mutex_;
  std::vector<Block> waiting_;  // the oldest first
  size_t waiting_bytes_ = 0;
};

Keeper& keeper() {
  static auto& the_one = *new Keeper;  // outlives the tensors that the interpreter frees last
  return the_one;
}

void release(void* context) {
  const auto* block = static_cast<Block*>(context);
  c10::profiledCPUMemoryReporter().Delete(block->data);
  keeper().give(*block);
  delete block;
}

}  // namespace

at::Tensor empty_kept(at::IntArrayRef sizes, at::ScalarType dtype) {
  const size_t bytes = c10::multiply_integers(sizes) * c10::elementSize(dtype);
  if (bytes < kSmallest) {
    return at::empty(sizes, dtype);
  }
  auto* block = new Block{keeper().take(bytes), bytes};
  c10::profiledCPUMemoryReporter().New(block->data, bytes);
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes, at::DataPtr(block->data, block, release, at::kCPU), c10::GetCPUAllocator(),
      /*resizable=*/true);
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(std::move(storage)), c10::DispatchKeySet(c10::DispatchKey::CPU), c10::scalarTypeToTypeMeta(dtype));
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return tensor;
}

}  // namespace grl_ext::cpu
