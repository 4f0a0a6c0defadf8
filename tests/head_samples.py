"""What the tests of the linear operations share: sample arguments, and the network they replace, layer by layer.

That network is the oracle. It is written from PyTorch's own parts and nothing of this package: for each head a reversal
of two lines, `F.linear` and `F.relu`, and `F.cross_entropy`, `F.binary_cross_entropy_with_logits` or `F.mse_loss`, in
float64.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grl_ext import AdversarialHeads, HeadsLoss, _backend, heads_loss, linear_heads

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

# The total of head sizes past which the compiled heads go through matrix products.
SWITCH = _backend.C.build_info()["max_columns_cpu"] if _backend.C else 40

# (N, D): none, one or two blocks of 64 rows, full and not; features of one element, of whole vectors, and with a rest,
# behind whole strips of four vectors, behind single ones, and behind both.
SHAPES = [(0, 7), (1, 1), (1, 129), (5, 64), (7, 100), (64, 7), (65, 129), (130, 1), (130, 64)]
HEAD_SIZES = [(1,), (2,), (2, 2), (1, 3, 1), (10, 2), (13,), (SWITCH - 2, 2), (SWITCH - 1, 2), (251, 1, 49)]
WIDE = (SWITCH, 2)  # the first head in the fused kernels, the second by matrix products
DEEP = ((6, 3), 2, (5, 4, 1))  # heads of several layers beside a linear one

# In eps of the dtype. Float32 and float64: the rounding of some hundred terms, one by one, and an exponential good to 2
# eps. Half types: sums are made in float32, but the logits, their gradient and the result are each rounded, some twice.
ROUNDINGS = {torch.float64: 64, torch.float32: 64, torch.float16: 8, torch.bfloat16: 8}


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------


class LinearSample(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.x, self.weight, self.bias


def sample_linear(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    leading: Sequence[int] = (5,),
    features: int = 7,
    columns: int = 5,
    bias: bool = True,
) -> LinearSample:
    """x, weight and bias that require grad."""
    x = torch.randn(*leading, features, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(columns, features, device=device) / max(1, features) ** 0.5).to(dtype).requires_grad_()
    b = torch.randn(columns, device=device).to(dtype).requires_grad_() if bias else None
    return LinearSample(x, weight, b)


class Sample(NamedTuple):
    """Arguments of `heads_loss`; each head's layers in a list."""

    x: Tensor
    weight: list[list[Tensor]]
    bias: list[list[Tensor | None]]
    targets: list[Tensor]
    lambda_: list[float | None]
    losses: list[str] | None = None

    @property
    def inputs(self) -> list[Tensor]:
        """All tensors that may have a gradient: x, the weights, the biases."""
        return [
            self.x,
            *(w for layers in self.weight for w in layers),
            *(b for layers in self.bias for b in layers if b is not None),
        ]

    @property
    def wanted(self) -> list[Tensor]:
        return [t for t in self.inputs if t.requires_grad]

    def of(self, inputs: Sequence[Tensor]) -> "Sample":
        """The sample with other inputs."""
        rest = iter(inputs)
        x = next(rest)
        weight = [[next(rest) for _ in layers] for layers in self.weight]
        bias = [[b if b is None else next(rest) for b in layers] for layers in self.bias]
        return self._replace(x=x, weight=weight, bias=bias)

    def map(self, f: Callable[[Tensor], Tensor]) -> "Sample":
        """The sample with f of each input, detached; those that required grad still do."""
        return self.of([f(t.detach()).detach().requires_grad_(t.requires_grad) for t in self.inputs])

    def head(self, h: int) -> "Sample":
        """The sample with one head only."""
        losses = self.losses and [self.losses[h]]
        return Sample(self.x, [self.weight[h]], [self.bias[h]], [self.targets[h]], [self.lambda_[h]], losses)

    @property
    def linear(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """weight and bias of linear heads."""
        return [w for (w,) in self.weight], [b for (b,) in self.bias]


LAMBDAS = (None, 0.3, -2.0, 0.0)


def sample_heads(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    leading: Sequence[int] = (5,),
    features: int = 7,
    head_sizes: Sequence[int | Sequence[int]] = (3, 2),
    bias: bool | str = True,
    kinds: Sequence[str] = ("classes",),
) -> Sample:
    """Inputs that require grad; heads with lambda None, 0.3, -2, 0, None, ... and targets of the kinds in turn.

    A size may be a sequence: layers with ReLU between them. bias "mixed": every second layer has one. Kinds: "classes",
    "soft" (probabilities), "mse" (values), "bce" (0 and 1).
    """
    weight, biases, targets, losses = [], [], [], []
    count = 0
    for h, given in enumerate(head_sizes):
        sizes = [given] if isinstance(given, int) else list(given)
        weight.append([])
        biases.append([])
        width = features
        for size in sizes:
            w = torch.randn(size, width, device=device) / max(1, width) ** 0.5
            weight[-1].append(w.to(dtype).requires_grad_())
            has_bias = count % 2 == 0 if bias == "mixed" else bias
            biases[-1].append(torch.randn(size, device=device).to(dtype).requires_grad_() if has_bias else None)
            width, count = size, count + 1
        kind = kinds[h % len(kinds)]
        targets.append(sample_targets(kind, tuple(leading), width, device))
        losses.append(kind if kind in BY_OUTPUT else "cross_entropy")
    x = torch.randn(*leading, features, device=device).to(dtype).requires_grad_()
    lambda_ = [LAMBDAS[h % 4] for h in range(len(head_sizes))]
    return Sample(x, weight, biases, targets, lambda_, losses if BY_OUTPUT.keys() & losses else None)


def sample_targets(kind: str, leading: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    if kind == "classes":
        return torch.randint(max(2, size), leading, device=device)
    if kind == "mse":
        return torch.randn(*leading, size, device=device)
    if kind == "bce":
        return torch.randint(2, (*leading, size), device=device)
    return (
        torch.rand(*leading, 1, device=device) if size == 1 else torch.randn(*leading, size, device=device).softmax(-1)
    )


# ---------------------------------------------------------------------------------------------------------------------
# The network layer by layer
# ---------------------------------------------------------------------------------------------------------------------


def reversal(x: Tensor, lambda_: Tensor | float) -> Tensor:
    """The value of x and the derivative of -lambda x, in every mode of differentiation."""
    scaled = -lambda_ * x
    return scaled + (x - scaled).detach()


def naive_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lambda_: Tensor | float) -> Tensor:
    return F.linear(reversal(x, lambda_), weight, bias)


def naive_logits(sample: Sample) -> list[Tensor]:
    """A reversal for each adversary, then its layers."""
    logits = []
    for weight, bias, lambda_ in zip(sample.weight, sample.bias, sample.lambda_, strict=True):
        z = sample.x if lambda_ is None else reversal(sample.x, lambda_)
        for i, (w, b) in enumerate(zip(weight, bias, strict=True)):
            z = F.linear(F.relu(z) if i else z, w, b)
        logits.append(z)
    return logits


BY_OUTPUT = {"mse": F.mse_loss, "bce": F.binary_cross_entropy_with_logits}


def naive_entry_losses(z: Tensor, target: Tensor, loss: str, weights: Tensor) -> Tensor:
    """The weighted losses of rows whose entries have weights (N, size) of their own, by those that count."""
    counts = weights != 0
    losses = BY_OUTPUT[loss](z[counts], target.reshape(z.shape).to(z)[counts], reduction="none")
    return torch.zeros_like(z).masked_scatter(counts, weights[counts] * losses).sum(1)


def naive_row_losses(
    z: Tensor, target: Tensor, loss: str | Callable, class_weight: Tensor | None, label_smoothing: float
) -> Tensor:
    """PyTorch's loss of every row, from logits (N, size) and targets that all count."""
    size = z.shape[1]
    if callable(loss):
        return loss(z, target)
    if loss in BY_OUTPUT:
        return BY_OUTPUT[loss](z, target.reshape(z.shape).to(z), reduction="none").sum(1)
    if size > 1:
        target = target if target.dtype == torch.int64 else target.to(z)
        return F.cross_entropy(z, target, class_weight, reduction="none", label_smoothing=label_smoothing)
    one = target.reshape(-1).to(z) * (1 - label_smoothing) + label_smoothing / 2
    if class_weight is None:
        return F.binary_cross_entropy_with_logits(z[:, 0], one, reduction="none")
    return -class_weight[0] * (1 - one) * F.logsigmoid(-z[:, 0]) - class_weight[1] * one * F.logsigmoid(z[:, 0])


def naive_loss(
    sample: Sample,
    *,
    logits: list[Tensor] | None = None,
    sample_weight: Tensor | Sequence[Tensor | None] | None = None,
    class_weight: Sequence[Tensor | None] | None = None,
    loss_weight: Sequence[float] | Tensor | None = None,
    label_smoothing: float | Sequence[float] = 0.0,
    ignore_index: int | Sequence[int] = -100,
    reduction: str = "mean",
) -> HeadsLoss:
    """What `heads_loss` gives, head by head over the rows that count."""
    logits = naive_logits(sample) if logits is None else logits
    heads = range(len(logits))

    def each(value):
        return value if isinstance(value, list | tuple) else [value] * len(logits)

    sample_weight, class_weight, smoothing, ignored = map(
        each, (sample_weight, class_weight, label_smoothing, ignore_index)
    )
    losses = []
    for h in heads:
        size = logits[h].shape[-1]
        z = logits[h].reshape(-1, size) if logits[h].numel() else logits[h].new_zeros(0, size) + 0 * logits[h].sum()
        loss = sample.losses[h] if sample.losses else "cross_entropy"
        classes = sample.targets[h].dtype == torch.int64 and loss not in BY_OUTPUT
        target = sample.targets[h].reshape(-1) if classes else sample.targets[h].reshape(len(z), size)
        given = sample_weight[h]
        if given is not None and loss in BY_OUTPUT and given.dim() == logits[h].dim():
            weights = given.reshape(z.shape).to(z)
            rows, norm = naive_entry_losses(z, target, loss, weights), weights.sum()
        else:
            weights = torch.ones(len(z), dtype=z.dtype, device=z.device)
            weights = weights if given is None else given.reshape(-1).to(weights)
            valid = weights != 0
            if classes:
                valid = valid & (target != ignored[h])
            of_classes = None if class_weight[h] is None else class_weight[h].to(z)
            has_smoothing = loss == "cross_entropy" or isinstance(label_smoothing, list | tuple)
            some = naive_row_losses(z[valid], target[valid], loss, of_classes, smoothing[h] if has_smoothing else 0.0)
            some = weights[valid] * some
            rows = some.new_zeros(len(z)).index_add(0, valid.nonzero()[:, 0], some) if len(z) else z.sum(1)
            weights = weights[valid]
            norm = (weights * of_classes[target[valid]]).sum() if of_classes is not None and classes else weights.sum()
            norm = norm * size if loss in BY_OUTPUT else norm
        if reduction == "none":
            losses.append(rows.reshape(logits[h].shape[:-1]))
        elif reduction == "sum":
            losses.append(rows.sum())
        else:
            losses.append(rows.sum() / norm if norm != 0 else 0 * rows.sum())
    loss_weight = [1.0] * len(losses) if loss_weight is None else loss_weight
    return HeadsLoss(sum(float(w) * loss for w, loss in zip(loss_weight, losses, strict=True)), losses, logits)


def our_logits(sample: Sample) -> list[Tensor]:
    return linear_heads(sample.x, *sample.linear, lambda_=sample.lambda_)


def our_loss(sample: Sample, **options) -> HeadsLoss:
    linear = all(len(layers) == 1 for layers in sample.weight)
    weight, bias = sample.linear if linear else (sample.weight, sample.bias)
    return heads_loss(sample.x, weight, bias, sample.targets, lambda_=sample.lambda_, losses=sample.losses, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons
# ---------------------------------------------------------------------------------------------------------------------


def assert_near(actual: Tensor, exact: Tensor, dtype: torch.dtype, sensitivity: float | None = None) -> None:
    """Equal to the float64 result but for the rounding of `dtype`; exact zeros must be met exactly.

    `sensitivity`: by how much the result changes with its inputs' relative change; without it, the largest element.
    """
    assert actual.shape == exact.shape
    if sensitivity is None:
        sensitivity = exact.abs().max().item() if exact.numel() else 0.0
    atol = ROUNDINGS[dtype] * torch.finfo(dtype).eps * sensitivity
    torch.testing.assert_close(actual.double(), exact.double(), rtol=0, atol=atol)


def _outputs_and_gradients(
    f: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    outputs = f(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    grads = [torch.randn_like(y) for y in outputs] if grads is None else grads
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    reached = [(y, grad) for y, grad in zip(outputs, grads, strict=True) if y.requires_grad]
    gradients = torch.autograd.grad([y for y, _ in reached], wanted, [grad for _, grad in reached], allow_unused=True)
    return [
        *(y.detach() for y in outputs),
        *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, gradients, strict=True)),
    ], grads


def check_network(
    ours: Callable[..., Tensor | Sequence[Tensor]],
    naive: Callable[..., Tensor | Sequence[Tensor]],
    *inputs: Tensor | None,
) -> None:
    """Outputs, and the gradients for random incoming ones: ours in the inputs' dtype against naive in float64.

    An error is allowed where inputs that differ by a few roundings would have caused it: an element whose terms cancel
    is as uncertain as its terms. How much that is, naive itself tells, from two slight changes of the inputs.
    """
    dtype = inputs[0].dtype
    actual, grads = _outputs_and_gradients(ours, inputs, None)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    for t, gradient in zip(wanted, actual[len(grads) :], strict=True):
        assert gradient.dtype == t.dtype

    def evaluate(change: float) -> list[Tensor]:
        def changed(t: Tensor) -> Tensor:
            t = t.detach().double()
            return t * (1 + change * (2 * torch.rand_like(t) - 1)) if change else t

        exact_inputs = [t if t is None else changed(t).requires_grad_(t.requires_grad) for t in inputs]
        return _outputs_and_gradients(naive, exact_inputs, [changed(grad) for grad in grads])[0]

    change = 1e-6
    exact, *others = evaluate(0), evaluate(change), evaluate(change)
    for i, (a, e) in enumerate(zip(actual, exact, strict=True)):
        changes = [(other[i] - e).abs().max().item() / change for other in others if e.numel()]
        # Two random changes find only a share of what the worst one does: hence the 8. Where a softmax is saturated,
        # its difference from the target is a rounding of numbers near 1, which no change of the inputs shows: hence the
        # floor.
        assert_near(
            a, e, dtype, max([8 * found for found in changes] + [e.abs().max().item(), 1e-2]) if e.numel() else 0.0
        )


def check_logits(sample: Sample) -> None:
    """`linear_heads` against the layers: logits and all gradients."""
    check_network(lambda *t: our_logits(sample.of(t)), lambda *t: naive_logits(sample.of(t)), *sample.inputs)


def check_loss(sample: Sample, *, outputs: str = "loss", **options) -> None:
    """`heads_loss` against the layers: the values of everything, and the gradients of `outputs`, "loss" or "all"."""

    def parts(result: HeadsLoss) -> list[Tensor]:
        return [result.loss] if outputs == "loss" else [result.loss, *result.head_losses, *result.logits]

    check_network(
        lambda *t: parts(our_loss(sample.of(t), **options)),
        lambda *t: parts(naive_loss(sample.of(t), **options)),
        *sample.inputs,
    )
    dtype = sample.x.dtype
    with torch.no_grad():
        ours, exact = our_loss(sample, **options), naive_loss(sample.map(Tensor.double), **options)
    assert {ours.loss.dtype, *(loss.dtype for loss in ours.head_losses)} == {torch.promote_types(dtype, torch.float32)}
    for ours_of, exact_of in zip([*ours.head_losses, *ours.logits], [*exact.head_losses, *exact.logits], strict=True):
        # Logits near 0 and losses near 0 are as uncertain as the terms of their sums, which are of size 1.
        assert_near(ours_of, exact_of, dtype, max(1.0, exact_of.abs().max().item()) if exact_of.numel() else 0.0)
    assert {z.dtype for z in ours.logits} == {dtype}


def second_order(f: Callable[..., Tensor], *inputs: Tensor | None) -> list[Tensor]:
    """Gradients of a gradient penalty, the sum of the first gradients' squares. The bias has none where that is linear
    in it."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    first = torch.autograd.grad(f(*inputs), wanted, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, second, strict=True)]


def gradients(output: Tensor, inputs: Sequence[Tensor], **options) -> list[Tensor]:
    """With zeros where autograd gives None."""
    given = torch.autograd.grad(output, inputs, allow_unused=True, **options)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, given, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# AdversarialHeads, module by module
# ---------------------------------------------------------------------------------------------------------------------


def lambdas_of(heads: AdversarialHeads) -> dict[str, float]:
    return {name: lambda_.item() for name, lambda_ in heads.lambda_.items()}


def logits_of_modules(heads: AdversarialHeads, x: Tensor, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Each head's module behind a reversal of two lines."""
    lambdas, modules = lambdas_of(heads), {**heads.predictors, **heads.adversaries}
    names = [name for name in heads.head_names if names is None or name in names]
    return {name: modules[name](reversal(x, lambdas[name]) if name in lambdas else x) for name in names}


def losses_of_modules(
    heads: AdversarialHeads, logits: dict[str, Tensor], targets: dict[str, Tensor]
) -> dict[str, Tensor]:
    """By PyTorch's own functions."""
    losses = {}
    for name, z in logits.items():
        target = targets[name]
        if heads.losses.get(name) == "mse":
            losses[name] = F.mse_loss(z, target.reshape(z.shape).to(z))
        elif z.shape[-1] == 1:
            losses[name] = F.binary_cross_entropy_with_logits(z, target.reshape(z.shape).to(z))
        else:
            classes = target.dtype == torch.int64
            rows = z.reshape(-1, z.shape[-1])
            losses[name] = F.cross_entropy(rows, target.reshape(-1) if classes else target.reshape(rows.shape).to(z))
    return losses


def check_heads(
    heads: AdversarialHeads, x: Tensor, targets: dict[str, Tensor], seed: int = 0, penalty: bool = True, **tolerance
) -> None:
    """Logits, losses, all gradients of either, and those of a gradient penalty: as module by module, from one seed."""
    inputs = [x, *(p for p in heads.parameters() if p.requires_grad)]

    def run(f):
        torch.manual_seed(seed)
        return f()

    def compare(ours: Tensor, theirs: Tensor) -> None:
        close(ours, theirs)

        def of_inputs(**options):
            return [torch.autograd.grad(y, inputs, allow_unused=True, **options) for y in (ours, theirs)]

        close_gradients(*of_inputs(retain_graph=True))
        if penalty:
            first = of_inputs(create_graph=True)
            close_gradients(*first)
            squares = [sum(g.square().sum() for g in own if g is not None) for own in first]
            close_gradients(*(gradients(square, inputs, retain_graph=True) for square in squares))
        close_gradients(*of_inputs())

    def close(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a, b, **tolerance)

    def close_gradients(ours, theirs) -> None:
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                close(a, b)

    z, exact = run(lambda: heads(x)), run(lambda: logits_of_modules(heads, x))
    assert list(z) == list(exact) == list(heads.head_names)
    for name in z:
        close(z[name], exact[name])
    compare(sum(own.sin().sum() for own in z.values()), sum(own.sin().sum() for own in exact.values()))
    out, exact = run(lambda: heads(x, targets)), run(lambda: logits_of_modules(heads, x, targets))
    losses = losses_of_modules(heads, exact, targets)
    assert list(out.logits) == list(out.head_losses) == list(losses)
    for name in losses:
        close(out.logits[name], exact[name])
        close(out.head_losses[name], losses[name])
    compare(out.loss, sum(losses.values()))


# Ways in which a matrix may lie in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.T.contiguous().T,
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "rows apart": lambda t: torch.cat([t, t], -1)[:, : t.shape[1]],
    "expanded": lambda t: t[:1].expand_as(t),
}
