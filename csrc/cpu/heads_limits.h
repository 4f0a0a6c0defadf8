// Where the heads leave the skinny kernels for matrix products. Measured by `python bench/compare.py --cases switch`.
#pragma once

#include <cstdint>

namespace grl_ext {

constexpr int64_t kMaxSkinnyColumns = 64;

}  // namespace grl_ext
