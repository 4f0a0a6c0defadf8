"""What a loss is told of its heads, packed once and carried as it is."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CROSS_ENTROPY, SQUARED_ERROR, BINARY_CROSS_ENTROPY = 0, 1, 2
KINDS = {"cross_entropy": CROSS_ENTROPY, "mse": SQUARED_ERROR, "bce": BINARY_CROSS_ENTROPY}

LossOfRows = Callable[[Tensor, Tensor], Tensor]  # from a head's logits and targets a loss for each row
Kind = int | LossOfRows


def is_own(kind: Kind) -> bool:
    """Whether the loss is a function of the user's."""
    return not isinstance(kind, int)


def is_by_output(kind: Kind) -> bool:
    """Whether each output has a target and a loss of its own, over which a row's loss is summed."""
    return isinstance(kind, int) and kind != CROSS_ENTROPY


class HeadsOptions(NamedTuple):
    """One entry for each head; None in place of a list means its default for all."""

    sample_weight: Sequence[Tensor | None] | None = None
    class_weight: Sequence[Tensor | None] | None = None
    loss_weight: Sequence[Tensor | float] | Tensor | None = None
    kind: Sequence[Kind] | None = None
    label_smoothing: Sequence[float] | None = None
    ignore_index: Sequence[int] | None = None
    reduction: str = "mean"

    def filled(self, heads: int) -> "HeadsOptions":
        """The same without None in place of lists, but for loss_weight."""

        def each(given, default):
            return [default] * heads if given is None else given

        return HeadsOptions(
            each(self.sample_weight, None),
            each(self.class_weight, None),
            self.loss_weight,
            each(self.kind, CROSS_ENTROPY),
            each(self.label_smoothing, 0.0),
            each(self.ignore_index, -100),
            self.reduction,
        )

    def packed(self) -> "HeadsOptions":
        """The same with loss weights in one tensor where some are not Python's own numbers."""
        weights = self.loss_weight
        if weights is None or isinstance(weights, Tensor) or all(type(own) in (float, int) for own in weights):
            return self
        return self._replace(loss_weight=as_tensor(weights))

    def some(self, heads: Sequence[int]) -> "HeadsOptions":
        """Those of some heads."""
        if are_defaults(self):
            return self
        *lists, reduction = self
        options = HeadsOptions(*(given if given is None else [given[h] for h in heads] for given in lists), reduction)
        if not isinstance(self.loss_weight, Tensor):
            return options
        return options._replace(loss_weight=torch.stack(options.loss_weight))


# A function: Dynamo of torch 2.8 takes few methods of a named tuple.


def is_by_logits(options: HeadsOptions, h: int) -> bool:
    """Whether head h's loss is computed from its logits in plain PyTorch: the losses of rows, and the user's own."""
    return options.reduction == "none" or (options.kind is not None and is_own(options.kind[h]))


def are_defaults(options: HeadsOptions) -> bool:
    """Whether nothing was given, as is most often so. A graph looks at the options themselves: Dynamo of torch 2.8
    cannot tell two named tuples apart."""
    return not torch.compiler.is_compiling() and options is DEFAULTS


def any_by_logits(options: HeadsOptions, heads: int) -> bool:
    return not are_defaults(options) and any(is_by_logits(options, h) for h in range(heads))


DEFAULTS = HeadsOptions()  # made once, not in every step


def as_tensor(numbers: Sequence[Tensor | float]) -> Tensor:
    """Numbers of heads in one tensor. One graph serves all values of a changing number only if it becomes a tensor,
    and that by a product."""
    if not any(isinstance(number, Tensor) for number in numbers) and not torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=torch.float64)
    tensors = [n if isinstance(n, Tensor) else torch.ones((), dtype=torch.float64) * n for n in numbers]
    devices = [tensor.device for tensor in tensors]
    device = ([device for device in devices if device.type != "cpu"] or devices)[0]
    return torch.stack([tensor.to(device, torch.float64) for tensor in tensors])
