"""The operations in plain PyTorch, as a user would write them: what the fuzzer's programs are compared with.

Written apart from `grl_ext._reference`, so that no mistake of that is repeated here.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, lambda_: Tensor | float) -> Tensor:
        ctx.number = None
        if isinstance(lambda_, Tensor):
            ctx.save_for_backward(lambda_)
        else:
            ctx.number = lambda_
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if ctx.number is not None:
            lambda_ = torch.tensor(float(ctx.number), dtype=torch.float64)
        else:
            (lambda_,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        real = torch.float64 if wide in (torch.float64, torch.complex128) else torch.float32
        scaled = (grad.to(wide) * -lambda_.to(real)).to(grad.dtype)
        return torch.where(lambda_ == 0, torch.zeros((), dtype=grad.dtype), scaled), None


def gradient_reversal(x: Tensor, lambda_: Tensor | float = 1.0) -> Tensor:
    if isinstance(lambda_, Tensor):
        if not x.requires_grad:
            lambda_ = lambda_.detach()
        if lambda_.dim() == 0 and not lambda_.requires_grad:
            lambda_ = lambda_.item()
    return _Reverse.apply(x, lambda_)


def grl_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, lambda_: Tensor | float = 1.0) -> Tensor:
    return F.linear(gradient_reversal(x, lambda_), weight, bias)


class GRL(nn.Module):
    def __init__(self, lambda_: float = 1.0):
        super().__init__()
        self.lambda_ = lambda_

    def forward(self, x: Tensor) -> Tensor:
        return gradient_reversal(x, self.lambda_)


OPERATIONS = SimpleNamespace(gradient_reversal=gradient_reversal, grl_linear=grl_linear, GRL=GRL)
