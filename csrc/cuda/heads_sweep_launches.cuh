// The heads' operators by sweeps, for up to kMaxSweepColumns columns: which kernels run, one after the other.
#pragma once

#include <algorithm>

#include "heads_stream.cuh"
#include "heads_sweep.cuh"
#include "heads_total.cuh"

namespace grl_ext {

// Whether any head has this gradient to write.
template <typename T>
bool any_needs(const Heads<T>& heads, T* Head<T>::* gradient) {
  return std::any_of(heads.head, heads.head + heads.count, [&](const Head<T>& head) { return head.*gradient; });
}

// Sets where each head's target and sample weight lie in a row of the sweep's tiles. Returns the bytes of a row.
template <typename T>
int place_targets(Heads<T>& heads) {
  int at = 0;
  for (Head<T>* head = heads.head; head != heads.head + heads.count; ++head) {
    head->target_at = static_cast<uint16_t>(at);
    at += head->target_bytes();
    head->weight_at = static_cast<uint16_t>(at);
    at += head->sample_weight ? head->weights_of_row() * static_cast<int>(sizeof(*head->sample_weight)) : 0;
  }
  return at;
}

template <typename T>
HeadsProblem problem_of(const HeadsCall<T>& call) {
  HeadsProblem problem{};
  problem.rows = call.rows;
  problem.features = call.features;
  problem.columns = call.columns;
  problem.element_bytes = sizeof(T);
  problem.arithmetic_bytes = sizeof(typename Arithmetic<T>::type);
  problem.weight_gradient = any_needs(call.heads, &Head<T>::grad_weight);
  return problem;
}

// A mean divides by the rows' weights. Other weights reach the gradients as they are, and for a sum all do.
template <typename T>
bool has_weights_of_any_range(const Heads<T>& heads, bool mean) {
  return std::any_of(heads.head, heads.head + heads.count, [&](const Head<T>& head) {
    const bool of_classes = head.class_weight && !(mean && head.kind == TargetKind::kClasses);
    return of_classes || (head.sample_weight && !mean);
  });
}

template <typename T>
HeadsProblem problem_with_loss(const HeadsCall<T>& call, bool mean) {
  auto problem = problem_of(call);
  auto heads = call.heads;
  problem.target_bytes = place_targets(heads);
  problem.rows_to_count = mean ? call.rows * heads.count : 0;
  problem.any_range = std::is_same_v<T, __half> && has_weights_of_any_range(heads, mean);
  return problem;
}

template <typename T>
SweepArguments<T> sweep_arguments(Pass pass, const HeadsCall<T>& call, const Sweep& sweep) {
  SweepArguments<T> arguments{};
  static_cast<HeadsCall<T>&>(arguments) = call;
  arguments.pass = pass;
  arguments.sweep = sweep;
  for (int h = 0; h < call.heads.count; ++h) {
    const Head<T>& head = call.heads.head[h];
    if (head.grad_weight) {
      arguments.weight_columns |= (~0u >> (32 - head.size())) << head.begin;
    }
    arguments.sums.widest = std::max(arguments.sums.widest, head.size());
    arguments.sums.softmax |= head.kind == TargetKind::kClasses || head.kind == TargetKind::kProbabilities;
    arguments.sums.mass |= head.kind == TargetKind::kProbabilities ||
        (head.kind == TargetKind::kClasses && head.class_weight);
  }
  const int64_t weights = arguments.weight_columns ? int64_t{call.columns} * call.features : 0;
  arguments.partial_stride = round_up(weights + call.columns, kPiece);
  return arguments;
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

// Memory for what each block adds up, where a parameter's gradient is needed.
template <typename T>
typename Arithmetic<T>::type* take_partial(Workspace& workspace, const SweepArguments<T>& sweep) {
  const bool needed = any_needs(sweep.heads, &Head<T>::grad_weight) || any_needs(sweep.heads, &Head<T>::grad_bias);
  return needed ? workspace.take<typename Arithmetic<T>::type>(sweep.sweep.blocks * sweep.partial_stride) : nullptr;
}

template <bool kWithLoss, typename T>
void run_sweep(Stream& stream, const SweepArguments<T>& arguments) {
  const Sweep& sweep = arguments.sweep;
  if (sweep.blocks == 0) {
    return;
  }
  const dim3 grid(
      static_cast<unsigned>(sweep.blocks), arguments.pass == Pass::kLogits ? 1 : static_cast<unsigned>(sweep.slices));
  const auto shared_bytes = static_cast<std::size_t>(sweep.shared_bytes);
  const auto start = [&](auto kernel) { stream.start(kernel, grid, sweep.threads, shared_bytes, arguments); };
  if constexpr (sizeof(T) == 2) {
    if (sweep.matrix_groups > 0) {
      return start(
          sweep.matrix_groups == 1       ? heads_sweep_kernel<T, MatrixTile<T, 1>, kWithLoss>
              : sweep.matrix_groups == 2 ? heads_sweep_kernel<T, MatrixTile<T, 2>, kWithLoss>
                                         : heads_sweep_kernel<T, MatrixTile<T, 4>, kWithLoss>);
    }
  }
  if constexpr (sizeof(typename Arithmetic<T>::type) < 8) {
    if (sweep.threads == 512) {
      return start(heads_sweep_kernel<T, LaneTile<T, 512>, kWithLoss>);
    }
  }
  start(heads_sweep_kernel<T, LaneTile<T, 256>, kWithLoss>);
}

template <bool kWithLoss, typename T>
void run_total(
    Stream& stream, const SweepArguments<T>& swept, const LossOutputs<typename Arithmetic<T>::type>& outputs) {
  HeadsTotal<T> total{};
  total.partial = swept.partial;
  total.partial_stride = swept.partial_stride;
  total.features = swept.features;
  total.weight_elements = swept.weight_columns ? int64_t{swept.columns} * swept.features : 0;
  total.losses = swept.losses;
  total.out = outputs;
  total.all_heads = swept.heads.count;
  total.blocks = swept.sweep.blocks;
  total.heads = swept.heads;
  int64_t runs = 0;
  for (int h = 0; h < total.heads.count; ++h) {
    runs += total.weight_runs(h) + total.bias_runs(h);
  }
  if (runs > 0 || kWithLoss) {
    stream.start(heads_total_kernel<T, kWithLoss>, small_grid(runs, stream.device), kTotalThreads, 0, total);
  }
}

template <typename T, typename Allocate>
void heads_logits(const HeadsCall<T>& call, Stream& stream, Allocate allocate) {
  const Sweep plan = plan_any_sweep(logits_problem(problem_of(call)), stream.device);
  auto sweep = logits_pass(sweep_arguments(Pass::kLogits, call, plan), plan);
  place_in_workspace(allocate, [&](Workspace& w) {
    sweep.z = plan.slices > 1 ? w.take<typename Arithmetic<T>::type>(call.rows * call.columns) : nullptr;
  });
  run_sweep<false>(stream, sweep);
}

template <typename T, typename Allocate>
void heads_gradients(const HeadsCall<T>& call, Stream& stream, Allocate allocate) {
  auto sweep = sweep_arguments(Pass::kGradients, call, plan_any_sweep(problem_of(call), stream.device));
  place_in_workspace(allocate, [&](Workspace& w) { sweep.partial = take_partial(w, sweep); });
  run_sweep<false>(stream, sweep);
  run_total<false>(stream, sweep, {});
}

// `plan` is that of the call, and not kProducts.
template <typename T, typename Allocate>
void heads_loss(
    const HeadsCall<T>& call, const HeadsPlan& plan, bool mean,
    const LossOutputs<typename Arithmetic<T>::type>& outputs, Stream& stream, Allocate allocate) {
  auto sweep = sweep_arguments(Pass::kLoss, call, plan.gradients);
  place_targets(sweep.heads);
  double* parts = nullptr;
  place_in_workspace(allocate, [&](Workspace& w) {
    parts = w.take<double>(int64_t{plan.norm_blocks} * call.heads.count);
    sweep.losses = w.take<double>(int64_t{plan.gradients.blocks} * call.heads.count);
    sweep.partial = take_partial(w, sweep);
    sweep.z = plan.form == HeadsForm::kTwoPasses ? w.take<typename Arithmetic<T>::type>(call.rows * call.columns)
                                                 : nullptr;
  });
  sweep.norms.mean = mean;
  if (plan.norm_blocks > 0) {
    stream.start(
        heads_norm_kernel<T>, dim3(static_cast<unsigned>(plan.norm_blocks)), kNormThreads, 0, parts, call.rows,
        sweep.heads);
    sweep.norms.parts = parts;
    sweep.norms.blocks = plan.norm_blocks;
  }
  if (plan.form == HeadsForm::kTwoPasses) {
    run_sweep<true>(stream, logits_pass(sweep, plan.logits));
    sweep.pass = Pass::kLossOfLogits;
  }
  run_sweep<true>(stream, sweep);
  run_total<true>(stream, sweep, outputs);
}

}  // namespace grl_ext
