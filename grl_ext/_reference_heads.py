"""The heads in plain PyTorch, layer by layer: the fallback where nothing is compiled, and the oracle of the tests.

The rules are the compiled operations' own: same results, same errors, same gradients of gradients.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grl_ext._reference import (
    as_rows,
    autocast,
    check_number,
    check_operand,
    check_scalar,
    gradient_reversal,
    in_a_graph,
    in_make_fx,
    without_autocast,
)

CROSS_ENTROPY, SQUARED_ERROR = 0, 1


class HeadsOptions(NamedTuple):
    """What a loss is told of its heads, one entry for each; None in place of a list means its default for all."""

    sample_weight: Sequence[Tensor | None] | None = None
    class_weight: Sequence[Tensor | None] | None = None
    loss_weight: Tensor | None = None
    kind: Sequence[int] | None = None
    label_smoothing: Sequence[float] | None = None
    ignore_index: Sequence[int] | None = None
    mean: bool = True

    def filled(self, heads: int) -> "HeadsOptions":
        """The same without None in place of lists."""

        def each(given, default):
            return [default] * heads if given is None else given

        return HeadsOptions(
            each(self.sample_weight, None),
            each(self.class_weight, None),
            self.loss_weight,
            each(self.kind, CROSS_ENTROPY),
            each(self.label_smoothing, 0.0),
            each(self.ignore_index, -100),
            self.mean,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Checks. The texts are those of csrc/heads_checks.h.
# ---------------------------------------------------------------------------------------------------------------------

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_layer(x: Tensor, weight: Tensor, bias: Tensor | None, layer: int, features: int) -> None:
    name = f"weight[{layer}]"
    if weight.dim() != 2 or weight.shape[1] != features or weight.shape[0] == 0:
        raise ValueError(f"{name} must have shape [K, {features}] with K at least 1, got {list(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"{name} is on {weight.device} but x is on {x.device}")
    if weight.dtype != x.dtype:
        raise TypeError(f"{name} must have x's dtype {x.dtype}, got {weight.dtype}")
    if bias is not None:
        name = f"bias[{layer}]"
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{name} must have shape [{weight.shape[0]}], got {list(bias.shape)}")
        if bias.device != x.device:
            raise ValueError(f"{name} is on {bias.device} but x is on {x.device}")
        if bias.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {bias.dtype}")


def check_layers(x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor | None], depth: Sequence[int]) -> None:
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got shape []")
    if x.dtype not in FLOATING:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if not weight:
        raise ValueError("weight must hold at least one head's matrix, got none")
    if len(bias) != len(weight):
        raise ValueError(f"bias must have an entry for each of the {len(weight)} matrices in weight, got {len(bias)}")
    layer = 0
    for layers in depth:
        if layers < 1 or layer + layers > len(weight):
            raise ValueError(
                f"depth must be positive and sum to the {len(weight)} matrices in weight, got {list(depth)}"
            )
        features = x.shape[-1]
        for _ in range(layers):
            check_layer(x, weight[layer], bias[layer], layer, features)
            features = weight[layer].shape[0]
            layer += 1
    if layer != len(weight):
        raise ValueError(f"depth must be positive and sum to the {len(weight)} matrices in weight, got {list(depth)}")


def check_lambda_of_heads(x: Tensor, lambda_: Tensor, lambda_index: Sequence[int], heads: int) -> None:
    if lambda_.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"lambda_ must be float32 or float64, got {lambda_.dtype}")
    if lambda_.dim() != 1:
        raise ValueError(f"lambda_ must hold the adversaries' numbers, shape [A], got {list(lambda_.shape)}")
    if lambda_.device != x.device and lambda_.device.type != "cpu":
        raise ValueError(f"lambda_ is on {lambda_.device} but x is on {x.device}")
    if len(lambda_index) != heads:
        raise ValueError(f"lambda_index must have an entry for each of the {heads} heads, got {len(lambda_index)}")
    for index in lambda_index:
        if not -1 <= index < lambda_.shape[0]:
            raise ValueError(
                f"lambda_index must be -1 or an element of lambda_, of which there are {lambda_.shape[0]}, got {index}"
            )
    if lambda_.requires_grad:
        raise ValueError("lambda_ requires a gradient, which the heads do not give: pass lambda_.detach()")


def refuse_gradient(name: str, tensor: Tensor) -> None:
    """What the loss has no derivative for must not be lost in silence."""
    if tensor.requires_grad:
        raise ValueError(
            f"{name} requires a gradient, which the heads' loss does not give: pass {name}.detach(), "
            "or compute this head's loss from heads(features)"
        )


def check_target(x: Tensor, target: Tensor, head: int, leading: list[int], size: int, squared: bool) -> None:
    name = f"targets[{head}]"
    labels = target.dtype == torch.int64
    if target.dtype not in FLOATING and not (labels and not squared):
        wanted = "floating point (values)" if squared else "torch.int64 (classes) or floating point (probabilities)"
        raise TypeError(f"{name} must be {wanted}, got {target.dtype}")
    with_size = [*leading, size]
    shapes = ([leading] if labels else [with_size]) + ([with_size, leading] if size == 1 else [])
    if list(target.shape) not in shapes:
        raise ValueError(
            f"{name} must have shape {leading if labels or size == 1 else with_size}, got {list(target.shape)}"
        )
    if target.device != x.device:
        raise ValueError(f"{name} is on {target.device} but x is on {x.device}")
    refuse_gradient(name, target)


def check_weights(x: Tensor, argument: str, weights: Tensor | None, head: int, sizes: list[int]) -> None:
    if weights is None:
        return
    name = f"{argument}[{head}]"
    check_operand(name, weights)
    if weights.dtype not in FLOATING:
        raise TypeError(f"{name} must be floating point, got {weights.dtype}")
    if list(weights.shape) != sizes:
        raise ValueError(f"{name} must have shape {sizes}, got {list(weights.shape)}")
    if weights.device != x.device:
        raise ValueError(f"{name} is on {weights.device} but x is on {x.device}")
    refuse_gradient(name, weights)


def check_options(
    x: Tensor, sizes: Sequence[int], targets: Sequence[Tensor], options: HeadsOptions, first: int = 0
) -> None:
    """x (..., D) or whatever else has the targets' leading sizes; `sizes`, the columns of each head's logits. `first`
    numbers them."""
    heads = len(sizes)
    for name, entries in zip(("targets", *HeadsOptions._fields), (targets, *options), strict=True):
        if name not in ("loss_weight", "mean") and len(entries) != heads:
            raise ValueError(f"{name} must have an entry for each of the {heads} heads, got {len(entries)}")
    leading = list(x.shape[:-1])
    for i, size in enumerate(sizes):
        h = first + i
        squared = options.kind[i] == SQUARED_ERROR
        if not squared and options.kind[i] != CROSS_ENTROPY:
            raise ValueError(f"kind must be 0 (cross entropy) or 1 (squared error), got {options.kind[i]}")
        check_target(x, targets[i], h, leading, size, squared)
        check_weights(x, "sample_weight", options.sample_weight[i], h, leading)
        if squared and options.class_weight[i] is not None:
            raise ValueError(f"class_weight[{h}] is for a cross entropy, this head has a squared error")
        check_weights(x, "class_weight", options.class_weight[i], h, [max(2, size)])
        smoothing = options.label_smoothing[i]
        if not 0 <= smoothing <= 1:
            raise ValueError(f"label_smoothing[{h}] must be in [0, 1], got {smoothing:g}")
        if squared and smoothing != 0:
            raise ValueError(f"label_smoothing[{h}] is for a cross entropy, this head has a squared error")
        check_values(targets[i], options.sample_weight[i], h, size, options.ignore_index[i])
    weights = options.loss_weight
    if weights is not None:
        if weights.is_complex():
            raise TypeError(f"loss_weight must hold real numbers, got {weights.dtype}")
        if weights.shape != (heads,):
            raise ValueError(
                f"loss_weight must have an entry for each of the {heads} heads, got shape {list(weights.shape)}"
            )
        if weights.device != x.device and weights.device.type != "cpu":
            raise ValueError(f"loss_weight is on {weights.device} but x is on {x.device}")
        refuse_gradient("loss_weight", weights)


def check_values(target: Tensor, sample_weight: Tensor | None, head: int, size: int, ignore_index: int) -> None:
    """Values are only looked at where that costs no synchronisation and they exist."""
    plain = target.device.type == "cpu" and type(target) is Tensor
    if (
        not plain
        or torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
    ):
        return
    if in_make_fx():  # as in torch.func.linearize
        return
    if sample_weight is not None and type(sample_weight) is Tensor:
        wrong = ~((sample_weight >= 0) & sample_weight.isfinite())
        if wrong.any():
            number = sample_weight[wrong][0].item()
            raise ValueError(f"sample_weight[{head}] must be finite and not negative, got {number:g}")
    if target.dtype == torch.int64:
        classes = max(2, size)
        wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
        if wrong.any():
            raise IndexError(
                f"targets[{head}] must be in [0, {classes}) or ignore_index ({ignore_index}), got {target[wrong][0]}"
            )


# ---------------------------------------------------------------------------------------------------------------------
# The operations
# ---------------------------------------------------------------------------------------------------------------------


def as_given(x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor | None]):
    """x, weight and bias under autocast."""
    check_operand("x", x)
    for name, tensors in (("weight", weight), ("bias", bias)):
        for i, tensor in enumerate(tensors):
            if tensor is not None:
                check_operand(f"{name}[{i}]", tensor)
    x, *parameters = autocast(x, *weight, *bias)
    return x, parameters[: len(weight)], parameters[len(weight) :]


def _seen_by(x: Tensor, lambda_: Tensor, index: int) -> Tensor:
    """The features as the head sees them: an adversary's gradient to them is reversed."""
    if index < 0:
        return x
    if in_a_graph():  # where a Python function's own backward would be lost
        return torch.ops.grl_ext.gradient_reversal(x, lambda_[index])
    return gradient_reversal(x, lambda_[index])


def linear_heads(
    x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor | None], lambda_: Tensor, lambda_index: Sequence[int]
) -> list[Tensor]:
    x, weight, bias = as_given(x, weight, bias)
    check_layers(x, weight, bias, [1] * len(weight))
    check_lambda_of_heads(x, lambda_, lambda_index, len(weight))
    with without_autocast(x.device):
        heads = zip(lambda_index, weight, bias, strict=True)
        return [F.linear(_seen_by(x, lambda_, index), w, b) for index, w, b in heads]


def weights_of_rows(
    like: Tensor,
    target: Tensor,
    *,
    size: int,
    kind: int,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The weight of each row (N,), 0 for one that is not valid, and what their mean is divided by. `like` (N, ...) is
    any float tensor."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    weights = torch.ones_like(like[:, 0], dtype=dtype) if sample_weight is None else sample_weight.to(dtype)
    valid = weights != 0
    labels = target.dtype == torch.int64
    if labels:
        valid = valid & (target != ignore_index)
    weights = torch.where(valid, weights, weights.new_zeros(()))
    norm = weights.sum()
    if kind == SQUARED_ERROR:
        norm = norm * size
    elif class_weight is not None and labels:
        of_target = class_weight.to(dtype)[target.masked_fill(~valid, 0)]
        norm = torch.where(valid, weights * of_target, weights.new_zeros(())).sum()
    return weights, norm


def head_loss(
    logits: Tensor,
    target: Tensor,
    *,
    kind: int,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
) -> Tensor:
    """One head's loss from logits (N, size) and targets (N) or (N, size). Rows that are not valid add nothing, not even
    a NaN."""
    size = logits.shape[1]
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = target.dtype == torch.int64
    row_weight, norm = weights_of_rows(
        z,
        target,
        size=size,
        kind=kind,
        sample_weight=sample_weight,
        class_weight=class_weight,
        ignore_index=ignore_index,
    )
    valid, zero = row_weight != 0, z.new_zeros(())
    if mean:
        valid = valid & (norm != 0)  # without a norm no row counts
    z = torch.where(valid[:, None], z, zero)
    if kind == SQUARED_ERROR:
        losses = (z - torch.where(valid[:, None], target.to(z.dtype), zero)).square().sum(1)
    else:
        if size == 1:
            z = torch.cat([torch.zeros_like(z), z], 1)  # binary: the softmax over 0 and z
        classes = z.shape[1]
        if labels:
            target = target.masked_fill(~valid, 0)
            wanted = torch.zeros_like(z).scatter(1, target[:, None], 1.0)
        else:
            given = target.to(z.dtype)
            wanted = torch.where(valid[:, None], torch.cat([1 - given, given], 1) if size == 1 else given, zero)
        wanted = wanted * (1 - label_smoothing) + label_smoothing / classes
        if class_weight is not None:
            # The weight of a class that is not wanted may be infinite.
            wanted = torch.where(valid[:, None] & (wanted != 0), wanted * class_weight.to(z.dtype), zero)
        # A class that is not wanted at all adds nothing, though its logit be -infinity.
        losses = -torch.where(wanted == 0, zero, wanted * z.log_softmax(1)).sum(1)
    total = (row_weight * losses).sum()
    return total * torch.where(norm == 0, zero, 1 / norm) if mean else total


def heads_loss(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    depth: Sequence[int],
    targets: Sequence[Tensor],
    lambda_: Tensor,
    lambda_index: Sequence[int],
    options: HeadsOptions,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x, weight, bias = as_given(x, weight, bias)
    for i, target in enumerate(targets):
        check_operand(f"targets[{i}]", target)
    heads = len(depth)
    options = options.filled(heads)
    check_layers(x, weight, bias, depth)
    check_lambda_of_heads(x, lambda_, lambda_index, heads)
    last = [sum(depth[: h + 1]) - 1 for h in range(heads)]
    sizes = [weight[layer].shape[0] for layer in last]
    check_options(x, sizes, targets, options)
    losses, logits = [], []
    with without_autocast(x.device):
        for h in range(heads):
            z = _seen_by(x, lambda_, lambda_index[h])
            for layer in range(last[h] - depth[h] + 1, last[h] + 1):
                z = F.linear(z, weight[layer], bias[layer])
                z = z if layer == last[h] else F.relu(z)
            logits.append(z)
            losses.append(loss_of_head(z, targets, options, h))
        return total_loss(losses, options.loss_weight), losses, logits


def loss_of_head(logits: Tensor, targets: Sequence[Tensor], options: HeadsOptions, h: int) -> Tensor:
    """Head h's loss from logits (..., size) and targets that were checked; `options` with all lists filled."""
    target, sample_weight = targets[h], options.sample_weight[h]
    if logits.is_nested:  # jagged sequences: their steps lie one behind the other
        logits, target = logits.values(), target.values()
        sample_weight = None if sample_weight is None else sample_weight.values()
    rows = as_rows(logits)
    return head_loss(
        rows,
        target.reshape(rows.shape[:1] if target.dtype == torch.int64 else rows.shape),
        kind=options.kind[h],
        sample_weight=None if sample_weight is None else sample_weight.reshape(rows.shape[:1]),
        class_weight=options.class_weight[h],
        label_smoothing=options.label_smoothing[h],
        ignore_index=options.ignore_index[h],
        mean=options.mean,
    )


def total_loss(losses: Sequence[Tensor], loss_weight: Tensor | None) -> Tensor:
    return sum(loss if loss_weight is None else loss * loss_weight[h].to(loss) for h, loss in enumerate(losses))


def numbers(name: str, values: Sequence[Tensor | float] | Tensor, places: Sequence[int] | None = None) -> Tensor:
    """Numbers of heads in one tensor; read now, where they are on the CPU. `places` are their heads, which errors
    name."""
    if isinstance(values, Tensor):
        return values
    if torch.compiler.is_compiling():
        # One graph serves all values of a changing number only if it becomes a tensor, and that by a product.
        values = [
            value if isinstance(value, Tensor) else torch.ones((), dtype=torch.float64) * value for value in values
        ]
    else:
        places = range(len(values)) if places is None else places
        values = [check_scalar(f"{name}[{h}]", value) for h, value in zip(places, values, strict=True)]
    devices = [value.device for value in values if isinstance(value, Tensor)]
    if not devices:
        return torch.tensor(values, dtype=torch.float64)
    device = ([device for device in devices if device.type != "cpu"] or devices)[0]
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])


def check_smoothing(values: Sequence[float]) -> Sequence[float]:
    if torch.compiler.is_compiling():
        return values
    return [check_number(f"label_smoothing[{h}]", value) for h, value in enumerate(values)]


def check_ignored(values: Sequence[int]) -> Sequence[int]:
    for h, value in enumerate(values):
        if not isinstance(value, Integral):
            raise TypeError(f"ignore_index[{h}] must be an integer, got {type(value).__name__}")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"ignore_index[{h}] must fit into int64, got {value}")
    return values
