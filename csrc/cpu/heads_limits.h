// The most columns, of all heads together, that the fused kernels take. Heads beyond it are computed by matrix
// products.
//
// One number serves both operators, so that a head has its logits from the same kernel with targets and without. It is
// chosen for heads_loss: there the products cost more, because the losses between them read the logits and write their
// gradient once more. linear_heads would be faster by products from fewer columns on; `python bench/compare.py --cases
// switch` shows from how many.
#pragma once

#include <cstdint>

namespace grl_ext {

constexpr int64_t kMaxFusedColumns = 40;

}  // namespace grl_ext
