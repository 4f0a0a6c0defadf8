// The heads on the GPU: which kernels run, one after the other, on plain pointers. Knows no ATen, so that tests/cuda_on_cpu runs
// this text as it is; heads.cu brings the tensors.
//
// Nothing waits for the device, every sum has one fixed order, and all memory is the caller's.
#pragma once

#include "heads_sweep.cuh"

namespace grl_ext {

template <typename T>
struct HeadsInput {
  const T* x;       // (rows, features)
  const T* weight;  // (columns, features)
  const T* bias;    // (columns), or null
  int64_t rows;
  int features;
  int columns;
};

// Null where not needed.
template <typename T>
struct HeadsGradients {
  T* dx;
  T* dw;
  T* db;
};

template <typename A>
struct HeadsLosses {
  A* loss;        // the sum of the heads' losses, each with its weight
  A* head_losses;
};

// Kernels on one stream; after the first that could not start, none.
struct Launches {
  cudaStream_t stream;
  cudaError_t status = cudaSuccess;

  template <typename... Params, typename... Args>
  void operator()(void (*kernel)(Params...), dim3 grid, int threads, std::size_t shared_bytes, Args&&... args) {
    if (status == cudaSuccess) {
      status = launch(kernel, grid, dim3(static_cast<unsigned>(threads)), shared_bytes, stream, std::forward<Args>(args)...);
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The sum of what the blocks left
// ---------------------------------------------------------------------------------------------------------------------

template <typename T>
struct HeadsTotal {
  using A = typename Arithmetic<T>::type;
  // dW and db: `elements` sums over `blocks` of partial[block][element], the first `dw_elements` of them dW's.
  const A* partial;
  int64_t partial_stride;
  int64_t elements;
  int64_t dw_elements;
  T* dw;
  T* db;
  // The heads' losses: sums over `blocks` of losses[block][head]. Null: there are none.
  HeadsLosses<A> out;
  const double* losses;
  int all_heads;
  int blocks;
};

// dW, db and the losses, each the sum of the blocks' parts in their order.
// Traffic: the parts once, which the sweep has just left in the L2 cache. Launch: a warp's lanes are 32 neighbouring elements and
// the block's warps share the parts, so that there are enough loads in flight; block 0 adds the losses first, a warp a head.
template <typename T>
__global__ void __launch_bounds__(kTotalThreads)
    heads_total_kernel(const __grid_constant__ HeadsTotal<T> in, const __grid_constant__ Heads heads) {
  using A = typename Arithmetic<T>::type;
  constexpr int kWarps = kTotalThreads / kWarpSize;
  __shared__ double scratch[kTotalThreads];
  if (in.losses && blockIdx.x == 0) {
    double weighted = 0;
    for (int h = warp_id(); h < heads.count; h += kWarps) {
      double mean = 0;
      for (int b = lane_id(); b < in.blocks; b += kWarpSize) {
        mean += in.losses[int64_t{b} * in.all_heads + heads.first + h];
      }
      mean = over_warp(mean, Sum{});
      if (lane_id() == 0) {
        in.out.head_losses[heads.first + h] = static_cast<A>(mean);
        weighted += heads.loss_weight[h] * mean;
      }
    }
    weighted = sum_over_warps(weighted, scratch);
    if (threadIdx.x == 0) {
      *in.out.loss = static_cast<A>((heads.first == 0 ? 0.0 : static_cast<double>(*in.out.loss)) + weighted);
    }
  }
  for (int64_t first = int64_t{blockIdx.x} * kWarpSize; first < in.elements; first += int64_t{gridDim.x} * kWarpSize) {
    const int64_t element = first + lane_id();
    A sum = 0;
    if (element < in.elements) {
#pragma unroll 4
      for (int b = warp_id(); b < in.blocks; b += kWarps) {
        sum += in.partial[b * in.partial_stride + element];
      }
    }
    const T total = Arithmetic<T>::narrow(static_cast<A>(sum_over_warps(static_cast<double>(sum), scratch)));
    if (warp_id() == 0 && element < in.elements) {
      (element < in.dw_elements ? in.dw[element] : in.db[element - in.dw_elements]) = total;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The steps
// ---------------------------------------------------------------------------------------------------------------------

// Hands out pieces of a workspace; before there is one, only adds up their sizes.
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

// place(workspace) takes its pieces, once to measure and once for good. allocate(bytes) gives memory on the device.
template <typename Allocate, typename Place>
void place_in_workspace(const Allocate& allocate, const Place& place) {
  Workspace measured;
  place(measured);
  Workspace workspace(allocate(std::max<int64_t>(1, measured.bytes())));
  place(workspace);
}

inline dim3 small_grid(int64_t blocks, const HeadsDevice& device) {
  return dim3(static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, int64_t{kSmallBlocksPerSm} * device.sm_count)));
}

template <typename T>
SweepArguments<T> sweep_arguments(Pass pass, const HeadsInput<T>& in, const HeadsGradients<T>& out, const Heads& heads) {
  SweepArguments<T> arguments{};
  arguments.pass = pass;
  arguments.rows = in.rows;
  arguments.features = in.features;
  arguments.columns = in.columns;
  arguments.heads = heads;
  arguments.x = in.x;
  arguments.weight = in.weight;
  arguments.bias = in.bias;
  arguments.dx = out.dx;
  arguments.weight_gradient = out.dw != nullptr;
  arguments.partial_stride = round_up((out.dw ? int64_t{in.columns} * in.features : 0) + in.columns, kPiece);
  return arguments;
}

template <typename T>
HeadsProblem problem_of(const SweepArguments<T>& arguments) {
  using A = typename Arithmetic<T>::type;
  const bool has_loss = arguments.pass == Pass::kLoss || arguments.pass == Pass::kLossOfLogits;
  return {
      arguments.rows, arguments.features, arguments.columns, has_loss ? arguments.heads.count : 0, sizeof(T), sizeof(A),
      arguments.weight_gradient, arguments.pass == Pass::kLogits};
}

template <typename T>
void run_sweep(Launches& launches, const SweepArguments<T>& arguments) {
  const Sweep& sweep = arguments.sweep;
  if (sweep.blocks == 0) {
    return;
  }
  const dim3 grid(static_cast<unsigned>(sweep.blocks), arguments.pass == Pass::kLogits ? 1 : static_cast<unsigned>(sweep.slices));
  const auto shared_bytes = static_cast<std::size_t>(sweep.shared_bytes);
  if constexpr (sizeof(typename Arithmetic<T>::type) < 8) {
    if (sweep.threads == 512) {
      return launches(heads_sweep_kernel<T, 512>, grid, 512, shared_bytes, arguments);
    }
  }
  launches(heads_sweep_kernel<T, 256>, grid, 256, shared_bytes, arguments);
}

template <typename T>
void run_total(
    Launches& launches, const SweepArguments<T>& swept, const HeadsGradients<T>& out,
    HeadsLosses<typename Arithmetic<T>::type> losses, const HeadsDevice& device) {
  HeadsTotal<T> total{};
  total.partial = swept.partial;
  total.partial_stride = swept.partial_stride;
  total.dw_elements = out.dw ? int64_t{swept.columns} * swept.features : 0;
  total.elements = total.dw_elements + (out.db ? swept.columns : 0);
  total.dw = out.dw;
  total.db = out.db;
  total.out = losses;
  total.losses = swept.losses;
  total.all_heads = swept.heads.count;
  total.blocks = swept.sweep.blocks;
  if (total.elements > 0 || total.losses) {
    launches(heads_total_kernel<T>, small_grid(divide_up(total.elements, kWarpSize), device), kTotalThreads, 0, total, swept.heads);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The operators, for up to kMaxSweepColumns columns
// ---------------------------------------------------------------------------------------------------------------------

template <typename T, typename Allocate>
cudaError_t heads_logits(T* logits, const HeadsInput<T>& in, const HeadsDevice& device, cudaStream_t stream, const Allocate& allocate) {
  Heads one{};  // where its columns end is all that the sweep asks
  one.count = 1;
  one.begin[1] = in.columns;
  auto sweep = sweep_arguments(Pass::kLogits, in, HeadsGradients<T>{}, one);
  sweep.sweep = plan_sweep(problem_of(sweep), device);
  sweep.logits = logits;
  if (sweep.sweep.slices > 1) {
    place_in_workspace(allocate, [&](Workspace& w) { sweep.z = w.take<typename Arithmetic<T>::type>(in.rows * in.columns); });
  }
  Launches launches{stream};
  run_sweep(launches, sweep);
  return launches.status;
}

template <typename T, typename Allocate>
cudaError_t heads_gradients(
    const HeadsGradients<T>& out, const T* grad_logits, const HeadsInput<T>& in, const Heads& heads, const HeadsDevice& device,
    cudaStream_t stream, const Allocate& allocate) {
  using A = typename Arithmetic<T>::type;
  auto sweep = sweep_arguments(Pass::kGradients, in, out, heads);
  sweep.sweep = plan_sweep(problem_of(sweep), device);
  sweep.grad_logits = grad_logits;
  if (out.dw || out.db) {
    place_in_workspace(allocate, [&](Workspace& w) { sweep.partial = w.take<A>(sweep.sweep.blocks * sweep.partial_stride); });
  }
  Launches launches{stream};
  run_sweep(launches, sweep);
  run_total(launches, sweep, out, {}, device);
  return launches.status;
}

// `targets` without its counts.
template <typename T, typename Allocate>
cudaError_t heads_cross_entropy(
    T* logits, const HeadsLosses<typename Arithmetic<T>::type>& losses, const HeadsGradients<T>& out, const HeadsInput<T>& in,
    const Heads& heads, Targets targets, const HeadsDevice& device, cudaStream_t stream, const Allocate& allocate) {
  using A = typename Arithmetic<T>::type;
  auto sweep = sweep_arguments(Pass::kLoss, in, out, heads);
  const HeadsPlan plan = plan_heads(problem_of(sweep), device);
  sweep.sweep = plan.gradients;
  sweep.logits = logits;

  int* counts = nullptr;
  place_in_workspace(allocate, [&](Workspace& w) {
    counts = w.take<int>(int64_t{plan.count_blocks} * heads.count);
    sweep.losses = w.take<double>(int64_t{plan.gradients.blocks} * heads.count);
    sweep.partial = out.dw || out.db ? w.take<A>(plan.gradients.blocks * sweep.partial_stride) : nullptr;
    sweep.z = plan.form == HeadsForm::kTwoPasses ? w.take<A>(in.rows * in.columns) : nullptr;
  });

  Launches launches{stream};
  if (plan.count_blocks > 0) {
    launches(heads_count_kernel, dim3(static_cast<unsigned>(plan.count_blocks)), kCountThreads, 0, counts, targets, heads.count);
    targets.counts = counts;
    targets.count_blocks = plan.count_blocks;
  }
  sweep.targets = targets;
  if (plan.form == HeadsForm::kTwoPasses) {
    auto first = sweep;
    first.pass = Pass::kLogits;
    first.sweep = plan.logits;
    first.weight_gradient = false;
    first.dx = nullptr;
    first.partial = nullptr;
    run_sweep(launches, first);
    sweep.pass = Pass::kLossOfLogits;
  }
  run_sweep(launches, sweep);
  run_total(launches, sweep, out, losses, device);
  return launches.status;
}

// ---------------------------------------------------------------------------------------------------------------------
// Between the matrix products, for any number of columns
// ---------------------------------------------------------------------------------------------------------------------

// The losses, g and scaled (each where not null) of logits (rows, columns). `launches_heads` covers all heads, kHeadsPerLaunch at a
// time; `targets` without its counts.
template <typename T, typename HeadsList, typename Allocate>
cudaError_t heads_cross_entropy_of_logits(
    const HeadsLosses<typename Arithmetic<T>::type>& losses, T* g, T* scaled, const T* logits, int columns, const HeadsList& all_heads,
    const Targets& all_targets, const HeadsDevice& device, cudaStream_t stream, const Allocate& allocate) {
  const int64_t rows = all_targets.rows;
  const int heads_count = all_targets.stride;
  const int count_blocks = count_blocks_for(rows * heads_count);
  const dim3 grid = small_grid(divide_up(rows, kCrossEntropyThreads / kWarpSize), device);

  HeadsTotal<T> total{};
  total.out = losses;
  total.all_heads = heads_count;
  total.blocks = rows == 0 ? 0 : static_cast<int>(grid.x);
  int* counts = nullptr;
  double* partial = nullptr;
  place_in_workspace(allocate, [&](Workspace& w) {
    counts = w.take<int>(int64_t{count_blocks} * kHeadsPerLaunch);
    partial = w.take<double>(int64_t{total.blocks} * heads_count);
  });
  total.losses = partial;

  Launches launches{stream};
  for (const Heads& heads : all_heads) {
    auto targets = all_targets;
    targets.classes += heads.first;
    targets.counts = counts;
    targets.count_blocks = count_blocks;
    if (rows > 0) {
      launches(heads_count_kernel, dim3(static_cast<unsigned>(count_blocks)), kCountThreads, 0, counts, targets, heads.count);
      launches(
          heads_cross_entropy_kernel<T>, dim3(grid.x, static_cast<unsigned>(heads.count)), kCrossEntropyThreads, 0, g, scaled,
          partial, logits, columns, heads, targets);
    }
    launches(heads_total_kernel<T>, dim3(1), kTotalThreads, 0, total, heads);
  }
  return launches.status;
}

template <typename T, typename HeadsList>
cudaError_t heads_scale(
    T* scaled, const T* g, int64_t rows, int columns, const HeadsList& all_heads, const HeadsDevice& device, cudaStream_t stream) {
  Launches launches{stream};
  for (const Heads& heads : all_heads) {
    const int head_columns = heads.begin[heads.count] - heads.begin[0];
    const auto grid = small_grid(divide_up(rows * head_columns, int64_t{4} * kCrossEntropyThreads * heads.count), device);
    if (rows > 0) {
      launches(
          heads_scale_kernel<T>, dim3(grid.x, static_cast<unsigned>(heads.count)), kCrossEntropyThreads, 0, scaled, g, rows, columns,
          heads);
    }
  }
  return launches.status;
}

}  // namespace grl_ext
