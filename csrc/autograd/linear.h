// What the operators built on linear layers share: autocast, and features of any shape as rows.
#pragma once

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <optional>

namespace grl_ext {

struct LinearInputs {
  at::Tensor x, weight;
  std::optional<at::Tensor> bias;
};

// As F.linear under autocast: all three in autocast's dtype, float64 left alone.
inline LinearInputs autocast(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const auto device = x.device().type();
  if (!at::autocast::is_autocast_available(device) || !at::autocast::is_autocast_enabled(device)) {
    return {x, weight, bias};
  }
  const auto dtype = at::autocast::get_autocast_dtype(device);
  return {
      at::autocast::cached_cast(dtype, x, device), at::autocast::cached_cast(dtype, weight, device),
      bias ? std::optional(at::autocast::cached_cast(dtype, *bias, device)) : std::nullopt};
}

// (..., D) -> (N, D)
inline at::Tensor as_rows(const at::Tensor& x) {
  if (x.dim() == 2) {
    return x;
  }
  c10::SymInt rows = 1;  // not -1, which is ambiguous without features
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    rows *= x.sym_size(d);
  }
  return x.reshape_symint({rows, x.sym_size(-1)});
}

// The sizes (..., K) for rows (N, K), with the leading sizes of `like`.
inline std::vector<c10::SymInt> leading_sizes(const at::Tensor& rows, const at::Tensor& like) {
  auto sizes = like.sym_sizes().vec();
  sizes.back() = rows.sym_size(-1);
  return sizes;
}

// Rows in that shape, which nobody else may hold: the result is not marked as a view. Neither is F.linear's. A view would lose its
// hooks when it is modified in place.
inline at::Tensor with_leading_sizes(const at::Tensor& rows, const at::Tensor& like) {
  return like.dim() == 2 ? rows : at::_unsafe_view_symint(rows, leading_sizes(rows, like));
}

// The nodes of linear operators have no forward-mode derivative: an error is better than a tangent that is silently lost. The
// Python functions take their other path; this guards torch.ops.
inline void refuse_forward_mode(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  using torch::autograd::isFwGradDefined;
  TORCH_CHECK_NOT_IMPLEMENTED(
      !isFwGradDefined(x) && !isFwGradDefined(weight) && !(bias && isFwGradDefined(*bias)),
      "torch.ops.grl_ext has no forward-mode derivative for linear operators; call the functions of grl_ext instead");
}

inline void refuse_forward_mode(const at::Tensor& x, at::TensorList weight, const c10::List<std::optional<at::Tensor>>& bias) {
  refuse_forward_mode(x, x, std::nullopt);
  for (size_t i = 0; i < weight.size(); ++i) {
    refuse_forward_mode(x, weight[i], i < bias.size() ? bias.get(i) : std::nullopt);
  }
}

inline bool any_requires_grad(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  return at::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad() || (bias && bias->requires_grad()));
}

}  // namespace grl_ext
