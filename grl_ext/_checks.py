"""Every refusal and its text. The compiled functions decline what they do not take; then these checks say why."""

import sys
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.masked import MaskedTensor

from grl_ext import _paths
from grl_ext._options import (
    BINARY_CROSS_ENTROPY,
    CROSS_ENTROPY,
    KINDS,
    SQUARED_ERROR,
    HeadsOptions,
    Kind,
    is_by_output,
    is_own,
)

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Names(NamedTuple):
    """How errors name what the user wrote."""

    features: str = "x"
    heads: Sequence[str | int] | None = None  # None: by number
    layers: Sequence[int] | None = None  # which of the heads' layers, where they are given one by one

    def of(self, argument: str, h: int) -> str:
        name = f"{argument}[{h if self.heads is None else self.heads[h]!r}]"
        return name if self.layers is None or argument not in ("weight", "bias") else f"{name}[{self.layers[h]}]"

    def some(self, heads: Sequence[int]) -> "Names":
        layers = None if self.layers is None else [self.layers[h] for h in heads]
        return Names(self.features, list(heads) if self.heads is None else [self.heads[h] for h in heads], layers)

    def of_layers(self, heads: Sequence[int], layers: Sequence[int]) -> "Names":
        """Of one layer of each head. Heads that have names were given as modules, whose layers have no numbers here."""
        return self.some(heads) if self.heads is not None else Names(self.features, heads, layers)


NUMBERED = Names()


# Functions: Dynamo of torch 2.8 takes no property of a named tuple.


def _of_features(names: Names) -> str:
    return "x's" if names.features == "x" else f"the {names.features}'"


def _features_are(names: Names) -> str:
    return "x is" if names.features == "x" else f"the {names.features} are"


# ---------------------------------------------------------------------------------------------------------------------
# Tensors and numbers
# ---------------------------------------------------------------------------------------------------------------------


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_operand(name: str, value: object) -> None:
    """What a linear layer or a loss takes."""
    check_tensor(name, value)
    if isinstance(value, MaskedTensor):
        raise TypeError(
            f"{name} must not be a MaskedTensor: pass {name}.to_tensor(value), with the value that masked elements are "
            "to have"
        )


def from_array(value: object) -> object:
    """Python's number from an array without dimensions, such as numpy's; anything else as it is."""
    if isinstance(value, (Real, Tensor)) or getattr(value, "shape", None) != () or not hasattr(value, "item"):
        return value
    number = value.item()
    return number if isinstance(number, Real) else value


def check_number(name: str, value: object) -> float:
    """A finite Python float from any real number."""
    value = from_array(value)
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number or a real tensor, got {type(value).__name__}")
    value = float(value)
    if not abs(value) <= sys.float_info.max:  # torch.compile traces neither math.isfinite nor math.inf
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def _check_real(name: str, value: Tensor) -> None:
    if value.is_complex():
        raise TypeError(f"{name} must be a real number or a real tensor, got a tensor of {value.dtype}")


def _is_read_by_graph(tensor: Tensor) -> bool:
    """Whether a compiled graph can look at the values when it runs."""
    plain = tensor.device.type == "cpu" and not hasattr(type(tensor), "__tensor_flatten__")  # a DTensor is none
    # Not by is_exporting(): in torch 2.10 and before, Dynamo takes it for true in every graph.
    return plain and torch.compiler.is_compiling() and not torch.compiler._is_exporting_flag


def _check_finite(name: str, value: Tensor) -> None:
    if _paths.are_readable(value) and not value.isfinite().all():
        number = value[~value.isfinite()].flatten()[0].item()
        raise ValueError(f"{name} must be finite, got {number}")


def check_scalar(name: str, value: object) -> Tensor | float:
    """A finite number, or a 0-d tensor as it is."""
    if not isinstance(value, Tensor):
        return check_number(name, value)
    _check_real(name, value)
    if value.dim() != 0:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {list(value.shape)}")
    _check_finite(name, value)
    return value


def check_lambda_number(name: str, value: object) -> Tensor | float:
    """The same for lambda, of which other layers keep tensors of shape [1]."""
    return check_scalar(name, value.reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else value)


def _check_device(name: str, tensor: Tensor, x: Tensor, names: Names = NUMBERED) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} but {_features_are(names)} on {x.device}")


def check_lambda(x: Tensor, lambda_: Tensor | float) -> Tensor | float:
    """Of a reversal of x: a finite number, or a tensor that broadcasts to x."""
    if not isinstance(lambda_, Tensor):
        return check_number("lambda_", lambda_)
    _check_real("lambda_", lambda_)
    if lambda_.device != x.device and (lambda_.dim() > 0 or lambda_.device.type != "cpu"):
        raise ValueError(
            f"lambda_ is on {lambda_.device} but x is on {x.device}: only a 0-d lambda_ may be elsewhere, on the CPU"
        )
    offset = x.dim() - lambda_.dim()
    if offset < 0 or any(size not in (1, x.shape[offset + d]) for d, size in enumerate(lambda_.shape)):
        raise ValueError(f"lambda_ of shape {list(lambda_.shape)} does not broadcast to x of shape {list(x.shape)}")
    _check_finite("lambda_", lambda_)
    return lambda_


# ---------------------------------------------------------------------------------------------------------------------
# Linear layers
# ---------------------------------------------------------------------------------------------------------------------


def check_linear(x: object, weight: object, bias: object) -> None:
    """The arguments of one linear layer, before autocast."""
    check_operand("x", x)
    check_operand("weight", weight)
    if bias is not None:
        check_operand("bias", bias)


def check_linear_shapes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The same after autocast."""
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got shape []")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight must have shape [K, D] with D = x.shape[-1] = {x.shape[-1]}, got {list(weight.shape)}"
        )
    _check_device("weight", weight, x)
    if x.dtype not in FLOATING or weight.dtype != x.dtype:
        raise TypeError(
            "x and weight must have the same dtype, float16, bfloat16, float32 or float64, "
            f"got {x.dtype} and {weight.dtype}"
        )
    if bias is not None:
        _check_bias("bias", bias, weight, x, NUMBERED)


def _check_bias(name: str, bias: Tensor, weight: Tensor, x: Tensor, names: Names) -> None:
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{name} must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    _check_device(name, bias, x, names)
    if bias.dtype != x.dtype:
        raise TypeError(f"{name} must have {_of_features(names)} dtype {x.dtype}, got {bias.dtype}")


def check_operands(x: object, weight: Sequence[object], bias: Sequence[object | None], names: Names = NUMBERED) -> None:
    """Features and layers of heads, before autocast."""
    check_operand(names.features, x)
    for argument, tensors in (("weight", weight), ("bias", bias)):
        for h, tensor in enumerate(tensors):
            if argument == "weight" or tensor is not None:
                check_operand(names.of(argument, h), tensor)


def check_heads(x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor | None], names: Names = NUMBERED) -> None:
    """The same after autocast."""
    if x.dim() == 0:
        raise ValueError(f"{names.features} must have at least one dimension, got shape []")
    if x.dtype not in FLOATING:
        raise TypeError(f"{names.features} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if not weight:
        raise ValueError("weight must hold at least one head's matrix, got none")
    if len(bias) != len(weight):
        raise ValueError(f"bias must have an entry for each of the {len(weight)} heads, got {len(bias)}")
    for h, matrix in enumerate(weight):
        name = names.of("weight", h)
        check_matrix(name, matrix, x.shape[-1])
        _check_device(name, matrix, x, names)
        if matrix.dtype != x.dtype:
            raise TypeError(f"{name} must have {_of_features(names)} dtype {x.dtype}, got {matrix.dtype}")
        if bias[h] is not None:
            _check_bias(names.of("bias", h), bias[h], matrix, x, names)


def check_matrix(name: str, weight: Tensor, features: int) -> None:
    if weight.dim() != 2 or weight.shape[1] != features or weight.shape[0] == 0:
        raise ValueError(f"{name} must have shape [K, {features}] with K at least 1, got {list(weight.shape)}")


def check_lambda_of_heads(lambda_: object, heads: int) -> list[Tensor | float | None]:
    """The argument as a whole; numbers of any type become Python's floats, which the compiled functions take."""
    if isinstance(lambda_, (Tensor, str)) or not isinstance(lambda_, Sequence):
        raise TypeError(
            "lambda_ must be a sequence with a number, a 0-d tensor or None for each head, "
            f"got {type(lambda_).__name__}"
        )
    check_count("lambda_", lambda_, heads)
    numbers: list[Tensor | float | None] = []
    for h, own in enumerate(lambda_):
        if isinstance(own, Tensor):
            numbers.append(own.reshape(()) if own.dim() > 0 and own.numel() == 1 else own)
        else:
            numbers.append(None if own is None else check_number(f"lambda_[{h}]", own))
    return numbers


def check_lambdas(x: Tensor, lambda_: Sequence[Tensor | float | None], names: Names = NUMBERED) -> None:
    """Each head's: None for a predictor."""
    for h, value in enumerate(lambda_):
        if value is None:
            continue
        name = names.of("lambda_", h)
        if isinstance(check_scalar(name, value), Tensor):
            if value.device.type != "cpu":
                _check_device(name, value, x, names)
            if value.requires_grad:
                raise ValueError(f"{name} requires a gradient, which the heads do not give: pass {name}.detach()")


# ---------------------------------------------------------------------------------------------------------------------
# The loss of heads
# ---------------------------------------------------------------------------------------------------------------------


def check_count(name: str, entries: Sequence[object], heads: int) -> None:
    if len(entries) != heads:
        raise ValueError(f"{name} must have an entry for each of the {heads} heads, got {len(entries)}")


def kind_of(name: str, loss: object) -> Kind:
    if isinstance(loss, str) and loss in KINDS:
        return KINDS[loss]
    if not callable(loss):
        raise ValueError(f"{name} must be one of {list(KINDS)} or a function, got {loss!r}")
    return loss


def check_own_losses(losses: object, rows: int) -> None:
    """What a loss of the user's own has returned."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"a loss function must return a tensor with a loss for each row, got {type(losses).__name__}")
    if losses.dim() != 1 or losses.shape[0] != rows:
        raise ValueError(
            f"a loss function must return a loss for each row, of shape [{rows}], got shape {list(losses.shape)}: "
            "leave the mean to the heads, as with reduction='none'"
        )


def check_reduction(reduction: str) -> str:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    return reduction


def check_mapping(name: str, value: object, of: str) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping from head names to {of}, got {type(value).__name__}")


def check_counts(targets: Sequence[Tensor], options: HeadsOptions, heads: int) -> None:
    check_count("targets", targets, heads)
    for name in ("sample_weight", "class_weight", "loss_weight", "kind", "label_smoothing", "ignore_index"):
        entries = getattr(options, name)
        if isinstance(entries, Tensor):
            if entries.shape != (heads,):
                raise ValueError(
                    f"{name} must have an entry for each of the {heads} heads, got shape {list(entries.shape)}"
                )
        elif entries is not None:
            check_count(name, entries, heads)


def check_numbers(options: HeadsOptions, names: Names = NUMBERED) -> None:
    """The options that are numbers. Of tensors what can be said without the features."""
    for h, smoothing in enumerate(options.label_smoothing or ()):
        name = names.of("label_smoothing", h)
        if not isinstance(from_array(smoothing), Real):
            raise TypeError(f"{name} must be a real number, got {type(smoothing).__name__}")
        if not 0 <= check_number(name, smoothing) <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {smoothing:g}")
        if options.kind is not None and smoothing != 0:
            _check_cross_entropy(name, options.kind[h])
    for h, index in enumerate(options.ignore_index or ()):
        name = names.of("ignore_index", h)
        if not isinstance(index, Integral):
            raise TypeError(f"{name} must be an integer, got {type(index).__name__}")
        if not -(2**63) <= index < 2**63:
            raise ValueError(f"{name} must fit into int64, got {index}")
    if isinstance(options.loss_weight, Tensor):
        if options.loss_weight.is_complex():
            raise TypeError(f"loss_weight must hold real numbers, got {options.loss_weight.dtype}")
        _check_loss_weight("loss_weight", options.loss_weight)
    else:
        for h, weight in enumerate(options.loss_weight or ()):
            if isinstance(check_scalar(names.of("loss_weight", h), weight), Tensor):
                _check_loss_weight(names.of("loss_weight", h), weight)


def _check_loss_weight(name: str, weight: Tensor) -> None:
    _refuse_gradient(name, weight)
    if _is_read_by_graph(weight):
        torch.ops.aten._assert_async.msg(weight.isfinite().all(), f"{name} must be finite")
    _check_finite(name, weight)


def check_loss(
    x: Tensor, sizes: Sequence[int], targets: Sequence[Tensor], options: HeadsOptions, names: Names = NUMBERED
) -> None:
    """x (..., D) or what else has the targets' leading sizes; `sizes`, the columns of each head's logits. Of options
    whose numbers were checked."""
    heads = len(sizes)
    check_counts(targets, options, heads)
    options = options.filled(heads)
    leading = list(x.shape[:-1])
    for h, size in enumerate(sizes):
        kind, sample_weight = options.kind[h], options.sample_weight[h]
        _check_target(names.of("targets", h), x, targets[h], leading, size, kind, names)
        of_entries = is_by_output(kind) and isinstance(sample_weight, Tensor) and sample_weight.dim() == x.dim()
        shape = [*leading, size] if of_entries else leading
        _check_weights(names.of("sample_weight", h), x, sample_weight, shape, names)
        name = names.of("class_weight", h)
        if options.class_weight[h] is not None:
            _check_cross_entropy(name, kind)
        _check_weights(name, x, options.class_weight[h], [max(2, size)], names)
        _check_values(h, targets[h], sample_weight, max(2, size), options.ignore_index[h], kind, names)
        if not is_own(kind) and kind == CROSS_ENTROPY and targets[h].dtype != torch.int64:
            _check_probabilities(h, targets[h], sample_weight, size, names)
    weights = options.loss_weight
    if isinstance(weights, Tensor) and weights.device.type != "cpu":
        _check_device("loss_weight", weights, x, names)


def _refuse_gradient(name: str, tensor: Tensor) -> None:
    """What the loss has no derivative for must not be lost silently."""
    if tensor.requires_grad:
        raise ValueError(
            f"{name} requires a gradient, which the heads' loss does not give: pass {name}.detach(), "
            "or compute this head's loss from heads(features)"
        )


def _check_cross_entropy(name: str, kind: Kind) -> None:
    if is_own(kind) or kind != CROSS_ENTROPY:
        others = {SQUARED_ERROR: "a squared error", BINARY_CROSS_ENTROPY: "a binary cross entropy for each output"}
        other = "a loss function of its own" if is_own(kind) else others[kind]
        raise ValueError(f"{name} is for a cross entropy, this head has {other}")


# What targets a loss takes beside floating-point ones, and how the error calls them all.
_TARGETS = {
    CROSS_ENTROPY: ((torch.int64,), "torch.int64 (classes) or floating point (probabilities)"),
    SQUARED_ERROR: ((), "floating point (values)"),
    BINARY_CROSS_ENTROPY: ((torch.int64, torch.bool), "0 and 1 (torch.bool, torch.int64) or floating point in [0, 1]"),
}


def _check_target(
    name: str, x: Tensor, target: Tensor, leading: list[int], size: int, kind: Kind, names: Names
) -> None:
    check_operand(name, target)
    if is_own(kind):  # the rest is the function's; it may also give the targets a gradient
        if list(target.shape[: len(leading)]) != leading:
            raise ValueError(f"{name} must have shape {leading}, or more dimensions, got {list(target.shape)}")
        _check_device(name, target, x, names)
        return
    others, wanted = _TARGETS[kind]
    if target.dtype not in FLOATING and target.dtype not in others:
        raise TypeError(f"{name} must be {wanted}, got {target.dtype}")
    labels = kind == CROSS_ENTROPY and target.dtype == torch.int64
    with_size = [*leading, size]
    shapes = ([leading] if labels else [with_size]) + ([with_size, leading] if size == 1 else [])
    if not any(list(target.shape) == shape for shape in shapes):  # Dynamo's `in` compares no symbolic sizes
        wanted = leading if labels or size == 1 else with_size
        raise ValueError(f"{name} must have shape {wanted}, got {list(target.shape)}")
    _check_device(name, target, x, names)
    _refuse_gradient(name, target)


def _check_weights(name: str, x: Tensor, weights: Tensor | None, sizes: list[int], names: Names) -> None:
    if weights is None:
        return
    check_operand(name, weights)
    if weights.dtype not in FLOATING:
        raise TypeError(f"{name} must be floating point, got {weights.dtype}")
    if list(weights.shape) != sizes:
        raise ValueError(f"{name} must have shape {sizes}, got {list(weights.shape)}")
    _check_device(name, weights, x, names)
    _refuse_gradient(name, weights)


def _check_values(
    h: int, target: Tensor, sample_weight: Tensor | None, classes: int, ignore_index: int, kind: Kind, names: Names
) -> None:
    """Values are looked at where they exist and that costs no synchronisation; in a compiled graph, when it runs."""
    in_graph = _is_read_by_graph(target)
    if not in_graph and not _paths.are_readable(target, sample_weight):
        return
    if sample_weight is not None:
        name = f"{names.of('sample_weight', h)} must be finite and not negative"
        right = (sample_weight >= 0) & sample_weight.isfinite()
        if in_graph:
            torch.ops.aten._assert_async.msg(right.all(), name)
        elif not right.all():
            raise ValueError(f"{name}, got {sample_weight[~right][0].item():g}")
    if is_own(kind):
        return
    if kind == BINARY_CROSS_ENTROPY and target.dtype != torch.bool:
        name = f"{names.of('targets', h)} must be in [0, 1]"
        right = (target >= 0) & (target <= 1)
        if sample_weight is not None:
            out = sample_weight == 0
            if out.dim() != right.dim():  # a row's weight for all its outputs, or an only output's for its row
                out = out[..., None] if out.dim() < right.dim() else out[..., 0]
            right = right | out
        if in_graph:
            torch.ops.aten._assert_async.msg(right.all(), name)
        elif not right.all():
            raise ValueError(f"{name}, got {target[~right].flatten()[0].item():g}")
    elif target.dtype == torch.int64 and kind == CROSS_ENTROPY:
        name = f"{names.of('targets', h)} must be in [0, {classes}) or ignore_index ({ignore_index})"
        right = (target == ignore_index) | ((target >= 0) & (target < classes))
        if in_graph:
            torch.ops.aten._assert_async.msg(right.all(), name)
        elif not right.all():
            raise IndexError(f"{name}, got {target[~right].flatten()[0]}")


# For probabilities that were rounded, to two decimals or to bfloat16. csrc/cpu/heads_loss.cpp has the same.
PROBABILITY_TOLERANCE = 0.02


def _check_probabilities(h: int, target: Tensor, sample_weight: Tensor | None, size: int, names: Names) -> None:
    """Of a cross entropy: several labels at once would be read as probabilities. Looked at as the values above."""
    in_graph = _is_read_by_graph(target)
    if not in_graph and not _paths.are_readable(target, sample_weight):
        return
    given = target.detach().reshape(-1, size).to(torch.promote_types(target.dtype, torch.float32))
    least, most = -PROBABILITY_TOLERANCE, 1 + PROBABILITY_TOLERANCE
    right = ((given >= least) & (given <= most)).all(1)
    sums = given.sum(1)
    if size > 1:
        right = right & ((sums - 1).abs() <= PROBABILITY_TOLERANCE)
    if sample_weight is not None:
        right = right | (sample_weight.reshape(-1) == 0)
    if in_graph:
        torch.ops.aten._assert_async.msg(right.all(), _probabilities(h, size, names))
    elif not right.all():
        row = given[~right][0]
        what = f"{row[0].item():g}" if size == 1 else f"a row that sums to {row.sum().item():g}"
        if size > 1 and abs(row.sum().item() - 1) <= PROBABILITY_TOLERANCE:
            what = f"{row[(row < least) | (row > most)][0].item():g}"
        raise ValueError(f"{_probabilities(h, size, names)}, got {what}")


def _probabilities(h: int, size: int, names: Names) -> str:
    name = names.of("targets", h)
    if size == 1:
        return f"{name} must be probabilities, in [0, 1]"
    label = None if names.heads is None else names.heads[h]
    several = f'losses={{{label!r}: "bce"}}' if isinstance(label, str) else 'losses=[..., "bce"]'
    return f"{name} must be probabilities, which sum to 1 in each row; for several labels at once use {several}"
