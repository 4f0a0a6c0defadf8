"""The operations in plain PyTorch, layer by layer: the fallback where nothing is compiled, and the oracle of the tests.

The rules are the compiled operations' own: same results, same errors, same gradients of gradients. It also serves where
C++ autograd nodes cannot go: `torch.func` transforms, and devices for which no kernel is compiled.
"""

import contextlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from grl_ext._checks import (
    NUMBERED,
    Names,
    check_heads,
    check_lambda,
    check_lambdas,
    check_linear,
    check_linear_shapes,
    check_loss,
    check_operands,
    check_own_losses,
)
from grl_ext._options import (
    CROSS_ENTROPY,
    SQUARED_ERROR,
    HeadsOptions,
    Kind,
    LossOfRows,
    as_tensor,
    is_by_output,
    is_own,
)
from grl_ext._reversal import seen_by

Lambdas = Sequence[Tensor | float | None]  # each head's; None for a predictor
LayersOfHeads = Sequence[Sequence[Tensor | None]]  # the weights of each head's layers, or their biases
LossAndLogits = tuple[Tensor, list[Tensor], list[Tensor]]  # the total, each head's loss, each head's logits

# ---------------------------------------------------------------------------------------------------------------------
# Linear layers
# ---------------------------------------------------------------------------------------------------------------------

# Asked now: Dynamo of torch 2.11 does not know the function.
_AUTOCAST = {device: torch.amp.is_autocast_available(device) for device in ("cpu", "cuda", "mps", "xpu", "meta")}


def _has_autocast(device: str) -> bool:
    return _AUTOCAST[device] if device in _AUTOCAST else torch.amp.is_autocast_available(device)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As F.linear under autocast: floating-point tensors in autocast's dtype, float64 left alone."""
    device = tensors[0].device.type
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    eligible = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(t.to(dtype) if t is not None and t.dtype in eligible else t for t in tensors)


def without_autocast(device: torch.device):
    return torch.autocast(device.type, enabled=False) if _has_autocast(device.type) else contextlib.nullcontext()


def as_rows(x: Tensor) -> Tensor:
    """(..., D) -> (N, D), also where D is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def grl_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, lambda_: Tensor | float = 1.0) -> Tensor:
    check_linear(x, weight, bias)
    lambda_ = check_lambda(x, lambda_)
    x, weight, bias = autocast(x, weight, bias)
    check_linear_shapes(x, weight, bias)
    return F.linear(seen_by(x, lambda_), weight, bias)


def checked_heads(x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor | None], names: Names = NUMBERED):
    """x, weight and bias under autocast."""
    check_operands(x, weight, bias, names)
    x, *parameters = autocast(x, *weight, *bias)
    weight, bias = parameters[: len(weight)], parameters[len(weight) :]
    check_heads(x, weight, bias, names)
    return x, weight, bias


def linear_heads(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    lambda_: Sequence[Tensor | float | None],
    names: Names = NUMBERED,
) -> list[Tensor]:
    x, weight, bias = checked_heads(x, weight, bias, names)
    check_lambdas(x, lambda_, names)
    with without_autocast(x.device):
        return [F.linear(seen_by(x, own), w, b) for own, w, b in zip(lambda_, weight, bias, strict=True)]


def hidden_layers(z: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor | None], names: Names) -> Tensor:
    z = F.relu(z)
    for i in range(len(weight)):
        z, (w,), (b,) = checked_heads(z, weight[i : i + 1], bias[i : i + 1], names.some([i]))
        z = F.relu(F.linear(z, w, b))
    return z


# ---------------------------------------------------------------------------------------------------------------------
# The loss of heads
# ---------------------------------------------------------------------------------------------------------------------


def weights_of_rows(
    like: Tensor,
    target: Tensor,
    *,
    size: int,
    kind: Kind,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The weight of each row (N,), or of its entries (N, size), 0 for what is not valid; and what the mean is divided
    by.

    `like` (N, ...) is any float tensor.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    weights = torch.ones_like(like[:, 0], dtype=dtype) if sample_weight is None else sample_weight.to(dtype)
    valid = weights != 0
    labels = _are_labels(target, kind)
    if labels:
        valid = valid & (target != ignore_index)
    weights = torch.where(valid, weights, weights.new_zeros(()))
    norm = weights.sum()
    if is_by_output(kind):
        norm = norm if weights.dim() == 2 else norm * size
    elif class_weight is not None and labels:
        of_rows = class_weight.to(dtype)[target.masked_fill(~valid, 0)]
        norm = torch.where(valid, weights * of_rows, weights.new_zeros(())).sum()
    return weights, norm


def _are_labels(target: Tensor, kind: Kind) -> bool:
    """Of targets as rows: whether they are classes, of which one is to be ignored."""
    return target.dtype == torch.int64 and target.dim() == 1 and not is_by_output(kind)


def head_loss(
    logits: Tensor,
    target: Tensor,
    *,
    kind: Kind,
    sample_weight: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """One head's loss from logits (N, size) and targets (N) or (N, size). What is not valid adds nothing, not even a
    NaN."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights, norm = weights_of_rows(
        z,
        target,
        size=logits.shape[1],
        kind=kind,
        sample_weight=sample_weight,
        class_weight=class_weight,
        ignore_index=ignore_index,
    )
    valid, zero = weights != 0, z.new_zeros(())
    if reduction == "mean":
        valid = valid & (norm != 0)  # without a norm no row counts
    if is_own(kind):
        losses = _own_losses(kind, z, target, valid)
    elif is_by_output(kind):
        of_entries = valid if valid.dim() == 2 else valid[:, None]
        losses = _output_losses(torch.where(of_entries, z, zero), target, of_entries, kind)
        losses = losses if valid.dim() == 2 else losses.sum(1)
    else:
        losses = _cross_entropies(z, target, valid, class_weight, label_smoothing)
    losses = torch.where(valid, weights * losses, zero)
    if reduction == "none":
        return losses if losses.dim() == 1 else losses.sum(1)
    total = losses.sum()
    return total * torch.where(norm == 0, zero, 1 / norm) if reduction == "mean" else total


def _cross_entropies(
    z: Tensor, target: Tensor, valid: Tensor, class_weight: Tensor | None, label_smoothing: float
) -> Tensor:
    zero = z.new_zeros(())
    binary = z.shape[1] == 1
    z = torch.where(valid[:, None], z, zero)
    if binary:
        z = torch.cat([torch.zeros_like(z), z], 1)  # the softmax over 0 and z
    if target.dtype == torch.int64:
        target = target.masked_fill(~valid, 0)
        wanted = torch.zeros_like(z).scatter(1, target[:, None], 1.0)
    else:
        given = target.to(z.dtype)
        wanted = torch.where(valid[:, None], torch.cat([1 - given, given], 1) if binary else given, zero)
    wanted = wanted * (1 - label_smoothing) + label_smoothing / z.shape[1]
    if class_weight is not None:  # the weight of a class that is not wanted may be infinite
        wanted = torch.where(valid[:, None] & (wanted != 0), wanted * class_weight.to(z.dtype), zero)
    # A class that is not wanted at all adds nothing, though its logit be -infinity.
    return -torch.where(wanted == 0, zero, wanted * z.log_softmax(1)).sum(1)


def _output_losses(z: Tensor, target: Tensor, valid: Tensor, kind: int) -> Tensor:
    """Of each output, (N, size)."""
    zero = z.new_zeros(())
    wanted = torch.where(valid, target.to(z.dtype), zero)
    if kind == SQUARED_ERROR:
        return (z - wanted).square()
    # As a softmax over 0 and z: F.softplus is linear from 20 on, and DTensor does not know F.logsigmoid.
    logs = torch.stack([torch.zeros_like(z), z], -1).log_softmax(-1)
    sides = torch.stack([1 - wanted, wanted], -1)
    # A side that is not wanted adds nothing, though its logit be infinite.
    return -torch.where(sides == 0, zero, sides * logs).sum(-1)


def _own_losses(loss: LossOfRows, z: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """By the user's function, which sees zeros in place of rows that are not valid. Whatever it makes of them, neither
    the logits nor the targets get a gradient for it."""
    target = torch.where(valid.view(-1, *[1] * (target.dim() - 1)), target, target.new_zeros(()))
    losses = loss(torch.where(valid[:, None], z, z.new_zeros(())), target)
    check_own_losses(losses, z.shape[0])
    return losses


def loss_of_head(logits: Tensor, targets: Sequence[Tensor], options: HeadsOptions, h: int) -> Tensor:
    """Head h's loss from logits (..., size) and targets that were checked; `options` with all lists filled."""
    target, sample_weight, kind = targets[h], options.sample_weight[h], options.kind[h]
    leading = logits.shape[:-1]
    of_entries = sample_weight is not None and sample_weight.dim() == logits.dim()
    if is_own(kind):
        inner = target.shape[logits.dim() - 1 :]
    else:
        inner = () if target.dtype == torch.int64 and kind == CROSS_ENTROPY else logits.shape[-1:]
    jagged = logits if logits.is_nested else None
    if jagged is not None:  # sequences: their steps lie one behind the other
        logits, target = logits.values(), target.values()
        sample_weight = None if sample_weight is None else sample_weight.values()
    rows = as_rows(logits)
    if sample_weight is not None:
        sample_weight = sample_weight.reshape(rows.shape if of_entries else rows.shape[:1])
    losses = head_loss(
        rows,
        target.reshape(rows.shape[0], *inner),
        kind=kind,
        sample_weight=sample_weight,
        class_weight=options.class_weight[h],
        label_smoothing=options.label_smoothing[h],
        ignore_index=options.ignore_index[h],
        reduction=options.reduction,
    )
    if options.reduction != "none":
        return losses
    if jagged is not None:
        return torch.nested.nested_tensor_from_jagged(losses, jagged.offsets())
    return losses.reshape(leading)


def heads_loss(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    targets: Sequence[Tensor],
    lambda_: Sequence[Tensor | float | None],
    options: HeadsOptions,
    names: Names = NUMBERED,
) -> LossAndLogits:
    x, weight, bias = checked_heads(x, weight, bias, names)
    check_lambdas(x, lambda_, names)
    sizes = [matrix.shape[0] for matrix in weight]
    check_loss(x, sizes, targets, options, names)
    with without_autocast(x.device):
        logits = [F.linear(seen_by(x, own), w, b) for own, w, b in zip(lambda_, weight, bias, strict=True)]
        return loss_of_logits(logits, targets, options)


def loss_of_logits(logits: list[Tensor], targets: Sequence[Tensor], options: HeadsOptions) -> LossAndLogits:
    """Of logits and targets that were checked."""
    options = options.filled(len(logits))
    losses = [loss_of_head(z, targets, options, h) for h, z in enumerate(logits)]
    weights = options.loss_weight
    if weights is not None and not isinstance(weights, Tensor):
        weights = as_tensor(weights)
    total = losses[0] if weights is None else losses[0] * weights[0].to(losses[0])
    for h in range(1, len(losses)):
        total = add_losses(total, losses[h] if weights is None else losses[h] * weights[h].to(losses[h]))
    return total, losses, logits


def add_losses(total: Tensor, loss: Tensor) -> Tensor:
    if total.dim() + loss.dim() > 0 and total.shape != loss.shape:  # a shape takes as long as the sum of two numbers
        raise ValueError(
            "reduction 'none' needs heads with the same rows, whose losses can be added, got losses of shapes "
            f"{list(total.shape)} and {list(loss.shape)}"
        )
    return total + loss
