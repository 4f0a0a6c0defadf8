"""The heads over features that are distributed by rows (`DTensor`): every process runs the operator over its own rows.

A mean is over all rows of all processes: each adds up its own, divided by the norm of all. So one short vector is
exchanged before the operator, the loss after it, and the result is that of one process which has all rows. Other
layouts, such as weights sharded by classes, are left to PyTorch's strategies for its own operators, layer by layer.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from grl_ext._checks import Names, check_lambdas, check_loss
from grl_ext._options import CROSS_ENTROPY, HeadsOptions, as_tensor
from grl_ext._plain import Lambdas, LayersOfHeads, LossAndLogits, as_rows, checked_heads, weights_of_rows

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


def _by_rows(
    x: DTensor, parameters: Sequence[Tensor | None], others: Sequence[Tensor | None], lambda_: Lambdas
) -> bool:
    """Whether each process has whole rows of x and all parameters."""
    tensors = [tensor for tensor in (*parameters, *others) if tensor is not None]
    if not all(isinstance(tensor, DTensor) and tensor.device_mesh == x.device_mesh for tensor in tensors):
        return False
    if not all(
        placement.is_replicate() or (type(placement) is Shard and placement.dim < x.dim() - 1)
        for placement in x.placements
    ):
        return False
    replicated = [*parameters, *(own for own in lambda_ if isinstance(own, DTensor))]
    return all(tensor is None or _is_replicated(tensor) for tensor in replicated)


def _here(tensor: Tensor | float | None, placements: Placements) -> Tensor | float | None:
    """Of a tensor that gets no gradient."""
    return tensor.redistribute(placements=placements).to_local() if isinstance(tensor, DTensor) else tensor


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


class _Rows:
    """The layout of x, and its tensors in this process."""

    def __init__(self, x: DTensor, weight: LayersOfHeads, bias: LayersOfHeads, lambda_: Lambdas) -> None:
        self.mesh, self.leading = x.device_mesh, x.shape[:-1]
        self.placements = x.placements
        self.sums = tuple(Partial() if placement.is_shard() else placement for placement in x.placements)
        self.everywhere = (Replicate(),) * len(x.placements)
        self.x = _ToLocal.apply(x, self.placements)
        self.weight, self.bias = self._parameters(weight), self._parameters(bias)
        self.lambda_ = [_here(own, self.everywhere) for own in lambda_]

    def _parameters(self, layers: LayersOfHeads) -> LayersOfHeads:
        return [[None if own is None else _ToLocal.apply(own, self.sums) for own in head] for head in layers]

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
    run: Callable[..., list[Tensor]],
    x: DTensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    lambda_: Lambdas,
    names: Names,
) -> list[Tensor] | None:
    """`run` over this process's rows. None for a layout that is not this module's."""
    if not _by_rows(x, (*weight, *bias), (), lambda_):
        return None
    x, weight, bias = checked_heads(x, weight, bias, names)
    check_lambdas(x, lambda_, names)
    rows = _Rows(x, [weight], [bias], lambda_)
    return rows.logits(run(rows.x, *rows.weight, *rows.bias, rows.lambda_, names))


def heads_loss(
    run: Callable[..., LossAndLogits],
    x: DTensor,
    weight: LayersOfHeads,
    bias: LayersOfHeads,
    targets: Sequence[Tensor],
    lambda_: Lambdas,
    options: HeadsOptions,
    names: Names,
) -> LossAndLogits | None:
    """`run` over this process's rows. None for a layout that is not this module's."""
    options = options.filled(len(weight))
    parameters = [own for head in (*weight, *bias) for own in head]
    if not _by_rows(x, parameters, (*targets, *options.sample_weight, *options.class_weight), lambda_):
        return None
    sizes = [head[-1].shape[0] for head in weight]
    x, weight, bias = _with_checked_first(x, weight, bias, names)
    check_lambdas(x, lambda_, names)
    check_loss(x, sizes, targets, options, names)
    rows = _Rows(x, weight, bias, lambda_)
    loss_weight = options.loss_weight
    if loss_weight is not None and not isinstance(loss_weight, Tensor):
        loss_weight = as_tensor(loss_weight)
    local = options._replace(
        sample_weight=[_here(weights, rows.placements) for weights in options.sample_weight],
        class_weight=[_here(weights, rows.everywhere) for weights in options.class_weight],
        loss_weight=_here(loss_weight, rows.everywhere),
        reduction="sum",
    )
    targets = [_here(target, rows.placements) for target in targets]
    factors = None
    if options.reduction == "mean":
        factors = _factors(rows, sizes, targets, local)
        of_all = factors if local.loss_weight is None else factors * local.loss_weight.to(factors)
        local = local._replace(loss_weight=of_all)
    loss, head_losses, logits = run(rows.x, rows.weight, rows.bias, targets, rows.lambda_, local, names)
    if factors is not None:
        head_losses = [own * factors[h].to(own) for h, own in enumerate(head_losses)]
    return rows.total(loss, True), [rows.total(own, False) for own in head_losses], rows.logits(logits)


def _with_checked_first(
    x: DTensor, weight: LayersOfHeads, bias: LayersOfHeads, names: Names
) -> tuple[DTensor, LayersOfHeads, LayersOfHeads]:
    """The heads with their first layers checked against the features. The layers above are checked where they run, on
    this process's rows."""
    x, firsts, of_firsts = checked_heads(x, [head[0] for head in weight], [head[0] for head in bias], names)
    weight = [[first, *head[1:]] for first, head in zip(firsts, weight, strict=True)]
    return x, weight, [[first, *head[1:]] for first, head in zip(of_firsts, bias, strict=True)]


@torch.no_grad()
def _factors(rows: _Rows, sizes: Sequence[int], targets: Sequence[Tensor], local: HeadsOptions) -> Tensor:
    """For each head 1 / (the weights of all rows in all processes), 0 where they have none."""
    like = as_rows(rows.x)
    norms = []
    for h, size in enumerate(sizes):
        target, sample_weight = targets[h], local.sample_weight[h]
        labels = target.dtype == torch.int64 and local.kind[h] == CROSS_ENTROPY
        of_entries = sample_weight is not None and sample_weight.dim() == rows.x.dim()
        _, norm = weights_of_rows(
            like,
            target.reshape(like.shape[:1] if labels else (len(like), size)),
            size=size,
            kind=local.kind[h],
            sample_weight=None
            if sample_weight is None
            else sample_weight.reshape((len(like), size) if of_entries else like.shape[:1]),
            class_weight=local.class_weight[h],
            ignore_index=local.ignore_index[h],
        )
        norms.append(norm.double())
    norms = DTensor.from_local(torch.stack(norms), rows.mesh, rows.sums, run_check=False).full_tensor()
    return torch.where(norms == 0, 0.0, 1 / norms)
