// The machine that cuda_emulation.h runs kernels on: fibres for the threads of a block, barriers, and exchanges among
// the lanes of a warp, with the order that ThreadSanitizer may see in them.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

#include "cuda_types.h"
#include "device_limits.h"
#include "elsewhere.h"

namespace cuda_emulation {

constexpr unsigned kWarpSize = 32;
constexpr std::size_t kStackBytes = 64 << 10;

// The machine's own state is not the kernel's: ThreadSanitizer must not check it, nor see order in it, and for the
// others it would only be slow.
#define CUDA_EMULATION_UNSEEN __attribute__((no_sanitize("thread"), no_sanitize("address"), no_sanitize("undefined")))

#ifdef __SANITIZE_THREAD__
constexpr std::size_t kMaxGridThreads = 8000;  // it knows 8128 at a time
constexpr bool kFibrePerThread = true;
inline void* tsan_create() {
  return __tsan_create_fiber(0);
}
inline void* tsan_current() {
  return __tsan_get_current_fiber();
}
inline void tsan_switch(void* fibre) {
  __tsan_switch_to_fiber(fibre, __tsan_switch_to_fiber_no_sync);
}
inline void tsan_destroy(void* fibre) {
  __tsan_destroy_fiber(fibre);
}
inline void tsan_release(void* clock) {
  __tsan_release(clock);
}
inline void tsan_acquire(void* clock) {
  __tsan_acquire(clock);
}
#else
constexpr std::size_t kMaxGridThreads = SIZE_MAX;
constexpr bool kFibrePerThread = false;
inline void* tsan_create() {
  return nullptr;
}
inline void* tsan_current() {
  return nullptr;
}
inline void tsan_switch(void*) {}
inline void tsan_destroy(void*) {}
inline void tsan_release(void*) {}
inline void tsan_acquire(void*) {}
#endif

// What ThreadSanitizer hangs an order on: an address of its own.
using Clock = uint64_t;
inline Clock grid_clock;  // everything in a grid comes before what the host does next
inline Clock fence_clock;  // __threadfence

// The call that a thread waits in.
struct Site {
  const char* call = nullptr;
  const char* file = nullptr;
  int line = 0;
};

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
};

// Where a fibre goes on: what __builtin_setjmp saves.
struct Resume {
  void* words[5];
};

// What each lane of a warp sent.
struct Lanes {
  uint64_t of[kWarpSize];
};

struct Thread {
  dim3 index;
  void* tsan = nullptr;
  bool returned = false;
  Site waits;  // no call: it can run,
  Resume* resume;  // from here

  Thread* warp;  // lane 0 of the warp; the others follow it
  unsigned lane;
  unsigned lanes;  // that the warp has
  unsigned mask = 0;  // of the lanes waited for
  uint64_t sent;  // to them
  Lanes* received;  // from them
  Clock warp_clock = 0;  // the warp's, in its lane 0

  std::vector<Copy> open_copies;
  std::vector<std::vector<Copy>> committed_copies;
};

struct Block {
  Block(const cudaLaunchConfig_t& config, const std::function<void()>& kernel, dim3 index)
      : config(config), kernel(kernel), index(index), count(config.blockDim.x * config.blockDim.y * config.blockDim.z),
        threads(new Thread[count]), shared(new char[config.dynamicSmemBytes]) {
    std::memset(shared.get(), 0xff, config.dynamicSmemBytes);
    const dim3 size = config.blockDim;
    for (unsigned t = 0; t < count; ++t) {
      Thread& thread = threads[t];
      thread.index = {t % size.x, t / size.x % size.y, t / size.x / size.y};
      thread.lane = t % kWarpSize;
      thread.warp = &thread - thread.lane;
      thread.lanes = std::min(kWarpSize, count - (t - thread.lane));
    }
  }

  const cudaLaunchConfig_t& config;
  const std::function<void()>& kernel;
  const dim3 index;
  const unsigned count;
  const std::unique_ptr<Thread[]> threads;
  const std::unique_ptr<char[]> shared;
  Resume* scheduler;
  void* scheduler_tsan;
  unsigned begun = 0;
  unsigned at_barrier = 0;
  Clock clock = 0;
};

inline thread_local Block* this_block;
inline thread_local Thread* this_thread;

template <typename... Args>
[[noreturn]] void fail(const char* format, Args... args) {
  std::fputs("cuda_emulation: ", stderr);
  if (this_block) {
    std::fprintf(stderr, "block (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z);
  }
  std::fprintf(stderr, format, args...);
  std::fputc('\n', stderr);
  std::abort();
}

// The stacks of a block's threads. The next block takes them again: new pages are dear. Not under ThreadSanitizer, to
// which what two blocks wrote to the same address is a race.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() { release(); }

  char* of(unsigned threads) {
    const std::size_t bytes = threads * kStackBytes;
    if (kFibrePerThread || bytes > bytes_) {
      release();
      void* const memory = mmap(
          nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) {
        fail("no memory for the stacks of %u threads", threads);
      }
      stacks_ = static_cast<char*>(memory);
      bytes_ = bytes;
    }
    return stacks_;
  }

 private:
  void release() {
    if (stacks_) {
      munmap(stacks_, bytes_);
    }
  }

  char* stacks_ = nullptr;
  std::size_t bytes_ = 0;
};

// A stack as if nobody had used it.
inline char* fresh(char* stack) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack, kStackBytes);  // its last user left by a jump
#endif
  return stack;
}

// noipa: the compiler must not learn that jump never returns, or AddressSanitizer forgets all about the stack that it
// leaves.
#define CUDA_EMULATION_SWITCH CUDA_EMULATION_UNSEEN __attribute__((noipa))

// Goes on where `to` was saved.
CUDA_EMULATION_SWITCH inline void jump(Resume* to, void* tsan_to) {
  tsan_switch(tsan_to);
  __builtin_longjmp(to->words, 1);
}

// Goes on where `to` was saved; returns when somebody goes on at `from`. swapcontext would do, but it calls the system
// at every switch, and AddressSanitizer's own version of it forgets all it knows about a stack.
CUDA_EMULATION_SWITCH inline void switch_to(Resume*& from, Resume* to, void* tsan_to) {
  Resume here;
  from = &here;
  if (__builtin_setjmp(here.words) == 0) {
    jump(to, tsan_to);
  }
}

// The same, to a fibre that has not begun.
CUDA_EMULATION_SWITCH inline void begin_fibre(Resume*& from, ucontext_t& fibre, void* tsan_to) {
  Resume here;
  from = &here;
  if (__builtin_setjmp(here.words) == 0) {
    tsan_switch(tsan_to);
    setcontext(&fibre);
  }
}

CUDA_EMULATION_UNSEEN inline void become(Thread& thread) {
  this_thread = &thread;
  threadIdx = thread.index;
}

CUDA_EMULATION_UNSEEN inline void suspend() {
  switch_to(this_thread->resume, this_block->scheduler, this_block->scheduler_tsan);
}

// A fibre: runs the block's next thread, and when that has returned the one after it. So a kernel without barriers
// needs a single fibre, except under ThreadSanitizer.
CUDA_EMULATION_UNSEEN inline void fibre_main() {
  Block& block = *this_block;
  do {
    become(block.threads[block.begun++]);
    block.kernel();
    this_thread->returned = true;
  } while (!kFibrePerThread && block.begun < block.count);
  tsan_release(&grid_clock);
  jump(block.scheduler, block.scheduler_tsan);
}

CUDA_EMULATION_UNSEEN inline void report_deadlock() {
  std::map<std::pair<int, const char*>, std::vector<const Thread*>> waiting;
  unsigned returned = 0;
  for (unsigned t = 0; t < this_block->count; ++t) {
    const Thread& thread = this_block->threads[t];
    returned += thread.returned;
    if (!thread.returned) {
      waiting[{thread.waits.line, thread.waits.call}].push_back(&thread);
    }
  }
  for (const auto& [key, group] : waiting) {
    const Thread& first = *group.front();
    std::fprintf(
        stderr, "cuda_emulation: %zu threads, the first (%u, %u, %u), wait at %s, %s:%d\n", group.size(), first.index.x,
        first.index.y, first.index.z, first.waits.call, first.waits.file, first.waits.line);
  }
  fail("deadlock: the threads above wait for others in vain; %u of %u have returned", returned, this_block->count);
}

CUDA_EMULATION_UNSEEN inline void run(Block& block, Stacks& stacks) {
  this_block = &block;
  blockIdx = block.index;
  blockDim = block.config.blockDim;
  gridDim = block.config.gridDim;
  block.scheduler_tsan = tsan_current();

  for (char* stack = stacks.of(block.count); block.begun < block.count; stack += kStackBytes) {
    Thread& thread = block.threads[block.begun];
    thread.tsan = tsan_create();
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fresh(stack);
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, fibre_main, 0);
    begin_fibre(block.scheduler, context, thread.tsan);
  }

  bool all_returned = false;
  for (bool progress = true; progress && !all_returned;) {
    progress = false;
    all_returned = true;
    for (unsigned t = 0; t < block.count; ++t) {
      Thread& thread = block.threads[t];
      if (!thread.returned && !thread.waits.call) {
        progress = true;
        become(thread);
        switch_to(block.scheduler, thread.resume, thread.tsan);
      }
      all_returned &= thread.returned;
    }
  }
  if (!all_returned) {
    report_deadlock();
  }
}

inline cudaError_t run_grid(
    const cudaLaunchConfig_t& config, const void* function, const std::vector<char>& parameters,
    const std::function<void()>& kernel) {
  const dim3 grid = config.gridDim;
  const dim3 size = config.blockDim;
  const std::size_t count = std::size_t{size.x} * size.y * size.z;
  if (count == 0 || count > kMaxThreads || size.z > kMaxBlockZ || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) {
    return cudaErrorInvalidConfiguration;
  }
  if (parameters.size() > kMaxParameterBytes || !may_have(function, config.dynamicSmemBytes)) {
    return cudaErrorInvalidValue;
  }
  ++launches;
  if (only_judge) {
    return cudaSuccess;
  }
  if (cuda_emulation_run_elsewhere) {
    return run_elsewhere(config, function, parameters);
  }
  const std::size_t block_count = std::size_t{grid.x} * grid.y * grid.z;
  if (block_count * count > kMaxGridThreads) {
    fail("a grid of %zu threads, of which ThreadSanitizer can tell %zu apart", block_count * count, kMaxGridThreads);
  }
  // All blocks live until the grid has ended: what one freed and the next got again, memory or ThreadSanitizer's name
  // of a fibre, would be taken for the same.
  std::vector<std::unique_ptr<Block>> blocks;
  static thread_local Stacks stacks;  // of who launches, not of the block's own thread
  for (auto b = static_cast<unsigned>(block_count); b-- > 0;) {
    blocks.push_back(
        std::make_unique<Block>(config, kernel, dim3{b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y}));
    std::thread([&, &of = stacks] { run(*blocks.back(), of); }).join();
  }
  tsan_acquire(&grid_clock);
  for (const auto& block : blocks) {
    for (unsigned t = 0; t < block->count; ++t) {
      tsan_destroy(block->threads[t].tsan);
    }
  }
  return cudaSuccess;
}

inline char* dynamic_shared_memory() {
  return this_block->shared.get();
}

// All that `count` threads from `first` on did, of those in the mask, comes before all that any of them does next.
CUDA_EMULATION_UNSEEN inline void order_memory(Thread* first, unsigned count, unsigned mask, Clock& clock) {
  for (const auto step : {tsan_release, tsan_acquire}) {
    for (unsigned t = 0; t < count; ++t) {
      if (mask >> first[t].lane & 1) {
        tsan_switch(first[t].tsan);
        step(&clock);
      }
    }
  }
  tsan_switch(this_thread->tsan);
}

CUDA_EMULATION_UNSEEN inline void check_together(const Thread& thread) {
  const Site& a = thread.waits;
  const Site& b = this_thread->waits;
  if (a.line != b.line || (a.call != b.call && std::strcmp(a.call, b.call) != 0)) {
    fail("threads meet in different calls: %s, %s:%d and %s, %s:%d", a.call, a.file, a.line, b.call, b.file, b.line);
  }
}

CUDA_EMULATION_UNSEEN inline void sync_block(Site site) {
  Block& block = *this_block;
  this_thread->waits = site;
  if (++block.at_barrier < block.count) {
    suspend();
    return;
  }
  for (unsigned t = 0; t < block.count; ++t) {
    check_together(block.threads[t]);
  }
  for (unsigned t = 0; t < block.count; ++t) {
    block.threads[t].waits = Site{};
  }
  block.at_barrier = 0;
  order_memory(block.threads.get(), block.count, ~0u, block.clock);
}

// Gives every lane of the mask what each of them sent; all ones, which is NaN, for the lanes outside. All warp
// operations stand on it; a matrix product takes a few exchanges. One of them orders memory.
CUDA_EMULATION_UNSEEN inline Lanes exchange(unsigned mask, uint64_t value, Site site, bool orders = false) {
  Thread& self = *this_thread;
  Thread* warp = self.warp;
  if (!(mask >> self.lane & 1) || (self.lanes < kWarpSize && mask >> self.lanes)) {
    fail(
        "lane %u of %u calls %s with the mask %#x, %s:%d", self.lane, self.lanes, site.call, mask, site.file,
        site.line);
  }
  self.waits = site;
  self.mask = mask;
  self.sent = value;
  Lanes received;
  self.received = &received;
  for (unsigned lane = 0; lane < self.lanes; ++lane) {
    if ((mask >> lane & 1) && warp[lane].mask != mask) {
      suspend();
      return received;
    }
  }
  for (unsigned from = 0; from < kWarpSize; ++from) {
    received.of[from] = mask >> from & 1 ? warp[from].sent : ~uint64_t{0};
  }
  for (unsigned lane = 0; lane < self.lanes; ++lane) {
    if (mask >> lane & 1) {
      check_together(warp[lane]);
      *warp[lane].received = received;
    }
  }
  for (unsigned lane = 0; lane < self.lanes; ++lane) {
    if (mask >> lane & 1) {
      warp[lane].waits = Site{};
      warp[lane].mask = 0;
    }
  }
  if (orders) {
    order_memory(warp, self.lanes, mask, warp->warp_clock);
  }
  return received;
}

// How many lanes have been given a number by another: a count of a kernel's work, for tests.
inline std::atomic<std::size_t> shuffled_lanes{0};

// The value that `source` holds; the own one where that lane is not among those that may be asked.
template <typename T>
T shuffle(unsigned mask, T value, unsigned source, bool may_ask, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  shuffled_lanes.fetch_add(1, std::memory_order_relaxed);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, site).of[may_ask ? source : this_thread->lane];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_emulation
