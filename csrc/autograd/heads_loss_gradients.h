// The gradients of heads_loss from its features, where those made in the forward do not serve.
#pragma once

#include <functional>
#include <vector>

#include "heads_of_loss.h"

namespace grl_ext {

// The incoming gradients of heads_loss: of the loss, of each head's loss, of each head's logits. Undefined where there is none.
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

// In one more pass over the features. Nothing may be asked of the logits. A head without an incoming gradient takes no part: what it
// holds may be infinite, and its parameters get no gradient, not zeros.
torch::autograd::variable_list heads_loss_gradients(
    const IncomingGradients& incoming, const HeadsOfLoss& heads, const at::Tensor& x, const std::vector<bool>& needs);

// The same in operators: differentiable where gradients of gradients are asked for, and with the logits' own gradients.
// `logits` gives those of a linear head as the forward had them.
torch::autograd::variable_list heads_loss_gradients_in_operators(
    const IncomingGradients& incoming, const HeadsOfLoss& heads, const at::Tensor& x,
    const std::function<at::Tensor(size_t h)>& logits, const std::vector<bool>& needs);

}  // namespace grl_ext
