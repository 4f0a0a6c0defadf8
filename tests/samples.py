"""What the tests of the reversal share: samples of its arguments, the oracle, and gradients of any provenance."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from grl_ext import _reversal

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
SHAPE = (2, 3, 4, 5)

# Every form of lambda over SHAPE. 0.3 is in no binary type exactly, 7 is in all.
LAMBDAS: dict[str, Callable[[torch.device], Tensor | float]] = {
    "float": lambda device: 0.3,
    "negative float": lambda device: -0.3,
    "int": lambda device: 7,
    "numpy float32": lambda device: np.float32(0.3),
    "numpy int64": lambda device: np.int64(7),
    "0-d float32 on the CPU": lambda device: torch.tensor(0.3),
    "0-d float64 on the CPU": lambda device: torch.tensor(0.3, dtype=torch.float64),
    "0-d bfloat16 on the CPU": lambda device: torch.tensor(0.3, dtype=torch.bfloat16),
    "0-d int64 on the CPU": lambda device: torch.tensor(7),
    "0-d float32": lambda device: torch.tensor(0.3, device=device),
    "0-d float64": lambda device: torch.tensor(-0.3, dtype=torch.float64, device=device),
    "0-d int64": lambda device: torch.tensor(7, device=device),
    "0-d that requires grad": lambda device: torch.tensor(0.3, device=device, requires_grad=True),
    "one element": lambda device: torch.tensor([0.3], device=device),
    "one element of many dimensions": lambda device: torch.full((1, 1, 1, 1), 0.3, device=device),
    "per sample": lambda device: torch.randn(2, 1, 1, 1, device=device),
    "per sample, float64": lambda device: torch.randn(2, 1, 1, 1, dtype=torch.float64, device=device),
    "per sample, int64": lambda device: torch.tensor([7, 0], device=device).view(2, 1, 1, 1),
    "per sample, requires grad": lambda device: torch.randn(2, 1, 1, 1, device=device, requires_grad=True),
    "per channel": lambda device: torch.randn(1, 3, 1, 1, device=device),
    "per channel, no batch dimension": lambda device: torch.randn(3, 1, 1, device=device),
    "per sample and channel": lambda device: torch.randn(2, 3, 1, 1, device=device),
    "last dimension": lambda device: torch.randn(5, device=device),
    "full shape": lambda device: torch.randn(SHAPE, device=device),
    "sample and row: dimensions that are not neighbours": lambda device: torch.randn(2, 1, 4, 1, device=device),
    "channel and column: dimensions that are not neighbours": lambda device: torch.randn(3, 1, 5, device=device),
    "expanded": lambda device: torch.randn(2, 1, 1, 1, device=device).expand(2, 3, 1, 1),
    "strided": lambda device: torch.randn(2, 6, 1, 1, device=device)[:, ::2],
    "transposed full shape": lambda device: torch.randn(5, 4, 3, 2, device=device).permute(3, 2, 1, 0),
}

# Ways in which a tensor of SHAPE may lie in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "sliced": lambda t: torch.stack([t, t], dim=-1).flatten(-2)[..., ::2],
    "offset by one element": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1, :, :, :1].expand(t.shape),
}


class Sample(NamedTuple):
    name: str
    x: Tensor
    lambda_: Tensor | float


def sample_inputs(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Sample]:
    """Arguments of `gradient_reversal`; every x requires grad, whatever its layout."""
    x = torch.randn(SHAPE, dtype=dtype, device=device)
    samples = [Sample(name, x.clone(), make(device)) for name, make in LAMBDAS.items()]
    samples += [Sample(f"{name} x", layout(x), torch.tensor(0.3)) for name, layout in LAYOUTS.items()]
    samples += [
        Sample("0-d x", x[0, 0, 0, 0].clone(), 0.3),
        Sample("empty x", x[:0], 0.3),
        Sample("empty x, lambda per sample", x[:0], torch.randn(0, 1, 1, 1, device=device)),
        Sample("x with sizes of 1", x[:1, :, :1], torch.randn(1, 3, 1, 1, device=device)),
    ]
    return [sample._replace(x=sample.x.detach().requires_grad_()) for sample in samples]


def expected_gradient(grad: Tensor, lambda_: Tensor | float) -> Tensor:
    """-lambda * grad by the reference in float64, in grad's dtype. To be met exactly, without a tolerance.

    Lambda is first rounded to the type of the arithmetic, float32 for half types. A product of two float32 numbers has
    48 bits and is exact in float64, so that the oracle's only roundings are those that the operation may make: one to
    the type of the arithmetic, and for half types one more to the type itself.
    """
    double = grad.dtype in (torch.float64, torch.complex128)
    value = lambda_.detach() if isinstance(lambda_, Tensor) else torch.tensor(float(lambda_), dtype=torch.float64)
    value = value.to(torch.float64 if double else torch.float32).to(grad.device, torch.float64)
    exact = _reversal.scale(grad.to(torch.promote_types(grad.dtype, torch.float64)), -value)
    return exact.to(torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal in every element, NaN included, and of one shape, dtype and device."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@contextmanager
def case(*name: object) -> Iterator[None]:
    """Names the case of a loop in its failure."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{', '.join(map(str, name))}: {error}") from error


class Emit(torch.autograd.Function):
    """A scalar whose backward is whatever `make()` returns: a gradient of any provenance, with no reference left
    behind."""

    @staticmethod
    def forward(ctx, y: Tensor, make: Callable[[], Tensor]) -> Tensor:
        ctx.make = make
        return torch.zeros((), device=y.device)

    @staticmethod
    def backward(ctx, _: Tensor):
        return ctx.make(), None


def deliver(y: Tensor, grad: Tensor) -> Tensor:
    """A scalar whose backward delivers a copy of `grad` to y in a buffer that was born in C++ and that nobody else
    holds.

    A gradient that has passed through Python is held by its Python object for as long as it lives, and is never
    overwritten.
    """
    return Emit.apply(y.neg(), grad.neg)
