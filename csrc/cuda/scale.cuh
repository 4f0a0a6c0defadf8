// out = factor * grad on the GPU: the kernels for one gradient and for several, the three forms of the factor, and the
// launches on plain pointers. Knows no ATen, so that tests/cuda_on_cpu runs this text as it is; scale.cu brings the
// tensors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "arithmetic.cuh"
#include "launch.cuh"

namespace grl_ext {

// The forms of the factor. Each thread calls fetch() once. The result's run_from(i) returns an iterator for a run of
// neighbouring elements that begins at element i: next() returns the factor of one element after the other.
// changes_nothing() says whether a gradient would stay as it is.

// A number known to the host.
template <typename A>
struct HostFactor {
  A value;
  __device__ HostFactor fetch() const { return *this; }
  __device__ HostFactor run_from(int64_t) const { return *this; }
  __device__ A next() const { return value; }
  __device__ bool changes_nothing() const { return value == A(1); }
};

// A number that the device holds, times one that the host knows: read there, so that the host never waits for it and a
// replayed CUDA graph sees its changes.
template <typename A, typename Stored>
struct DeviceFactor {
  const Stored* number;
  A multiplier;
  __device__ HostFactor<A> fetch() const { return {multiplier * static_cast<A>(__ldg(number))}; }
};

// A tensor, times a number that the host knows: element i has values[(i / inner) % period]. A run divides once, where
// it begins, and only counts from there on. Index is 32 bits wide where the gradient allows: a 64-bit division costs
// several times as much.
template <typename A, typename Index>
struct BroadcastFactor {
  const A* values;
  A multiplier;
  Index period;
  Index inner;

  struct Run {
    BroadcastFactor factor;
    Index position;
    Index repeat;
    __device__ A next() {
      const A value = factor.multiplier * __ldg(factor.values + position);
      if (++repeat == factor.inner) {
        repeat = 0;
        position = position + 1 == factor.period ? 0 : position + 1;
      }
      return value;
    }
  };

  __device__ BroadcastFactor fetch() const { return *this; }
  __device__ Run run_from(int64_t i) const {
    const Index index = static_cast<Index>(i);
    const Index group = index / inner;
    return {*this, group % period, index - group * inner};
  }
  __device__ bool changes_nothing() const { return false; }
};

// The factor 0 switches the adversary off: zero then, also where the gradient has overflowed.
template <typename T, typename A>
__device__ T scaled_element(T grad, A factor) {
  return Arithmetic<T>::narrow(factor == A(0) ? A(0) : factor * Arithmetic<T>::widen(grad));
}

// The bytes that a thread moves at a time where it can: the widest access there is.
constexpr int kVectorBytes = 16;
template <typename T>
constexpr int kVectorSize = kVectorBytes / sizeof(T);

// How many vectors a thread loads before it stores the first. `out` may be `grad`, so that the compiler cannot move a
// load before a store: with one vector at a time, each load would wait for the store before it. The same for elements
// that are no part of a vector.
constexpr int kVectorsInFlight = 4;

// store(i, load(i)) for i = first, first + step, ... before `end`, with kVectorsInFlight loads before the first store.
// Each is guarded, so that a short run and the rest of a long one have as many in flight.
template <typename Value, typename Load, typename Store>
__device__ void move_in_flight(int64_t first, int64_t end, int64_t step, const Load& load, const Store& store) {
  for (int64_t i = first; i < end; i += kVectorsInFlight * step) {
    Value values[kVectorsInFlight];
#pragma unroll
    for (int k = 0; k < kVectorsInFlight; ++k) {
      if (i + k * step < end) {
        values[k] = load(i + k * step);
      }
    }
#pragma unroll
    for (int k = 0; k < kVectorsInFlight; ++k) {
      if (i + k * step < end) {
        store(i + k * step, values[k]);
      }
    }
  }
}

constexpr int kScaleThreads = 256;
// As many blocks as run at a time, so that none waits for another's end. The kernels take up to 64 registers a thread,
// with which four blocks fit. Their loads in flight, 64 KB a multiprocessor, are several times what hides the memory's
// latency. With eight blocks a thread would have 32 registers and spill. To be tuned with bench/compare.py --device
// cuda.
constexpr int kScaleBlocksPerSm = 4;

// Scales the elements of a vector, each by the next factor of the run.
template <typename T, typename Vector, typename Run>
__device__ Vector scaled_vector(Vector bits, Run run) {
  T elements[sizeof(Vector) / sizeof(T)];
  memcpy(elements, &bits, sizeof(Vector));
#pragma unroll
  for (T& element : elements) {
    element = scaled_element(element, run.next());
  }
  memcpy(&bits, elements, sizeof(Vector));
  return bits;
}

// The widest vector, in bytes and up to kVectorBytes, whose boundaries `a` and `b` reach together: the largest power of
// two that divides their distance.
__device__ inline uintptr_t common_width(const void* a, const void* b) {
  const uintptr_t apart = (reinterpret_cast<uintptr_t>(a) - reinterpret_cast<uintptr_t>(b)) | kVectorBytes;
  return apart & -apart;  // the lowest bit that is set
}

// out[i] = factor_i * grad[i], by `blocks` blocks of which the caller is one; out may be grad.
// A vector is narrower than 16 bytes where out and grad do not reach such a boundary together (a gradient that begins
// inside another tensor). The elements before the first boundary and those after the last are handled one by one, and
// so are all of them where no vector has more than one.
// __ldcg and __stcg are one instruction a vector, past L1, where nothing is read twice. A plain assignment is not: nvcc
// splits it into its elements where it sees them in registers. test_cuda_code.py counts them in the compiled code.
template <typename T, typename Factor>
__device__ void scale_elements(T* out, const T* grad, int64_t n, Factor factor, unsigned block, unsigned blocks) {
  const int64_t thread = static_cast<int64_t>(block) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(blocks) * blockDim.x;

  // Powers of two, with masks for remainders: 64-bit divisions take long.
  const uintptr_t width = common_width(out, grad);
  const auto size = static_cast<int64_t>(width / sizeof(T));
  const auto to_boundary = static_cast<int64_t>((-reinterpret_cast<uintptr_t>(out) & (width - 1)) / sizeof(T));
  const int64_t head = size > 1 && to_boundary < n ? to_boundary : n;
  const int64_t tail = n - ((n - head) & (size - 1));

  const auto move_vectors = [&](auto zero) {
    using Vector = decltype(zero);
    if constexpr (sizeof(Vector) > sizeof(T)) {
      constexpr int kSize = sizeof(Vector) / sizeof(T);
      const auto* const from = reinterpret_cast<const Vector*>(grad + head);
      auto* const to = reinterpret_cast<Vector*>(out + head);
      move_in_flight<Vector>(
          thread, (tail - head) / kSize, threads, [&](int64_t v) { return __ldcg(from + v); },
          [&](int64_t v, Vector bits) { __stcg(to + v, scaled_vector<T>(bits, factor.run_from(head + v * kSize))); });
    }
  };
  if (width == sizeof(uint4)) {
    move_vectors(uint4{});
  } else if (width == sizeof(uint2)) {
    move_vectors(uint2{});
  } else if (width == sizeof(unsigned)) {
    move_vectors(0U);
  }
  const auto outside = [&](int64_t j) { return j < head ? j : j - head + tail; };  // of the vectors
  move_in_flight<T>(
      thread, head + n - tail, threads, [&](int64_t j) { return grad[outside(j)]; },
      [&](int64_t j, T element) {
        const int64_t i = outside(j);
        out[i] = scaled_element(element, factor.run_from(i).next());
      });
}

// Traffic: one read and one write per element (a broadcast factor is small and comes from the cache).
// Launch: one thread per 16 bytes until the multiprocessors are full, then each thread strides over the rest. No shared
// memory, as no element needs another. In place with the factor 1 nothing is read or written.
template <typename T, typename Factor>
__global__ void __launch_bounds__(kScaleThreads, kScaleBlocksPerSm)
    scale_kernel(T* out, const T* grad, int64_t n, Factor form) {
  const auto factor = form.fetch();
  if (out == grad && factor.changes_nothing()) {
    return;
  }
  scale_elements(out, grad, n, factor, blockIdx.x, gridDim.x);
}

// As many blocks as have 16 bytes for every thread, but no more than run at a time.
template <typename T>
int64_t scale_blocks(int64_t n, int sm_count) {
  constexpr int64_t kPerBlock = kScaleThreads * kVectorSize<T>;
  return std::min<int64_t>((n + kPerBlock - 1) / kPerBlock, int64_t{sm_count} * kScaleBlocksPerSm);
}

// `n` counts reals: a complex element is two of them under one factor, for which a broadcast factor has twice the
// inner.
template <typename T, typename Factor>
cudaError_t scale(T* out, const T* grad, int64_t n, Factor factor, int sm_count, cudaStream_t stream) {
  if (n == 0) {
    return cudaSuccess;
  }
  return launch(
      scale_kernel<T, Factor>, dim3(static_cast<unsigned>(scale_blocks<T>(n, sm_count))), dim3(kScaleThreads), 0,
      stream, out, grad, n, factor);
}

// ---------------------------------------------------------------------------------------------------------------------
// Several gradients in place, by one factor
// ---------------------------------------------------------------------------------------------------------------------

// As many as fit into a kernel's arguments, with some room to spare.
constexpr int kGradientsPerLaunch = 128;

template <typename T>
struct GradientList {
  int count;
  unsigned first_block[kGradientsPerLaunch];  // which of the grid's blocks takes the gradient's first elements
  T* grad[kGradientsPerLaunch];
  int64_t n[kGradientsPerLaunch];
};

// Every gradient's elements times the factor. A training step's gradients are one large and several small ones, which
// as launches of their own would cost more time to start than to run. Traffic and inner loops: as scale_kernel. Each
// gradient begins at another block, so that a list of small ones is spread over the grid.
template <typename T, typename Factor>
__global__ void __launch_bounds__(kScaleThreads, kScaleBlocksPerSm)
    scale_list_kernel(const __grid_constant__ GradientList<T> list, Factor form) {
  const auto factor = form.fetch();
  if (factor.changes_nothing()) {
    return;
  }
#pragma unroll 1
  for (int i = 0; i < list.count; ++i) {
    const unsigned first = list.first_block[i];
    const unsigned block = blockIdx.x >= first ? blockIdx.x - first : blockIdx.x + gridDim.x - first;
    scale_elements(list.grad[i], list.grad[i], list.n[i], factor, block, gridDim.x);
  }
}

// grads[i] has sizes[i] reals. One launch for each kGradientsPerLaunch of them.
template <typename T, typename Factor>
cudaError_t scale_list(
    T* const* grads, const int64_t* sizes, int count, Factor factor, int sm_count, cudaStream_t stream) {
  for (int begin = 0; begin < count; begin += kGradientsPerLaunch) {
    GradientList<T> list{};
    list.count = std::min(count - begin, kGradientsPerLaunch);
    int64_t blocks = 0;  // that all of them together would have work for
    for (int i = 0; i < list.count; ++i) {
      list.grad[i] = grads[begin + i];
      list.n[i] = sizes[begin + i];
      blocks += scale_blocks<T>(list.n[i], sm_count);
    }
    const int64_t grid = std::min(blocks, int64_t{sm_count} * kScaleBlocksPerSm);
    if (grid == 0) {
      continue;
    }
    int64_t before = 0;
    for (int i = 0; i < list.count; ++i) {
      list.first_block[i] = static_cast<unsigned>(before % grid);
      before += scale_blocks<T>(list.n[i], sm_count);
    }
    const cudaError_t status = launch(
        scale_list_kernel<T, Factor>, dim3(static_cast<unsigned>(grid)), dim3(kScaleThreads), 0, stream, list, factor);
    if (status != cudaSuccess) {
      return status;
    }
  }
  return cudaSuccess;
}

}  // namespace grl_ext
