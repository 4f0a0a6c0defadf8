// The heads' operators by sweeps, for up to kMaxSweepColumns columns: which kernels run, one after the other.
#pragma once

#include <algorithm>

#include "heads_queue.cuh"
#include "heads_sweep.cuh"
#include "heads_total.cuh"

namespace grl_ext {

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
    arguments.sums.mass |= head.kind == TargetKind::kProbabilities ||
        (head.kind == TargetKind::kClasses && head.class_weight);
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
  const dim3 grid(
      static_cast<unsigned>(sweep.blocks), arguments.pass == Pass::kLogits ? 1 : static_cast<unsigned>(sweep.slices));
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
  auto sweep = logits_pass(
      sweep_arguments(Pass::kLogits, call), plan_sweep(logits_problem(problem_of(call)), queue.device));
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
    const HeadsCall<T>& call, bool mean, const HeadsLosses<typename Arithmetic<T>::type>& losses,
    const HeadsQueue& queue, const Allocate& allocate) {
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
    launches(
        heads_norm_kernel<T>, dim3(static_cast<unsigned>(plan.norm_blocks)), kNormThreads, 0, parts, call.rows,
        sweep.heads);
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

}  // namespace grl_ext
