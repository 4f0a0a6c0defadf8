"""The public operations. Each asks `_paths` who computes it and leaves the work to them: C++ in eager mode, the
registered operator in graphs (`torch.compile`, `torch.export`, `torch.jit`), plain PyTorch (`_plain`) elsewhere."""

from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from grl_ext import _backend, _operators, _paths, _plain, _script
from grl_ext._checks import (
    NUMBERED,
    Names,
    check_count,
    check_counts,
    check_lambda,
    check_lambda_of_heads,
    check_lambdas,
    check_linear,
    check_loss,
    check_matrix,
    check_numbers,
    check_operand,
    check_reduction,
    check_tensor,
    from_array,
    kind_of,
)
from grl_ext._options import (
    CROSS_ENTROPY,
    DEFAULTS,
    HeadsOptions,
    Kind,
    LossOfRows,
    any_by_logits,
    as_tensor,
    is_by_logits,
    is_own,
)
from grl_ext._paths import EXACT, Path
from grl_ext._plain import Lambdas, LayersOfHeads, LossAndLogits
from grl_ext._reversal import for_operator
from grl_ext._reversal import gradient_reversal as plain_reversal

__all__ = ["HeadsLoss", "gradient_reversal", "grl_linear", "heads_loss", "linear_heads"]

_operators.register()


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
        return _script.gradient_reversal(x, lambda_)
    else:  # which a script leaves out
        return _gradient_reversal(x, lambda_)


@torch.jit.unused
def _gradient_reversal(x, lambda_):
    if has_torch_function_unary(x):
        return handle_torch_function(gradient_reversal, (x,), x, lambda_)
    path = _paths.of_layer()
    if path is Path.EAGER and type(x) in EXACT:
        y = _backend.C.gradient_reversal(x, lambda_)
        if y is not None:
            return y
    if path is Path.OPERATOR:
        check_tensor("x", x)
        return torch.ops.grl_ext.gradient_reversal(x, for_operator(check_lambda(x, lambda_)))
    return plain_reversal(x, lambda_)


def grl_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, lambda_: Tensor | float = 1.0) -> Tensor:
    r"""``F.linear(gradient_reversal(x, lambda_), weight, bias)`` whose backward costs what a plain linear layer's does.

    .. math:: y = x W^T + b, \qquad dx = -\lambda\, dy\, W, \quad dW = dy^T x, \quad db = \textstyle\sum dy

    A lambda that the host knows (a number, a 0-d CPU tensor) is the factor of the matrix product for :math:`dx`; any
    other scales its result in place. The layer's own gradients are not reversed.

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
        return _script.grl_linear(x, weight, bias, lambda_)
    else:
        return _grl_linear(x, weight, bias, lambda_)


@torch.jit.unused
def _grl_linear(x, weight, bias, lambda_):
    if has_torch_function((x, weight, bias)):
        return handle_torch_function(grl_linear, (x, weight, bias), x, weight, bias, lambda_)
    path = _paths.of_linear((x, weight, bias))
    if path is Path.EAGER:
        y = _backend.C.grl_linear(x, weight, bias, lambda_)
        if y is not None:
            return y
    if path is Path.OPERATOR:
        check_linear(x, weight, bias)
        return torch.ops.grl_ext.grl_linear(x, weight, bias, for_operator(check_lambda(x, lambda_)))
    return _plain.grl_linear(x, weight, bias, lambda_)


# ---------------------------------------------------------------------------------------------------------------------
# Several heads over the same features
# ---------------------------------------------------------------------------------------------------------------------


def linear_heads(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    *,
    lambda_: Sequence[Tensor | float | None],
) -> list[Tensor]:
    r"""The logits of several linear heads over the same features, with the adversaries' gradients reversed.

    .. math:: z_h = x W_h^T + b_h, \qquad dx = \sum_h s_h\, dz_h W_h, \quad dW_h = dz_h^T x,
        \quad db_h = \textstyle\sum dz_h

    with :math:`s_h = -\lambda_h` for an adversary and 1 for a predictor; the heads' own gradients are not scaled. Any
    loss may follow. Narrow heads are one pass over the features, forward and backward. A head whose logits get no
    gradient is left out of the backward: its ``.grad`` stays None.

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
    return run_linear_heads(x, weight, bias, check_lambda_of_heads(lambda_, len(weight)))


def run_linear_heads(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    lambda_: Lambdas,
    names: Names = NUMBERED,
) -> list[Tensor]:
    """:func:`linear_heads`, whose errors use the names."""
    path = _paths.of_heads(x, (*weight, *bias))
    if path is Path.EAGER:
        logits = _backend.C.linear_heads(x, weight, bias, lambda_)
        if logits is not None:
            return logits
    elif path is Path.OPERATOR:
        x, weight, bias = _plain.checked_heads(x, weight, bias, names)
        return torch.ops.grl_ext.linear_heads(x, weight, bias, _for_operators(x, lambda_, names))
    elif path is Path.BY_ROWS:
        from grl_ext import _sharded

        logits = _sharded.linear_heads(run_linear_heads, x, weight, bias, lambda_, names)
        if logits is not None:
            return logits
    return _plain.linear_heads(x, weight, bias, lambda_, names)


def _for_operators(x: Tensor, lambda_: Lambdas, names: Names) -> list[Tensor | None]:
    check_lambdas(x, lambda_, names)
    return [None if value is None else for_operator(value).to(x.device) for value in lambda_]


def hidden_layers(z: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor | None], names: Names) -> Tensor:
    """ReLU of z, then for each weight a linear layer and its ReLU. Takes z over: nobody else may read it."""
    if _paths.of_heads(z, ()) is Path.EAGER:
        hidden = _backend.C.hidden_layers(z, weight, bias)
        if hidden is not None:
            return hidden
    return _plain.hidden_layers(z, weight, bias, names)


class HeadsLoss(NamedTuple):
    """What the heads' loss returns. All of it is differentiable.

    The gradients of ``loss`` are made beside it. Asking for those of ``head_losses`` or ``logits`` costs one more pass
    over the features in the backward.
    """

    loss: Tensor
    head_losses: list[Tensor]
    logits: list[Tensor]


def heads_loss(
    x: Tensor,
    weight: Sequence[Tensor | Sequence[Tensor]],
    bias: Sequence[Tensor | Sequence[Tensor | None] | None] | None = None,
    targets: Sequence[Tensor] = (),  # required; it has a default because bias before it has one
    *,
    lambda_: Sequence[Tensor | float | None],
    losses: Sequence[str | LossOfRows] | None = None,
    sample_weight: Tensor | Sequence[Tensor | None] | None = None,
    class_weight: Sequence[Tensor | None] | None = None,
    loss_weight: float | Sequence[Tensor | float] | Tensor | None = None,
    label_smoothing: float | Sequence[float] = 0.0,
    ignore_index: int | Sequence[int] = -100,
    reduction: str = "mean",
) -> HeadsLoss:
    r"""The losses of several heads over the same features; those of linear heads in one pass over ``x``.

    That pass makes logits, losses and all gradients. With float16 features there are two passes: the gradients wait
    for the backward, where the loss scale that saves the small ones is known.

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
            them. Of these the first layers are computed as by :func:`linear_heads`, the last ones with their loss.
        bias: for each head (layer) ``(size,)`` or None; None, the default, for none at all.
        targets: for each head int64 classes ``(...)``; or floating-point probabilities ``(..., size)``. A head of size
            1 is binary: classes 0 and 1, or the probability of 1, ``(...)`` or ``(..., 1)``. For ``"mse"`` values
            ``(..., size)``; for ``"bce"`` 0 and 1 (bool, int64) or numbers between them, ``(..., size)``; for a
            function what it takes, ``(..., ...)``.
        lambda_: for each head None (a predictor), or a finite number or 0-d tensor (an adversary).
        losses: for each head ``"cross_entropy"`` (the default; binary for a head of size 1); ``"mse"`` or ``"bce"``,
            the mean over the outputs of the squared error or of the binary cross entropy; or a function of logits
            ``(N, size)`` and targets ``(N, ...)``, all rows one behind the other, that gives a loss ``(N,)`` for each
            row. Rows that do not count come to it as zeros.
        sample_weight: ``(...)``, finite and not negative, for all heads or for each. A row of weight 0 is ignored. For
            ``"mse"`` and ``"bce"`` also ``(..., size)``: the mean is then over the entries, and one of weight 0 is
            ignored.
        class_weight: for each head ``(classes,)`` or None. A head of size 1 has two classes.
        loss_weight: a number, for all heads or for each; or a tensor of them.
        label_smoothing: in [0, 1], for all heads or for each, as in ``F.cross_entropy``.
        ignore_index: for all heads or for each, the class that marks a row without a label.
        reduction: ``"mean"``, the weighted mean above; ``"sum"``, its numerator (``"mse"`` and ``"bce"`` summed over
            the outputs); or ``"none"``, the parts ``(...)`` of which that is the sum, for ``loss`` too. Single rows'
            losses and loss functions are computed from the logits, and cost one more pass over ``x``.

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
    weights = [_layers_of("weight", h, own) for h, own in enumerate(weight)]
    bias = [None] * heads if bias is None else bias
    check_count("bias", bias, heads)
    biases = [[None] * len(weights[h]) if own is None else _layers_of("bias", h, own) for h, own in enumerate(bias)]
    tensors = (x, *(w for own in weights for w in own), *(b for own in biases for b in own), *targets)
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
    lambda_ = check_lambda_of_heads(lambda_, heads)
    loss_weight, label_smoothing, ignore_index = map(_as_numbers, (loss_weight, label_smoothing, ignore_index))
    kind = None if losses is None else [kind_of(f"losses[{h}]", loss) for h, loss in enumerate(losses)]
    if kind is not None:
        check_count("losses", kind, heads)
    if isinstance(label_smoothing, Sequence):
        smoothing = label_smoothing
    elif isinstance(label_smoothing, Real) and label_smoothing == 0:
        smoothing = None
    else:  # for all heads that have one
        smoothing = smoothing_of_all(label_smoothing, kind, heads)
    if not isinstance(ignore_index, Sequence):
        ignore_index = None if ignore_index == -100 else [ignore_index] * heads
    options = HeadsOptions(
        [sample_weight] * heads if isinstance(sample_weight, Tensor) else sample_weight,
        class_weight,
        [loss_weight] * heads if isinstance(loss_weight, Real) else loss_weight,
        kind,
        smoothing,
        ignore_index,
        check_reduction(reduction),
    )
    check_numbers(options)
    if any(len(own) != 1 for own in (*weights, *biases)):
        _check_layers(x, weights, biases)
        check_counts(targets, options, heads)
    return HeadsLoss(*run_heads_loss(x, weights, biases, targets, lambda_, options))


def _as_numbers(given):
    """One for all heads, or a sequence of them, without numpy's arrays."""
    return [from_array(own) for own in given] if isinstance(given, (list, tuple)) else from_array(given)


def smoothing_of_all(number: float, kind: Sequence[Kind] | None, heads: int) -> list[float]:
    """One number for all heads that have label smoothing."""
    return [number if kind is None or (not is_own(kind[h]) and kind[h] == CROSS_ENTROPY) else 0.0 for h in range(heads)]


def _layers_of(name: str, h: int, given: Tensor | Sequence[Tensor | None]) -> list[Tensor | None]:
    if isinstance(given, Tensor) or not hasattr(given, "__iter__"):
        check_tensor(f"{name}[{h}]", given)
        return [given]
    return list(given)


def run_heads_loss(
    x: Tensor,
    weight: LayersOfHeads,
    bias: LayersOfHeads,
    targets: Sequence[Tensor],
    lambda_: Lambdas,
    options: HeadsOptions = DEFAULTS,
    names: Names = NUMBERED,
) -> LossAndLogits:
    """:func:`heads_loss` with the layers of each head in a sequence and the options packed; its errors use the
    names."""
    if not any_by_logits(options, len(weight)):
        path, result = _paths.of_heads(x, ()), None
        if path is Path.EAGER:
            given = None if options is DEFAULTS else options.packed()
            result = _backend.C.heads_loss(x, weight, bias, targets, lambda_, given)
        elif path is Path.BY_ROWS:
            from grl_ext import _sharded

            result = _sharded.heads_loss(run_heads_loss, x, weight, bias, targets, lambda_, options, names)
        if result is not None:
            return result
    if all(len(own) == 1 for own in weight):
        layers = [w for (w,) in weight], [b for (b,) in bias]
        return _loss_of_linear_heads(x, *layers, targets, lambda_, options, names)
    return _loss_of_layered_heads(x, weight, bias, targets, lambda_, options, names)


def _loss_of_layered_heads(
    x: Tensor,
    weight: LayersOfHeads,
    bias: LayersOfHeads,
    targets: Sequence[Tensor],
    lambda_: Lambdas,
    options: HeadsOptions,
    names: Names,
) -> LossAndLogits:
    """The linear heads together; of the others the first layers together, and each one's last layer with its loss.
    csrc/autograd/layered_heads.cpp has the same, for the time that each call from Python takes."""
    parts = []
    if linear := [h for h, own in enumerate(weight) if len(own) == 1]:
        parts.append((x, linear, [lambda_[h] for h in linear], names.some(linear)))
    if deep := [h for h, own in enumerate(weight) if len(own) > 1]:
        of_first = [weight[h][0] for h in deep], [bias[h][0] for h in deep], [lambda_[h] for h in deep]
        # Dynamo takes nothing out of an operator's list.
        outputs = list(run_linear_heads(x, *of_first, names.of_layers(deep, [0] * len(deep))))
        for h in deep:
            last = len(weight[h]) - 1
            between = names.of_layers([h] * (last - 1), range(1, last))
            hidden = hidden_layers(outputs.pop(0), weight[h][1:last], bias[h][1:last], between)
            parts.append((hidden, [h], [None], names.of_layers([h], [last])))
    total, losses, logits = None, {}, {}
    while parts:
        features, heads, lambdas, own_names = parts.pop(0)
        loss, *by_head = run_heads_loss(
            features,
            [weight[h][-1:] for h in heads],
            [bias[h][-1:] for h in heads],
            [targets[h] for h in heads],
            lambdas,
            options.some(heads),
            own_names,
        )
        total = loss if total is None else _plain.add_losses(total, loss)
        losses.update(zip(heads, by_head[0], strict=True))
        logits.update(zip(heads, by_head[1], strict=True))
    return total, [losses[h] for h in range(len(weight))], [logits[h] for h in range(len(weight))]


def _check_layers(x: Tensor, weight: Sequence[Sequence[Tensor]], bias: Sequence[Sequence[Tensor | None]]) -> None:
    """That the layers of each head fit together."""
    check_operand("x", x)
    for h, layers in enumerate(weight):
        if not layers:
            raise ValueError(f"weight[{h}] must hold at least one layer's matrix, got none")
        if len(bias[h]) != len(layers):
            raise ValueError(
                f"bias[{h}] must have an entry for each of the head's layers, {len(layers)}, got {len(bias[h])}"
            )
        for i, matrix in enumerate(layers):
            name = f"weight[{h}]" if len(layers) == 1 else f"weight[{h}][{i}]"
            check_operand(name, matrix)
            if i > 0 and layers[i - 1].dim() == 2:  # the first is looked at where it is run
                check_matrix(name, matrix, layers[i - 1].shape[0])


def _loss_of_linear_heads(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    targets: Sequence[Tensor],
    lambda_: Lambdas,
    options: HeadsOptions,
    names: Names,
) -> LossAndLogits:
    """What the direct call does not take: graphs, losses that are made from logits, and whatever plain PyTorch knows or
    its checks refuse."""
    if any_by_logits(options, len(weight)):
        return _loss_by_logits(x, weight, bias, targets, lambda_, options, names)
    if _paths.of_heads(x, (*weight, *bias, *targets)) is Path.OPERATOR:
        x, weight, bias = _plain.checked_heads(x, weight, bias, names)
        check_loss(x, [matrix.shape[0] for matrix in weight], targets, options, names)
        sample_weight, class_weight, loss_weight, *others = options.filled(len(weight))
        if loss_weight is not None:
            loss_weight = loss_weight if isinstance(loss_weight, Tensor) else as_tensor(loss_weight)
            loss_weight = loss_weight.to(x.device)
        lambdas = _for_operators(x, lambda_, names)
        kind, label_smoothing, ignore_index, reduction = others
        return torch.ops.grl_ext.heads_loss(
            x,
            weight,
            bias,
            targets,
            lambdas,
            sample_weight,
            class_weight,
            loss_weight,
            kind,
            label_smoothing,
            ignore_index,
            reduction == "mean",
        )
    return _plain.heads_loss(x, weight, bias, targets, lambda_, options, names)


def _loss_by_logits(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    targets: Sequence[Tensor],
    lambda_: Lambdas,
    options: HeadsOptions,
    names: Names,
) -> LossAndLogits:
    """Rows' losses, and losses of the user's own, in plain PyTorch from logits that are computed together; the other
    heads' as always."""
    check_counts(targets, options, len(weight))
    total, losses, all_logits = None, {}, {}
    for plain in (False, True):
        heads = [h for h in range(len(weight)) if is_by_logits(options, h) == plain]
        if not heads:
            continue
        given, lambdas = [targets[h] for h in heads], [lambda_[h] for h in heads]
        some, own_names = options.some(heads), names.some(heads)
        if plain:
            layers = [weight[h] for h in heads], [bias[h] for h in heads]
            logits = run_linear_heads(x, *layers, lambdas, own_names)
            check_loss(x, [matrix.shape[0] for matrix in layers[0]], given, some, own_names)
            loss, *by_head = _plain.loss_of_logits(list(logits), given, some)
        else:
            layers = [[weight[h]] for h in heads], [[bias[h]] for h in heads]
            loss, *by_head = run_heads_loss(x, *layers, given, lambdas, some, own_names)
        total = loss if total is None else _plain.add_losses(total, loss)
        losses.update(zip(heads, by_head[0], strict=True))
        all_logits.update(zip(heads, by_head[1], strict=True))
    every = range(len(weight))
    return total, [losses[h] for h in every], [all_logits[h] for h in every]
