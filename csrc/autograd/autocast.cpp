#include <pytorch.h>

#include "autocast.h"

#include <ATen/autocast_mode.h>

namespace grl_ext {

Autocast::Autocast(c10::DeviceType device) : device_(device) {
  if (at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device)) {
    dtype_ = at::autocast::get_autocast_dtype(device);
  }
}

at::Tensor Autocast::operator()(const at::Tensor& tensor) const {
  return dtype_ ? at::autocast::cached_cast(*dtype_, tensor, device_) : tensor;
}

std::optional<at::Tensor> Autocast::operator()(const std::optional<at::Tensor>& tensor) const {
  return tensor ? std::optional((*this)(*tensor)) : std::nullopt;
}

}  // namespace grl_ext
