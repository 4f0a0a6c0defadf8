"""The layers that are compared: `layer(x)` is the identity forward and multiplies the gradient by -coeff backward.

The published ones are called as their users call them; what is not installed is left out, with the reason.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import grl_ext

# The reference is what ratios are taken of; a yardstick is other work, for scale.
Kind = Literal["identity", "reference", "peer", "ours", "yardstick"]


class Identity(nn.Module):
    """No reversal: what a layer costs that does nothing at all. It is subtracted from the others."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view_as(x)


class _PastedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.neg() * ctx.alpha, None


class Pasted(nn.Module):
    """The common Python layer: a view forward, two passes backward.

    Some code bases have a copy in the forward, `x * 1.0` or `x.clone()`. That costs one pass more, and is not measured.
    """

    def __init__(self, coeff: float) -> None:
        super().__init__()
        self.coeff = coeff

    def forward(self, x: Tensor) -> Tensor:
        return _PastedFunction.apply(x, self.coeff)


class _TunedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, coeff):
        ctx.factor = -coeff
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class Tuned(nn.Module):
    """The best that Python can do: a view forward, one multiplication backward."""

    def __init__(self, coeff: float) -> None:
        super().__init__()
        self.coeff = coeff

    def forward(self, x: Tensor) -> Tensor:
        return _TunedFunction.apply(x, self.coeff)


@dataclass(frozen=True)
class Layer:
    name: str
    kind: Kind
    make: Callable[[float], nn.Module]  # from coeff


def _published(name: str, module: str, make: Callable[..., nn.Module]) -> tuple[Layer | None, str]:
    """The layer of a package, or None and why not: importing a package can fail in more ways than being absent."""
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # noqa: BLE001
        return None, f"{name} is left out: {type(error).__name__}: {error}"
    return Layer(name, "peer", functools.partial(make, imported)), ""


@functools.cache
def layers() -> tuple[list[Layer], list[str]]:
    """Every layer that can be made here, and a line for each that cannot."""
    published = [
        _published("pytorch-revgrad", "pytorch_revgrad", lambda package, coeff: package.RevGrad(alpha=coeff)),
        _published(
            "pytorch-adapt",
            "pytorch_adapt.layers.gradient_reversal",
            lambda package, coeff: package.GradientReversal(weight=coeff),
        ),
    ]
    found = [
        Layer("identity", "identity", lambda coeff: Identity()),
        Layer("pasted", "reference", Pasted),
        Layer("tuned", "peer", Tuned),
        *(layer for layer, _ in published if layer is not None),
        Layer("grl_ext", "ours", lambda coeff: grl_ext.GRL(lambda_=coeff)),
    ]
    return found, [reason for _, reason in published if reason]


@functools.cache
def compile_problem(device: str) -> str | None:
    """Why torch.compile is of no use here (no C++ compiler, no Triton, switched off), or None."""

    def probe(x: Tensor) -> Tensor:
        return x + 1 if torch.compiler.is_compiling() else x

    try:
        compiled = torch.compile(probe)(torch.zeros(8, device=device)).sum().item() == 8
    except Exception as error:  # noqa: BLE001
        return f"the compiled rows are left out: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None if compiled else "the compiled rows are left out: torch.compile is switched off"
