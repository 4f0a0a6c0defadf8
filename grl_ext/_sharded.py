"""The heads over features that are distributed by rows (`DTensor`): every process runs the operator over its own rows.

A mean is over all rows of all processes: each adds up its own, divided by the norm of all. So one short vector is
exchanged before the operator, the loss after it, and the result is that of one process which has all rows. Other
layouts, such as weights sharded by classes, are left to PyTorch's strategies for its own operators, layer by layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from grl_ext import functional
from grl_ext._reference_heads import (
    HeadsOptions,
    as_given,
    as_rows,
    check_lambda_of_heads,
    check_layers,
    check_options,
    weights_of_rows,
)

Placements = tuple[Placement, ...]


def _added_up(placements: Placements) -> Placements:
    """The layout after what processes hold in parts has been added up; also that of its gradient."""
    return tuple(Replicate() if placement.is_partial() else placement for placement in placements)


class _ToLocal(torch.autograd.Function):
    """This process's part; its gradient's layout is given. Unlike PyTorch's own pair, both can be differentiated
    again."""

    @staticmethod
    def forward(ctx, tensor: DTensor, placements: Placements) -> Tensor:
        ctx.mesh, ctx.placements, ctx.shape, ctx.stride = tensor.device_mesh, placements, tensor.shape, tensor.stride()
        ctx.set_materialize_grads(False)
        local = tensor.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx, grad: Tensor | None) -> tuple[DTensor | None, None]:
        return None if grad is None else _FromLocal.apply(
            grad, ctx.mesh, ctx.placements, ctx.shape, ctx.stride, False
        ), None


class _FromLocal(torch.autograd.Function):
    """The whole of which this process has a part; `add` adds up what `placements` call partial."""

    @staticmethod
    def forward(
        ctx, local: Tensor, mesh, placements: Placements, shape: torch.Size, stride: tuple[int, ...], add: bool
    ) -> DTensor:
        ctx.placements = placements
        ctx.set_materialize_grads(False)
        whole = DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
        return whole.redistribute(placements=_added_up(placements)) if add else whole

    @staticmethod
    def backward(ctx, grad: DTensor | None):
        if grad is not None:
            grad = _ToLocal.apply(grad.redistribute(placements=_added_up(ctx.placements)), ctx.placements)
        return grad, None, None, None, None, None


def _is_replicated(tensor: DTensor) -> bool:
    return all(placement.is_replicate() for placement in tensor.placements)


def _by_rows(x: DTensor, parameters: Sequence[Tensor | None], others: Sequence[Tensor | None], lambda_: Tensor) -> bool:
    """Whether each process has whole rows of x and all parameters."""
    tensors = [tensor for tensor in (*parameters, *others) if tensor is not None]
    if not all(isinstance(tensor, DTensor) and tensor.device_mesh == x.device_mesh for tensor in tensors):
        return False
    if not all(
        placement.is_replicate() or (type(placement) is Shard and placement.dim < x.dim() - 1)
        for placement in x.placements
    ):
        return False
    replicated = [*parameters, *([lambda_] if isinstance(lambda_, DTensor) else [])]
    return all(tensor is None or _is_replicated(tensor) for tensor in replicated)


def _here(tensor: Tensor | None, placements: Placements) -> Tensor | None:
    """Of a tensor that gets no gradient."""
    return tensor.redistribute(placements=placements).to_local() if isinstance(tensor, DTensor) else tensor


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


class _Rows:
    """The layout of x, and its tensors in this process."""

    def __init__(self, x: DTensor, weight: Sequence[DTensor], bias: Sequence[DTensor | None], lambda_: Tensor) -> None:
        self.mesh, self.leading = x.device_mesh, x.shape[:-1]
        self.placements = x.placements
        self.sums = tuple(Partial() if placement.is_shard() else placement for placement in x.placements)
        self.everywhere = (Replicate(),) * len(x.placements)
        self.x = _ToLocal.apply(x, self.placements)
        self.weight = [_ToLocal.apply(tensor, self.sums) for tensor in weight]
        self.bias = [None if tensor is None else _ToLocal.apply(tensor, self.sums) for tensor in bias]
        self.lambda_ = _here(lambda_, self.everywhere)

    def logits(self, local: Sequence[Tensor]) -> list[DTensor]:
        shapes = [torch.Size((*self.leading, z.shape[-1])) for z in local]
        return [
            _FromLocal.apply(z, self.mesh, self.placements, shape, _contiguous(shape), False)
            for z, shape in zip(local, shapes, strict=True)
        ]

    def total(self, local: Tensor, add: bool) -> DTensor:
        """Of a number that each process has added up over its rows; without `add` it is left to whoever reads it."""
        return _FromLocal.apply(local, self.mesh, self.sums, local.shape, local.stride(), add)


def linear_heads(
    x: DTensor, weight: Sequence[Tensor], bias: Sequence[Tensor | None], lambda_: Tensor, lambda_index: Sequence[int]
) -> list[Tensor] | None:
    """None for a layout that is not this module's."""
    if not _by_rows(x, (*weight, *bias), (), lambda_):
        return None
    x, weight, bias = as_given(x, weight, bias)
    check_layers(x, weight, bias, [1] * len(weight))
    check_lambda_of_heads(x, lambda_, lambda_index, len(weight))
    rows = _Rows(x, weight, bias, lambda_)
    return rows.logits(functional.run_linear_heads(rows.x, rows.weight, rows.bias, rows.lambda_, lambda_index))


def heads_loss(
    x: DTensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    depth: Sequence[int],
    targets: Sequence[Tensor],
    lambda_: Tensor,
    lambda_index: Sequence[int],
    options: HeadsOptions,
) -> tuple[Tensor, list[Tensor], list[Tensor]] | None:
    """None for a layout that is not this module's."""
    heads = len(depth)
    options = options.filled(heads)
    if not _by_rows(x, (*weight, *bias), (*targets, *options.sample_weight, *options.class_weight), lambda_):
        return None
    x, weight, bias = as_given(x, weight, bias)
    check_layers(x, weight, bias, depth)
    check_lambda_of_heads(x, lambda_, lambda_index, heads)
    last = [sum(depth[: h + 1]) - 1 for h in range(heads)]
    sizes = [weight[layer].shape[0] for layer in last]
    check_options(x, sizes, targets, options)
    rows = _Rows(x, weight, bias, lambda_)
    own = options._replace(
        sample_weight=[_here(weights, rows.placements) for weights in options.sample_weight],
        class_weight=[_here(weights, rows.everywhere) for weights in options.class_weight],
        loss_weight=_here(options.loss_weight, rows.everywhere),
        mean=False,
    )
    targets = [_here(target, rows.placements) for target in targets]
    factors = None
    if options.mean:
        factors = _factors(rows, sizes, targets, own)
        loss_weight = factors if own.loss_weight is None else factors * own.loss_weight.to(factors)
        own = own._replace(loss_weight=loss_weight)
    given = (rows.x, rows.weight, rows.bias, depth, targets, rows.lambda_, lambda_index, own)
    loss, head_losses, logits = functional.run_heads_loss(*given)
    if factors is not None:
        head_losses = [own_loss * factors[h].to(own_loss) for h, own_loss in enumerate(head_losses)]
    return rows.total(loss, True), [rows.total(own_loss, False) for own_loss in head_losses], rows.logits(logits)


@torch.no_grad()
def _factors(rows: _Rows, sizes: Sequence[int], targets: Sequence[Tensor], own: HeadsOptions) -> Tensor:
    """For each head 1 / (the weights of all rows in all processes), 0 where they have none."""
    like = as_rows(rows.x)
    norms = []
    for h, size in enumerate(sizes):
        target, sample_weight = targets[h], own.sample_weight[h]
        labels = target.dtype == torch.int64
        _, norm = weights_of_rows(
            like,
            target.reshape(like.shape[:1] if labels else (len(like), size)),
            size=size,
            kind=own.kind[h],
            sample_weight=None if sample_weight is None else sample_weight.reshape(like.shape[:1]),
            class_weight=own.class_weight[h],
            ignore_index=own.ignore_index[h],
        )
        norms.append(norm.double())
    norms = DTensor.from_local(torch.stack(norms), rows.mesh, rows.sums, run_check=False).full_tensor()
    return torch.where(norms == 0, 0.0, 1 / norms)
