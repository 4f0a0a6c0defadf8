"""The scaling of a gradient alone, against the copy that any such pass must cost: the CUDA kernel in each of its
forms."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from cases import COEFF, Case, Remarks, Row, Settings, Work, deviation, judge

SIZES = {"64M": 2**26, "256M": 2**28}
KEPT_FROM_L2 = 256 << 20  # bytes: several times the largest L2 cache


def turns(nbytes: int) -> int:
    """How many buffers of that size exceed the L2 cache together, two at least."""
    return max(2, -(-KEPT_FROM_L2 // max(1, nbytes)) + 1)


def _build(numel: int, settings: Settings) -> Work:
    # Steps take turns over several buffers, so that none finds its input in the GPU's cache.
    kwargs = {"device": settings.device, "dtype": settings.dtype}
    grads = [
        torch.randn(numel, **kwargs)
        for _ in range(turns(numel * settings.dtype.itemsize) if settings.device == "cuda" else 2)
    ]
    out = torch.empty(numel, **kwargs)
    host, device = (-COEFF, None), (-1.0, torch.tensor(COEFF, device=settings.device))
    scale, scale_ = torch.ops.grl_ext._scale, torch.ops.grl_ext._scale_

    def in_turns(step: Callable[[Tensor], object]) -> Callable[[], object]:
        turn = cycle(grads)
        return lambda: step(next(turn))

    rows = [
        Row("pasted: neg, then mul", "reference", in_turns(lambda grad: grad.neg() * COEFF)),
        Row("tuned: one mul", "peer", in_turns(lambda grad: grad * -COEFF)),
        Row("out of place, lambda on the host", "ours", in_turns(lambda grad: scale(grad, *host))),
        Row("out of place, lambda on the device", "ours", in_turns(lambda grad: scale(grad, *device))),
        # The factors 1 and -1 by turns would leave the numbers in range, but the kernel skips its work for a 1. With
        # this constant the buffers become zeros at last, which take as long to move.
        Row("in place, lambda on the host", "ours", in_turns(lambda grad: scale_(grad, *host))),
        Row("in place, lambda on the device", "ours", in_turns(lambda grad: scale_(grad, *device))),
        Row("yardstick", "yardstick", in_turns(out.copy_)),
    ]

    def check() -> Remarks:
        grad, remarks = grads[0], {}
        expected = [grad * -COEFF]
        for factor, tensor in (host, device):
            written = grad.clone()
            scale_(written, factor, tensor)
            for found in (written, scale(grad, factor, tensor)):
                judge(rows[0], deviation([found], expected, 0), remarks)
        return remarks

    return Work(rows, check, "yardstick: one copy, which reads and writes as much")


def bandwidth(settings: Settings) -> Sequence[Case]:
    if settings.device == "cuda":
        sizes = {name: numel for name, numel in SIZES.items() if not settings.quick or name == "64M"}
    else:  # the kernels in question are CUDA's; a small run shows that the rows are right
        sizes = {"1M": 2**20} if settings.quick else {}
    return [
        Case(f"bandwidth/{name}", f"-lambda * grad over {name} elements", partial(_build, numel, settings), seconds=2.0)
        for name, numel in sizes.items()
    ]


GROUPS = {"bandwidth": bandwidth}
