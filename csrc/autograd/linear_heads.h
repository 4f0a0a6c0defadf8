// The gradients of linear heads, which heads_loss needs too.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../heads_options.h"

namespace grl_ext {

// The gradients (dx, dw, db) of linear heads from those of their logits. In dx each adversary's part is multiplied by
// its -lambda. Computed by the kernel; by ATen operators for gradients of gradients and for batches of gradients. A
// gradient that is not needed comes back undefined. x may be undefined where no weight needs a gradient, and weight
// empty where x needs none.
HeadsGradients heads_gradients(
    const std::vector<at::Tensor>& grad_logits, const at::Tensor& x, const std::vector<at::Tensor>& weight,
    const at::Tensor& lambda, const std::vector<int64_t>& lambda_index, const std::vector<bool>& needs);

}  // namespace grl_ext
