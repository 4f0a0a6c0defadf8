"""Runs random programs through grl_ext and through plain PyTorch, and compares all that they record.

python tests/fuzz/fuzz.py --count 100000 [--seed 0] [--path compiled|fallback]

Each kind of program is a module with `run(seed, operations)`, which returns what it recorded: pairs of a name and a
tensor, a string or None. A new kind is added to KINDS.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import autograd_programs
import heads_programs
import plain
import torch
import torch.nn.functional as F
from torch import Tensor

import grl_ext
from grl_ext import _backend

KINDS = {"autograd": autograd_programs, "heads": heads_programs}

OURS = SimpleNamespace(
    gradient_reversal=grl_ext.gradient_reversal,
    grl_linear=grl_ext.grl_linear,
    GRL=grl_ext.GRL,
    AdversarialHeads=grl_ext.AdversarialHeads,
    LambdaScheduler=grl_ext.LambdaScheduler,
)


def tolerated(records: list[tuple[str, object]]) -> float:
    """Relative to the largest element of a tensor. The order of sums and the place of the factor differ in a matrix
    product: some roundings of the coarsest dtype in the program, because the result of one is the argument of another.
    """
    dtypes = {
        value.dtype
        for _, value in records
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    }
    eps = max([torch.finfo(dtype).eps for dtype in dtypes], default=0.0)
    if eps < torch.finfo(torch.float32).eps:
        return 2**22 * eps  # far below any mistake, though terms cancel in gradients of gradients
    return eps * (256 if eps < 1e-6 else 8)


@contextmanager
def rounded_otherwise(seed: int) -> Iterator[None]:
    """Every linear layer's result off by at most one rounding."""
    linear, numbers = F.linear, torch.Generator().manual_seed(seed)

    def other(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        z = linear(x, weight, bias)
        share = torch.rand(z.shape, generator=numbers, dtype=torch.float64) * 2 - 1
        return z * (1 + torch.finfo(z.dtype).eps * share).to(z.dtype)

    with mock.patch.object(F, "linear", other):
        yield


def sensitivity(kind: str, seed: int, theirs: list[tuple[str, object]]) -> list[float]:
    """How far plain PyTorch's records move by a rounding. Terms may cancel: those of a gradient through weight norm
    over one input do so wholly."""
    moved = [0.0] * len(theirs)
    for draw in range(3):
        with rounded_otherwise(draw):
            others = KINDS[kind].run(seed, plain.OPERATIONS)
        for i, ((_, value), (_, other)) in enumerate(zip(theirs, others, strict=True)):
            if isinstance(value, Tensor) and value.is_floating_point():
                off = (other - value).abs()
                moved[i] = max([moved[i], *off[off.isfinite()].flatten().tolist()])
    return moved


def difference(
    ours: list[tuple[str, object]], theirs: list[tuple[str, object]], moved: list[float] | None = None
) -> str | None:
    """The first record that differs; `moved`: how far each may move by a rounding."""
    fused = ("fused", True) in ours
    relative = tolerated(theirs)
    moved = [0.0] * len(theirs) if moved is None else moved
    for (name, our), (expected_name, their), of_rounding in zip(ours, theirs, moved, strict=False):
        if any(isinstance(value, str) and "single memory location" in value for value in (our, their)):
            return None  # two views may differ in the stride of a dimension of size 1, which PyTorch looks at there
        if fused and "RuntimeError: inplace|in-place" in (
            our if isinstance(our, str) else None,
            their if isinstance(their, str) else None,
        ):
            return None  # a fused operation saves less than its parts: what may not change any more differs
        if name != expected_name:
            return f"'{name}' instead of '{expected_name}'"
        if not isinstance(our, Tensor) or not isinstance(their, Tensor):
            if type(our) is not type(their) or our != their:
                return f"{name}: {our} instead of {their}"
            continue
        if our.dtype != their.dtype or our.shape != their.shape:
            return f"{name}: {our.dtype} {list(our.shape)} instead of {their.dtype} {list(their.shape)}"
        tolerance = 0.0
        if our.is_floating_point() or our.is_complex():
            finite = their[their.isfinite()].abs()
            scale = max(1.0, finite.max().item()) if finite.numel() else 1.0
            tolerance = relative * scale + 64 * of_rounding  # ours rounds in more places
        if not torch.allclose(our, their, rtol=0, atol=tolerance, equal_nan=True):
            off = (our - their).abs().max().item()
            return f"{name} is off by {off:.2g}, allowed are {tolerance:.2g}:\n{our}\ninstead of\n{their}"
    if len(ours) != len(theirs):
        return f"{len(ours)} records instead of {len(theirs)}"
    return None


def check(kind: str, seed: int) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = KINDS[kind].run(seed, plain.OPERATIONS)
        try:
            ours = KINDS[kind].run(seed, OURS)
        except Exception as error:  # programs record the errors that they expect
            return f"{type(error).__name__}: {error}"
        found = difference(ours, theirs)
        return found and difference(ours, theirs, sensitivity(kind, seed, theirs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="the first program's; the others follow")
    parser.add_argument("--path", choices=["compiled", "fallback"], default="compiled")
    parser.add_argument("--kind", choices=KINDS, default="autograd")
    args = parser.parse_args()
    if args.path == "fallback":
        _backend.C = None
    elif _backend.C is None:
        sys.exit(f"no compiled extension: {_backend.why_not}")
    wrong = 0
    for seed in range(args.seed, args.seed + args.count):
        if found := check(args.kind, seed):
            wrong += 1
            print(f"{args.kind} program {seed}: {found}", flush=True)
    print(f"{args.count} {args.kind} programs on the {args.path} path, {wrong} with a difference", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
