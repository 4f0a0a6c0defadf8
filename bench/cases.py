"""What is measured. A case builds rows (callables that do the same work with different layers), says how their results
are checked, and whether they are timed or their memory is counted.

To add a group: write a function that takes `Settings` and returns its `Case`s, and name it in `GROUPS`. Ratios are
taken within a section; a case that wants eager and compiled rows compared with each other gives them the same one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Literal

import torch
from torch import Tensor, nn

import baselines
from baselines import Kind
from measure import Step

COEFF = 0.5


class WrongResult(AssertionError):
    """A row of ours does not compute what it should: its time would mean nothing."""


@dataclass(frozen=True)
class Settings:
    device: str
    dtype: torch.dtype
    quick: bool  # smaller work, and no compiled rows: compiling takes longer than all the rest


@dataclass(frozen=True)
class Row:
    name: str
    kind: Kind
    step: Step
    section: str = "eager"


@dataclass(frozen=True)
class Work:
    """A case that is ready to run."""

    rows: list[Row]
    check: Callable[[], "Remarks"]  # raises WrongResult
    yardstick: str  # what the yardstick's row does


Remarks = dict[Row, str]  # how a rival's result deviates


@dataclass(frozen=True)
class Case:
    name: str  # the group, a slash, what distinguishes it
    title: str
    build: Callable[[], Work]
    measures: Literal["time", "memory", "launches"] = "time"  # launches: of kernels, on CUDA
    clock: Literal["device", "wall"] = "device"  # of a time on CUDA
    subtract_identity: bool = False  # report the cost over the section's identity row, not the whole
    seconds: float = 6.0  # how long the rounds may take together
    min_rounds: int = 9


def errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """For each tensor the largest one of an entry, relative to the largest expected entry."""
    return [
        (a.double() - b.double()).abs().max().item() / (b.abs().max().item() or 1.0)
        for a, b in zip(found, expected, strict=True)
    ]


def deviation(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> str | None:
    """None if every entry is within `tolerance` of the expected one."""
    for index, (a, error) in enumerate(zip(found, errors(found, expected), strict=True)):
        if not error <= tolerance:  # NaN is an error too
            return (
                f"gradient {index} of shape {list(a.shape)} is off by {error:.2g} of its largest entry, "
                f"allowed are {tolerance:.2g}"
            )
    return None


def judge(row: Row, deviates: str | None, remarks: Remarks) -> None:
    """Ours must be right. A rival's own rounding, such as that of a compiled convolution, is said in its row."""
    if deviates and row.kind in ("ours", "identity"):
        raise WrongResult(f"{row.section} {row.name}: {deviates}")
    if deviates:
        remarks[row] = deviates


def sections(settings: Settings, compiled: Sequence[str]) -> list[tuple[str, list[baselines.Layer]]]:
    """The eager rows, and the compiled rows that are named, where torch.compile can be had."""
    layers, _ = baselines.layers()
    found = [("eager", layers)]
    if compiled and not settings.quick and baselines.compile_problem(settings.device) is None:
        found.append(("compiled", [layer for layer in layers if layer.name in compiled]))
    return found


def compiled_in(function: Callable, section: str) -> Callable:
    # Static shapes: on the CPU the compiler decides from the size whether a loop is worth several threads.
    return torch.compile(function, fullgraph=True, dynamic=False) if section == "compiled" else function


# ---------------------------------------------------------------------------------------------------------------------
# tax: what the layer adds to a chain of operations.  memory: the same chain, in bytes
# ---------------------------------------------------------------------------------------------------------------------

SIZES = {"64": 2**6, "4k": 2**12, "1M": 2**20, "16M": 2**24}


class Chain(nn.Module):
    """mul -> layer -> mul, so that the gradient reaches the layer in a buffer fresh from another operation, as in a
    network.

    A multiplication by a number saves nothing for backward and its gradient is one more multiplication: the cheapest
    neighbours there are, next to which the layer shows most.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * 1.25) * 1.75


def _build_chain(numel: int, with_yardstick: bool, settings: Settings) -> Work:
    # What torch.compile makes of the published layers is what it makes of the pasted one: their graphs are the same.
    # And between the ends of the range nothing changes but the size, so that the minutes of compiling are spent on
    # timing the ends only.
    compiled = (
        ("identity", "pasted", "tuned", "grl_ext") if with_yardstick and numel in (SIZES["64"], SIZES["16M"]) else ()
    )
    kwargs = {"device": settings.device, "dtype": settings.dtype}
    generator = torch.Generator().manual_seed(0)
    # Sizes that do not fit the caches take turns over several tensors, so that no row finds its input left there by the
    # last.
    turns = 4 if numel >= SIZES["16M"] else 1
    inputs = [torch.randn(numel, generator=generator).to(**kwargs).requires_grad_() for _ in range(turns)]
    grad = torch.randn(numel, generator=generator).to(**kwargs)

    def chain_step(chain: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        turn = cycle(inputs)

        def step() -> Tensor:
            x = next(turn)
            return torch.autograd.grad(chain(x), x, grad)[0]

        return step

    rows = [
        Row(
            layer.name,
            layer.kind,
            chain_step(compiled_in(Chain(layer.make(COEFF).to(settings.device)), section)),
            section,
        )
        for section, found in sections(settings, compiled)
        for layer in found
    ]

    def check() -> Remarks:
        identity, remarks = rows[0].step(), {}
        for row in rows:
            expected = identity if row.kind == "identity" else -COEFF * identity
            # Two multiplications and the layer's own, each rounded by at most half an eps, on either side.
            judge(row, deviation([row.step()], [expected], 3 * torch.finfo(settings.dtype).eps), remarks)
        return remarks

    if not with_yardstick:
        return Work(rows, check, "yardstick: none, the identity needs 0 by definition")
    buffers = cycle([x.detach().clone() for x in inputs])
    # By -1 the values neither grow nor fade while the row repeats; the cost is that of any factor.
    yardstick = Row("yardstick", "yardstick", lambda: next(buffers).mul_(-1.0))
    return Work(
        [*rows, yardstick], check, "yardstick: one in-place mul_ of that size, which reads the gradient and writes it"
    )


def tax(settings: Settings) -> list[Case]:
    names = [name for name in SIZES if not (settings.quick and name == "16M")]
    return [
        Case(
            f"tax/{name}",
            f"what the layer adds to mul -> layer -> mul, forward + backward, {SIZES[name]:,} elements",
            partial(_build_chain, SIZES[name], True, settings),
            subtract_identity=True,
            seconds=1.0 if settings.quick else 10.0 if name == "16M" else 3.0,
        )
        for name in names
    ]


def memory(settings: Settings) -> list[Case]:
    name = "1M" if settings.quick else "16M"
    return [
        Case(
            f"memory/{name}",
            f"peak memory that the layer adds to mul -> layer -> mul, forward + backward, {SIZES[name]:,} elements",
            partial(_build_chain, SIZES[name], False, settings),
            measures="memory",
            subtract_identity=True,
        )
    ]


GROUPS: dict[str, Callable[[Settings], list[Case]]] = {"tax": tax, "memory": memory}
