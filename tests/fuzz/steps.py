"""Trains for many steps and looks whether memory stays flat: resident bytes, live tensors, and what only the garbage
collector frees.

python tests/fuzz/steps.py --count 100000 [--path compiled|fallback]

A step has all operations of grl_ext over small tensors: layers, heads with a loss and weights, a lambda that changes,
and now and then
what programs also do: gradients of gradients, `retain_graph`, no gradient at all, an error.
"""

import argparse
import contextlib
import gc
import resource
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import grl_ext
from grl_ext import _backend

PAGE = resource.getpagesize()
WARM_UP = 500  # at least: until then allocators and caches of PyTorch and Python grow
SAMPLES = 10


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.reversal, self.linear = nn.Linear(6, 8), grl_ext.GRL(), grl_ext.GRLLinear(8, 2)
        self.heads = grl_ext.AdversarialHeads(
            8,
            {"digit": 3, "age": [5, 1]},
            {"domain": 2, "speaker": [4, 3], "room": nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))},
            losses={"age": "mse"},
        )
        self.schedule = grl_ext.LambdaScheduler(
            [self.reversal, self.linear, self.heads], grl_ext.schedules.dann(), 1000
        )

    def forward(self, rows: int, seed: int) -> Tensor:
        torch.manual_seed(seed)
        x, labels = torch.randn(rows, 6), torch.randint(3, (rows,))
        two = labels.clamp(max=1)
        features = self.encoder(x).tanh()
        out = self.heads(
            features,
            {"digit": labels.where(labels != 2, -100), "age": x[:, :1], "domain": two, "speaker": labels, "room": two},
            sample_weight=x[:, 0].abs(),
            class_weight={"digit": torch.tensor([1.0, 2.0, 0.5])},
            loss_weight={"speaker": 0.5},
            label_smoothing=0.1,
        )
        logits = self.heads(features)
        reversed_ = grl_ext.gradient_reversal(self.reversal(features), torch.rand(rows, 1))
        others = self.linear(features).square().mean() + reversed_.square().mean() + logits["domain"].square().mean()
        return out.loss + others + out.head_losses["domain"] + out.logits["digit"].square().mean()


class Training:
    def __init__(self) -> None:
        self.network = Network()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3, fused=True)

    def step(self, i: int) -> None:
        rows = (1, 4, 7, 16)[i % 4]
        loss = self.network(rows, i)
        parameters = list(self.network.parameters())
        if i % 50 == 1:
            first = torch.autograd.grad(loss, parameters, create_graph=True)
            loss = loss + 1e-3 * sum(gradient.square().sum() for gradient in first)
        if i % 50 == 2:
            loss.backward(retain_graph=True)
        self.optimizer.zero_grad(set_to_none=i % 3 != 0)
        loss.backward()
        self.optimizer.step()
        self.network.schedule.step()
        if i % 50 == 3:
            with torch.no_grad():
                self.network(rows, i)
        if i % 50 == 4:
            with contextlib.suppress(ValueError):
                self.network.heads(torch.randn(rows, 8), {"digit": torch.zeros(rows + 1, dtype=torch.int64)})


class Sample(NamedTuple):
    step: int
    resident: int  # bytes
    tensors: int
    garbage: int  # objects that only the garbage collector could free, since the sample before


def sample(step: int) -> Sample:
    garbage = gc.collect()
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * PAGE
    return Sample(step, resident, sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()), garbage)


def run(count: int, step: Callable[[int], None]) -> list[Sample]:
    """Samples at equal distances, the first after the warm-up."""
    warm_up = max(WARM_UP, count // 10)
    every = max(1, (count - warm_up) // SAMPLES)
    samples = []
    gc.disable()  # so that garbage adds up until it is counted
    gc.freeze()  # what is there before is not looked at, which saves time
    try:
        for i in range(warm_up):
            step(i)
        for _ in range(3):  # the list of all objects takes memory too
            sample(0)
        samples.append(sample(warm_up))
        for i in range(warm_up, warm_up + SAMPLES * every):
            step(i)
            if (i + 1 - warm_up) % every == 0:
                samples.append(sample(i + 1))
    finally:
        gc.unfreeze()
        gc.enable()
    return samples


def complaint(samples: list[Sample]) -> str | None:
    """What grew; None if nothing did."""
    first, last = samples[0], samples[-1]
    if last.tensors > first.tensors:
        return f"{last.tensors - first.tensors} more tensors are alive"
    if garbage := sum(own.garbage for own in samples[1:]):
        return f"{garbage} objects were freed by the garbage collector only"
    # An allocator's own ups and downs are some pages. The smallest object that a step could leave behind takes 16
    # bytes.
    grown, allowed = last.resident - first.resident, max(128 * 1024, 8 * (last.step - first.step))
    return f"{grown} more bytes are resident, where {allowed} are allowed" if grown > allowed else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100000)
    parser.add_argument("--path", choices=["compiled", "fallback"], default="compiled")
    arguments = parser.parse_args()
    if arguments.path == "fallback":
        _backend.C = None
    elif _backend.C is None:
        sys.exit(f"no compiled extension: {_backend.why_not}")
    torch.set_num_threads(1)
    samples = run(arguments.count, Training().step)
    print(f"{'step':>8} {'resident, KiB':>14} {'live tensors':>13} {'garbage':>8}")
    for own in samples:
        print(f"{own.step:8} {own.resident // 1024:14} {own.tensors:13} {own.garbage:8}")
    if found := complaint(samples):
        sys.exit(f"{arguments.path}: {found}")
    print(f"{arguments.path}: flat from step {samples[0].step} to {samples[-1].step}")


if __name__ == "__main__":
    main()
