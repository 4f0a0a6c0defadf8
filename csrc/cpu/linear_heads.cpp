// _heads_logits and _heads_gradients on the CPU.
#include <torch/library.h>

#include "heads_common.h"
#include "kept_memory.h"

namespace grl_ext::cpu {
namespace {

Tensor heads_logits(const Tensor& x_, const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t n = x_.size(0), d = x_.size(1), k = weight.size(0), step = block_rows(d);
  if (k > kMaxSkinnyColumns) {
    return at::linear(x_, weight, bias);
  }
  const auto x = x_.contiguous();
  auto logits = at::empty({n, k}, x.options());
  dispatch_wide(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Parameters<T> parameters(weight, bias);
    for_each_thread(thread_count(n, d, k), n, [&](int64_t, int64_t begin, int64_t end) {
      Rows<T> features(x, d), out(logits, k);
      std::vector<T> z(k * kMaxBlockRows);
      for (int64_t r = begin; r < end; r += step) {
        const int64_t rows = std::min(step, end - r);
        const T* next = features.ahead(std::min(r + rows, end - 1));
        heads_kernels<T>().logits(z.data(), features.read(r, rows), next, parameters.weight(), parameters.bias(), rows, d, k);
        to_rows(out.write(r), z.data(), rows, k);
        out.written(r, rows);
      }
    });
  });
  return logits;
}

std::tuple<Tensor, Tensor, Tensor> heads_gradients(
    const Tensor& grad_logits, const std::optional<Tensor>& x_, const std::optional<Tensor>& weight_, at::IntArrayRef head_sizes,
    const Tensor& grad_scale, std::array<bool, 3> needs) {
  const int64_t n = grad_logits.size(0), k = grad_logits.size(1);
  const int64_t d = needs[1] ? x_->size(1) : needs[0] ? weight_->size(1) : 0, step = block_rows(d);
  const auto grad = grad_logits.contiguous();
  return dispatch_wide(grad.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    const auto scales = column_scales<T>(head_sizes, grad_scale);
    if (k > kMaxSkinnyColumns) {
      const auto scale = at::tensor(at::ArrayRef<T>(scales), at::TensorOptions().dtype(wide_type(grad.scalar_type())));
      const auto scaled = at::where(scale.eq(0), at::zeros({}, scale.options()), grad * scale).to(grad.scalar_type());
      return gradients_by_products(grad, scaled, x_, weight_, needs);
    }
    const auto none = grad.new_empty({0});
    const auto x = needs[1] ? x_->contiguous() : none;
    const Parameters<T> parameters(needs[0] ? *weight_ : none, std::nullopt);
    const int64_t threads = thread_count(n, d, 2 * k);
    auto dx = needs[0] ? empty_kept({n, d}, grad.scalar_type()) : none;
    ParameterGradients<T> of_parameters(threads, k, d, grad.scalar_type(), needs[1], needs[2]);
    for_each_thread(threads, n, [&](int64_t t, int64_t begin, int64_t end) {
      Rows<T> features(x, d), gradient(dx, d), incoming(grad, k);
      std::vector<T> g(k * kMaxBlockRows), scaled(k * kMaxBlockRows);
      for (int64_t r = begin; r < end; r += step) {
        const int64_t rows = std::min(step, end - r);
        to_columns(g.data(), incoming.read(r, rows), rows, k);
        if (needs[0]) {
          for (int64_t i = 0; i < k * kMaxBlockRows; ++i) {
            const T scale = scales[i / kMaxBlockRows];
            scaled[i] = scale == 0 ? T(0) : g[i] * scale;
          }
        }
        if (needs[0] || needs[1]) {
          heads_kernels<T>().gradients(
              needs[0] ? gradient.write(r) : nullptr, of_parameters.weight(t), g.data(), scaled.data(),
              needs[1] ? features.read(r, rows) : nullptr, parameters.weight(), rows, d, k);
        }
        if (needs[0]) {
          gradient.written(r, rows);
        }
        if (needs[2]) {
          of_parameters.add_to_bias(t, g.data(), rows);
        }
      }
    });
    const auto [dw, db] = of_parameters.total();
    return {dx, dw, db};
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(grl_ext, CPU, m) {
  m.impl("_heads_logits", heads_logits);
  m.impl("_heads_gradients", heads_gradients);
}

}  // namespace grl_ext::cpu
