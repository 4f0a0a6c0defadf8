"""The fused heads: two heads over the same features, forward, losses and all gradients, against the layer-by-layer network.

Every row starts from the same weights and computes the loss and the gradients of features and parameters.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import baselines
import founding
import grl_ext
from cases import COEFF, Case, Row, Settings, Work, WrongResult, _compiled, check_gradients

Sizes = tuple[int, ...]  # of a head's layers; the last is its classes


@dataclass(frozen=True)
class Shape:
    rows: int
    features: int
    predictor: Sizes
    adversary: Sizes
    adversary_loss: str = "cross_entropy"
    weighted: bool = False  # weights for rows and for the predictor's classes

    @property
    def name(self) -> str:
        heads = "+".join("-".join(map(str, sizes)) for sizes in (self.predictor, self.adversary))
        return f"{self.rows}x{self.features}_{heads}"

    @property
    def operations(self) -> int:
        """Of the matrix products forward and backward."""
        products = 0
        for sizes in (self.predictor, self.adversary):
            products += sum(a * b for a, b in zip((self.features, *sizes[:-1]), sizes, strict=True))
        return 6 * self.rows * products


LINEAR = [
    Shape(128, 256, (10,), (2,)),
    Shape(1000, 1764, (2,), (2,)),
    Shape(4096, 1024, (10,), (2,)),
    Shape(16384, 2048, (31,), (2,)),
]
CUDA_LINEAR = [*LINEAR, *(Shape(65536, d, (k,), (2,)) for d in (1024, 2048) for k in (2, 10, 31))]
WEIGHTED = [Shape(1000, 1764, (2,), (2,), weighted=True), Shape(4096, 1024, (10,), (2,), weighted=True)]
REGRESSION = [Shape(4096, 1024, (10,), (1,), adversary_loss="mse")]
HIDDEN = [
    Shape(64, 256, (10,), (1024, 1024, 2)),
    Shape(128, 768, (100, 100, 10), (100, 2)),
    Shape(4096, 1024, (10,), (1024, 1024, 2)),
]


def _module(features: int, sizes: Sizes) -> nn.Module:
    layers: list[nn.Module] = []
    for size in sizes:
        layers += [nn.Linear(features, size), nn.ReLU()]
        features = size
    return layers[0] if len(sizes) == 1 else nn.Sequential(*layers[:-1])


class Problem:
    """Features, targets and two heads."""

    def __init__(self, shape: Shape, settings: Settings) -> None:
        self.shape = shape
        n, d = shape.rows, shape.features
        kwargs = {"device": settings.device, "dtype": settings.dtype}
        generator = torch.Generator().manual_seed(0)
        # CUDA rows take turns over buffers that together exceed the caches; a CPU step finds its features where the extractor
        # left them, as in a network.
        self.features = torch.randn(n, d, generator=generator).to(**kwargs).requires_grad_()
        self.regression = shape.adversary_loss == "mse"
        classes = torch.randint(shape.predictor[-1], (n,), generator=generator)
        other = torch.randn(n, 1, generator=generator) if self.regression else torch.randint(shape.adversary[-1], (n,), generator=generator)
        self.targets = [target.to(settings.device) for target in (classes, other)]
        self.sample_weight = torch.rand(n, generator=generator).to(settings.device) if shape.weighted else None
        self.class_weight = torch.rand(shape.predictor[-1], generator=generator).to(settings.device) if shape.weighted else None
        torch.manual_seed(0)
        self.modules = [_module(d, sizes).to(**kwargs) for sizes in (shape.predictor, shape.adversary)]
        # Sums over n rows or d features, in float32 at least, in any order; half types round what each layer gives once more.
        accumulator = torch.float64 if settings.dtype == torch.float64 else torch.float32
        self.tolerance = 4 * math.sqrt(max(n, d)) * torch.finfo(accumulator).eps
        if settings.dtype in (torch.float16, torch.bfloat16):
            self.tolerance += 8 * max(len(shape.predictor), len(shape.adversary)) * torch.finfo(settings.dtype).eps

    def losses(self, logits: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """As plain PyTorch has them."""
        if self.sample_weight is None:
            adversary = F.mse_loss(other, self.targets[1].to(other)) if self.regression else F.cross_entropy(other, self.targets[1])
            return F.cross_entropy(logits, self.targets[0]), adversary
        weight, classes = self.sample_weight.to(logits), self.class_weight.to(logits)
        rows = F.cross_entropy(logits, self.targets[0], weight=classes, reduction="none")
        predictor = (weight * rows).sum() / (weight * classes[self.targets[0]]).sum()
        rows = F.cross_entropy(other, self.targets[1], reduction="none")
        return predictor, (weight * rows).sum() / weight.sum()

    def expected(self) -> list[Tensor]:
        """The gradients in float64: of the features, and of the predictor's and the adversary's parameters."""
        x = self.features.detach().double().requires_grad_()
        predictor, adversary = (copy.deepcopy(module).double() for module in self.modules)
        own = self.losses(predictor(x), adversary(x))
        (dx,) = torch.autograd.grad(own[0] - COEFF * own[1], x, retain_graph=True)
        return [dx, *torch.autograd.grad(own[0] + own[1], [*predictor.parameters(), *adversary.parameters()])]

    def fused(self) -> tuple[grl_ext.AdversarialHeads, dict[str, Tensor], dict[str, object]]:
        predictor, adversary = (copy.deepcopy(module) for module in self.modules)
        heads = grl_ext.AdversarialHeads(
            self.shape.features,
            {"predictor": predictor},
            {"adversary": adversary},
            lambda_=COEFF,
            losses={"adversary": self.shape.adversary_loss},
        )
        options = {}
        if self.sample_weight is not None:
            options = {"sample_weight": self.sample_weight, "class_weight": {"predictor": self.class_weight}}
        return heads, {"predictor": self.targets[0], "adversary": self.targets[1]}, options


Made = tuple[Callable[[], Tensor], list[nn.Parameter]]


def _layered(problem: Problem, layer: nn.Module) -> Made:
    predictor, adversary = (copy.deepcopy(module) for module in problem.modules)

    def loss() -> Tensor:
        x = problem.features
        return sum(problem.losses(predictor(x), adversary(layer(x))))

    return loss, [*predictor.parameters(), *adversary.parameters()]


def _linear_cross_entropy(problem: Problem) -> Made:
    predictor, adversary = (copy.deepcopy(linear) for linear in problem.modules)
    layer = grl_ext.GRL(COEFF).to(problem.features.device)

    def loss() -> Tensor:
        x = problem.features
        own = F.linear_cross_entropy(x, predictor.weight, problem.targets[0], linear_bias=predictor.bias)
        return own + F.linear_cross_entropy(layer(x), adversary.weight, problem.targets[1], linear_bias=adversary.bias)

    return loss, [*predictor.parameters(), *adversary.parameters()]


def _fused_loss(problem: Problem, with_weights: bool = True) -> Made:
    heads, targets, options = problem.fused()
    options = options if with_weights else {}
    return (lambda: heads(problem.features, targets, **options).loss), list(heads.parameters())


def _fused_logits(problem: Problem) -> Made:
    heads, _, _ = problem.fused()

    def loss() -> Tensor:
        logits = heads(problem.features)
        return sum(problem.losses(logits["predictor"], logits["adversary"]))

    return loss, list(heads.parameters())


def _roofline(problem: Problem) -> Row:
    """The larger of one copy of the features and the products' operations in one large product."""
    features = problem.features.detach()
    side = 1024
    columns = max(1, round(problem.shape.operations / (2 * side * side)))
    square, matrix = (torch.randn(side, size, device=features.device).to(features.dtype) for size in (side, columns))

    def seconds(step: Callable[[], Tensor]) -> float:
        samples = []
        for _ in range(5):
            start = time.perf_counter()
            step()
            if features.is_cuda:
                torch.cuda.synchronize()
            samples.append(time.perf_counter() - start)
        return sorted(samples)[2]

    bounds = {"limit: one copy": features.clone, "limit: arithmetic": lambda: square @ matrix}
    name = max(bounds, key=lambda bound: seconds(bounds[bound]))
    return Row(name, "limit", bounds[name])


def check_whole_gradients(name: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Each gradient's norm of the difference: a unit within rounding of ReLU's kink passes its gradient in one precision and not in
    the other, which is a large difference in a few entries."""
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        error = ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()
        if not error <= 0.03:
            raise WrongResult(f"{name}: gradient {index} of shape {list(a.shape)} is off by {error:.2g} of its norm, allowed are 0.03")


def _build(shape: Shape, measured: str, settings: Settings) -> Work:
    problem = Problem(shape, settings)
    made: dict[tuple[str, str], Made] = {
        ("naive", "naive"): _layered(problem, baselines.Naive(COEFF)),
        ("tuned", "peer"): _layered(problem, baselines.Tuned(COEFF)),
    }
    if not settings.quick and measured == "time" and baselines.compile_problem(settings.device) is None:
        loss, parameters = _layered(problem, baselines.Naive(COEFF))
        made["compiled naive", "peer"] = _compiled(loss, "compiled"), parameters
    linear = len(shape.predictor) == len(shape.adversary) == 1
    plain = linear and not shape.weighted and not problem.regression
    if plain and hasattr(F, "linear_cross_entropy"):  # torch 2.13
        made["F.linear_cross_entropy", "peer"] = _linear_cross_entropy(problem)
    made["heads(features)", "ours"] = _fused_logits(problem)
    made["heads(features, targets)", "ours"] = _fused_loss(problem)

    def step_of(loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> Callable[[], list[Tensor]]:
        inputs = [problem.features, *parameters]
        return lambda: torch.autograd.grad(loss(), inputs)

    rows = [Row(name, kind, step_of(*parts)) for (name, kind), parts in made.items()]

    def check() -> None:
        expected = problem.expected()
        for row in rows:
            found = row.step()
            if linear:
                check_gradients(row.name, found, expected, problem.tolerance)
            else:
                check_whole_gradients(row.name, found, expected)

    if measured == "memory":
        return Work(rows, check, "limit: the features' gradient alone, " + f"{problem.features.nbytes / 1e6:.1f} MB")
    limits = [_roofline(problem)]
    if shape.weighted:
        limits.insert(0, Row("the same without weights", "limit", step_of(*_fused_loss(problem, with_weights=False))))
    return Work([*rows, *limits], check, "limit: the larger of one copy of the features and the products' operations in one large product")


def _case(group: str, shape: Shape, what: str, settings: Settings) -> Case:
    return Case(
        f"{group}/{shape.name}",
        f"{what}, forward + backward, {shape.rows}x{shape.features} features",
        partial(_build, shape, "time", settings),
        seconds=1.0 if settings.quick else 5.0,
    )


def heads(settings: Settings) -> list[Case]:
    shapes = LINEAR[:1] if settings.quick else CUDA_LINEAR if settings.device == "cuda" else LINEAR
    return [_case("heads", shape, "two linear heads and their cross entropy", settings) for shape in shapes]


def heads_weighted(settings: Settings) -> list[Case]:
    shapes = [Shape(128, 256, (10,), (2,), weighted=True)] if settings.quick else WEIGHTED
    return [_case("heads_weighted", shape, "the same with weights for rows and classes", settings) for shape in shapes]


def heads_mse(settings: Settings) -> list[Case]:
    shapes = [Shape(128, 256, (10,), (1,), adversary_loss="mse")] if settings.quick else REGRESSION
    return [_case("heads_mse", shape, "a classifier and a regression adversary", settings) for shape in shapes]


def heads_hidden(settings: Settings) -> list[Case]:
    shapes = [Shape(64, 256, (10,), (32, 2))] if settings.quick else HIDDEN
    return [_case("heads_hidden", shape, "heads with hidden layers and their cross entropy", settings) for shape in shapes]


def heads_memory(settings: Settings) -> list[Case]:
    shapes = LINEAR[:1] if settings.quick else [LINEAR[2], *HIDDEN]
    return [
        Case(
            f"heads_memory/{shape.name}",
            "peak memory of the same step beyond features, parameters and targets",
            partial(_build, shape, "memory", settings),
            measures="memory",
        )
        for shape in shapes
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
    fused = grl_ext.AdversarialHeads(network.out.in_features, {"out": network.out}, {"advout": network.advout}, lambda_=COEFF)
    targets = {"out": labels, "advout": 1 - labels}
    first_losses["AdversarialHeads"] = lambda: fused(network.extractor(images), targets).loss
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
    sizes = [columns - 2, 2]
    x, weight = torch.randn(n, d), [torch.randn(size, d) / math.sqrt(d) for size in sizes]
    lambda_, index = torch.tensor([COEFF], dtype=torch.float64), [-1, 0]
    dz = [torch.randn(n, size) / n for size in sizes]

    def by_products() -> tuple[Tensor, ...]:
        for matrix in weight:
            F.linear(x, matrix)
        dx = dz[0].mm(weight[0])
        return dx.addmm_(dz[1], weight[1], alpha=-COEFF), *(g.T.mm(x) for g in dz)

    def ours() -> tuple[Tensor, ...]:
        torch.ops.grl_ext._heads_logits(x, weight, [None, None])
        dx, dw, _ = torch.ops.grl_ext._heads_gradients(dz, x, weight, lambda_, index, [True, True, True, False, False])
        return dx, *dw

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
GROUPS = {
    "heads": heads,
    "heads_weighted": heads_weighted,
    "heads_mse": heads_mse,
    "heads_hidden": heads_hidden,
    "heads_memory": heads_memory,
    "grl_linear": grl_linear,
    "founding_heads": founding_heads,
}
BY_NAME_ONLY = {"switch": switch}
