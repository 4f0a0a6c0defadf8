#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace grl_ext {

// What autocast does to the arguments of F.linear: where it is on for the device, they are cast to its dtype, except
// for float64. Declared apart from its definition, because PyTorch's header of autocast includes every operator.
class Autocast {
 public:
  explicit Autocast(c10::DeviceType device);

  bool is_on() const { return dtype_.has_value(); }

  at::Tensor operator()(const at::Tensor& tensor) const;
  std::optional<at::Tensor> operator()(const std::optional<at::Tensor>& tensor) const;

 private:
  const c10::DeviceType device_;
  std::optional<at::ScalarType> dtype_;
};

}  // namespace grl_ext
