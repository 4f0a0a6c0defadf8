// Memory for a large result.
#pragma once

#include <ATen/ATen.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

namespace grl_ext::cpu {

// From this size on malloc takes fresh memory from the system for every tensor and gives it back with it, and then the first touch
// of its pages, 4 KB at a time, costs more than the arithmetic: on two threads, 134 MB are copied in 9 ms into memory in use, in 29 into fresh memory.
constexpr int64_t kFreshBytes = int64_t{32} << 20;

// Asks for large pages under a tensor that is about to be written as a whole. A hint: where the system has none, nothing changes.
inline at::Tensor in_large_pages(at::Tensor result) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(result.data_ptr()) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(result.data_ptr()) + result.nbytes()) / kPage * kPage;
  if (static_cast<int64_t>(result.nbytes()) >= kFreshBytes && begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return result;
}

}  // namespace grl_ext::cpu
