"""The linear layer behind a reversal, and where the CPU kernels of linear heads stop paying."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import baselines
import grl_ext
import heads
from cases import COEFF, Case, Remarks, Row, Settings, Work, deviation, judge


def _build_grl_linear(size: int, rows: int, settings: Settings) -> Work:
    kwargs = {"device": settings.device, "dtype": settings.dtype}
    torch.manual_seed(0)
    first = torch.randn(rows, size).to(**kwargs)
    buffers = [first.clone().requires_grad_() for _ in range(heads.turns(first))]
    grad = torch.randn(rows, size).to(**kwargs)
    plain = nn.Linear(size, size).to(**kwargs)
    fused = grl_ext.GRLLinear(size, size, lambda_=COEFF).to(**kwargs)
    fused.load_state_dict(plain.state_dict())

    def step_of(module: Callable[[Tensor], Tensor]) -> Callable[[], Sequence[Tensor]]:
        parameters = list(fused.parameters() if module is fused else plain.parameters())
        turn = cycle(buffers)

        def step() -> Sequence[Tensor]:
            x = next(turn)
            return torch.autograd.grad(module(x), [x, *parameters], grad)

        return step

    measured = [
        Row("pasted + nn.Linear", "reference", step_of(nn.Sequential(baselines.Pasted(COEFF), plain))),
        Row("nn.Linear alone", "peer", step_of(plain)),
        Row("GRLLinear", "ours", step_of(fused)),
    ]

    def check() -> Remarks:
        remarks = {}
        dx, *weights = measured[1].step()
        for row in (measured[0], measured[2]):
            eps = torch.finfo(settings.dtype).eps  # the factor is a power of two: exact but for the order of the sums
            judge(row, deviation(row.step(), [-COEFF * dx, *weights], 4 * math.sqrt(size) * eps), remarks)
        return remarks

    return Work(measured, check, "yardstick: nn.Linear alone, which reverses nothing")


def grl_linear(settings: Settings) -> list[Case]:
    rows, size = (256, 256) if settings.quick else (4096, 1024)
    return [
        Case(
            f"grl_linear/{rows}x{size}",
            f"linear layer behind a reversal, {rows}x{size} -> {size}, forward + backward",
            partial(_build_grl_linear, size, rows, settings),
            seconds=1.0 if settings.quick else 8.0,
        )
    ]


def _build_switch(columns: int, settings: Settings) -> Work:
    n, d = 4096, 1024
    torch.manual_seed(0)
    sizes = [columns - 2, 2]
    x, weight = torch.randn(n, d), [torch.randn(size, d) / math.sqrt(d) for size in sizes]
    factor, lambda_ = [1.0, -COEFF], [None, None]
    dz = [torch.randn(n, size) / n for size in sizes]

    def by_products() -> tuple[Tensor, ...]:
        for matrix in weight:
            F.linear(x, matrix)
        dx = dz[0].mm(weight[0])
        return dx.addmm_(dz[1], weight[1], alpha=-COEFF), *(g.T.mm(x) for g in dz)

    def ours() -> tuple[Tensor, ...]:
        torch.ops.grl_ext._heads_logits(x, weight, [None, None])
        dx, dw, _ = torch.ops.grl_ext._heads_gradients(dz, x, weight, factor, lambda_, [True] * 3 + [False] * 2)
        return dx, *dw

    def check() -> Remarks:
        remarks = {}
        tolerance = 4 * math.sqrt(n) * torch.finfo(torch.float32).eps
        judge(rows[1], deviation(ours(), by_products(), tolerance), remarks)
        return remarks

    rows = [Row("matrix products", "reference", by_products), Row("_heads kernels", "ours", ours)]
    return Work(rows, check, "yardstick: none, two forms of the same")


def switch(settings: Settings) -> list[Case]:
    """Where the CPU kernels stop paying: csrc/cpu/heads_limits.h. Past its bound both rows are matrix products."""
    columns = (12,) if settings.quick else (4, 12, 24, 33, 48, 64, 96, 128)
    return [
        Case(
            f"switch/{k}",
            f"4096x1024 features, {k} columns: logits and gradients",
            partial(_build_switch, k, settings),
            seconds=2.0,
        )
        for k in columns
        if settings.device == "cpu"
    ]


GROUPS = {"grl_linear": grl_linear}
BY_NAME_ONLY = {"switch": switch}  # for whoever sets the bound
