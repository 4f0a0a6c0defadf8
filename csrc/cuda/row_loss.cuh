// The loss of a row of one head, and its gradient for the row's logits z:
//
//   cross entropy   u[c] = class_weight[c] ((1 - smoothing) y[c] + smoothing / classes), with y the target class or
//                   probabilities;   mass = sum_c u[c]
//                   loss = sum_c u[c] (log sum_k exp z[k] - z[c]),       dz[c] = mass softmax(z)[c] - u[c]
//   squared error   loss = sum_c (z[c] - value[c])^2,                    dz[c] = 2 (z[c] - value[c])
//   binary          loss = sum_c y[c] log(1 + exp(-z[c])) + (1 - y[c]) log(1 + exp(z[c])),
//                                                                        dz[c] = 1 / (1 + exp(-z[c])) - y[c]
//
// A class of which nothing is wanted has u 0, whatever its weight, and adds 0 to the loss, whatever its logit.
// A head of one column is binary, the softmax over 0 and z. A row counts with its sample weight. It is not valid where
// that is 0 or its target is ignore_index: it has no loss and no gradient then, even where its logits or targets are
// NaN. The last two sum a loss of each output, which may have a weight of its own in place of the row's.
#pragma once

#include "heads_norm.cuh"

namespace grl_ext {

// What a head's loss needs in each of its rows. For a sum over the rows `norm` is 1.
template <typename T>
struct RowLoss {
  using A = typename Arithmetic<T>::type;
  TargetKind kind;
  bool binary;
  bool mass_is_one;  // in every row
  int classes;
  int64_t ignore_index;
  const A* class_weight;
  A smoothing_per_class;  // smoothing / classes: what every class gets
  A one_minus_smoothing;  // what the target class gets on top
  A share;  // of a row of weight 1 in the total loss: loss_weight / norm
  double norm;

  __device__ bool by_output() const { return kind == TargetKind::kValues || kind == TargetKind::kIndicators; }
};

template <typename T>
__device__ RowLoss<T> row_loss(const Head<T>& head, double norm) {
  using A = typename Arithmetic<T>::type;
  RowLoss<T> loss;
  loss.kind = head.kind;
  loss.binary = head.binary();
  loss.mass_is_one = head.kind == TargetKind::kClasses && !head.class_weight;
  loss.classes = head.classes();
  loss.ignore_index = head.ignore_index;
  loss.class_weight = head.class_weight;
  loss.smoothing_per_class = static_cast<A>(head.smoothing / head.classes());
  loss.one_minus_smoothing = static_cast<A>(1 - head.smoothing);
  loss.share = norm == 0 ? A(0) : static_cast<A>(head.weight_in_loss() / norm);
  loss.norm = norm;
  return loss;
}

// A row's target and weight.
template <typename T>
struct RowTarget {
  using A = typename Arithmetic<T>::type;
  bool exists = true;  // for check_target after all rows; until then one that does not exist is wanted nowhere
  bool valid = false;
  A weight = 0;
  int target_class = 0;
  const A* dense = nullptr;  // probabilities or values

  RowTarget() = default;

  // `target` is the row's own, `weight` its sample weight.
  __device__ RowTarget(const RowLoss<T>& head, const void* target, A weight)
      : valid(weight != 0 && head.norm != 0), weight(weight), dense(static_cast<const A*>(target)) {
    if (head.kind == TargetKind::kClasses) {
      const int64_t label = *static_cast<const int64_t*>(target);
      valid = valid && label != head.ignore_index;
      exists = !valid || (label >= 0 && label < head.classes);
      target_class = static_cast<int>(label);
    }
  }

  // u[c]
  __device__ A wanted(const RowLoss<T>& head, int c) const {
    A y = target_class == c;
    if (head.kind == TargetKind::kProbabilities) {
      y = !head.binary ? dense[c] : c == 1 ? dense[0] : 1 - dense[0];
    }
    const A u = head.smoothing_per_class + head.one_minus_smoothing * y;
    return head.class_weight && u != 0 ? __ldg(head.class_weight + c) * u : u;
  }
};

// The loss of one output, for the kinds with a loss for each, and its gradient.
template <typename A>
__device__ A loss_of_output(A& dz, A z, A target, TargetKind kind) {
  if (kind == TargetKind::kValues) {
    const A error = z - target;
    dz = 2 * error;
    return error * error;
  }
  // A side that is not wanted adds nothing, though z be infinite.
  const A e = exp(z <= 0 ? z : -z), log_sum = log1p(e);
  dz = (z <= 0 ? e : A(1)) / (1 + e) - target;
  const A of_one = (z <= 0 ? -z : A(0)) + log_sum, of_zero = (z <= 0 ? A(0) : z) + log_sum;
  return (target == 0 ? A(0) : target * of_one) + (target == 1 ? A(0) : (1 - target) * of_zero);
}

// A class's part of the loss.
template <typename A>
__device__ A class_loss(A u, A minus_log_probability) {
  return u == 0 ? A(0) : u * minus_log_probability;
}

// ---------------------------------------------------------------------------------------------------------------------
// Columns on lanes
// ---------------------------------------------------------------------------------------------------------------------

// Every lane gets op over lanes [first, end), which are those of its head. No head has more than `widest` lanes.
template <typename A, typename Op>
__device__ A over_head(A x, int first, int end, int widest, Op op) {
#pragma unroll 1
  for (int distance = 1; distance < widest; distance *= 2) {
    const A other = __shfl_down_sync(kWholeWarp, x, distance);
    x = lane_id() + distance < end ? op(x, other) : x;  // now over [lane, lane + 2 distance)
  }
  return __shfl_sync(kWholeWarp, x, first);
}

// Which sums over a head's lanes are needed by any head of the launch, and the most lanes that one has.
struct SumsNeeded {
  bool softmax;
  bool mass;
  int widest;
};

// The gradient of the row's part in the total loss, for the lane's logit z. Each lane adds its column's part of the
// row's loss to `loss`. A lane without a column counts as a head of its own.
template <typename T, typename A = typename Arithmetic<T>::type>
__device__ A loss_of_lane(
    double& loss, A z, const RowLoss<T>& head, const RowTarget<T>& row, bool exists, int first_lane, int end_lane,
    SumsNeeded needed) {
  const int column = lane_id() - first_lane;
  const bool valid = exists && row.valid;
  const bool wants = valid && !head.by_output();
  // A binary head's u[0]: its logit 0 has no lane. Computed twice, for want of a register.
  const auto other_u = [&] { return wants && head.binary ? row.wanted(head, 0) : A(0); };
  A u = 0, top = 0, e = 0, sum = 1, mass = 1;
  if (needed.softmax) {
    u = wants ? row.wanted(head, head.binary ? 1 : column) : A(0);
    top = over_head(head.binary ? Maximum{}(z, A(0)) : z, first_lane, end_lane, needed.widest, Maximum{});
    e = exp(z - top);
    sum = over_head(head.binary ? e + exp(-top) : e, first_lane, end_lane, needed.widest, Sum{});
    mass = needed.mass ? over_head(u + other_u(), first_lane, end_lane, needed.widest, Sum{}) : A(1);
  }
  if (!valid) {
    return 0;
  }
  A part, dz;
  if (head.by_output()) {
    part = loss_of_output(dz, z, row.dense[column], head.kind);
  } else {
    const A log_sum = log(sum);
    part = class_loss(u, log_sum - (z - top)) + class_loss(other_u(), log_sum + top);
    dz = (head.mass_is_one ? A(1) : mass) * (e / sum) - u;
  }
  loss += static_cast<double>(row.weight) * static_cast<double>(part);
  return row.weight * head.share * dz;
}

}  // namespace grl_ext
