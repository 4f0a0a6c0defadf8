// Runs CUDA kernels on the CPU, one fibre per CUDA thread, so that their logic can be tested under sanitizers without a GPU.
//
// Put tests/cuda_on_cpu/include first on the include path. The headers there have the names of the toolkit's (cuda_runtime.h,
// cuda_fp16.h, ...) and lead here, so that a .cuh of csrc/cuda compiles unchanged with g++ (C++17 or later, -pthread). It must
// - launch through launch() and reach its dynamic shared memory through dynamic_shared_memory(), both in launch.cuh;
// - align shared arrays with __align__: __shared__ __align__(16) float tile[32];
// - use no more of CUDA than this file provides: what a new kernel needs is added here.
// A test is a program that launches the kernel on ordinary host memory and exits with 0, named in tests/test_cuda_on_cpu.py.
//
// What is found that a GPU may let pass:
// - AddressSanitizer: accesses outside global buffers and outside the dynamic shared memory that was asked for.
// - UndefinedBehaviorSanitizer: misaligned vector accesses, indices outside static shared arrays.
// - ThreadSanitizer: races between the threads of a block (a missing __syncthreads or __syncwarp) and between blocks. Each CUDA
//   thread is a thread of its own to it, ordered with others by barriers and __threadfence only: a shuffle orders no memory.
//   The fibres run one at a time and in a fixed order, so what it reports does not depend on luck. 8000 threads a grid at most.
// - Here: threads that wait for one that has returned or waits elsewhere (the message lists the places), lanes outside the mask
//   they name, misaligned asynchronous copies.
// - Launches that a device refuses (device_limits.h): threads, grid, parameters, static and dynamic shared memory together. Not
//   registers, of which only the compiler knows: tests/test_cuda_code.py looks at those.
// - Dynamic shared memory begins as NaN. The target of an asynchronous copy is NaN until the copy has been waited for.
//
// What differs from a GPU: blocks run one after another, the last one first, so that they cannot wait for each other; there is no
// timing and there are no streams; every lane that a mask names must arrive, at the same line, or the block hangs (and says so).
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

#include "device_limits.h"

// ---- The language -----------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local  // each block has an operating system's thread to itself, which its fibres share

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::exp;
using std::log;
using std::max;
using std::min;

template <typename T>
struct alignas(2 * sizeof(T)) EmulatedVector2 {
  T x, y;
};

template <typename T>
struct alignas(16) EmulatedVector4 {
  T x, y, z, w;
};

using float2 = EmulatedVector2<float>;
using double2 = EmulatedVector2<double>;
using int2 = EmulatedVector2<int>;
using uint2 = EmulatedVector2<unsigned>;
using float4 = EmulatedVector4<float>;
using int4 = EmulatedVector4<int>;
using uint4 = EmulatedVector4<unsigned>;

inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

// ---- The runtime's types ----------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
using cudaStream_t = void*;

struct cudaFuncAttributes {
  std::size_t sharedSizeBytes;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// ---- The machine ------------------------------------------------------------------------------------------------------------

namespace cuda_emulation {

constexpr unsigned kWarpSize = 32;
constexpr std::size_t kStackBytes = 256 << 10;

// The machine's own state is not the kernel's: ThreadSanitizer must not check it, nor see order in it.
#define CUDA_EMULATION_UNSEEN __attribute__((no_sanitize("thread")))

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
inline Clock grid_clock;   // everything in a grid comes before what the host does next
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
  Site waits;           // no call: it can run,
  Resume* resume;       // from here

  Thread* warp;  // lane 0 of the warp; the others follow it
  unsigned lane;
  unsigned lanes;        // that the warp has
  unsigned mask = 0;     // of the lanes waited for
  uint64_t sent;         // to them
  Lanes* received;       // from them
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

// noipa: the compiler must not learn that jump never returns, or AddressSanitizer forgets all about the stack that it leaves.
#define CUDA_EMULATION_SWITCH CUDA_EMULATION_UNSEEN __attribute__((noipa, no_sanitize("address")))

// Goes on where `to` was saved.
CUDA_EMULATION_SWITCH inline void jump(Resume* to, void* tsan_to) {
  tsan_switch(tsan_to);
  __builtin_longjmp(to->words, 1);
}

// Goes on where `to` was saved; returns when somebody goes on at `from`. swapcontext would do, but it calls the system at every
// switch, and AddressSanitizer's own version of it forgets all it knows about a stack.
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

// A fibre: runs the block's next thread, and when that has returned the one after it. So a kernel without barriers needs a single
// fibre, except under ThreadSanitizer.
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

CUDA_EMULATION_UNSEEN inline void run(Block& block) {
  this_block = &block;
  blockIdx = block.index;
  blockDim = block.config.blockDim;
  gridDim = block.config.gridDim;
  block.scheduler_tsan = tsan_current();

  const std::size_t stack_bytes = block.count * kStackBytes;
  auto* stacks = static_cast<char*>(
      mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) {
    fail("no memory for the stacks of %u threads", block.count);
  }
  for (char* stack = stacks; block.begun < block.count; stack += kStackBytes) {
    Thread& thread = block.threads[block.begun];
    thread.tsan = tsan_create();
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
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
  munmap(stacks, stack_bytes);
}

inline cudaError_t run_grid(
    const cudaLaunchConfig_t& config, const void* function, std::size_t parameter_bytes, const std::function<void()>& kernel) {
  const dim3 grid = config.gridDim;
  const dim3 size = config.blockDim;
  const std::size_t count = std::size_t{size.x} * size.y * size.z;
  if (count == 0 || count > kMaxThreads || size.z > kMaxBlockZ || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > kMaxGridX ||
      grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) {
    return cudaErrorInvalidConfiguration;
  }
  if (parameter_bytes > kMaxParameterBytes || !may_have(function, config.dynamicSmemBytes)) {
    return cudaErrorInvalidValue;
  }
  ++launches;
  if (only_judge) {
    return cudaSuccess;
  }
  const std::size_t block_count = std::size_t{grid.x} * grid.y * grid.z;
  if (block_count * count > kMaxGridThreads) {
    fail("a grid of %zu threads, of which ThreadSanitizer can tell %zu apart", block_count * count, kMaxGridThreads);
  }
  // All blocks live until the grid has ended: what one freed and the next got again, memory or ThreadSanitizer's name of a fibre,
  // would be taken for the same.
  std::vector<std::unique_ptr<Block>> blocks;
  for (auto b = static_cast<unsigned>(block_count); b-- > 0;) {
    blocks.push_back(std::make_unique<Block>(config, kernel, dim3{b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y}));
    std::thread([&] { run(*blocks.back()); }).join();
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
  if (a.line != b.line || std::strcmp(a.call, b.call) != 0) {
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

// Gives every lane of the mask what each of them sent; all ones, which is NaN, for the lanes outside. All warp operations stand on
// it, also those still to be emulated: the fragments of a matrix product take a few exchanges. One of them orders memory.
CUDA_EMULATION_UNSEEN inline Lanes exchange(unsigned mask, uint64_t value, Site site, bool orders = false) {
  Thread& self = *this_thread;
  Thread* warp = self.warp;
  if (!(mask >> self.lane & 1) || (self.lanes < kWarpSize && mask >> self.lanes)) {
    fail("lane %u of %u calls %s with the mask %#x, %s:%d", self.lane, self.lanes, site.call, mask, site.file, site.line);
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
  for (unsigned to = 0; to < self.lanes; ++to) {
    if (mask >> to & 1) {
      check_together(warp[to]);
      for (unsigned from = 0; from < kWarpSize; ++from) {
        warp[to].received->of[from] = mask >> from & 1 ? warp[from].sent : ~uint64_t{0};
      }
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

// The value that `source` holds; the own one where that lane is not among those that may be asked.
template <typename T>
T shuffle(unsigned mask, T value, unsigned source, bool may_ask, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, site).of[may_ask ? source : this_thread->lane];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_emulation

// ---- The runtime ------------------------------------------------------------------------------------------------------------

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

inline cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int bytes) {
  if (!cuda_emulation::may_ask_for(function, bytes)) {
    return cudaErrorInvalidValue;
  }
  cuda_emulation::dynamic_bytes_asked_for[{cuda_emulation::device.id, function}] = bytes;
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const std::tuple<Params...> parameters(std::forward<Args>(args)...);
  constexpr std::size_t kParameterBytes = (std::size_t{0} + ... + ((sizeof(Params) + 7) / 8 * 8));
  return cuda_emulation::run_grid(
      *config, reinterpret_cast<const void*>(kernel), kParameterBytes, [&] { std::apply(kernel, parameters); });
}

// ---- Threads together -------------------------------------------------------------------------------------------------------

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

// ---- Memory -----------------------------------------------------------------------------------------------------------------

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
    cuda_emulation::fail("an asynchronous copy of %zu bytes from %p to %p: 4, 8 or 16, both ends aligned to it", bytes, from, to);
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

// ---- Half types -------------------------------------------------------------------------------------------------------------

struct __half {
  uint16_t bits;
};

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31;
  const int fraction = x.bits & 1023;
  const float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                                         : std::ldexp(float(exponent ? 1024 + fraction : fraction), std::max(exponent, 1) - 25);
  return std::copysign(magnitude, x.bits & 0x8000 ? -1.0f : 1.0f);
}

// A half is a count of its binade's unit; a count that rounds up to the next binade carries into the exponent by itself.
inline __half __float2half_rn(float x) {
  const unsigned sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) {
    return {0x7fff};
  }
  if (std::fabs(x) >= 65536) {
    return {uint16_t(sign | 0x7c00)};
  }
  const int exponent = x == 0 ? -14 : std::max(std::ilogb(x), -14);
  const auto count = unsigned(std::nearbyint(std::ldexp(std::fabs(x), 10 - exponent)));
  return {uint16_t(sign | (((exponent + 14) << 10) + count))};
}

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return {uint16_t(std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

using __half2 = EmulatedVector2<__half>;
using __nv_bfloat162 = EmulatedVector2<__nv_bfloat16>;

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int __ffs(int x) {
  return __builtin_ffs(x);
}

inline float2 __half22float2(__half2 v) {
  return {__half2float(v.x), __half2float(v.y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) {
  return {__bfloat162float(v.x), __bfloat162float(v.y)};
}
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
