"""The fused heads: two heads over the same features, forward, losses and all gradients, against the layer-by-layer network.

Every row starts from the same weights and computes the loss and the gradients of features, weights and biases.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import baselines
import founding
import grl_ext
from cases import COEFF, Case, Row, Settings, Work, WrongResult, _compiled, check_gradients

Shape = tuple[int, int, tuple[int, int]]  # rows, features, classes of the predictor and of the adversary

SHAPES: dict[str, Shape] = {
    "128x256_10+2": (128, 256, (10, 2)),
    "1000x1764_2+2": (1000, 1764, (2, 2)),
    "4096x1024_10+2": (4096, 1024, (10, 2)),
    "16384x2048_31+2": (16384, 2048, (31, 2)),
}
CUDA_SHAPES: dict[str, Shape] = SHAPES | {
    f"65536x{d}_{k}+2": (65536, d, (k, 2)) for d in (1024, 2048) for k in (2, 10, 31)
}


class Problem:
    """Features, targets and two linear heads."""

    def __init__(self, shape: Shape, settings: Settings) -> None:
        n, d, classes = shape
        kwargs = {"device": settings.device, "dtype": settings.dtype}
        generator = torch.Generator().manual_seed(0)
        # CUDA rows take turns over buffers that together exceed the caches; a CPU step finds its features where the extractor
        # left them, as in a network.
        self.features = torch.randn(n, d, generator=generator).to(**kwargs).requires_grad_()
        self.targets = [torch.randint(size, (n,), generator=generator).to(settings.device) for size in classes]
        torch.manual_seed(0)
        self.linears = [nn.Linear(d, size).to(**kwargs) for size in classes]
        # Sums over n rows or d features, in float32 at least, in any order; half types round inputs to the last product once more.
        accumulator = torch.float64 if settings.dtype == torch.float64 else torch.float32
        self.tolerance = 4 * math.sqrt(max(n, d)) * torch.finfo(accumulator).eps
        if settings.dtype in (torch.float16, torch.bfloat16):
            self.tolerance += 8 * torch.finfo(settings.dtype).eps

    def fused(self) -> grl_ext.AdversarialHeads:
        predictor, adversary = self.linears
        return grl_ext.AdversarialHeads.from_linears({"predictor": predictor}, {"adversary": adversary}, lambda_=COEFF)

    def expected(self) -> list[Tensor]:
        """The gradients in float64: of the features, both weights, both biases."""
        x = self.features.detach().double().requires_grad_()
        predictor, adversary = (copy.deepcopy(linear).double() for linear in self.linears)
        own = F.cross_entropy(predictor(x), self.targets[0]), F.cross_entropy(adversary(x), self.targets[1])
        (dx,) = torch.autograd.grad(own[0] - COEFF * own[1], x, retain_graph=True)
        weights = [predictor.weight, adversary.weight, predictor.bias, adversary.bias]
        return [dx, *torch.autograd.grad(own[0] + own[1], weights)]


def _layered(problem: Problem, layer: nn.Module) -> tuple[Callable[[], Tensor], list[nn.Parameter]]:
    predictor, adversary = (copy.deepcopy(linear) for linear in problem.linears)

    def loss() -> Tensor:
        x = problem.features
        return F.cross_entropy(predictor(x), problem.targets[0]) + F.cross_entropy(adversary(layer(x)), problem.targets[1])

    return loss, [predictor.weight, adversary.weight, predictor.bias, adversary.bias]


def _linear_cross_entropy(problem: Problem) -> tuple[Callable[[], Tensor], list[nn.Parameter]]:
    predictor, adversary = (copy.deepcopy(linear) for linear in problem.linears)
    layer = grl_ext.GRL(COEFF).to(problem.features.device)

    def loss() -> Tensor:
        x = problem.features
        own = F.linear_cross_entropy(x, predictor.weight, problem.targets[0], linear_bias=predictor.bias)
        return own + F.linear_cross_entropy(layer(x), adversary.weight, problem.targets[1], linear_bias=adversary.bias)

    return loss, [predictor.weight, adversary.weight, predictor.bias, adversary.bias]


def _fused_loss(problem: Problem) -> tuple[Callable[[], Tensor], list[nn.Parameter]]:
    heads = problem.fused()
    targets = {"predictor": problem.targets[0], "adversary": problem.targets[1]}
    return (lambda: heads.loss(problem.features, targets).loss), [heads.weight, heads.bias]


def _fused_linear(problem: Problem) -> tuple[Callable[[], Tensor], list[nn.Parameter]]:
    heads = problem.fused()

    def loss() -> Tensor:
        logits = heads(problem.features)
        return F.cross_entropy(logits["predictor"], problem.targets[0]) + F.cross_entropy(logits["adversary"], problem.targets[1])

    return loss, [heads.weight, heads.bias]


def _build(shape: Shape, measured: str, settings: Settings) -> Work:
    problem = Problem(shape, settings)
    made: dict[tuple[str, str], tuple[Callable[[], Tensor], list[nn.Parameter]]] = {
        ("naive", "naive"): _layered(problem, baselines.Naive(COEFF)),
        ("tuned", "peer"): _layered(problem, baselines.Tuned(COEFF)),
    }
    if not settings.quick and measured == "time" and baselines.compile_problem(settings.device) is None:
        loss, parameters = _layered(problem, baselines.Naive(COEFF))
        made["compiled naive", "peer"] = _compiled(loss, "compiled"), parameters
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        made["F.linear_cross_entropy", "peer"] = _linear_cross_entropy(problem)
    made["linear_heads", "ours"] = _fused_linear(problem)
    made["heads.loss", "ours"] = _fused_loss(problem)

    def step_of(loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> Callable[[], list[Tensor]]:
        inputs = [problem.features, *parameters]
        return lambda: torch.autograd.grad(loss(), inputs)

    rows = [Row(name, kind, step_of(*parts)) for (name, kind), parts in made.items()]

    def check() -> None:
        expected = problem.expected()
        for row in rows:
            dx, *found = row.step()
            if len(found) == 2:  # the fused heads' weights and biases are one tensor each
                sizes = [linear.out_features for linear in problem.linears]
                found = [*found[0].split(sizes), *found[1].split(sizes)]
            check_gradients(row.name, [dx, *found], expected, problem.tolerance)

    if measured == "memory":
        return Work(rows, check, "limit: the features' gradient alone, " + f"{problem.features.nbytes / 1e6:.1f} MB")
    limit = Row("limit", "limit", lambda: problem.features.detach().clone())
    return Work([*rows, limit], check, "limit: one copy of the features, which reads them once and writes as much as their gradient")


def heads(settings: Settings) -> list[Case]:
    shapes = CUDA_SHAPES if settings.device == "cuda" else SHAPES
    wanted = ["128x256_10+2"] if settings.quick else list(shapes)
    return [
        Case(
            f"heads/{name}",
            "two heads and their cross entropy, forward + backward, {}x{} features, {} classes".format(
                *shapes[name][:2], "+".join(map(str, shapes[name][2]))
            ),
            partial(_build, shapes[name], "time", settings),
            seconds=1.0 if settings.quick else 5.0,
        )
        for name in wanted
    ]


def heads_memory(settings: Settings) -> list[Case]:
    name = "128x256_10+2" if settings.quick else "4096x1024_10+2"
    return [
        Case(
            f"heads_memory/{name}",
            "peak memory of the same step beyond features, weights and targets",
            partial(_build, SHAPES[name], "memory", settings),
            measures="memory",
        )
    ]


def _build_linear(size: int, rows: int, settings: Settings) -> Work:
    kwargs = {"device": settings.device, "dtype": settings.dtype}
    torch.manual_seed(0)
    x = torch.randn(rows, size).to(**kwargs).requires_grad_()
    grad = torch.randn(rows, size).to(**kwargs)
    plain = nn.Linear(size, size).to(**kwargs)
    fused = grl_ext.GRLLinear(size, size, lambda_=COEFF).to(**kwargs)
    fused.load_state_dict(plain.state_dict())

    def step_of(module: Callable[[Tensor], Tensor]) -> Callable[[], Sequence[Tensor]]:
        parameters = fused.parameters() if module is fused else plain.parameters()
        inputs = [x, *parameters]
        return lambda: torch.autograd.grad(module(x), inputs, grad)

    measured = [
        Row("naive + nn.Linear", "naive", step_of(nn.Sequential(baselines.Naive(COEFF), plain))),
        Row("nn.Linear alone", "peer", step_of(plain)),
        Row("GRLLinear", "ours", step_of(fused)),
    ]

    def check() -> None:
        dx, *weights = measured[1].step()
        for row in (measured[0], measured[2]):
            eps = torch.finfo(settings.dtype).eps  # the factor is a power of two: exact but for the order of the sums
            check_gradients(row.name, row.step(), [-COEFF * dx, *weights], 4 * math.sqrt(size) * eps)

    return Work(measured, check, "limit: nn.Linear alone, which reverses nothing")


def grl_linear(settings: Settings) -> list[Case]:
    rows, size = (256, 256) if settings.quick else (4096, 1024)
    return [
        Case(
            f"grl_linear/{rows}x{size}",
            f"linear layer behind a reversal, {rows}x{size} -> {size}, forward + backward",
            partial(_build_linear, size, rows, settings),
            seconds=1.0 if settings.quick else 8.0,
        )
    ]


def _build_founding(batch: int, settings: Settings) -> Work:
    images, digits = founding.scaled_digits()
    images, labels = founding.digit_pairs(images, digits, batch, torch.Generator().manual_seed(0))
    images, labels = images.to(settings.device, settings.dtype), labels.to(settings.device)
    torch.manual_seed(0)
    start = founding.MnistNN2(baselines.Naive(COEFF)).to(settings.device, settings.dtype)
    kinds = {"naive": baselines.Naive(COEFF), "grl_ext.GRL": grl_ext.GRL(COEFF).to(settings.device)}

    def step_of(loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> Callable[[], None]:
        optimizer = torch.optim.SGD(parameters, lr=0.001)

        def step() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return step

    rows, first_losses = [], {}
    for name, layer in kinds.items():
        network = copy.deepcopy(start)
        network.reversal = layer
        loss = partial(lambda network: sum(founding.losses(network, images, labels)), network)
        first_losses[name] = loss
        rows.append(Row(name, "naive" if name == "naive" else "ours", step_of(loss, list(network.parameters()))))

    network = copy.deepcopy(start)
    fused = grl_ext.AdversarialHeads.from_linears({"out": network.out}, {"advout": network.advout}, lambda_=COEFF)
    targets = {"out": labels, "advout": 1 - labels}
    first_losses["AdversarialHeads"] = lambda: fused.loss(network.extractor(images), targets).loss
    parameters = [*network.extractor.parameters(), *fused.parameters()]
    rows.append(Row("AdversarialHeads", "ours", step_of(first_losses["AdversarialHeads"], parameters)))

    def check() -> None:
        """Ten steps leave all networks at the same loss."""
        for row in rows:
            for _ in range(10):
                row.step()
        found = {name: loss().item() for name, loss in first_losses.items()}
        tolerance = 1e-4 if settings.dtype in (torch.float32, torch.float64) else 5e-2
        if max(found.values()) - min(found.values()) > tolerance * abs(found["naive"]):
            raise WrongResult(f"after ten steps the losses differ: {found}")

    return Work(rows, check, "limit: none; the convolutions are most of the step")


def founding_heads(settings: Settings) -> list[Case]:
    batch = 100 if settings.quick else 1000
    return [
        Case(
            "founding_heads",
            f"a whole training step of the founding experiment's network, {batch} pairs of real digits, with fused heads",
            partial(_build_founding, batch, settings),
            seconds=2.0 if settings.quick else 8.0,
        )
    ]


def _build_switch(columns: int, settings: Settings) -> Work:
    n, d = 4096, 1024
    torch.manual_seed(0)
    x, weight, bias = torch.randn(n, d), torch.randn(columns, d) / math.sqrt(d), torch.zeros(columns)
    sizes, scale = [columns - 2, 2], torch.tensor([1.0, -COEFF])
    dz = torch.randn(n, columns) / n
    columns_scale = scale.repeat_interleave(torch.tensor(sizes))

    def by_products() -> tuple[Tensor, ...]:
        F.linear(x, weight, bias)
        return (dz * columns_scale).mm(weight), dz.T.mm(x), dz.sum(0)

    def ours() -> tuple[Tensor, ...]:
        torch.ops.grl_ext._heads_logits(x, weight, bias)
        return torch.ops.grl_ext._heads_gradients(dz, x, weight, sizes, scale, [True] * 3)

    def check() -> None:
        check_gradients("_heads_gradients", ours(), by_products(), 4 * math.sqrt(n) * torch.finfo(torch.float32).eps)

    return Work(
        [Row("matrix products", "naive", by_products), Row("_heads kernels", "ours", ours)], check, "limit: none, two forms of the same"
    )


def switch(settings: Settings) -> list[Case]:
    """Where the CPU kernels stop paying: csrc/cpu/heads_limits.h. Past its bound both rows are matrix products."""
    columns = (12,) if settings.quick else (4, 12, 24, 33, 48, 64, 96, 128)
    return [
        Case(f"switch/{k}", f"4096x1024 features, {k} columns: logits and gradients", partial(_build_switch, k, settings), seconds=2.0)
        for k in columns
        if settings.device == "cpu"
    ]


# `switch` serves whoever sets the bound and is run by name only.
GROUPS = {"heads": heads, "heads_memory": heads_memory, "grl_linear": grl_linear, "founding_heads": founding_heads}
BY_NAME_ONLY = {"switch": switch}
