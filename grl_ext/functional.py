"""The operations. Each picks its path and leaves the work to it: C++ in eager mode, the registered operator in graphs
(`torch.compile`, `torch.export`, `torch.jit`), plain PyTorch (`_reference`) under `torch.func` and where nothing is
compiled."""

import sys
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from grl_ext import _backend, _operators, _reference, _reference_heads
from grl_ext._reference import check_number, check_tensor, check_tensors, fx_records
from grl_ext._reference_heads import CROSS_ENTROPY, SQUARED_ERROR, HeadsOptions

__all__ = ["HeadsLoss", "gradient_reversal", "grl_linear", "heads_loss", "linear_heads"]


if not hasattr(torch.ops.grl_ext, "gradient_reversal"):
    _reference.register_operators()
else:
    _operators.register()


# Subclasses (jagged, masked, distributed, quantised) know the operators of plain PyTorch, which the reference keeps to.
_PLAIN = (Tensor, torch.nn.Parameter)


def _path() -> str:
    if torch._C._are_functorch_transforms_active():
        return "reference"
    if torch.compiler.is_compiling():
        return "traced"
    if torch._C._is_tracing():  # but ONNX knows no operator of ours, and no backward
        return "reference" if torch.onnx.is_in_onnx_export() else "traced"
    if fx_records():  # make_fx records PyTorch's own operators, below autograd
        return "reference"
    return "reference" if _backend.C is None else "eager"


def _linear_path() -> str:
    """The linear operations' nodes have no forward-mode derivative."""
    return "reference" if forward_ad._current_level >= 0 else _path()


def _as_tensor(lambda_: Tensor | float) -> Tensor:
    """In a script, which knows no isfinite() of a number."""
    if isinstance(lambda_, Tensor):
        return lambda_
    assert abs(lambda_) <= 1.7976931348623157e308, "lambda_ must be finite"
    return torch.tensor(lambda_, dtype=torch.float64)


def _traced_lambda(lambda_: Tensor | float) -> Tensor:
    """For an operator in a graph. A number that changes between calls is symbolic in the second graph; it becomes a
    tensor by a product, because a constant would fix each value in a new graph."""
    if isinstance(lambda_, Tensor):
        return lambda_
    return torch.ones((), dtype=torch.float64) * check_number("lambda_", lambda_)


def gradient_reversal(x: Tensor, lambda_: Tensor | float = 1.0) -> Tensor:
    r"""The identity forward; backward, the gradient times :math:`-\lambda`.

    .. math:: y = x, \qquad \frac{\partial L}{\partial x} = -\lambda \frac{\partial L}{\partial y}

    Source: Ganin & Lempitsky, *Unsupervised Domain Adaptation by Backpropagation*, ICML 2015.

    Args:
        x: any shape, any dtype; gradients exist for float16, bfloat16, float32, float64 and complex.
        lambda_: a finite number; or a 0-d tensor, on the CPU or on ``x``'s device, where the backward reads it without
            a synchronisation; or a tensor that broadcasts to ``x``, such as ``(N, 1)`` for one value per sample.
            Negative values scale the gradient without reversing it. Where lambda is 0 the gradient is exactly 0, even
            if the incoming one is infinite or NaN.

    Returns:
        A view of ``x``: nothing is copied or saved. Modifying it in place raises PyTorch's own view error, because the
        modification would bypass the reversal; write ``gradient_reversal(x).clone()``, or ``relu(y)`` instead of
        ``relu_(y)``.

    The gradient keeps its dtype, with half types scaled in float32 and rounded once. No gradient reaches ``lambda_``
    from the first backward. A 0-d CPU lambda is read when the layer runs; one on the device is read when its backward
    runs. Forward mode (jvp) multiplies the tangent by :math:`-\lambda`, the adjoint of the backward.

    Raises:
        TypeError: ``x`` is not a tensor, or ``lambda_`` is not a real number or real tensor.
        ValueError: ``lambda_`` is NaN or infinite, does not broadcast to ``x``, or is on another device.

    Example:
        >>> x = torch.ones(3, requires_grad=True)
        >>> grl_ext.gradient_reversal(x, 0.5).sum().backward()
        >>> x.grad
        tensor([-0.5000, -0.5000, -0.5000])
    """
    if torch.jit.is_scripting():
        return torch.ops.grl_ext.gradient_reversal(x, _as_tensor(lambda_))
    else:  # which a script leaves out
        if has_torch_function_unary(x):
            return handle_torch_function(gradient_reversal, (x,), x, lambda_)
        path = _path()
        if path == "eager" and type(x) in _PLAIN:
            return _backend.C.gradient_reversal(x, lambda_)
        if path == "traced":
            check_tensor("x", x)
            return torch.ops.grl_ext.gradient_reversal(x, _traced_lambda(lambda_))
        return _reference.gradient_reversal(x, lambda_)


def grl_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, lambda_: Tensor | float = 1.0) -> Tensor:
    r"""``F.linear(gradient_reversal(x, lambda_), weight, bias)`` whose backward costs what a plain linear layer's does.

    .. math:: y = x W^T + b, \qquad dx = -\lambda\, dy\, W, \quad dW = dy^T x, \quad db = \textstyle\sum dy

    A lambda that the host knows (a number, a 0-d CPU tensor) rides in the matrix product for :math:`dx`; any other
    scales its result in place. The layer's own gradients are not reversed.

    Args:
        x: ``(..., D)``, float16, bfloat16, float32 or float64.
        weight: ``(K, D)``, of x's dtype.
        bias: ``(K,)`` or None.
        lambda_: as for :func:`gradient_reversal`.

    Returns:
        ``(..., K)``. Under autocast, as ``F.linear``: in autocast's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Example:
        >>> x, weight = torch.ones(2, 3, requires_grad=True), torch.ones(1, 3)
        >>> grl_ext.grl_linear(x, weight, lambda_=0.5).sum().backward()
        >>> x.grad
        tensor([[-0.5000, -0.5000, -0.5000],
                [-0.5000, -0.5000, -0.5000]])
    """
    if torch.jit.is_scripting():
        return torch.ops.grl_ext.grl_linear(x, weight, bias, _as_tensor(lambda_))
    else:
        if has_torch_function((x, weight, bias)):
            return handle_torch_function(grl_linear, (x, weight, bias), x, weight, bias, lambda_)
        path = _linear_path()
        if path == "eager" and type(x) in _PLAIN and type(weight) in _PLAIN and (bias is None or type(bias) in _PLAIN):
            return _backend.C.grl_linear(x, weight, bias, lambda_)
        if path == "traced":
            check_tensors(x, weight, bias)
            return torch.ops.grl_ext.grl_linear(x, weight, bias, _traced_lambda(lambda_))
        return _reference.grl_linear(x, weight, bias, lambda_)


# ---------------------------------------------------------------------------------------------------------------------
# Several heads over the same features
# ---------------------------------------------------------------------------------------------------------------------


def _in_graph(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a graph takes the heads' operators for these tensors."""
    if not isinstance(x, Tensor) or x.device.type not in _backend.kernel_devices:
        return False
    if not torch.compiler.is_compiling():
        return False  # torch.jit.trace knows no lists of optional tensors. The reversal stays an operator there.
    # A subclass in a graph, such as DTensor, has a strategy for each of PyTorch's own operators.
    return not any(tensor is not None and hasattr(type(tensor), "__tensor_flatten__") for tensor in (x, *others))


def _is_distributed(x: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # which is slow to import, and is where there is a DTensor
    if module is None or not isinstance(x, module.DTensor):
        return False
    return not (torch._C._are_functorch_transforms_active() or fx_records() or forward_ad._current_level >= 0)


def _lambda_of_heads(lambda_: Sequence[Tensor | float | None], heads: int) -> tuple[Tensor, list[int]]:
    """The adversaries' numbers as one tensor, and each head's place in it; -1 for a predictor."""
    if isinstance(lambda_, (Tensor, str)) or not isinstance(lambda_, Sequence):
        raise TypeError(
            f"lambda_ must be a sequence with a number, a 0-d tensor or None for each head, got {type(lambda_).__name__}"
        )
    if len(lambda_) != heads:
        raise ValueError(f"lambda_ must have an entry for each of the {heads} heads, got {len(lambda_)}")
    adversaries = [h for h, value in enumerate(lambda_) if value is not None]
    lambda_index = [-1] * heads
    for i, h in enumerate(adversaries):
        lambda_index[h] = i
    return _reference_heads.numbers("lambda_", [lambda_[h] for h in adversaries], adversaries), lambda_index


def _layers_of_head(name: str, h: int, given: Tensor | Sequence[Tensor | None]) -> list[Tensor | None]:
    if isinstance(given, Tensor) or not hasattr(given, "__iter__"):
        check_tensor(f"{name}[{h}]", given)
        return [given]
    return list(given)


def linear_heads(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    *,
    lambda_: Sequence[Tensor | float | None],
) -> list[Tensor]:
    r"""The logits of several linear heads over the same features, with the adversaries' gradients reversed.

    .. math:: z_h = x W_h^T + b_h, \qquad dx = \sum_h s_h\, dz_h W_h, \quad dW_h = dz_h^T x, \quad db_h = \textstyle\sum
    dz_h

    with :math:`s_h = -\lambda_h` for an adversary and 1 for a predictor; the heads' own gradients are not scaled. Any
    loss may follow. Narrow heads are one pass over the features, forward and backward. A head whose logits get no
    gradient takes no part: its ``.grad`` stays None.

    Args:
        x: ``(..., D)``, float16, bfloat16, float32 or float64. Half types are accumulated in float32.
        weight: for each head ``(size, D)``, of x's dtype.
        bias: for each head ``(size,)`` or None; None for none at all.
        lambda_: for each head None (a predictor), or a finite number or 0-d tensor (an adversary). 0 gives exact zeros,
            whatever the head's weight holds.

    Returns:
        For each head ``(..., size)``. Under autocast, as ``F.linear``: in autocast's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Example:
        >>> x, digit, domain = torch.randn(8, 16), torch.randn(10, 16), torch.randn(2, 16)
        >>> digit_logits, domain_logits = grl_ext.linear_heads(x, [digit, domain], lambda_=[None, 0.3])
    """
    bias = [None] * len(weight) if bias is None else bias
    tensors = (x, *weight, *bias)
    if has_torch_function(tensors):
        return handle_torch_function(linear_heads, tensors, x, weight, bias, lambda_=lambda_)
    return run_linear_heads(x, weight, bias, *_lambda_of_heads(lambda_, len(weight)))


def run_linear_heads(
    x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor | None], lambda_: Tensor, lambda_index: Sequence[int]
) -> list[Tensor]:
    """:func:`linear_heads` with the adversaries' numbers in one tensor, and each head's place in it."""
    path = _linear_path()
    if path == "eager":
        logits = _backend.C.linear_heads(x, weight, bias, lambda_, lambda_index)
        if logits is not None:
            return logits
    elif path == "traced" and _in_graph(x, *weight, *bias):
        return torch.ops.grl_ext.linear_heads(x, weight, bias, lambda_.to(x.device), lambda_index)
    if path != "traced" and _is_distributed(x):
        from grl_ext import _sharded

        logits = _sharded.linear_heads(x, weight, bias, lambda_, lambda_index)
        if logits is not None:
            return logits
    return _reference_heads.linear_heads(x, weight, bias, lambda_, lambda_index)


class HeadsLoss(NamedTuple):
    """What the heads' loss returns. All of it is differentiable.

    The gradients of ``loss`` are made beside it. Asking for those of ``head_losses`` or ``logits`` costs one more pass
    over the features in the backward.
    """

    loss: Tensor
    head_losses: list[Tensor]
    logits: list[Tensor]


_KINDS = {"cross_entropy": CROSS_ENTROPY, "mse": SQUARED_ERROR}


def kind_of(name: str, loss: str) -> int:
    if loss not in _KINDS:
        raise ValueError(f"{name} must be one of {list(_KINDS)}, got {loss!r}")
    return _KINDS[loss]


def check_reduction(reduction: str) -> bool:
    """Whether it is the mean."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    return reduction == "mean"


def heads_loss(
    x: Tensor,
    weight: Sequence[Tensor | Sequence[Tensor]],
    bias: Sequence[Tensor | Sequence[Tensor | None] | None] | None,
    targets: Sequence[Tensor],
    *,
    lambda_: Sequence[Tensor | float | None],
    losses: Sequence[str] | None = None,
    sample_weight: Tensor | Sequence[Tensor | None] | None = None,
    class_weight: Sequence[Tensor | None] | None = None,
    loss_weight: float | Sequence[Tensor | float] | Tensor | None = None,
    label_smoothing: float | Sequence[float] = 0.0,
    ignore_index: int | Sequence[int] = -100,
    reduction: str = "mean",
) -> HeadsLoss:
    r"""The losses of several heads over the same features: for linear heads logits, losses and all gradients in one
    pass over ``x``.

    With float16 features in two: their gradients wait for the backward, where the loss scale that saves the small ones
        is known.

    .. math:: L = \sum_h \omega_h L_h, \qquad
        L_h = \frac{\sum_i w_{ih}\, l_h(z_{ih}, t_{ih})}{\sum_i w_{ih}}, \qquad z_h = x W_h^T + b_h

    over the rows i that are valid: those whose target is not ``ignore_index`` and whose sample weight is not 0. With
    classes as targets :math:`w_{ih}` is the row's sample weight times its class's weight, which is what
    ``F.cross_entropy(weight=...)`` does; otherwise the sample weight. Where the weights sum to 0 the loss is 0 and
    gives no gradient. Backward, an adversary's gradient to ``x`` is multiplied by :math:`-\lambda_h`; those to the
    heads' own parameters are not.

    Args:
        x: ``(..., D)``, float16, bfloat16, float32 or float64. Half types are accumulated in float32.
        weight: for each head ``(size, D)``, of x's dtype; or a sequence of matrices: linear layers with ReLU between
            them.
        bias: for each head (layer) ``(size,)`` or None; None for none at all.
        targets: for each head int64 classes ``(...)``; or floating-point probabilities ``(..., size)``; or, for a
            squared error, values ``(..., size)``. A head of size 1 is binary: classes 0 and 1, or the probability of 1,
            ``(...)`` or ``(..., 1)``.
        lambda_: for each head None (a predictor), or a finite number or 0-d tensor (an adversary).
        losses: for each head ``"cross_entropy"`` (the default; binary for a head of size 1) or ``"mse"``, the mean over
            the outputs of the squared error.
        sample_weight: ``(...)``, finite and not negative, for all heads or for each. A row of weight 0 takes no part.
        class_weight: for each head ``(classes,)`` or None. A head of size 1 has two classes.
        loss_weight: a number, for all heads or for each; or a tensor of them.
        label_smoothing: in [0, 1], for all heads or for each, as in ``F.cross_entropy``.
        ignore_index: for all heads or for each, the class that marks a row without a label.
        reduction: ``"mean"``, the weighted mean above; or ``"sum"``, its numerator. For single rows' losses use
            :func:`linear_heads`.

    Returns:
        ``HeadsLoss(loss, head_losses, logits)``: the total, each head's loss before its ``loss_weight``, and its logits
        ``(..., size)``. Losses are float32 (float64 for float64 features), also under autocast.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message; a target or
            weight that requires a gradient, which this loss does not give.
        IndexError: a class that is out of range and not ``ignore_index`` (on a CUDA device an assertion, as for
            ``F.cross_entropy``: looking would be a synchronisation).

    Example:
        >>> x, label, domain = torch.randn(4, 8, requires_grad=True), torch.randn(3, 8), torch.randn(2, 8)
        >>> targets = [torch.tensor([0, 2, 1, -100]), torch.tensor([0, 1, 1, 0])]
        >>> out = grl_ext.heads_loss(x, [label, domain], None, targets, lambda_=[None, 0.5])
        >>> out.loss.backward()
    """
    heads = len(weight)
    layers = [_layers_of_head("weight", h, given) for h, given in enumerate(weight)]
    depth = [len(own) for own in layers]
    matrices = [layer for own in layers for layer in own]
    bias = [None] * heads if bias is None else bias
    if len(bias) != heads:
        raise ValueError(f"bias must have an entry for each of the {heads} heads, got {len(bias)}")
    vectors = []
    for h, given in enumerate(bias):
        own = [None] * depth[h] if given is None else _layers_of_head("bias", h, given)
        if len(own) != depth[h]:
            raise ValueError(f"bias[{h}] must have an entry for each of the head's {depth[h]} layers, got {len(own)}")
        vectors += own
    tensors = (x, *matrices, *vectors, *targets)
    if has_torch_function(tensors):
        return handle_torch_function(
            heads_loss,
            tensors,
            x,
            weight,
            bias,
            targets,
            lambda_=lambda_,
            losses=losses,
            sample_weight=sample_weight,
            class_weight=class_weight,
            loss_weight=loss_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
        )
    kind = None if losses is None else [kind_of(f"losses[{h}]", loss) for h, loss in enumerate(losses)]
    if kind is not None and len(kind) != heads:
        raise ValueError(f"losses must have an entry for each of the {heads} heads, got {len(kind)}")
    smoothing = None
    if isinstance(label_smoothing, Sequence):
        smoothing = _reference_heads.check_smoothing(label_smoothing)
    elif label_smoothing != 0:  # for all heads that have one
        smoothing = [0.0 if kind and kind[h] == SQUARED_ERROR else label_smoothing for h in range(heads)]
        smoothing = _reference_heads.check_smoothing(smoothing)
    if isinstance(loss_weight, Real):
        loss_weight = [loss_weight] * heads
    if not isinstance(ignore_index, Sequence):
        ignore_index = None if ignore_index == -100 else [ignore_index] * heads
    options = HeadsOptions(
        [sample_weight] * heads if isinstance(sample_weight, Tensor) else sample_weight,
        class_weight,
        None if loss_weight is None else _reference_heads.numbers("loss_weight", loss_weight),
        kind,
        smoothing,
        None if ignore_index is None else _reference_heads.check_ignored(ignore_index),
        check_reduction(reduction),
    )
    return HeadsLoss(*run_heads_loss(x, matrices, vectors, depth, targets, *_lambda_of_heads(lambda_, heads), options))


def run_heads_loss(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    depth: Sequence[int] | None,
    targets: Sequence[Tensor],
    lambda_: Tensor,
    lambda_index: Sequence[int],
    options: HeadsOptions,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """:func:`heads_loss` with one flat list of layers, of which a head has `depth` (None: one), and one entry per head
    in all else."""
    path = _linear_path()
    if path == "eager":
        # None where the kernels do not take these tensors.
        result = _backend.C.heads_loss(x, weight, bias, depth, targets, lambda_, lambda_index, *options)
        if result is not None:
            return result
    depth = [1] * len(weight) if depth is None else depth
    if path != "traced" and _is_distributed(x):
        from grl_ext import _sharded

        result = _sharded.heads_loss(x, weight, bias, depth, targets, lambda_, lambda_index, options)
        if result is not None:
            return result
    weights = (*(options.sample_weight or ()), *(options.class_weight or ()))
    if path == "traced" and _in_graph(x, *weight, *bias, *targets, *weights):
        sample_weight, class_weight, loss_weight, *others = options.filled(len(depth))
        return torch.ops.grl_ext.heads_loss(
            x,
            weight,
            bias,
            depth,
            targets,
            sample_weight,
            class_weight,
            lambda_.to(x.device),
            lambda_index,
            None if loss_weight is None else loss_weight.to(x.device),
            *others,
        )
    return _reference_heads.heads_loss(x, weight, bias, depth, targets, lambda_, lambda_index, options)
