// The losses of one head over a block of rows, with the gradient of its logits. A row or entry of weight 0 has no loss
// and no gradient, even where its logits or targets are NaN.

// y * z, and 0 where y is 0, even if z is infinite or NaN.
template <class T>
inline Vector<T> weighted(Vector<T> y, Vector<T> z) {
  return y == 0 ? Vector<T>{} : y * z;
}

// Stores the gradient of one column of logits, and the same times the head's factor, which is what goes into dx.
template <class T>
inline void store_gradient(const HeadBlock<T>& head, long c, long r, Vector<T> weight, Vector<T> dz) {
  const Vector<T> zero = {};
  dz = weight != 0 ? dz * weight * static_cast<T>(head.grad_factor) : zero;
  store(head.grad_logits + c * kMaxBlockRows + r, dz);
  store(head.scaled + c * kMaxBlockRows + r, head.factor == 0 ? zero : dz * static_cast<T>(head.factor));
}

// Softmax cross entropy (columns == 1: binary, the softmax over the logits 0 and z). For each row, with y the one-hot
// class or the given probabilities:
//   u[c] = class_weight[c] ((1 - smoothing) y[c] + smoothing / classes),   mass = sum_c u[c]
//   loss = mass log sum_c exp(z[c] - top) - sum_c u[c] (z[c] - top),        dz[c] = mass softmax(z)[c] - u[c]
// with top the row's largest logit. A class with u = 0 adds nothing to the loss, even if its logit is -infinity. A
// class that is not wanted has u = 0, even if its weight is infinite or NaN.
// Returns sum_r row_weight[r] loss[r], summed in T.
template <class T, bool kLabels>
double cross_entropy_of(const HeadBlock<T>& head) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  using Integers = Vector<Integer<T>>;
  const bool binary = head.columns == 1;
  const T smoothing_per_class = static_cast<T>(head.smoothing / (binary ? 2 : head.columns));
  const T one_minus_smoothing = static_cast<T>(1 - head.smoothing);
  const bool mass_is_one = kLabels && !head.class_weight;
  const Vector<T> zero = {};
  Vector<T> loss = zero;
  for (long r = 0; r < head.rows; r += kLanes) {
    const Vector<T> weight = load(head.row_weight + r);
    Integers label = {};
    if constexpr (kLabels) {
      label = load(head.label + r);
    }
    // u[c]. A binary head has one column and two classes.
    const auto wanted = [&](long c) {
      Vector<T> y;
      if constexpr (kLabels) {
        const Integers hit = label == static_cast<Integer<T>>(c);
        y = smoothing_per_class + (hit ? broadcast(one_minus_smoothing) : zero);
      } else {
        const Vector<T> given = load(head.target + (binary ? 0 : c) * kMaxBlockRows + r);
        y = smoothing_per_class + one_minus_smoothing * (binary && c == 0 ? 1 - given : given);
      }
      return head.class_weight ? weighted<T>(y, broadcast(head.class_weight[c])) : y;
    };
    const long first = binary ? 1 : 0;  // the class of the first column
    Vector<T> top = binary ? zero : load(head.logits + r);
    for (long c = 0; c < head.columns; ++c) {
      const Vector<T> z = load(head.logits + c * kMaxBlockRows + r);
      top = z <= top ? top : z;  // NaN goes through
    }
    Vector<T> sum = zero, mass = zero, expected = zero;  // of exp(z - top), u and u (z - top)
    if (binary) {
      const Vector<T> u = wanted(0);
      sum = exp_nonpositive(zero - top);
      mass = u;
      expected = weighted<T>(u, zero - top);
    }
    for (long c = 0; c < head.columns; ++c) {
      const Vector<T> shifted = load(head.logits + c * kMaxBlockRows + r) - top;
      const Vector<T> e = exp_nonpositive(shifted);
      const Vector<T> u = wanted(c + first);
      sum += e;
      mass += u;
      expected += weighted<T>(u, shifted);
      store(head.grad_logits + c * kMaxBlockRows + r, e);
    }
    mass = mass_is_one ? broadcast(T(1)) : mass;
    const Vector<T> per_exp = mass / sum;
    for (long c = 0; c < head.columns; ++c) {
      store_gradient(head, c, r, weight, load(head.grad_logits + c * kMaxBlockRows + r) * per_exp - wanted(c + first));
    }
    // An infinite mass, of an infinite class weight, is the loss; expected is infinite too, or NaN.
    const Vector<T> of_row = mass - mass == 0 ? mass * log_at_least_one(sum) - expected : mass;
    loss += weight != 0 ? weight * of_row : zero;
  }
  return sum_lanes<T>(loss);
}

template <class T>
double cross_entropy(const HeadBlock<T>& head) {
  return head.label ? cross_entropy_of<T, true>(head) : cross_entropy_of<T, false>(head);
}

// A loss for each output, without the others: loss = sum_c l(z[c], target[c]). each(z, target, dz) returns l and sets dz.
// Returns the sum of the losses, each times its row's or its own weight, summed in T.
template <class T, class Each>
double loss_by_output(const HeadBlock<T>& head, const Each& each) {
  constexpr int kLanes = VectorOf<T>::kLanes;
  Vector<T> loss = {};
  for (long r = 0; r < head.rows; r += kLanes) {
    const Vector<T> of_row = load(head.row_weight + r);
    for (long c = 0; c < head.columns; ++c) {
      const long at = c * kMaxBlockRows + r;
      const Vector<T> weight = head.entry_weight ? load(head.entry_weight + at) : of_row;
      Vector<T> dz;
      const Vector<T> own = each(load(head.logits + at), load(head.target + at), dz);
      store_gradient(head, c, r, weight, dz);
      loss += weight != 0 ? weight * own : Vector<T>{};
    }
  }
  return sum_lanes<T>(loss);
}

// l = (z - target)^2
template <class T>
double squared_error(const HeadBlock<T>& head) {
  return loss_by_output(head, [](Vector<T> z, Vector<T> target, Vector<T>& dz) {
    const Vector<T> error = z - target;
    dz = 2 * error;
    return error * error;
  });
}

// l = target log(1 + exp(-z)) + (1 - target) log(1 + exp(z)). A side that is not wanted adds nothing, though z be
// infinite.
template <class T>
double binary_cross_entropy(const HeadBlock<T>& head) {
  return loss_by_output(head, [](Vector<T> z, Vector<T> target, Vector<T>& dz) {
    const Vector<T> zero = {};
    const Vector<T> e = exp_nonpositive(z <= 0 ? z : -z), sum = 1 + e, log_sum = log_at_least_one(sum);
    dz = (z <= 0 ? e : broadcast(T(1))) / sum - target;
    const Vector<T> of_one = (z <= 0 ? -z : zero) + log_sum, of_zero = (z <= 0 ? zero : z) + log_sum;
    return weighted<T>(target, of_one) + weighted<T>(1 - target, of_zero);
  });
}
