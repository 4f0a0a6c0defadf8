// Memory for a step's one large result, the gradient of the features.
#pragma once

#include <ATen/ATen.h>

namespace grl_ext::cpu {

// at::empty on the CPU, but the memory of a large tensor does not return to the system with the tensor: it waits for the next of
// exactly its size. Malloc maps what is above 32 MB anew each time, and a page fresh from the system costs several times what a fused
// step takes to fill it. Smaller blocks malloc reuses itself, and rather those that are still in the caches.
//
// At most GRL_EXT_KEEP_MB megabytes wait (256 by default, 0 for none; read once); the oldest leave first.
at::Tensor empty_kept(at::IntArrayRef sizes, at::ScalarType dtype);

}  // namespace grl_ext::cpu
