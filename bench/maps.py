"""Heads at every pixel of a feature map: what the map's layout in memory costs."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import baselines
import grl_ext
from cases import COEFF, Case, Remarks, Row, Settings, Work, deviation, judge

CLASSES, DOMAINS = 19, 2


def _build(n: int, c: int, side: int, settings: Settings) -> Work:
    kwargs = {"device": settings.device, "dtype": settings.dtype}
    torch.manual_seed(0)
    maps = torch.randn(n, c, side, side).to(**kwargs)
    targets = {"label": torch.randint(CLASSES, (n, side, side)), "domain": torch.randint(DOMAINS, (n, side, side))}
    targets = {name: target.to(settings.device) for name, target in targets.items()}
    label, domain = nn.Linear(c, CLASSES).to(**kwargs), nn.Linear(c, DOMAINS).to(**kwargs)
    parameters = [*label.parameters(), *domain.parameters()]
    layer = baselines.Pasted(COEFF)
    heads = grl_ext.AdversarialHeads(c, {"label": label}, {"domain": domain}, lambda_=COEFF, dim=1)
    over_rows = grl_ext.AdversarialHeads(c, {"label": label}, {"domain": domain}, lambda_=COEFF)

    def layered(x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        parts = (label(rows), targets["label"]), (domain(layer(rows)), targets["domain"])
        return sum(F.cross_entropy(z.flatten(0, 2), target.flatten()) for z, target in parts)

    def step_of(x: Tensor, loss: Callable[[Tensor], Tensor]) -> Callable[[], Sequence[Tensor]]:
        x = x.detach().requires_grad_()
        return lambda: torch.autograd.grad(loss(x), [x, *parameters])

    channels_last = maps.clone(memory_format=torch.channels_last)
    rows = channels_last.permute(0, 2, 3, 1)
    measured = [
        Row("pasted, NCHW", "reference", step_of(maps, layered)),
        Row("pasted, channels_last", "peer", step_of(channels_last, layered)),
        Row("heads(dim=1), NCHW", "ours", step_of(maps, lambda x: heads(x, targets).loss)),
        Row("heads(dim=1), channels_last", "ours", step_of(channels_last, lambda x: heads(x, targets).loss)),
    ]
    yardstick = Row("yardstick: heads over rows", "yardstick", step_of(rows, lambda x: over_rows(x, targets).loss))

    def check() -> Remarks:
        expected, remarks = [t.double() for t in measured[0].step()], {}
        eps = max(
            torch.finfo(settings.dtype).eps, torch.finfo(torch.float32).eps if settings.dtype != torch.float64 else 0
        )
        for row in measured[1:]:
            judge(row, deviation(row.step(), expected, 16 * math.sqrt(n * side * side) * eps), remarks)
        return remarks

    return Work([*measured, yardstick], check, "yardstick: the same heads over rows (N, C)")


def heads_maps(settings: Settings) -> list[Case]:
    n, c, side = (2, 64, 8) if settings.quick else (16, 256, 28)
    return [
        Case(
            f"heads_maps/{n}x{c}x{side}x{side}_{CLASSES}+{DOMAINS}",
            f"two heads at every pixel of ({n}, {c}, {side}, {side}) maps, forward + backward",
            partial(_build, n, c, side, settings),
            seconds=1.0 if settings.quick else 4.0,
        )
    ]


GROUPS = {"heads_maps": heads_maps}
