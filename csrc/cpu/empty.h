// Memory for the kernels' results.
//
// Make the largest tensor last. What glibc's malloc takes from the end of its heap, and gets back while it is still the last block
// there, serves the next step again. Below other blocks it leaves a gap, too small for the next tensor of its size, which has to be
// aligned. The heap then grows instead, and when it shrinks again its pages go to the system and come back to be filled with zeros.
#pragma once

#include <ATen/core/Tensor.h>

namespace grl_ext::cpu {

// at::empty without the dispatcher's overhead, in huge pages where that helps.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype);

// Asks the system for huge pages where a tensor that was just made, and will be written from end to end, has pages of its own.
at::Tensor in_huge_pages(at::Tensor fresh);

}  // namespace grl_ext::cpu
