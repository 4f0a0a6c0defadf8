// The backward of heads_loss, from its features: for where the forward's gradients cannot be returned.
#pragma once

#include <functional>
#include <vector>

#include "heads_loss_forward.h"

namespace grl_ext {

// The incoming gradients of heads_loss: of the loss, of each head's loss, of each head's logits. Undefined where there
// is none.
struct IncomingGradients {
  const torch::autograd::variable_list& grads;
  size_t heads;

  const at::Tensor& of_loss() const { return grads[0]; }

  const at::Tensor& of_head_loss(size_t h) const { return grads[1 + h]; }

  const at::Tensor& of_logits(size_t h) const { return grads[1 + heads + h]; }

  bool any_of_head_losses() const { return any(1, 1 + heads); }

  bool any_of_logits() const { return any(1 + heads, grads.size()); }

  bool any_batched() const;

 private:
  bool any(size_t begin, size_t end) const;
};

// By the kernels, in one more pass over the features. The logits must have no incoming gradients. A head whose loss has
// none takes no part: its values may be infinite, and its parameters get no gradient instead of zeros.
torch::autograd::variable_list heads_loss_backward(
    const IncomingGradients& incoming, const HeadsOfLoss& heads, const at::Tensor& x, const std::vector<bool>& needs);

// The same in ATen operators, which are differentiable; with the logits' incoming gradients. logits(h) returns the
// logits of linear head h as the forward saved them.
torch::autograd::variable_list heads_loss_backward_composite(
    const IncomingGradients& incoming, const HeadsOfLoss& heads, const at::Tensor& x,
    const std::function<at::Tensor(size_t h)>& logits, const std::vector<bool>& needs);

}  // namespace grl_ext
