"""Are the heads ever slower than the same network layer by layer? Random networks, and those where they are.

    python bench/sweep.py --count 60 --dtype float16 --seed 1

The layers are PyTorch's own, behind the fastest reversal that Python has, with `F.cross_entropy` for each head. A step
is forward, losses and all gradients. Both are timed in turns; a ratio is the median of their pairs, and counts as above
1 only where it is so in more rounds than chance allows.
"""

import argparse
import copy
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import baselines
import grl_ext
from cases import COEFF, WrongResult
from heads import Sizes, whole_deviation
from measure import Spread, interleave, is_above, paired_ratio, wall_timer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LARGEST = 3e8  # multiply-adds of a forward, so that a step takes some ten milliseconds at most
BATCHES = 4  # of rounds: a network that seems slower is measured again, which chance does not survive


@dataclass(frozen=True)
class Network:
    rows: int
    features: int
    predictors: tuple[Sizes, ...]
    adversaries: tuple[Sizes, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        heads = " ".join("-".join(map(str, sizes)) for sizes in self.predictors)
        others = " ".join("-".join(map(str, sizes)) for sizes in self.adversaries)
        return f"{str(self.dtype).removeprefix('torch.')} {self.rows}x{self.features} [{heads}] reversed [{others}]"

    @property
    def multiply_adds(self) -> int:
        products = 0
        for sizes in (*self.predictors, *self.adversaries):
            products += sum(a * b for a, b in zip((self.features, *sizes[:-1]), sizes, strict=True))
        return self.rows * products


def between(draw: random.Random, low: int, high: int) -> int:
    """A size between the two; each power of two is as likely as the next."""
    return round(2 ** draw.uniform(math.log2(low), math.log2(high)))


def drawn(draw: random.Random, dtype: torch.dtype) -> Network:
    """Most heads are narrow, some are wide, a third of the networks have hidden layers."""

    def sizes(layers: int) -> Sizes:
        hidden = [between(draw, 16, 1024) for _ in range(layers)]
        return (*hidden, between(draw, 1, 2000 if draw.random() < 0.2 else 40))

    while True:
        with_hidden = draw.random() < 1 / 3
        heads = [sizes(draw.randrange(3) if with_hidden else 0) for _ in range(between(draw, 1, 8))]
        first = draw.randrange(len(heads))
        network = Network(
            between(draw, 16, 8192), between(draw, 8, 2048), tuple(heads[:first]), tuple(heads[first:]), dtype
        )
        if network.multiply_adds <= LARGEST:
            return network


class Problem:
    def __init__(self, network: Network) -> None:
        self.network = network
        torch.manual_seed(0)
        self.features = torch.randn(network.rows, network.features).to(network.dtype).requires_grad_()
        self.heads = grl_ext.AdversarialHeads(
            network.features,
            {f"p{i}": sizes for i, sizes in enumerate(network.predictors)},
            {f"a{i}": sizes for i, sizes in enumerate(network.adversaries)},
            lambda_=COEFF,
            dtype=network.dtype,
        )
        sizes = {**self.heads.predictors, **self.heads.adversaries}
        columns = {
            name: (head if isinstance(head, nn.Linear) else head[-1]).out_features for name, head in sizes.items()
        }
        self.targets = {name: torch.randint(max(2, size), (network.rows,)) for name, size in columns.items()}

    def fused(self) -> Callable[[], Sequence[Tensor]]:
        parameters = list(self.heads.parameters())

        def step() -> Sequence[Tensor]:
            loss = self.heads(self.features, self.targets).loss
            return torch.autograd.grad(loss, [self.features, *parameters])

        return step

    def layered(self, dtype: torch.dtype | None = None) -> Callable[[], Sequence[Tensor]]:
        heads = copy.deepcopy(self.heads).to(dtype)
        features = self.features.detach().to(dtype or self.features.dtype).requires_grad_()
        reversal, parameters = baselines.Tuned(COEFF), list(heads.parameters())

        def loss_of(logits: Tensor, target: Tensor) -> Tensor:
            if logits.size(1) == 1:
                return F.binary_cross_entropy_with_logits(logits[:, 0], target.to(logits))
            return F.cross_entropy(logits, target)

        def step() -> Sequence[Tensor]:
            losses = [loss_of(head(features), self.targets[name]) for name, head in heads.predictors.items()]
            losses += [
                loss_of(head(reversal(features)), self.targets[name]) for name, head in heads.adversaries.items()
            ]
            return torch.autograd.grad(sum(losses), [features, *parameters])

        return step

    def check(self) -> None:
        deviates = whole_deviation(self.fused()(), self.layered(torch.float64)(), self.layered()())
        if deviates:
            raise WrongResult(f"{self.network}: {deviates}")


def ratio(problem: Problem, seconds: float) -> tuple[Spread, bool]:
    """Our time over that of the layers, and whether it is above 1 beyond the noise."""
    steps = {"layers": problem.layered(), "heads": problem.fused()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for batch in range(BATCHES):
        found = interleave(steps, wall_timer(), seconds=seconds / BATCHES, min_rounds=12, seed=batch)
        for name, own in samples.items():
            own += found[name]
        if not is_above(samples["heads"], samples["layers"], margin=0.0):
            break
    spread = paired_ratio(samples["heads"], samples["layers"])
    assert spread is not None  # the layers took time
    return spread, is_above(samples["heads"], samples["layers"], margin=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="networks of each dtype")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="one or more; default: all four")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1.0, help="for the rounds of a network that seems slower")
    arguments = parser.parse_args()
    for name in arguments.dtype or DTYPES:
        draw = random.Random(arguments.seed)
        medians, slower = [], []
        for _ in tqdm(range(arguments.count), desc=name, leave=False):
            problem = Problem(drawn(draw, DTYPES[name]))
            problem.check()
            spread, above = ratio(problem, arguments.seconds)
            medians.append(spread.median)
            if above:
                slower.append((spread, problem.network))
        print(
            f"{name}: {len(medians)} networks, our time over that of the layers: median "
            f"{statistics.median(medians):.2f}, largest {max(medians):.2f}; above 1: {len(slower)}",
            flush=True,
        )
        for spread, network in sorted(slower, key=lambda found: -found[0].median):
            print(f"  {spread.median:.2f} ({spread.q1:.2f} to {spread.q3:.2f})  {network}", flush=True)


if __name__ == "__main__":
    main()
