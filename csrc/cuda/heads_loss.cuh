// The loss of a row of one head, and its gradient for the row's logits z:
//
//   cross entropy   u[c] = class_weight[c] ((1 - smoothing) y[c] + smoothing / classes), with y the target class or
//                   probabilities;   mass = sum_c u[c]
//                   loss = mass log sum_c exp z[c] - sum_c u[c] z[c],    dz[c] = mass softmax(z)[c] - u[c]
//   squared error   loss = sum_c (z[c] - value[c])^2,                    dz[c] = 2 (z[c] - value[c])
//
// A head of one column is binary, the softmax over 0 and z. A row counts with its sample weight. It is not valid where
// that is 0 or its target is ignore_index: it has no loss and no gradient then, even where its logits or targets are
// NaN.
#pragma once

#include "heads_norm.cuh"

namespace grl_ext {

// What the loss of a head needs in each of its rows. For a sum over the rows `norm` is 1.
template <typename T>
struct HeadLoss {
  using A = typename Arithmetic<T>::type;
  TargetKind kind;
  bool binary;
  bool mass_is_one;  // in every row
  int classes;
  int64_t ignore_index;
  const A* class_weight;
  A smoothing_per_class;  // smoothing / classes: what every class gets
  A one_minus_smoothing;  // what the target class gets on top
  A factor;  // of a row of weight 1 in the loss: loss_weight / norm
  double norm;

  __device__ bool squared() const { return kind == TargetKind::kValues; }
};

template <typename T>
__device__ HeadLoss<T> head_loss(const Heads<T>& heads, int h, double norm) {
  using A = typename Arithmetic<T>::type;
  const Head<T>& head = heads.head[h];
  HeadLoss<T> loss;
  loss.kind = head.kind;
  loss.binary = head.binary();
  loss.mass_is_one = head.kind == TargetKind::kClasses && !head.class_weight;
  loss.classes = head.classes();
  loss.ignore_index = head.ignore_index;
  loss.class_weight = head.class_weight;
  loss.smoothing_per_class = static_cast<A>(head.smoothing / head.classes());
  loss.one_minus_smoothing = static_cast<A>(1 - head.smoothing);
  loss.factor = norm == 0 ? A(0) : static_cast<A>(heads.loss_weight_of(h) / norm);
  loss.norm = norm;
  return loss;
}

// A row's target and weight.
template <typename T>
struct RowTarget {
  using A = typename Arithmetic<T>::type;
  bool valid = false;
  A weight = 0;
  int target_class = 0;
  const A* dense = nullptr;  // probabilities or values

  RowTarget() = default;

  // `target` is the row's own, `weight` its sample weight.
  __device__ RowTarget(const HeadLoss<T>& head, const void* target, A weight)
      : valid(weight != 0 && head.norm != 0), weight(weight), dense(static_cast<const A*>(target)) {
    if (head.kind == TargetKind::kClasses) {
      const int64_t label = *static_cast<const int64_t*>(target);
      valid = valid && label != head.ignore_index;
      check_target(!valid || (label >= 0 && label < head.classes));
      target_class = static_cast<int>(label);
    }
  }

  // u[c]
  __device__ A wanted(const HeadLoss<T>& head, int c) const {
    A y = target_class == c;
    if (head.kind == TargetKind::kProbabilities) {
      y = !head.binary ? dense[c] : c == 1 ? dense[0] : 1 - dense[0];
    }
    const A u = head.smoothing_per_class + head.one_minus_smoothing * y;
    return head.class_weight ? __ldg(head.class_weight + c) * u : u;
  }
};

// A class's term of sum_c u[c] (z[c] - top). It is 0 where u is 0, even if z is infinite.
template <typename A>
__device__ A expected_part(A u, A shifted) {
  return u == 0 ? A(0) : u * shifted;
}

// ---------------------------------------------------------------------------------------------------------------------
// Columns on lanes
// ---------------------------------------------------------------------------------------------------------------------

// Every lane gets op over lanes [first, end), which are those of its head.
template <typename A, typename Op>
__device__ A over_head(A x, int first, int end, Op op) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const A other = __shfl_down_sync(kWholeWarp, x, distance);
    x = lane_id() + distance < end ? op(x, other) : x;  // now over [lane, lane + 2 distance)
  }
  return __shfl_sync(kWholeWarp, x, first);
}

// Which sums over a head's lanes are needed by any head of the launch.
struct LossSums {
  bool softmax;
  bool mass;
};

// The gradient of the row's part in the total loss, for the lane's logit z. The first lane of each head adds the row's
// loss to `loss`. A lane without a column counts as a head of its own.
template <typename T, typename A = typename Arithmetic<T>::type>
__device__ A loss_of_lane(
    double& loss, A z, const HeadLoss<T>& head, const RowTarget<T>& row, bool exists, int first_lane, int end_lane,
    LossSums sums) {
  const int column = lane_id() - first_lane;
  const int hit = head.binary ? 1 : column;  // the class that the lane stands for
  A e = 0, sum = 1, u = 0, mass = 1;
  A part = 0;  // of the loss, beside the logarithm
  if (head.squared()) {
    u = exists && row.valid ? row.dense[column] : A(0);
    part = (z - u) * (z - u);
  } else {
    u = exists && row.valid ? row.wanted(head, hit) : A(0);
  }
  if (sums.softmax) {
    const A top = over_head(head.binary ? Maximum{}(z, A(0)) : z, first_lane, end_lane, Maximum{});
    e = exp(z - top);
    sum = e;
    A mine = u;
    if (!head.squared()) {
      part = expected_part(u, z - top);
      if (head.binary && exists && row.valid) {  // the class of the logit 0, which has no lane
        const A other = row.wanted(head, 0);
        sum += exp(-top);
        part += expected_part(other, -top);
        mine += other;
      }
    }
    sum = over_head(sum, first_lane, end_lane, Sum{});
    if (sums.mass) {
      mass = over_head(mine, first_lane, end_lane, Sum{});
    }
    mass = head.mass_is_one ? A(1) : mass;
  }
  part = over_head(part, first_lane, end_lane, Sum{});
  if (!exists || !row.valid) {
    return 0;
  }
  if (column == 0) {
    loss += static_cast<double>(row.weight) * static_cast<double>(head.squared() ? part : mass * log(sum) - part);
  }
  return row.weight * head.factor * (head.squared() ? 2 * (z - u) : mass * (e / sum) - u);
}

}  // namespace grl_ext
