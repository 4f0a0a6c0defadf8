#include "empty.h"

#include <ATen/EmptyTensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace grl_ext::cpu {
namespace {

// glibc's malloc takes a block above this size from the system, and gives it back as soon as it is free: its pages are new each time,
// and what the system was told about them goes with them.
constexpr size_t kPagesOfItsOwn = size_t{32} << 20;

// The system fills a page with zeros when it is first touched. Page by page of 4 kB that takes longer than the heads' arithmetic.
void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only a hint: where it fails the pages stay small
#endif
}

}  // namespace

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  return in_huge_pages(at::detail::empty_cpu(sizes, dtype));
}

at::Tensor in_huge_pages(at::Tensor fresh) {
  if (fresh.nbytes() > kPagesOfItsOwn) {
    ask_for_huge_pages(fresh.mutable_data_ptr(), fresh.nbytes());
  }
  return fresh;
}

}  // namespace grl_ext::cpu
