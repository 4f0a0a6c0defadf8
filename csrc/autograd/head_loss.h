// The losses' rules in ATen operators: for gradients of gradients, and where the logits' gradient is asked for beside the loss's.
#pragma once

#include <ATen/ATen.h>

#include "../heads.h"

namespace grl_ext {

// The gradient of head h's loss, before its loss weight, for its logits (N, size). Not rounded to half types: the loss scale comes
// later. Rows that are not valid get 0, whatever their logits hold.
at::Tensor grad_logits_composite(const at::Tensor& logits, const HeadsOptions& options, size_t h);

}  // namespace grl_ext
