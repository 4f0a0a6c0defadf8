// The heads' operators on plain pointers: which kernels run, one after the other. Knows no ATen, so that tests/cuda_on_cpu runs
// this text as it is; linear_heads.cu and heads_loss.cu bring the tensors.
//
// Nothing waits for the device, every sum has one fixed order, and all memory is the caller's.
#pragma once

#include "heads_products.cuh"
#include "heads_sweep.cuh"
#include "heads_total.cuh"

namespace grl_ext {

// Starts kernels on one stream. After one that could not start, no further one is started.
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

// Calls place(workspace) twice: to add up the pieces it takes, and to hand them out. allocate(bytes) returns memory on the device.
template <typename Allocate, typename Place>
void place_in_workspace(const Allocate& allocate, const Place& place) {
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

// The device and the stream that kernels are started on.
struct HeadsQueue {
  HeadsDevice device;
  cudaStream_t stream;
};

// ---------------------------------------------------------------------------------------------------------------------
// By sweeps, for up to kMaxSweepColumns columns
// ---------------------------------------------------------------------------------------------------------------------

// The arguments of an operator. The description of each head says where its parameters, targets and results are.
template <typename T>
struct HeadsCall {
  const T* x;  // (rows, features)
  T* dx;  // (rows, features), or null
  int64_t rows;
  int features;
  int columns;
  Heads<T> heads;

  bool any_weight_gradient() const {
    return std::any_of(heads.head, heads.head + heads.count, [](const Head<T>& head) { return head.grad_weight; });
  }
  bool any_parameter_gradient() const {
    return any_weight_gradient() ||
        std::any_of(heads.head, heads.head + heads.count, [](const Head<T>& head) { return head.grad_bias; });
  }
};

// Sets where each head's target and sample weight lie in a row of the sweep's tiles. Returns the bytes of a row.
template <typename T>
int place_targets(Heads<T>& heads) {
  int at = 0;
  for (Head<T>* head = heads.head; head != heads.head + heads.count; ++head) {
    head->target_at = static_cast<uint16_t>(at);
    at += head->target_bytes();
    head->weight_at = static_cast<uint16_t>(at);
    at += head->sample_weight ? static_cast<int>(sizeof(*head->sample_weight)) : 0;
  }
  return at;
}

// HeadsProblem::rows_to_count: what must be read before the norms are known.
template <typename T>
int64_t rows_to_count(const Heads<T>& heads, int64_t rows, bool mean) {
  return mean ? rows * heads.count : 0;
}

template <typename T>
HeadsProblem problem_of(const HeadsCall<T>& call) {
  using A = typename Arithmetic<T>::type;
  HeadsProblem problem{};
  problem.rows = call.rows;
  problem.features = call.features;
  problem.columns = call.columns;
  problem.element_bytes = sizeof(T);
  problem.arithmetic_bytes = sizeof(A);
  problem.weight_gradient = call.any_weight_gradient();
  return problem;
}

template <typename T>
HeadsProblem problem_with_loss(const HeadsCall<T>& call, bool mean) {
  auto problem = problem_of(call);
  auto heads = call.heads;
  problem.target_bytes = place_targets(heads);
  problem.rows_to_count = rows_to_count(call.heads, call.rows, mean);
  return problem;
}

template <typename T>
SweepArguments<T> sweep_arguments(Pass pass, const HeadsCall<T>& call) {
  SweepArguments<T> arguments{};
  arguments.pass = pass;
  arguments.rows = call.rows;
  arguments.features = call.features;
  arguments.columns = call.columns;
  arguments.x = call.x;
  arguments.dx = call.dx;
  arguments.heads = call.heads;
  for (int h = 0; h < call.heads.count; ++h) {
    const Head<T>& head = call.heads.head[h];
    if (head.grad_weight) {
      arguments.weight_columns |= (~0u >> (32 - head.size())) << head.begin;
    }
    arguments.sums.softmax |= head.kind == TargetKind::kClasses || head.kind == TargetKind::kProbabilities;
    arguments.sums.mass |= head.kind == TargetKind::kProbabilities || (head.kind == TargetKind::kClasses && head.class_weight);
  }
  const int64_t weights = arguments.weight_columns ? int64_t{call.columns} * call.features : 0;
  arguments.partial_stride = round_up(weights + call.columns, kPiece);
  return arguments;
}

template <bool kWithLoss, typename T>
void run_sweep(Launches& launches, const SweepArguments<T>& arguments) {
  const Sweep& sweep = arguments.sweep;
  if (sweep.blocks == 0) {
    return;
  }
  const dim3 grid(static_cast<unsigned>(sweep.blocks), arguments.pass == Pass::kLogits ? 1 : static_cast<unsigned>(sweep.slices));
  const auto shared_bytes = static_cast<std::size_t>(sweep.shared_bytes);
  if constexpr (sizeof(typename Arithmetic<T>::type) < 8) {
    if (sweep.threads == 512) {
      return launches(heads_sweep_kernel<T, 512, kWithLoss>, grid, 512, shared_bytes, arguments);
    }
  }
  launches(heads_sweep_kernel<T, 256, kWithLoss>, grid, 256, shared_bytes, arguments);
}

template <bool kWithLoss, typename T>
void run_total(
    Launches& launches, const SweepArguments<T>& swept, HeadsLosses<typename Arithmetic<T>::type> losses,
    const HeadsDevice& device) {
  HeadsTotal<T> total{};
  total.partial = swept.partial;
  total.partial_stride = swept.partial_stride;
  total.features = swept.features;
  total.weight_elements = swept.weight_columns ? int64_t{swept.columns} * swept.features : 0;
  total.losses = swept.losses;
  total.out = losses;
  total.all_heads = swept.heads.count;
  total.blocks = swept.sweep.blocks;
  total.heads = swept.heads;
  int64_t runs = 0;
  for (int h = 0; h < total.heads.count; ++h) {
    runs += total.weight_runs(h) + total.bias_runs(h);
  }
  if (runs > 0 || kWithLoss) {
    launches(heads_total_kernel<T, kWithLoss>, small_grid(runs, device), kTotalThreads, 0, total);
  }
}

// The same sweep as a pass that computes logits only.
template <typename T>
SweepArguments<T> logits_pass(SweepArguments<T> arguments, const Sweep& sweep) {
  arguments.pass = Pass::kLogits;
  arguments.sweep = sweep;
  arguments.weight_columns = 0;
  arguments.dx = nullptr;
  arguments.partial = nullptr;
  return arguments;
}

template <typename T, typename Allocate>
cudaError_t heads_logits(const HeadsCall<T>& call, const HeadsQueue& queue, const Allocate& allocate) {
  auto sweep = logits_pass(sweep_arguments(Pass::kLogits, call), plan_sweep(logits_problem(problem_of(call)), queue.device));
  place_in_workspace(allocate, [&](Workspace& w) {
    sweep.z = sweep.sweep.slices > 1 ? w.take<typename Arithmetic<T>::type>(call.rows * call.columns) : nullptr;
  });
  Launches launches{queue.stream};
  run_sweep<false>(launches, sweep);
  return launches.status;
}

template <typename T, typename Allocate>
cudaError_t heads_gradients(const HeadsCall<T>& call, const HeadsQueue& queue, const Allocate& allocate) {
  using A = typename Arithmetic<T>::type;
  auto sweep = sweep_arguments(Pass::kGradients, call);
  sweep.sweep = plan_sweep(problem_of(call), queue.device);
  place_in_workspace(allocate, [&](Workspace& w) {
    sweep.partial = call.any_parameter_gradient() ? w.take<A>(sweep.sweep.blocks * sweep.partial_stride) : nullptr;
  });
  Launches launches{queue.stream};
  run_sweep<false>(launches, sweep);
  run_total<false>(launches, sweep, {}, queue.device);
  return launches.status;
}

// For problems that plan_heads does not give to products.
template <typename T, typename Allocate>
cudaError_t heads_loss(
    const HeadsCall<T>& call, bool mean, const HeadsLosses<typename Arithmetic<T>::type>& losses, const HeadsQueue& queue,
    const Allocate& allocate) {
  using A = typename Arithmetic<T>::type;
  auto sweep = sweep_arguments(Pass::kLoss, call);
  place_targets(sweep.heads);
  const HeadsPlan plan = plan_heads(problem_with_loss(call, mean), queue.device);
  sweep.sweep = plan.gradients;
  double* parts = nullptr;
  place_in_workspace(allocate, [&](Workspace& w) {
    parts = w.take<double>(int64_t{plan.norm_blocks} * call.heads.count);
    sweep.losses = w.take<double>(int64_t{plan.gradients.blocks} * call.heads.count);
    sweep.partial = call.any_parameter_gradient() ? w.take<A>(plan.gradients.blocks * sweep.partial_stride) : nullptr;
    sweep.z = plan.form == HeadsForm::kTwoPasses ? w.take<A>(call.rows * call.columns) : nullptr;
  });

  Launches launches{queue.stream};
  sweep.norms.mean = mean;
  if (plan.norm_blocks > 0) {
    launches(heads_norm_kernel<T>, dim3(static_cast<unsigned>(plan.norm_blocks)), kNormThreads, 0, parts, call.rows, sweep.heads);
    sweep.norms.parts = parts;
    sweep.norms.blocks = plan.norm_blocks;
  }
  if (plan.form == HeadsForm::kTwoPasses) {
    run_sweep<true>(launches, logits_pass(sweep, plan.logits));
    sweep.pass = Pass::kLossOfLogits;
  }
  run_sweep<true>(launches, sweep);
  run_total<true>(launches, sweep, losses, queue.device);
  return launches.status;
}

// ---------------------------------------------------------------------------------------------------------------------
// Between matrix products, for any number of columns. `all_heads` holds all heads, kHeadsPerLaunch at a time.
// ---------------------------------------------------------------------------------------------------------------------

// The buffers that the products read and write: weight (pitch, features), bias (pitch), z, g and scaled (rows, pitch). Null: not
// needed.
template <typename T>
struct Products {
  int64_t rows;
  int features;
  int columns;
  int pitch;
  T* weight;
  T* bias;
  T* z;
  T* g;
  T* scaled;
};

// A thread for every four elements.
inline dim3 grid_of_elements(int64_t elements, int heads, const HeadsDevice& device) {
  return small_grid(divide_up(elements, int64_t{4} * kProductThreads), device, heads);
}

template <typename T, typename HeadsList>
cudaError_t gather_weights(const Products<T>& in, const HeadsList& all_heads, const HeadsQueue& queue) {
  Launches launches{queue.stream};
  for (const Heads<T>& heads : all_heads) {
    launches(
        heads_gather_weights_kernel<T>,
        grid_of_elements(int64_t{in.pitch} * in.features / heads.count + 1, heads.count, queue.device), kProductThreads, 0,
        in.weight, in.bias, in.features, in.columns, in.pitch, heads);
  }
  return launches.status;
}

template <typename T, typename HeadsList>
cudaError_t silence_weights(const Products<T>& in, const HeadsList& all_heads, const HeadsQueue& queue) {
  Launches launches{queue.stream};
  for (const Heads<T>& heads : all_heads) {
    launches(
        heads_silence_kernel<T>, grid_of_elements(int64_t{in.pitch} * in.features / heads.count + 1, heads.count, queue.device),
        kProductThreads, 0, in.weight, in.features, heads);
  }
  return launches.status;
}

template <typename T, typename HeadsList>
cudaError_t split_logits(const Products<T>& in, const HeadsList& all_heads, const HeadsQueue& queue) {
  Launches launches{queue.stream};
  for (const Heads<T>& heads : all_heads) {
    if (in.rows > 0) {
      launches(
          heads_split_logits_kernel<T>, grid_of_elements(in.rows * in.pitch / heads.count + 1, heads.count, queue.device),
          kProductThreads, 0, in.z, in.rows, in.pitch, heads);
    }
  }
  return launches.status;
}

template <typename T, typename HeadsList>
cudaError_t gather_gradients(const Products<T>& in, const HeadsList& all_heads, const HeadsQueue& queue) {
  Launches launches{queue.stream};
  for (const Heads<T>& heads : all_heads) {
    if (in.rows > 0) {
      launches(
          heads_gather_gradients_kernel<T>, grid_of_elements(in.rows * in.pitch / heads.count + 1, heads.count, queue.device),
          kProductThreads, 0, in.g, in.scaled, in.rows, in.columns, in.pitch, heads);
    }
  }
  return launches.status;
}

// Computes the heads' logits and losses, g and scaled from z.
template <typename T, typename HeadsList, typename Allocate>
cudaError_t heads_loss_of_products(
    const Products<T>& in, const HeadsList& all_heads, int heads_count, bool mean,
    const HeadsLosses<typename Arithmetic<T>::type>& losses, const HeadsQueue& queue, const Allocate& allocate) {
  const int norm_blocks = mean ? norm_blocks_for(in.rows * heads_count) : 0;
  const dim3 grid = grid_of_elements(in.rows * in.pitch / heads_count + 1, 1, queue.device);
  const int blocks = in.rows == 0 ? 0 : static_cast<int>(grid.x);
  double* parts = nullptr;
  double* partial = nullptr;
  place_in_workspace(allocate, [&](Workspace& w) {
    parts = w.take<double>(int64_t{norm_blocks} * kHeadsPerLaunch);
    partial = w.take<double>(int64_t{blocks} * heads_count);
  });

  Launches launches{queue.stream};
  for (const Heads<T>& heads : all_heads) {
    if (blocks > 0) {
      if (norm_blocks > 0) {
        launches(heads_norm_kernel<T>, dim3(static_cast<unsigned>(norm_blocks)), kNormThreads, 0, parts, in.rows, heads);
      }
      launches(
          heads_loss_kernel<T>, dim3(grid.x, static_cast<unsigned>(heads.count)), kProductThreads, 0, in.g, in.scaled, partial,
          in.z, in.rows, in.columns, in.pitch, heads_count, Norms{mean, parts, norm_blocks}, heads);
    }
    HeadsTotal<T> total{};
    total.losses = partial;
    total.out = losses;
    total.all_heads = heads_count;
    total.blocks = blocks;
    total.heads = heads;
    for (Head<T>* head = total.heads.head; head != total.heads.head + heads.count; ++head) {
      head->grad_weight = head->grad_bias = nullptr;  // the products make those
    }
    launches(heads_total_kernel<T, true>, dim3(1), kTotalThreads, 0, total);
  }
  return launches.status;
}

}  // namespace grl_ext
