"""A whole training step of the experiment that this project began with (does a pair of digits contain a zero?), as the
examples have it.

The rows exchange the reversal layer; the last puts fused heads in the place of the layer and the two heads.
"""

import copy
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import baselines
import grl_ext
from cases import COEFF, Case, Remarks, Row, Settings, Work, compiled_in, deviation, errors, judge, sections

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # scripts, not part of the package

from common.data import digit_pairs, scaled_digits  # noqa: E402
from common.founding import MnistNN2, losses  # noqa: E402


def _build(batch: int, settings: Settings) -> Work:
    images, digits = scaled_digits()
    images, labels = digit_pairs(images, digits, batch, torch.Generator().manual_seed(0))
    images, labels = images.to(settings.device, settings.dtype), labels.to(settings.device)
    torch.manual_seed(0)
    start = MnistNN2(baselines.Identity()).to(settings.device, settings.dtype)
    rows, made = [], {}

    def add(
        name: str, kind: baselines.Kind, network: MnistNN2, loss: Callable[[], Tensor], section: str = "eager"
    ) -> None:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.001)

        def step() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        rows.append(Row(name, kind, step, section))
        made[rows[-1]] = network, loss

    def layered(network: MnistNN2) -> Tensor:
        return sum(losses(network, images, labels))

    # The step takes longest to compile, and with tuned it gives the same code as with pasted.
    for section, layers in sections(settings, ("pasted", "grl_ext")):
        for layer in layers:
            network = copy.deepcopy(start)
            network.reversal = layer.make(COEFF).to(settings.device)
            add(layer.name, layer.kind, network, compiled_in(partial(layered, network), section), section)

    network, targets = copy.deepcopy(start), {"out": labels, "advout": 1 - labels}
    heads = grl_ext.AdversarialHeads(
        network.out.in_features, {"out": network.out}, {"advout": network.advout}, lambda_=COEFF
    )
    add("AdversarialHeads", "ours", network, lambda: heads(network.extractor(images), targets).loss)

    def check() -> Remarks:
        remarks, allowed = {}, {}
        # TF32, the default of CUDA's convolutions, would drown the comparison: off here, on in the steps that are
        # timed.
        with torch.backends.cudnn.flags(allow_tf32=False):
            expected = gradients_without_layer()
            for row, (network, loss) in made.items():
                if row.kind == "identity":
                    continue
                found = torch.autograd.grad(loss(), [*extractor_of(network), *heads_of(network)])
                if row.kind == "reference":
                    # What a compiler makes of the convolutions is in every row of its section.
                    allowed[row.section] = max(tolerance, 2 * max(errors(found, expected)))
                of_row = allowed.get(row.section, tolerance) if row.kind == "ours" else tolerance
                judge(row, deviation(found, expected, of_row), remarks)
        return remarks

    def gradients_without_layer() -> list[Tensor]:
        """What reversal means: the extractor descends prediction - COEFF * adversary, the heads their own losses."""
        prediction, adversary = losses(start, images, labels)
        extractor = torch.autograd.grad(prediction - COEFF * adversary, extractor_of(start), retain_graph=True)
        return [*extractor, *torch.autograd.grad(prediction + adversary, heads_of(start))]

    def extractor_of(network: MnistNN2) -> list[Tensor]:
        return list(network.extractor.parameters())

    def heads_of(network: MnistNN2) -> list[Tensor]:
        return [*network.out.parameters(), *network.advout.parameters()]

    # The longest sum is a convolution's weight gradient over batch x 28 x 28 terms, added up in float32 (or float64) in
    # an order that may differ: its rounding grows like a random walk. Half types round once more after each of the
    # eight layers.
    accumulator = torch.float64 if settings.dtype == torch.float64 else torch.float32
    tolerance = math.sqrt(batch * 28 * 28) * torch.finfo(accumulator).eps
    if settings.dtype in (torch.float16, torch.bfloat16):
        tolerance += 8 * torch.finfo(settings.dtype).eps
    return Work(rows, check, "yardstick: the identity's row, the same step with no reversal at all")


def founding(settings: Settings) -> list[Case]:
    batch = 100 if settings.quick else 1000
    return [
        Case(
            "founding",
            f"a whole training step of the founding experiment's network, {batch} pairs of real digits",
            partial(_build, batch, settings),
            seconds=2.0 if settings.quick else 16.0,
        )
    ]


GROUPS = {"founding": founding}
