// Does the emulation behave as a GPU does, and does it find what it is there to find? `emulation_test NAME` runs one
// case: 0 and no output where the kernel is right; the planted errors end in a sanitizer's report or in the emulation's
// own.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <string>

#include "launch.cuh"

namespace {

using namespace grl_ext;

void expect(bool holds, const char* what) {
  if (!holds) {
    std::printf("not so: %s\n", what);
    std::exit(1);
  }
}

// ---- Right kernels ----

__device__ float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(~0u, x, offset);
  }
  return x;
}

// A block's sum: warps by shuffles, then their sums through shared memory.
__global__ void block_sum(const float* in, float* out, int rounds) {
  __shared__ float sums[32];
  for (int round = 0; round < rounds; ++round) {
    const float sum = warp_sum(in[blockIdx.x * blockDim.x + threadIdx.x]);
    if (threadIdx.x % 32 == 0) {
      sums[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      const float total = warp_sum(threadIdx.x < blockDim.x / 32 ? sums[threadIdx.x] : 0.0f);
      if (threadIdx.x == 0) {
        out[blockIdx.x] = total;
      }
    }
    __syncthreads();
  }
}

void reductions() {
  std::vector<float> in(3 * 256);
  for (std::size_t i = 0; i < in.size(); ++i) {
    in[i] = static_cast<float>(i);
  }
  float out[3];
  const int rounds = 100;
  launch(block_sum, dim3(3), dim3(256), 0, nullptr, in.data(), out, rounds);
  for (int b = 0; b < 3; ++b) {
    expect(out[b] == 256.0f * (256 * b + 127.5f), "the sum of each block");
  }
}

__global__ void shuffles(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out[0 * 32 + lane] = __shfl_sync(~0u, lane, 5);
  out[1 * 32 + lane] = __shfl_sync(~0u, lane, 3, 8);
  out[2 * 32 + lane] = __shfl_down_sync(~0u, lane, 4);
  out[3 * 32 + lane] = __shfl_down_sync(~0u, lane, 1, 8);
  out[4 * 32 + lane] = static_cast<int>(__ballot_sync(~0u, lane % 3 == 0));
  // Two halves of a warp at different places.
  if (lane < 16) {
    out[5 * 32 + lane] = __shfl_xor_sync(0x0000ffffu, lane, 1);
  } else {
    out[5 * 32 + lane] = static_cast<int>(__shfl_sync(0xffff0000u, 2.5 * lane, 20));
  }
}

void shuffle_lanes() {
  int out[6 * 32];
  launch(shuffles, dim3(1), dim3(32), 0, nullptr, out);
  for (int lane = 0; lane < 32; ++lane) {
    expect(out[lane] == 5, "__shfl_sync");
    expect(out[32 + lane] == lane / 8 * 8 + 3, "__shfl_sync within 8 lanes");
    expect(out[64 + lane] == (lane < 28 ? lane + 4 : lane), "__shfl_down_sync, beyond the end the own value");
    expect(out[96 + lane] == (lane % 8 < 7 ? lane + 1 : lane), "__shfl_down_sync within 8 lanes");
    expect(out[128 + lane] == 0x49249249, "__ballot_sync");
    expect(out[160 + lane] == (lane < 16 ? lane ^ 1 : 50), "shuffles of half a warp");
  }
}

// Reverses a block's values through dynamic shared memory, copied there asynchronously in two groups.
__global__ void reverse(const float4* in, float4* out, bool wait) {
  auto* tile = reinterpret_cast<float4*>(dynamic_shared_memory());
  const unsigned n = blockDim.x;
  for (unsigned group = 0; group < 2; ++group) {
    __pipeline_memcpy_async(&tile[group * n + threadIdx.x], &in[group * n + threadIdx.x], 16);
    __pipeline_commit();
  }
  if (wait) {
    __pipeline_wait_prior(1);
    __syncthreads();
    out[threadIdx.x] = tile[n - 1 - threadIdx.x];
    __pipeline_wait_prior(0);
  }
  __syncthreads();
  out[n + threadIdx.x] = tile[2 * n - 1 - threadIdx.x];
}

float reversed_by(std::size_t shared_bytes, bool wait) {
  std::vector<float4> in(2 * 128), out(2 * 128);
  for (int i = 0; i < 256; ++i) {
    in[i] = make_float4(i, i, i, i);
  }
  expect(
      launch(reverse, dim3(1), dim3(128), shared_bytes, nullptr, in.data(), out.data(), wait) == cudaSuccess,
      "launched");
  for (int i = 0; wait && i < 128; ++i) {
    expect(out[i].x == 127 - i && out[128 + i].w == 255 - i, "reversed");
  }
  return out[128].x;
}

void async_copies() {
  reversed_by(2 * 128 * sizeof(float4), true);
  reversed_by(100 << 10, true);  // above the default limit: launch() must ask
  expect(std::isnan(reversed_by(2 * 128 * sizeof(float4), false)), "a copy never waited for has not arrived");
}

// The last block to arrive adds what the others left in global memory.
__global__ void last_block_sums(int* partial, unsigned* arrived, int* total) {
  __shared__ bool last;
  const unsigned blocks = gridDim.x * gridDim.y;
  if (threadIdx.x == 0) {
    const unsigned block = blockIdx.y * gridDim.x + blockIdx.x;
    partial[block] = static_cast<int>(block) + 1;
    __threadfence();
    last = atomicAdd(arrived, 1) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x < blocks) {
    atomicAdd(total, partial[threadIdx.x]);
  }
}

void last_block() {
  int partial[4], total = 0;
  unsigned arrived = 0;
  launch(last_block_sums, dim3(2, 2), dim3(32), 0, nullptr, partial, &arrived, &total);
  expect(arrived == 4 && total == 10, "the sum over blocks");
}

__global__ void nothing() {}

struct Large {
  char bytes[4096];
};

__global__ void large_parameters(Large, char) {}

template <typename T>
__global__ void has_static_memory(T* out) {
  __shared__ T values[64];
  __shared__ int more[2];
  values[threadIdx.x] = T(threadIdx.x);
  more[threadIdx.x % 2] = 0;
  __syncthreads();
  *out = values[threadIdx.x] + T(more[threadIdx.x % 2]);
}

// Past launch(), which asks for all there is.
template <typename T>
cudaError_t without_asking(std::size_t dynamic_bytes) {
  T out;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(1);
  config.dynamicSmemBytes = dynamic_bytes;
  return cudaLaunchKernelEx(&config, has_static_memory<T>, &out);
}

void limits() {
  expect(launch(nothing, dim3(1), dim3(1025), 0, nullptr) == cudaErrorInvalidConfiguration, "1024 threads at most");
  expect(launch(nothing, dim3(0), dim3(32), 0, nullptr) == cudaErrorInvalidConfiguration, "no empty grids");
  expect(
      launch(nothing, dim3(1, 65536), dim3(32), 0, nullptr) == cudaErrorInvalidConfiguration,
      "65535 blocks along y at most");
  expect(
      launch(nothing, dim3(1), dim3(1, 1, 65), 0, nullptr) == cudaErrorInvalidConfiguration,
      "64 threads along z at most");
  expect(
      launch(nothing, dim3(1), dim3(32), 228 << 10, nullptr) == cudaErrorInvalidValue,
      "227 KB of shared memory at most");
  expect(
      launch(large_parameters, dim3(1), dim3(1), 0, nullptr, Large{}, 'a') == cudaErrorInvalidValue,
      "4096 bytes of parameters");
}

// Static shared memory is a part of every limit.
void static_shared_memory() {
  constexpr std::size_t kStatic = 64 * 8 + 16;  // in steps of 16 bytes
  const auto* const kernel = reinterpret_cast<const void*>(&has_static_memory<double>);
  expect(cuda_emulation::static_shared_bytes(kernel) == kStatic, "both arrays of the kernel");
  expect(
      cuda_emulation::static_shared_bytes(reinterpret_cast<const void*>(&has_static_memory<short>)) == 64 * 2 + 16,
      "each instantiation has its own");
  expect(cuda_emulation::static_shared_bytes(reinterpret_cast<const void*>(&nothing)) == 0, "none");

  expect(without_asking<double>((48 << 10) - kStatic) == cudaSuccess, "48 KB in all need no asking");
  expect(without_asking<double>((48 << 10) - kStatic + 1) == cudaErrorInvalidValue, "more need it");
  double out;
  const auto asked = [&](std::size_t bytes) {
    return launch(has_static_memory<double>, dim3(1), dim3(1), bytes, nullptr, &out);
  };
  expect(asked((48 << 10) - kStatic + 1) == cudaSuccess && asked(48 << 10) == cudaSuccess, "launch() asks");
  expect(asked((227 << 10) - kStatic) == cudaSuccess, "up to what the device has");
  expect(asked((227 << 10) - kStatic + 1) == cudaErrorInvalidValue, "and no further");

  // launch() asks once, for all there is: a small launch must not lower it for a large one.
  const auto setting = [&] { return cuda_emulation::dynamic_bytes_asked_for[{cuda_emulation::device.id, kernel}]; };
  expect(setting() == (227 << 10) - kStatic, "the most there is");
  expect(asked(64) == cudaSuccess && setting() == (227 << 10) - kStatic, "a small launch leaves it");
  // And for each device anew.
  cuda_emulation::device = {1, 99 << 10};
  expect(asked((99 << 10) - kStatic) == cudaSuccess && setting() == (99 << 10) - kStatic, "another device");
  expect(asked((99 << 10) - kStatic + 1) == cudaErrorInvalidValue, "that has less");
}

// Sixteen host threads that start a kernel for the first time at once: each finds the setting made.
void many_host_threads() {
  std::vector<std::thread> threads;
  std::vector<cudaError_t> status(16, cudaErrorInvalidValue);
  for (int t = 0; t < 16; ++t) {
    threads.emplace_back(
        [&, t] { status[t] = allow_all_shared_memory(reinterpret_cast<const void*>(&has_static_memory<float>)); });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  expect(std::count(status.begin(), status.end(), cudaSuccess) == 16, "all may launch");
}

// Every half value survives the way through float; between two neighbours the nearer one is taken, the even one at the
// middle.
void half_types() {
  for (unsigned bits = 0; bits < 0x7c00; ++bits) {
    const float low = __half2float({static_cast<uint16_t>(bits)});
    const float high = bits == 0x7bff ? 65536.0f : __half2float({static_cast<uint16_t>(bits + 1)});
    const float middle = (low + high) / 2;
    expect(__float2half_rn(low).bits == bits && __float2half_rn(-low).bits == (bits | 0x8000), "half to float to half");
    expect(__float2half_rn(std::nextafter(middle, low)).bits == bits, "half: rounds down");
    expect(__float2half_rn(std::nextafter(middle, high)).bits == bits + 1, "half: rounds up");
    expect(__float2half_rn(middle).bits == bits + bits % 2, "half: ties to even");
  }
  for (unsigned bits = 0; bits < 0x7f80; ++bits) {
    const float low = __bfloat162float({static_cast<uint16_t>(bits)});
    uint32_t middle_bits = bits << 16 | 0x8000;
    float middle;
    std::memcpy(&middle, &middle_bits, sizeof middle);
    expect(__float2bfloat16_rn(-low).bits == (bits | 0x8000), "bfloat16 to float to bfloat16");
    expect(__float2bfloat16_rn(std::nextafter(middle, 0.0f)).bits == bits, "bfloat16: rounds down");
    expect(__float2bfloat16_rn(std::nextafter(middle, INFINITY)).bits == bits + 1, "bfloat16: rounds up");
    expect(__float2bfloat16_rn(middle).bits == bits + bits % 2, "bfloat16: ties to even");
  }
  expect(std::isinf(__half2float(__float2half_rn(1e6f))), "half: too large is infinite");
  expect(std::isinf(__bfloat162float(__float2bfloat16_rn(INFINITY))), "bfloat16: infinity");
  expect(
      std::isnan(__half2float(__float2half_rn(NAN))) && std::isnan(__bfloat162float(__float2bfloat16_rn(NAN))), "NaN");
}

// ---- Planted errors ----

__global__ void neighbour(int* out, bool sync) {
  __shared__ int values[64];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (sync) {
    __syncthreads();
  }
  out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

// The shuffle brings the lanes together but orders none of their memory.
__global__ void neighbour_lane(int* out, bool sync) {
  __shared__ int values[32];
  values[threadIdx.x] = __shfl_xor_sync(~0u, static_cast<int>(threadIdx.x), 1);
  if (sync) {
    __syncwarp();
  }
  const int value = values[(threadIdx.x + 1) % 32];
  out[threadIdx.x] = __shfl_xor_sync(~0u, value, 1);
}

__global__ void all_blocks_write(int* out) {
  if (threadIdx.x == 0) {
    *out = static_cast<int>(blockIdx.x);
  }
}

__global__ void some_return() {
  if (threadIdx.x >= 40) {
    return;
  }
  __syncthreads();
}

__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void not_in_mask() {
  __ballot_sync(0xffu, 1);
}

__global__ void past_shared() {
  dynamic_shared_memory()[64] = 0;
}

__global__ void misaligned(float4* out) {
  *reinterpret_cast<float4*>(reinterpret_cast<float*>(out) + 1) = make_float4(0, 0, 0, 0);
}

}  // namespace

int main(int, char** argv) {
  int out[64];
  float4 vectors[2];
  const std::map<std::string, std::function<void()>> cases = {
      {"reductions", reductions},
      {"shuffle_lanes", shuffle_lanes},
      {"async_copies", async_copies},
      {"last_block", last_block},
      {"limits", limits},
      {"static_shared_memory", static_shared_memory},
      {"many_host_threads", many_host_threads},
      {"half_types", half_types},
      {"barrier", [&] { launch(neighbour, dim3(1), dim3(64), 0, nullptr, out, true); }},
      {"warp_barrier", [&] { launch(neighbour_lane, dim3(1), dim3(32), 0, nullptr, out, true); }},
      {"missing_barrier", [&] { launch(neighbour, dim3(1), dim3(64), 0, nullptr, out, false); }},
      {"missing_warp_barrier", [&] { launch(neighbour_lane, dim3(1), dim3(32), 0, nullptr, out, false); }},
      {"racing_blocks", [&] { launch(all_blocks_write, dim3(2), dim3(32), 0, nullptr, out); }},
      {"early_return", [] { launch(some_return, dim3(1), dim3(64), 0, nullptr); }},
      {"two_barriers", [] { launch(two_barriers, dim3(1), dim3(64), 0, nullptr); }},
      {"not_in_mask", [] { launch(not_in_mask, dim3(1), dim3(32), 0, nullptr); }},
      {"past_shared", [] { launch(past_shared, dim3(1), dim3(32), 64, nullptr); }},
      {"misaligned", [&] { launch(misaligned, dim3(1), dim3(1), 0, nullptr, vectors); }},
  };
  cases.at(argv[1])();
}
