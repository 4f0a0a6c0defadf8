"""The fused heads: two heads over the same features, forward, losses and all gradients, against the layer-by-layer
network.

Every row starts from the same weights and computes the loss and the gradients of features and parameters.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bandwidth
import baselines
import grl_ext
from cases import COEFF, Case, Remarks, Row, Settings, Work, compiled_in, deviation, judge

FUSED = "heads(features, targets)"
CHUNKED = "F.linear_cross_entropy, chunked"
COPY = "yardstick: one copy"
PRODUCT = "yardstick: one product"
PRODUCTS = "yardstick: the layers' products"

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
# 30+2 is as wide as the kernel takes in one pass, 31+2 goes by matrix products.
CUDA_LINEAR = [
    *(Shape(n, d, (k,), (2,)) for n, d in ((128, 256), (1000, 1764), (4096, 1024)) for k in (2, 10, 31)),
    *(Shape(65536, d, (k,), (2,)) for d in (1024, 2048) for k in (2, 10, 30, 31)),
]
WEIGHTED = [Shape(1000, 1764, (2,), (2,), weighted=True), Shape(4096, 1024, (10,), (2,), weighted=True)]
REGRESSION = [Shape(4096, 1024, (10,), (1,), adversary_loss="mse")]
LABELS = [Shape(4096, 1024, (10,), (5,), adversary_loss="bce")]
HIDDEN = [
    Shape(64, 256, (10,), (1024, 1024, 2)),
    Shape(128, 768, (100, 100, 10), (100, 2)),
    Shape(4096, 1024, (10,), (1024, 1024, 2)),
]


class Problem:
    """Features, targets and two heads."""

    def __init__(self, shape: Shape, settings: Settings) -> None:
        self.shape = shape
        n, d = shape.rows, shape.features
        kwargs = {"device": settings.device, "dtype": settings.dtype}
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(n, d, generator=generator).to(**kwargs)
        self.turns = [features.clone().requires_grad_() for _ in range(turns(features))]
        self.features = self.turns[0]
        classes = torch.randint(shape.predictor[-1], (n,), generator=generator)
        columns = shape.adversary[-1]
        if shape.adversary_loss == "mse":
            other = torch.randn(n, columns, generator=generator)
        elif shape.adversary_loss == "bce":
            other = torch.randint(2, (n, columns), generator=generator).float()
        else:
            other = torch.randint(columns, (n,), generator=generator)
        self.targets = [target.to(settings.device) for target in (classes, other)]
        self.sample_weight = torch.rand(n, generator=generator).to(settings.device) if shape.weighted else None
        self.class_weight = (
            torch.rand(shape.predictor[-1], generator=generator).to(settings.device) if shape.weighted else None
        )
        torch.manual_seed(0)
        made = grl_ext.AdversarialHeads(d, {"predictor": shape.predictor}, {"adversary": shape.adversary}).to(**kwargs)
        self.modules = [made.predictors["predictor"], made.adversaries["adversary"]]
        # Sums over n rows or d features, in float32 at least, in any order; half types round what each layer gives once
        # more.
        accumulator = torch.float64 if settings.dtype == torch.float64 else torch.float32
        self.tolerance = 4 * math.sqrt(max(n, d)) * torch.finfo(accumulator).eps
        if settings.dtype in (torch.float16, torch.bfloat16):
            self.tolerance += 8 * max(len(shape.predictor), len(shape.adversary)) * torch.finfo(settings.dtype).eps

    def losses(self, logits: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """As plain PyTorch has them."""
        if self.sample_weight is None:
            by_output = {"mse": F.mse_loss, "bce": F.binary_cross_entropy_with_logits}.get(self.shape.adversary_loss)
            target = self.targets[1]
            adversary = by_output(other, target.to(other)) if by_output else F.cross_entropy(other, target)
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


Made = tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]  # the loss of the features, and the parameters


def _layered(problem: Problem, layer: nn.Module) -> Made:
    predictor, adversary = (copy.deepcopy(module) for module in problem.modules)

    def loss(x: Tensor) -> Tensor:
        return sum(problem.losses(predictor(x), adversary(layer(x))))

    return loss, [*predictor.parameters(), *adversary.parameters()]


def _linear_cross_entropy(problem: Problem, **options: object) -> Made:
    predictor, adversary = (copy.deepcopy(linear) for linear in problem.modules)
    layer = grl_ext.GRL(COEFF).to(problem.features.device)

    def loss(x: Tensor) -> Tensor:
        own = F.linear_cross_entropy(x, predictor.weight, problem.targets[0], linear_bias=predictor.bias, **options)
        return own + F.linear_cross_entropy(
            layer(x), adversary.weight, problem.targets[1], linear_bias=adversary.bias, **options
        )

    return loss, [*predictor.parameters(), *adversary.parameters()]


def _fused_loss(problem: Problem, with_weights: bool = True) -> Made:
    heads, targets, options = problem.fused()
    options = options if with_weights else {}
    return (lambda x: heads(x, targets, **options).loss), list(heads.parameters())


def _fused_logits(problem: Problem) -> Made:
    heads, _, _ = problem.fused()

    def loss(x: Tensor) -> Tensor:
        logits = heads(x)
        return sum(problem.losses(logits["predictor"], logits["adversary"]))

    return loss, list(heads.parameters())


def turns(features: Tensor) -> int:
    """How many copies of the features the steps take turns over.

    On CUDA they exceed the L2 cache together, so that no row finds there what the last one left. Where that would take
    too many, launches are the cost and not the memory. A CPU step finds its features where the extractor left them, as
    in a network.
    """
    return min(64, bandwidth.turns(features.nbytes)) if features.is_cuda else 1


def _in_turns(made: Made, buffers: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
    """A step: the gradients of the features, which are the next buffer's, and of the parameters."""
    loss, parameters = made
    turn = cycle(buffers)

    def step() -> Sequence[Tensor]:
        x = next(turn)
        return torch.autograd.grad(loss(x), [x, *parameters])

    return step


def _in_graphs(made: Made, buffers: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
    """The same, replayed: a CUDA graph for each buffer."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            _in_turns(made, buffers)()
    torch.cuda.current_stream().wait_stream(side)
    captured = []
    for x in buffers:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=captured[0][0].pool() if captured else None):
            gradients = _in_turns(made, [x])()
        captured.append((graph, gradients))
    turn = cycle(captured)

    def step() -> Sequence[Tensor]:
        graph, gradients = next(turn)
        graph.replay()
        return gradients

    return step


def _reduce_overhead(made: Made, buffers: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
    """Compiled with CUDA graphs. These copy an input whose address changes: to spare the row that copy its features
    stay in place."""
    loss, parameters = made
    torch._dynamo.mark_static_address(buffers[0])
    return _in_turns(
        (torch.compile(loss, fullgraph=True, dynamic=False, mode="reduce-overhead"), parameters), buffers[:1]
    )


def _if_it_runs(name: str, make: Callable[[], Callable[[], Sequence[Tensor]]]) -> list[Row]:
    """A row of PyTorch's own that not every installation can run: without it the others are still worth their time."""
    try:
        step = make()
        step()
    except Exception as error:  # a compiler fails in many ways
        first_line = next(iter(str(error).strip().splitlines()), "")
        print(f"{name} is left out: {type(error).__name__}: {first_line}")
        return []
    return [Row(name, "peer", step)]


def _yardsticks(problem: Problem) -> list[Row]:
    """One copy of the features, and the heads' operations in one large product.

    They are no bound: fused kernels may beat one large product, and one copy.
    """
    side = 1024
    columns = max(1, round(problem.shape.operations / (2 * side * side)))
    features = problem.features.detach()
    square, matrix = (torch.randn(side, size, device=features.device).to(features.dtype) for size in (side, columns))
    turn = cycle([x.detach() for x in problem.turns])
    out = torch.empty_like(features) if features.is_cuda else None

    def copy_features() -> Tensor:
        return next(turn).clone() if out is None else out.copy_(next(turn))

    return [Row(COPY, "yardstick", copy_features), Row(PRODUCT, "yardstick", lambda: square @ matrix)]


def _products(problem: Problem) -> Row:
    """The matrix products of heads with hidden layers, forward and backward, by ATen and with nothing between them."""
    shape, factory = problem.shape, {"device": problem.features.device, "dtype": problem.features.dtype}
    operands = []  # each layer's input, weight and output
    for sizes in (shape.predictor, shape.adversary):
        for inputs, outputs in pairwise((shape.features, *sizes)):
            operands.append(
                [
                    torch.randn(size, **factory)
                    for size in ((shape.rows, inputs), (outputs, inputs), (shape.rows, outputs))
                ]
            )

    def step() -> None:
        for x, weight, y in operands:
            x @ weight.T
            y @ weight
            y.T @ x

    return Row(PRODUCTS, "yardstick", step)


def whole_deviation(
    found: Sequence[Tensor], expected: Sequence[Tensor], layered: Sequence[Tensor] | None = None
) -> str | None:
    """By each gradient's norm of the difference: a unit within rounding of ReLU's kink passes its gradient in one
    precision and not in the other, which is a large difference in a few entries. Half types have many such units:
    there half as much again as the layers deviate is allowed, but never what a missing gradient would be."""
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        allowed = 0.03 if layered is None else min(0.5, max(0.03, 1.5 * _norm_error(layered[index], b)))
        error = _norm_error(a, b)
        if not error <= allowed:
            return (
                f"gradient {index} of shape {list(a.shape)} is off by {error:.2g} of its norm, "
                f"allowed are {allowed:.2g}"
            )
    return None


def _norm_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def _rows(problem: Problem, measured: str, settings: Settings) -> list[Row]:
    shape, buffers = problem.shape, problem.turns
    pasted = partial(_layered, problem, baselines.Pasted(COEFF))
    rows = [
        Row("pasted", "reference", _in_turns(pasted(), buffers)),
        Row("tuned", "peer", _in_turns(_layered(problem, baselines.Tuned(COEFF)), buffers)),
    ]
    if measured == "time" and not settings.quick and baselines.compile_problem(settings.device) is None:
        loss, parameters = pasted()
        rows += _if_it_runs("compiled pasted", lambda: _in_turns((compiled_in(loss, "compiled"), parameters), buffers))
        if settings.device == "cuda":
            rows += _if_it_runs("compiled pasted, reduce-overhead", lambda: _reduce_overhead(pasted(), buffers))
    plain = len(shape.predictor) == len(shape.adversary) == 1 and not shape.weighted
    plain = plain and shape.adversary_loss == "cross_entropy"
    if plain and hasattr(F, "linear_cross_entropy"):  # torch 2.13
        chunked = {"options": nn.LinearCrossEntropyOptions()}
        rows += _if_it_runs("F.linear_cross_entropy", lambda: _in_turns(_linear_cross_entropy(problem), buffers))
        rows += _if_it_runs(CHUNKED, lambda: _in_turns(_linear_cross_entropy(problem, **chunked), buffers))
    rows.append(Row("heads(features)", "ours", _in_turns(_fused_logits(problem), buffers)))
    rows.append(Row(FUSED, "ours", _in_turns(_fused_loss(problem), buffers)))
    if measured == "time" and settings.device == "cuda":
        rows.append(Row(f"{FUSED} in a CUDA graph", "ours", _in_graphs(_fused_loss(problem), buffers)))
    return rows


def _build(shape: Shape, measured: str, settings: Settings) -> Work:
    problem = Problem(shape, settings)
    rows = _rows(problem, measured, settings)
    linear = len(shape.predictor) == len(shape.adversary) == 1

    def check() -> Remarks:
        expected, remarks = problem.expected(), {}
        for row in rows:
            found = row.step()
            # What the chunked loss accumulates in is its own choice.
            by_entry = linear and row.name != CHUNKED
            deviates = deviation(found, expected, problem.tolerance) if by_entry else whole_deviation(found, expected)
            judge(row, deviates, remarks)
        return remarks

    if measured == "memory":
        return Work(
            rows, check, "yardstick: the features' gradient alone, " + f"{problem.features.nbytes / 1e6:.1f} MB"
        )
    if measured == "launches":
        return Work(rows, check, "yardstick: none; one of them is PyTorch's own, which makes the gradient of the loss")
    if not linear:
        return Work(
            [*rows, _products(problem)], check, "yardstick: the layers' matrix products alone, forward and backward"
        )
    yardsticks = _yardsticks(problem)
    if shape.weighted:
        step = _in_turns(_fused_loss(problem, with_weights=False), problem.turns)
        yardsticks.insert(0, Row("the same without weights", "yardstick", step))
    about = "yardsticks: one copy of the features; the heads' operations in one large product; neither is a bound"
    return Work([*rows, *yardsticks], check, about)


def _case(group: str, shape: Shape, what: str, settings: Settings) -> Case:
    return Case(
        f"{group}/{shape.name}",
        f"{what}, forward + backward, {shape.rows}x{shape.features} features",
        partial(_build, shape, "time", settings),
        seconds=1.0 if settings.quick else 2.0 if settings.device == "cuda" else 5.0,
        # Device events leave out what the host does before the first launch and after the last; a small step is mostly
        # that.
        clock="wall" if shape.rows <= 128 else "device",
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


def heads_bce(settings: Settings) -> list[Case]:
    shapes = [Shape(128, 256, (10,), (5,), adversary_loss="bce")] if settings.quick else LABELS
    return [_case("heads_bce", shape, "a classifier and an adversary of several labels", settings) for shape in shapes]


def heads_hidden(settings: Settings) -> list[Case]:
    shapes = [Shape(64, 256, (10,), (32, 2))] if settings.quick else HIDDEN
    return [
        _case("heads_hidden", shape, "heads with hidden layers and their cross entropy", settings) for shape in shapes
    ]


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


def heads_launches(settings: Settings) -> list[Case]:
    """How many kernels a small step starts."""
    return [
        Case(
            f"heads_launches/{shape.name}",
            "kernels that a step starts, forward + backward",
            partial(_build, shape, "launches", settings),
            measures="launches",
        )
        for shape in CUDA_LINEAR[:2]
        if settings.device == "cuda"
    ]


GROUPS = {
    "heads": heads,
    "heads_weighted": heads_weighted,
    "heads_mse": heads_mse,
    "heads_bce": heads_bce,
    "heads_hidden": heads_hidden,
    "heads_memory": heads_memory,
    "heads_launches": heads_launches,
}
