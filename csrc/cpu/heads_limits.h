// Where the heads leave the fused kernels for matrix products. Measured by `python bench/compare.py --cases switch` for linear_heads,
// where they break even at about 24 columns, and with the fused loss, where the kernels are ahead at 33 and behind at 48.
#pragma once

#include <cstdint>

namespace grl_ext {

constexpr int64_t kMaxFusedColumns = 40;

}  // namespace grl_ext
