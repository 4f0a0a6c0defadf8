// What the operators built on linear layers share: autocast, and features of any shape as rows.
#pragma once

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <optional>

namespace grl_ext {

// What autocast does to the arguments of F.linear: where it is on for the device, they are cast to its dtype, except
// for float64.
class Autocast {
 public:
  explicit Autocast(c10::DeviceType device) : device_(device) {
    if (at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device)) {
      dtype_ = at::autocast::get_autocast_dtype(device);
    }
  }

  bool is_on() const { return dtype_.has_value(); }

  at::Tensor operator()(const at::Tensor& tensor) const {
    return dtype_ ? at::autocast::cached_cast(*dtype_, tensor, device_) : tensor;
  }

  std::optional<at::Tensor> operator()(const std::optional<at::Tensor>& tensor) const {
    return tensor ? std::optional((*this)(*tensor)) : std::nullopt;
  }

 private:
  const c10::DeviceType device_;
  std::optional<at::ScalarType> dtype_;
};

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

// Rows in that shape, which nobody else may hold: the result is not marked as a view. Neither is F.linear's. A view
// would lose its hooks when it is modified in place.
inline at::Tensor with_leading_sizes(const at::Tensor& rows, const at::Tensor& like) {
  return like.dim() == 2 ? rows : at::_unsafe_view_symint(rows, leading_sizes(rows, like));
}

}  // namespace grl_ext
