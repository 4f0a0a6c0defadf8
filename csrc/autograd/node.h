// What the autograd nodes share.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/function.h>
#include <torch/version.h>

#include <utility>

namespace grl_ext {

// A node in the holder that this torch uses for nodes.
template <class T, class... Args>
auto make_node(Args&&... args) {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
  return c10::make_intrusive<T>(std::forward<Args>(args)...);
#else
  return std::shared_ptr<T>(new T(std::forward<Args>(args)...), torch::autograd::deleteNode);
#endif
}

// The same node's holder, from inside it.
inline auto holder_of(torch::autograd::Node& node) {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
  return c10::intrusive_ptr<torch::autograd::Node>::reclaim_copy(&node);
#else
  return node.getptr();
#endif
}

// Whether this tensor is what its data pointer says: no subclass, no batch of a transform, no lazy conjugate.
bool is_plain(const at::Tensor& tensor);

// Whether this tensor stands for many at once: vmap, or gradients taken with is_grads_batched.
bool is_batched(const at::Tensor& tensor);

// Whether the kernels take this tensor: a plain strided one, on a device and of a dtype that they were compiled for.
bool has_kernel(const at::Tensor& tensor);

// Raises PyTorch's own error inside a torch.func transform, which would pass by a C++ node in silence. The Python functions take
// their other path there; this guards torch.ops.
void refuse_functorch();

// Whether nobody on the host but the holder of `tensor` can see its memory, now or later. Of kernels that are still queued it says
// nothing: see Made in scale_negate.h.
bool is_unshared(const at::Tensor& tensor);

}  // namespace grl_ext
