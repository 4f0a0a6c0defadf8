// The type that the kernels compute in.
#pragma once

#include <c10/core/ScalarType.h>

namespace grl_ext {

// Double for double and for pairs of doubles, float for all other types. Losses and numbers such as lambda have it too.
inline at::ScalarType arithmetic_type(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kComplexDouble ? at::kDouble : at::kFloat;
}

}  // namespace grl_ext
