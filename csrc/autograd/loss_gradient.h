// The gradient of a head's loss in ATen operators: for gradients of gradients, and where the logits have an incoming
// gradient too.
#pragma once

#include <ATen/core/Tensor.h>

#include "../heads_options.h"

namespace grl_ext {

// The gradient of head h's loss, without its loss weight, for its logits (N, size). Not rounded to half types: small
// gradients would vanish before the loss scale is multiplied in. Rows that do not count get 0, even where their logits
// are NaN.
at::Tensor loss_gradient(const at::Tensor& logits, const HeadsOptions& options, size_t h);

}  // namespace grl_ext
