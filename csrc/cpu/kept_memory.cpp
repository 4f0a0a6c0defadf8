#include "kept_memory.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/safe_numerics.h>

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

namespace grl_ext::cpu {
namespace {

constexpr uint64_t kSmallest = 32 << 20;  // where glibc's malloc stops to adapt its threshold for mapping a block by itself

// A block begins with its size; the tensor's data follow, aligned as torch wants them. So the data's address says it all, which makes
// the storage an ordinary one: PyTorch's lazy clones want the pointer to be its own context.
constexpr size_t kHeader = 64;

void* data_of(void* block) {
  return static_cast<char*>(block) + kHeader;
}

void* block_of(void* data) {
  return static_cast<char*>(data) - kHeader;
}

uint64_t size_of(const void* block) {
  uint64_t bytes;
  std::memcpy(&bytes, block, sizeof(bytes));
  return bytes;
}

uint64_t limit_in_bytes() {
  const char* wanted = std::getenv("GRL_EXT_KEEP_MB");
  if (wanted == nullptr) {
    return uint64_t{256} << 20;
  }
  uint32_t megabytes = 0;
  const char* end = wanted + std::strlen(wanted);
  const auto [stopped, error] = std::from_chars(wanted, end, megabytes);
  TORCH_CHECK_VALUE(
      error == std::errc() && stopped == end, "GRL_EXT_KEEP_MB must be a whole number of megabytes, got '", wanted, "'");
  return uint64_t{megabytes} << 20;
}

// Blocks that wait. Nobody waits for the mutex: in a forked process it may be locked for ever, and without it there is malloc.
class Keeper {
 public:
  void* take(uint64_t bytes) {
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
      for (auto block = waiting_.begin(); block != waiting_.end(); ++block) {
        if (size_of(*block) == bytes) {
          void* found = *block;
          remove(block);
          return found;
        }
      }
    }
    void* block = allocate(bytes + kHeader);
    std::memcpy(block, &bytes, sizeof(bytes));
    return block;
  }

  void give(void* block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    const auto bytes = size_of(block);
    if (!lock || bytes > limit_) {
      c10::free_cpu(block);
      return;
    }
    waiting_.push_back(block);
    waiting_bytes_ += bytes;
    while (waiting_bytes_ > limit_) {
      c10::free_cpu(remove(waiting_.begin()));
    }
  }

 private:
  void* allocate(uint64_t bytes) {
    try {
      return c10::alloc_cpu(bytes);
    } catch (const c10::Error&) {
      clear();  // what waits may be what is missing
      return c10::alloc_cpu(bytes);
    }
  }

  void clear() {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    while (lock && !waiting_.empty()) {
      c10::free_cpu(remove(waiting_.begin()));
    }
  }

  void* remove(std::vector<void*>::iterator at) {
    void* block = *at;
    waiting_bytes_ -= size_of(block);
    waiting_.erase(at);
    return block;
  }

  const uint64_t limit_ = limit_in_bytes();
  std::mutex mutex_;
  std::vector<void*> waiting_;  // the oldest first
  uint64_t waiting_bytes_ = 0;
};

Keeper& keeper() {
  static auto& the_one = *new Keeper;  // outlives the tensors that the interpreter frees last
  return the_one;
}

void release(void* data) {
  c10::profiledCPUMemoryReporter().Delete(data);
  keeper().give(block_of(data));
}

}  // namespace

at::Tensor empty_kept(at::IntArrayRef sizes, at::ScalarType dtype) {
  uint64_t bytes = 0;
  const bool overflows = c10::safe_multiplies_u64(sizes, &bytes) || c10::mul_overflows(bytes, c10::elementSize(dtype), &bytes);
  if (overflows || bytes < kSmallest) {
    return at::empty(sizes, dtype);  // which says what is wrong with such sizes
  }
  void* data = data_of(keeper().take(bytes));
  c10::profiledCPUMemoryReporter().New(data, bytes);
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes, at::DataPtr(data, data, release, at::kCPU), c10::GetCPUAllocator(),
      /*resizable=*/true);
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(std::move(storage)), c10::DispatchKeySet(c10::DispatchKey::CPU), c10::scalarTypeToTypeMeta(dtype));
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return tensor;
}

}  // namespace grl_ext::cpu
