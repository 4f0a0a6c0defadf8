// Which element of a lambda tensor scales which element of a contiguous gradient, for kernels that do not expand the
// tensor.
#pragma once

#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <optional>

namespace grl_ext {

// Element i of the gradient is scaled by lambda[(i / inner) % period].
struct LambdaLayout {
  int64_t period;
  int64_t inner;
};

// The layout of a lambda of `lambda_sizes` under a gradient of `sizes`; nothing where it does not broadcast, and where
// it varies along dimensions that are not neighbours, such as (N, 1, H) over (N, C, H): no single period describes that.
inline std::optional<LambdaLayout> lambda_layout(c10::IntArrayRef sizes, c10::IntArrayRef lambda_sizes) {
  const auto offset = static_cast<int64_t>(sizes.size()) - static_cast<int64_t>(lambda_sizes.size());
  for (int64_t d = 0; d < static_cast<int64_t>(lambda_sizes.size()); ++d) {
    if (lambda_sizes[d] != 1 && (d + offset < 0 || lambda_sizes[d] != sizes[d + offset])) {
      return std::nullopt;
    }
  }
  int64_t period = 1;
  int64_t inner = 1;
  bool closed = false;  // a broadcast dimension stands left of a varying one: no further dimension may vary
  for (auto d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
    const int64_t size = sizes[d];
    const bool varies = size != 1 && d >= offset && lambda_sizes[d - offset] != 1;
    if (size == 1) {
      continue;
    }
    if (!varies) {
      closed = period > 1;
      inner *= closed ? 1 : size;
    } else if (closed) {
      return std::nullopt;
    } else {
      period *= size;
    }
  }
  return LambdaLayout{period, inner};
}

}  // namespace grl_ext
