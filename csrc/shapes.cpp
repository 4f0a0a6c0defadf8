// What the kernels return, for tracing: shapes and dtypes, no values.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>

namespace grl_ext {
namespace {

using at::Tensor;

Tensor scale_negate(const Tensor& grad, double, const std::optional<Tensor>&) {
  return at::empty_like(grad);
}

void scale_negate_(Tensor&, double, const std::optional<Tensor>&) {}

Tensor heads_logits(const Tensor& x, const Tensor& weight, const std::optional<Tensor>&) {
  return x.new_empty_symint({x.sym_size(0), weight.sym_size(0)});
}

Tensor needed(const Tensor& like, bool need, c10::SymIntArrayRef sizes) {
  return need ? like.new_empty_symint(sizes) : like.new_empty_symint({0});
}

std::tuple<Tensor, Tensor, Tensor> heads_gradients(
    const Tensor& grad_logits, const std::optional<Tensor>& x, const std::optional<Tensor>& weight, at::IntArrayRef,
    const Tensor&, std::array<bool, 3> needs) {
  const auto rows = grad_logits.sym_size(0), columns = grad_logits.sym_size(1);
  const auto features = needs[0] ? weight->sym_size(1) : needs[1] ? x->sym_size(1) : c10::SymInt(0);
  return {
      needed(grad_logits, needs[0], {rows, features}), needed(grad_logits, needs[1], {columns, features}),
      needed(grad_logits, needs[2], {columns})};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> heads_cross_entropy(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor&, at::IntArrayRef head_sizes,
    const Tensor& grad_scale, const std::optional<Tensor>&, int64_t, double, std::array<bool, 3> needs) {
  const auto loss_options = x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  auto logits = heads_logits(x, weight, bias);
  auto [dx, dw, db] = heads_gradients(logits, x, weight, head_sizes, grad_scale, needs);
  return {
      at::empty({}, loss_options), at::empty({static_cast<int64_t>(head_sizes.size())}, loss_options), logits, dx, dw, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(grl_ext, Meta, m) {
  m.impl("_scale_negate", scale_negate);
  m.impl("_scale_negate_", scale_negate_);
  m.impl("_heads_logits", heads_logits);
  m.impl("_heads_gradients", heads_gradients);
  m.impl("_heads_cross_entropy", heads_cross_entropy);
}

}  // namespace grl_ext
