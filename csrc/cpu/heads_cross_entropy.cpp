// _heads_cross_entropy on the CPU: block by block, logits, losses and all gradients while the features are in the cache.
#include <torch/library.h>

#include "heads_common.h"
#include "kept_memory.h"

namespace grl_ext::cpu {
namespace {

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // loss, head_losses, logits, dx, dw, db

// Targets and losses of all heads.
template <class T>
class Loss {
 public:
  Loss(
      const Tensor& targets, at::IntArrayRef head_sizes, const Tensor& grad_scale, const std::optional<Tensor>& loss_weight,
      int64_t ignore_index, double label_smoothing, int64_t threads)
      : targets_(targets.contiguous()), head_sizes_(head_sizes), heads_(static_cast<int64_t>(head_sizes.size())),
        scales_(column_scales<T>(head_sizes, grad_scale)), weights_(heads_, 1.0), ignore_index_(ignore_index),
        smoothing_(label_smoothing), sums_(threads * heads_) {
    if (loss_weight) {
      const auto values = loss_weight->to(at::kDouble).contiguous();
      weights_.assign(values.const_data_ptr<double>(), values.const_data_ptr<double>() + heads_);
    }
    count_valid();
  }

  // From the logits z of a block, their gradients g, and those with each head's scale. Columns of kMaxBlockRows.
  void block(int64_t thread, int64_t row, int64_t rows, const T* z, T* g, T* scaled) {
    std::array<Integer<T>, kMaxBlockRows> target;
    const auto* wanted = targets_.const_data_ptr<int64_t>() + row * heads_;
    for (int64_t h = 0, c = 0; h < heads_; c += head_sizes_[h], ++h) {
      target.fill(-1);
      for (int64_t i = 0; i < rows; ++i) {
        target[i] = wanted[i * heads_ + h] == ignore_index_ ? -1 : static_cast<Integer<T>>(wanted[i * heads_ + h]);
      }
      const int64_t at = c * kMaxBlockRows;
      sums_[thread * heads_ + h] += heads_kernels<T>().cross_entropy(
          g + at, scaled + at, z + at, target.data(), rows, head_sizes_[h], weights_[h] / std::max<int64_t>(1, valid_[h]),
          scales_[c], smoothing_);
    }
  }

  // (loss, head_losses)
  std::pair<Tensor, Tensor> total() const {
    const auto options = at::TensorOptions().dtype(std::is_same_v<T, double> ? at::kDouble : at::kFloat);
    auto head_losses = at::empty({heads_}, options);
    double loss = 0;
    for (int64_t h = 0; h < heads_; ++h) {
      double sum = 0;
      for (size_t i = h; i < sums_.size(); i += heads_) {
        sum += sums_[i];
      }
      const double mean = valid_[h] ? sum / static_cast<double>(valid_[h]) : 0.0;
      head_losses.template data_ptr<T>()[h] = static_cast<T>(mean);
      loss += weights_[h] * mean;
    }
    return {at::scalar_tensor(loss, options), head_losses};
  }

 private:
  // Before any gradient: their scale depends on it. Refuses a target that is neither a class nor ignore_index.
  void count_valid() {
    valid_.assign(heads_, 0);
    const auto* target = targets_.const_data_ptr<int64_t>();
    for (int64_t r = 0; r < targets_.size(0); ++r) {
      for (int64_t h = 0; h < heads_; ++h, ++target) {
        const int64_t classes = std::max<int64_t>(2, head_sizes_[h]);
        TORCH_CHECK_INDEX(
            *target == ignore_index_ || (*target >= 0 && *target < classes), "targets of head ", h, " must be in [0, ", classes,
            ") or ignore_index (", ignore_index_, "), got ", *target);
        valid_[h] += *target != ignore_index_;
      }
    }
  }

  const Tensor targets_;
  const at::IntArrayRef head_sizes_;
  const int64_t heads_;
  const std::vector<T> scales_;
  std::vector<double> weights_;
  const int64_t ignore_index_;
  const double smoothing_;
  std::vector<double> sums_;  // per thread and head
  std::vector<int64_t> valid_;
};

// One pass over the features.
template <class T>
Result fused(
    Loss<T>& loss, int64_t threads, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
    std::array<bool, 3> needs) {
  const int64_t n = x.size(0), d = x.size(1), k = weight.size(0), step = block_rows(d);
  const Parameters<T> parameters(weight, bias);
  auto logits = at::empty({n, k}, x.options());
  auto dx = needs[0] ? empty_kept({n, d}, x.scalar_type()) : x.new_empty({0});
  ParameterGradients<T> of_parameters(threads, k, d, x.scalar_type(), needs[1], needs[2]);
  for_each_thread(threads, n, [&](int64_t t, int64_t begin, int64_t end) {
    Rows<T> features(x, d), gradient(dx, d), out(logits, k);
    std::vector<T> z(k * kMaxBlockRows), g(k * kMaxBlockRows), scaled(k * kMaxBlockRows);
    for (int64_t r = begin; r < end; r += step) {
      const int64_t rows = std::min(step, end - r);
      const T* block = features.read(r, rows);
      const T* next = features.ahead(std::min(r + rows, end - 1));
      heads_kernels<T>().logits(z.data(), block, next, parameters.weight(), parameters.bias(), rows, d, k);
      to_rows(out.write(r), z.data(), rows, k);
      out.written(r, rows);
      loss.block(t, r, rows, z.data(), g.data(), scaled.data());
      if (needs[0] || needs[1]) {
        heads_kernels<T>().gradients(
            needs[0] ? gradient.write(r) : nullptr, of_parameters.weight(t), g.data(), scaled.data(), block,
            parameters.weight(), rows, d, k);
      }
      if (needs[0]) {
        gradient.written(r, rows);
      }
      if (needs[2]) {
        of_parameters.add_to_bias(t, g.data(), rows);
      }
    }
  });
  const auto [total, head_losses] = loss.total();
  const auto [dw, db] = of_parameters.total();
  return {total, head_losses, logits, dx, dw, db};
}

// The losses of all rows between matrix products, for heads too wide for the skinny kernels.
template <class T>
Result by_products(
    Loss<T>& loss, int64_t threads, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
    std::array<bool, 3> needs) {
  const int64_t n = x.size(0), k = weight.size(0);
  const auto logits = at::linear(x, weight, bias);
  auto all_g = at::empty_like(logits), all_scaled = at::empty_like(logits);
  for_each_thread(threads, n, [&](int64_t t, int64_t begin, int64_t end) {
    Rows<T> in(logits, k), out_g(all_g, k), out_scaled(all_scaled, k);
    std::vector<T> z(k * kMaxBlockRows), g(k * kMaxBlockRows), scaled(k * kMaxBlockRows);
    for (int64_t r = begin; r < end; r += kMaxBlockRows) {
      const int64_t rows = std::min<int64_t>(kMaxBlockRows, end - r);
      to_columns(z.data(), in.read(r, rows), rows, k);
      loss.block(t, r, rows, z.data(), g.data(), scaled.data());
      to_rows(out_g.write(r), g.data(), rows, k);
      out_g.written(r, rows);
      to_rows(out_scaled.write(r), scaled.data(), rows, k);
      out_scaled.written(r, rows);
    }
  });
  const auto [total, head_losses] = loss.total();
  const auto [dx, dw, db] = gradients_by_products(all_g, all_scaled, x, weight, needs);
  return {total, head_losses, logits, dx, dw, db};
}

Result heads_cross_entropy(
    const Tensor& x_, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& targets, at::IntArrayRef head_sizes,
    const Tensor& grad_scale, const std::optional<Tensor>& loss_weight, int64_t ignore_index, double label_smoothing,
    std::array<bool, 3> needs) {
  const auto x = x_.contiguous();
  const bool any_gradient = needs[0] || needs[1] || needs[2];
  const int64_t threads = thread_count(x.size(0), x.size(1), (any_gradient ? 3 : 1) * weight.size(0));
  return dispatch_wide(x.scalar_type(), [&](auto zero) {
    Loss<decltype(zero)> loss(targets, head_sizes, grad_scale, loss_weight, ignore_index, label_smoothing, threads);
    const auto compute = weight.size(0) <= kMaxSkinnyColumns ? fused<decltype(zero)> : by_products<decltype(zero)>;
    return compute(loss, threads, x, weight, bias, needs);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(grl_ext, CPU, m) {
  m.impl("_heads_cross_entropy", heads_cross_entropy);
}

}  // namespace grl_ext::cpu
