"""The operations in plain PyTorch, as a user would write them: what the fuzzer's programs are compared with.

Written apart from `grl_ext._plain`, so that no mistake of that is repeated here.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from head_samples import naive_loss
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


class AdversarialHeads(nn.Module):
    """Module by module, each adversary behind a reversal of its own."""

    def __init__(self, in_features: int, predictors: dict, adversaries: dict, *, lambda_: dict, losses: dict):
        super().__init__()
        self.predictors, self.adversaries = nn.ModuleDict(predictors), nn.ModuleDict(adversaries)
        self.numbers, self.losses = dict(lambda_), losses

    def __setattr__(self, name: str, value) -> None:
        if name == "lambda_":
            self.numbers.update(value)
        else:
            super().__setattr__(name, value)

    def forward(self, features: Tensor, targets: dict | None = None, **options):
        logits = {}
        for name, module in [*self.predictors.items(), *self.adversaries.items()]:
            if targets is None or name in targets:
                logits[name] = module(
                    gradient_reversal(features, self.numbers[name]) if name in self.numbers else features
                )
        if targets is None:
            return logits
        by_name = {"sample_weight": None, "class_weight": None, "loss_weight": 1.0}
        for option, otherwise in by_name.items():
            if isinstance(given := options.get(option), dict):
                options[option] = [given.get(name, otherwise) for name in logits]
        losses = [self.losses.get(name, "cross_entropy") for name in logits]
        heads = SimpleNamespace(targets=[targets[name] for name in logits], losses=losses)
        loss, head_losses, _ = naive_loss(heads, logits=list(logits.values()), **options)
        return SimpleNamespace(loss=loss, head_losses=dict(zip(logits, head_losses, strict=True)), logits=logits)


OPERATIONS = SimpleNamespace(
    gradient_reversal=gradient_reversal, grl_linear=grl_linear, GRL=GRL, AdversarialHeads=AdversarialHeads
)
