"""What the tests of the linear operations share: sample arguments, and the network they replace, layer by layer.

That network is the oracle: one reversal, one linear layer and one loss of PyTorch's own for each head, in float64.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grl_ext import _backend, _reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

# The total of head sizes past which the compiled heads go through matrix products.
SWITCH = _backend.C.build_info()["max_columns_cpu"] if _backend.C else 64

# (N, D): none, one or two blocks of 64 rows, full and not; features of one element, of whole vectors, and with a rest, behind whole
# strips of four vectors, behind single ones, and behind both.
SHAPES = [(0, 7), (1, 1), (1, 129), (5, 64), (7, 100), (64, 7), (65, 129), (130, 1), (130, 64)]
HEAD_SIZES = [(1,), (2,), (2, 2), (1, 3, 1), (10, 2), (13,), (SWITCH - 2, 2), (SWITCH - 1, 2), (251, 1, 49)]

# In eps of the dtype. Float32 and float64: the rounding of some hundred terms, one by one, and an exponential good to 2 eps. Half
# types: sums are made in float32, but the logits, their gradient and the result are each rounded, some twice.
ROUNDINGS = {torch.float64: 64, torch.float32: 64, torch.float16: 8, torch.bfloat16: 8}


class Sample(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    head_sizes: list[int]
    grad_scale: list[float]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.x, self.weight, self.bias


def sample_heads(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    leading: Sequence[int] = (5,),
    features: int = 7,
    head_sizes: Sequence[int] = (3, 2),
    bias: bool = True,
) -> Sample:
    """x, weight and bias that require grad, some targets, and head scales 1, -0.3, 2, 0, 1, ..."""
    columns = sum(head_sizes)
    x = torch.randn(*leading, features, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(columns, features, device=device) / max(1, features) ** 0.5).to(dtype).requires_grad_()
    b = torch.randn(columns, device=device).to(dtype).requires_grad_() if bias else None
    targets = torch.stack([torch.randint(max(2, size), tuple(leading), device=device) for size in head_sizes], -1)
    return Sample(x, weight, b, targets, list(head_sizes), [(1.0, -0.3, 2.0, 0.0)[h % 4] for h in range(len(head_sizes))])


def naive_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lambda_: Tensor | float) -> Tensor:
    return F.linear(_reference.gradient_reversal(x, lambda_), weight, bias)


def naive_heads(x: Tensor, weight: Tensor, bias: Tensor | None, head_sizes: Sequence[int], grad_scale: Iterable[float]) -> Tensor:
    """A reversal (lambda = -scale) and a linear layer for each head."""
    biases = [None] * len(head_sizes) if bias is None else bias.split(tuple(head_sizes))
    heads = zip(weight.split(tuple(head_sizes)), biases, grad_scale, strict=True)
    return torch.cat([naive_linear(x, w, b, -scale) for w, b, scale in heads], -1)


def naive_head_losses(
    logits: Tensor, targets: Tensor, head_sizes: Sequence[int], ignore_index: int = -100, label_smoothing: float = 0.0
) -> Tensor:
    """PyTorch's mean loss for each head: cross entropy, or binary cross entropy for one logit; 0 where no row counts."""
    losses = []
    for z, target in zip(logits.reshape(-1, logits.shape[-1]).split(tuple(head_sizes), 1), targets.reshape(-1, len(head_sizes)).T, strict=True):
        valid = target != ignore_index
        z, target = z[valid], target[valid]
        if not len(z):
            losses.append(z.sum())
        elif z.shape[1] == 1:
            soft = target.to(z) * (1 - label_smoothing) + label_smoothing / 2
            losses.append(F.binary_cross_entropy_with_logits(z[:, 0], soft))
        else:
            losses.append(F.cross_entropy(z, target, label_smoothing=label_smoothing))
    return torch.stack(losses)


def naive_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    head_sizes: Sequence[int],
    grad_scale: Iterable[float],
    *,
    loss_weight: Sequence[float] | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The differentiable total of `heads_cross_entropy`."""
    losses = naive_head_losses(naive_heads(x, weight, bias, head_sizes, grad_scale), targets, head_sizes, ignore_index, label_smoothing)
    return losses.sum() if loss_weight is None else losses @ torch.as_tensor(loss_weight).to(losses)


def assert_near(actual: Tensor, exact: Tensor, dtype: torch.dtype, sensitivity: float | None = None) -> None:
    """Equal to the float64 result but for the rounding of `dtype`; exact zeros must be met exactly.

    `sensitivity`: by how much the result changes with its inputs' relative change; without it, the largest element.
    """
    assert actual.shape == exact.shape
    if sensitivity is None:
        sensitivity = exact.abs().max().item() if exact.numel() else 0.0
    atol = ROUNDINGS[dtype] * torch.finfo(dtype).eps * sensitivity
    torch.testing.assert_close(actual.double(), exact.double(), rtol=0, atol=atol)


def _output_and_gradients(f: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor | None) -> tuple[list[Tensor], Tensor]:
    y = f(*inputs)
    grad = torch.randn_like(y) if grad is None else grad
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad)], grad


def check_network(ours: Callable[..., Tensor], naive: Callable[..., Tensor], *inputs: Tensor | None) -> None:
    """Output, and the gradients for a random incoming one: ours in the inputs' dtype against naive in float64.

    An error is allowed where inputs that differ by a few roundings would have caused it: an element whose terms cancel is as
    uncertain as its terms. How much that is, naive itself tells, from two slight changes of the inputs.
    """
    dtype = inputs[0].dtype
    actual, grad = _output_and_gradients(ours, inputs, None)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    for t, gradient in zip(wanted, actual[1:], strict=True):
        assert gradient.dtype == t.dtype

    def evaluate(change: float) -> list[Tensor]:
        def changed(t: Tensor) -> Tensor:
            t = t.detach().double()
            return t * (1 + change * (2 * torch.rand_like(t) - 1)) if change else t

        exact_inputs = [t if t is None else changed(t).requires_grad_(t.requires_grad) for t in inputs]
        return _output_and_gradients(naive, exact_inputs, changed(grad))[0]

    change = 1e-6
    exact, *others = evaluate(0), evaluate(change), evaluate(change)
    for i, (a, e) in enumerate(zip(actual, exact, strict=True)):
        changes = [(other[i] - e).abs().max().item() / change for other in others if e.numel()]
        assert_near(a, e, dtype, max(changes + [e.abs().max().item()]) if e.numel() else 0.0)


def second_order(f: Callable[..., Tensor], *inputs: Tensor | None) -> list[Tensor]:
    """Gradients of a gradient penalty, the sum of the first gradients' squares. The bias has none where that is linear in it."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    first = torch.autograd.grad(f(*inputs), wanted, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, second, strict=True)]
