"""The layer's operations inside torch.jit.script, which calls the registered operators.

A script has no isfinite() of a number: what it says otherwise is kept here.
"""

import torch
from torch import Tensor


def as_tensor(lambda_: Tensor | float) -> Tensor:
    if isinstance(lambda_, Tensor):
        return lambda_
    assert abs(lambda_) <= 1.7976931348623157e308, "lambda_ must be finite"
    return torch.tensor(lambda_, dtype=torch.float64)


def gradient_reversal(x: Tensor, lambda_: Tensor | float) -> Tensor:
    return torch.ops.grl_ext.gradient_reversal(x, as_tensor(lambda_))


def grl_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lambda_: Tensor | float) -> Tensor:
    return torch.ops.grl_ext.grl_linear(x, weight, bias, as_tensor(lambda_))
