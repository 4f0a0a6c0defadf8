"""The operations. Each picks its path and leaves the work to it: C++ in eager mode, the registered operator in graphs
(`torch.compile`, `torch.export`, `torch.jit`), plain PyTorch (`_reference`) under `torch.func` and where nothing is compiled."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from grl_ext import _backend, _reference
from grl_ext._reference import check_number, check_tensor, check_tensors

__all__ = ["HeadsOutput", "gradient_reversal", "grl_linear", "heads_cross_entropy", "linear_heads"]


if not hasattr(torch.ops.grl_ext, "gradient_reversal"):
    _reference.register_operators()


# Subclasses (jagged, masked, distributed, quantised) know the operators of plain PyTorch, which the reference keeps to.
_PLAIN = (Tensor, torch.nn.Parameter)


def _path() -> str:
    if torch._C._are_functorch_transforms_active():
        return "reference"
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return "traced"
    return "reference" if _backend.C is None else "eager"


def _linear_path() -> str:
    """The linear operations' nodes have no forward-mode derivative."""
    return "reference" if forward_ad._current_level >= 0 else _path()


def _heads_path(x: Tensor) -> str:
    """The heads' kernels have a list of devices."""
    has_kernels = _backend.C is not None and isinstance(x, Tensor) and x.device.type in _backend.kernel_devices
    return _linear_path() if has_kernels else "reference"


def _as_tensor(lambda_: Tensor | float) -> Tensor:
    """What a script can say: its operator refuses what is not finite, in its backward at the latest."""
    return lambda_ if isinstance(lambda_, Tensor) else torch.tensor(lambda_, dtype=torch.float64)


def _traced_lambda(lambda_: Tensor | float) -> Tensor:
    """For an operator in a graph. A number that changes between calls is symbolic in the second graph; it becomes a tensor by a
    product, because a constant would fix each value in a new graph."""
    if isinstance(lambda_, Tensor):
        return lambda_
    return torch.ones((), dtype=torch.float64) * check_number("lambda_", lambda_)


def gradient_reversal(x: Tensor, lambda_: Tensor | float = 1.0) -> Tensor:
    r"""The identity forward; backward, the gradient times :math:`-\lambda`.

    .. math:: y = x, \qquad \frac{\partial L}{\partial x} = -\lambda \frac{\partial L}{\partial y}

    Source: Ganin & Lempitsky, *Unsupervised Domain Adaptation by Backpropagation*, ICML 2015.

    Args:
        x: any shape, any dtype; gradients exist for float16, bfloat16, float32, float64 and complex.
        lambda_: a finite number; or a 0-d tensor, on the CPU or on ``x``'s device, where the backward reads it without a
            synchronisation; or a tensor that broadcasts to ``x``, such as ``(N, 1)`` for one value per sample. Negative values
            scale the gradient without reversing it. Where lambda is 0 the gradient is exactly 0, even if the incoming one is
            infinite or NaN.

    Returns:
        A view of ``x``: nothing is copied or saved. Modifying it in place raises PyTorch's own view error, because the
        modification would bypass the reversal; write ``gradient_reversal(x).clone()``, or ``relu(y)`` instead of ``relu_(y)``.

    The gradient keeps its dtype, with half types scaled in float32 and rounded once. No gradient reaches ``lambda_`` from the
    first backward. A 0-d CPU lambda is read when the layer runs; one on the device is read when its backward runs.
    Forward mode (jvp) multiplies the tangent by :math:`-\lambda`, the adjoint of the backward.

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

    A lambda that the host knows (a number, a 0-d CPU tensor) rides in the matrix product for :math:`dx`; any other scales its result
    in place. The layer's own gradients are not reversed.

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
        if path == "eager" and type(x) in _PLAIN and type(weight) in _PLAIN:
            return _backend.C.grl_linear(x, weight, bias, lambda_)
        if path == "traced":
            check_tensors(x, weight, bias)
            return torch.ops.grl_ext.grl_linear(x, weight, bias, _traced_lambda(lambda_))
        return _reference.grl_linear(x, weight, bias, lambda_)


def linear_heads(
    x: Tensor, weight: Tensor, bias: Tensor | None, head_sizes: Sequence[int], grad_scale: Tensor | Sequence[float]
) -> Tensor:
    r"""The logits of several heads over the same features, as one linear layer with a gradient scale for each head.

    .. math:: z_h = x W_h^T + b_h, \qquad dx = \sum_h s_h\, dz_h W_h, \quad dW_h = dz_h^T x, \quad db_h = \textstyle\sum dz_h

    A predictor has :math:`s_h = 1`, an adversary :math:`s_h = -\lambda_h`; the heads' own gradients are not scaled. Any loss may
    follow. The features are read once forward, and once backward while their gradient is written once.

    Args:
        x: ``(..., D)``, float16, bfloat16, float32 or float64. Half types are accumulated in float32.
        weight: ``(K, D)``, the heads' weights one below the other, of x's dtype.
        bias: ``(K,)`` or None.
        head_sizes: H positive integers that sum to K.
        grad_scale: H finite numbers, or an H-element tensor on the CPU or on x's device, where it is read without a
            synchronisation.

    Returns:
        ``(..., K)``: ``logits.split(head_sizes, -1)`` are the heads'. Under autocast, as ``F.linear``: in autocast's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.

    Example:
        >>> x, weight = torch.randn(8, 16), torch.randn(12, 16)
        >>> logits = grl_ext.linear_heads(x, weight, None, head_sizes=[10, 2], grad_scale=[1.0, -0.3])
        >>> digit, domain = logits.split([10, 2], -1)
    """
    if has_torch_function((x, weight, bias)):
        return handle_torch_function(linear_heads, (x, weight, bias), x, weight, bias, head_sizes, grad_scale)
    path = _heads_path(x)
    if path == "eager":
        return _backend.C.linear_heads(x, weight, bias, head_sizes, grad_scale)
    if path == "traced":
        return torch.ops.grl_ext.linear_heads(x, weight, bias, head_sizes, _on_device(grad_scale, x))
    return _reference.linear_heads(x, weight, bias, head_sizes, grad_scale)


class HeadsOutput(NamedTuple):
    """What the fused loss returns. Only ``loss`` is differentiable; the others are detached.

    From :meth:`grl_ext.AdversarialHeads.loss`, ``head_losses`` and ``logits`` are dicts by head name.
    """

    loss: Tensor
    head_losses: Tensor | dict[str, Tensor]
    logits: Tensor | dict[str, Tensor]


def heads_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    head_sizes: Sequence[int],
    grad_scale: Tensor | Sequence[float],
    *,
    loss_weight: Tensor | Sequence[float] | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> HeadsOutput:
    r"""The cross entropy of several heads over the same features: logits, losses and all gradients in one pass over ``x``.

    With float16 features in two: their gradients wait for the backward, where the loss scale that saves the small ones is known.

    .. math:: L = \sum_h w_h \frac{1}{|V_h|} \sum_{n \in V_h} \mathrm{CE}(z_{nh}, t_{nh}), \qquad z = x W^T + b

    with :math:`V_h` the rows whose target is not ``ignore_index``. Backward, the gradient to ``x`` counts each head with its
    ``grad_scale``, as in :func:`linear_heads`; those to ``weight`` and ``bias`` are not scaled.

    Equivalent to a linear layer and ``F.cross_entropy`` for each head (``F.binary_cross_entropy_with_logits`` for a head of size
    1), with two differences: a head without a valid row has loss 0 and no gradient, instead of NaN, and so has every head if ``x``
    has no rows; and an incoming gradient of 0 gives zeros, also where the loss is NaN.

    Args:
        x: ``(..., D)``, float16, bfloat16, float32 or float64. Half types are accumulated in float32.
        weight: ``(K, D)``, of x's dtype.
        bias: ``(K,)`` or None.
        targets: int64 ``(..., H)``, class indices; 0 or 1 for a head of size 1.
        head_sizes: H positive integers that sum to K.
        grad_scale: H numbers, or an H-element tensor: 1 for a predictor, -lambda for an adversary.
        loss_weight: H numbers, or an H-element tensor. Default: all 1.
        ignore_index: the target of an entry that does not count, in that head alone (a row without a label).
        label_smoothing: in [0, 1], as for ``F.cross_entropy``; a head of size 1 is smoothed as the two classes it stands for.

    Returns:
        ``HeadsOutput(loss, head_losses, logits)``: the differentiable total, the detached per-head means ``(H,)`` before
        ``loss_weight``, and the detached logits ``(..., K)``. Losses are float32 (float64 for float64 features), also under
        autocast.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, named in the message.
        IndexError: a target that is neither a class nor ``ignore_index`` (on a CUDA device an assertion, as for
            ``F.cross_entropy``: looking would be a synchronisation).

    Example:
        >>> x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8)
        >>> targets = torch.tensor([[0, 0], [2, 1], [1, 1], [-100, 0]])
        >>> out = grl_ext.heads_cross_entropy(x, weight, None, targets, head_sizes=[3, 2], grad_scale=[1.0, -0.5])
        >>> out.loss.backward()
    """
    if has_torch_function((x, weight, bias, targets)):
        return handle_torch_function(
            heads_cross_entropy,
            (x, weight, bias, targets),
            x,
            weight,
            bias,
            targets,
            head_sizes,
            grad_scale,
            loss_weight=loss_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
    path = _heads_path(x)
    if path == "traced":
        grad_scale = _on_device(grad_scale, x)
        loss_weight = None if loss_weight is None else _on_device(loss_weight, x)
        compute = torch.ops.grl_ext.heads_cross_entropy
    else:
        compute = (_backend.C if path == "eager" else _reference).heads_cross_entropy
    return HeadsOutput(*compute(x, weight, bias, targets, head_sizes, grad_scale, loss_weight, ignore_index, label_smoothing))


def adversarial_heads_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, head_sizes: Sequence[int], predictors: int, lambda_: Tensor
) -> Tensor:
    """:func:`linear_heads` with a scale of 1 for the first heads, the predictors, and -lambda for the others."""
    if _in_eager(x, weight, bias):
        return _backend.C.adversarial_heads_logits(x, weight, bias, head_sizes, predictors, lambda_)
    return linear_heads(x, weight, bias, head_sizes, _grad_scale(predictors, lambda_))


def adversarial_heads_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Sequence[Tensor],
    head_sizes: Sequence[int],
    predictors: int,
    lambda_: Tensor,
    loss_weight: Sequence[float] | None,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """:func:`heads_cross_entropy` in the same terms, with targets ``(...)`` for each head; the results but the loss by head."""
    if _in_eager(x, weight, bias, *targets):
        return _backend.C.adversarial_heads_loss(
            x, weight, bias, targets, head_sizes, predictors, lambda_, loss_weight, ignore_index, label_smoothing
        )
    loss, head_losses, logits = heads_cross_entropy(
        x,
        weight,
        bias,
        torch.stack(targets, -1),
        head_sizes,
        _grad_scale(predictors, lambda_),
        loss_weight=loss_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    return loss, head_losses.unbind(), logits.split_with_sizes(head_sizes, -1)


def _in_eager(x: Tensor, *others: Tensor | None) -> bool:
    return not has_torch_function((x, *others)) and _heads_path(x) == "eager"


def _grad_scale(predictors: int, lambda_: Tensor) -> Tensor:
    return torch.constant_pad_nd(-lambda_, (predictors, 0), 1.0)


def _on_device(numbers: Tensor | Sequence[float], x: Tensor) -> Tensor:
    """Tracing allows no CPU tensor beside those of another device, unless it is 0-d."""
    return numbers.to(x.device) if isinstance(numbers, Tensor) else torch.tensor(numbers, dtype=torch.float64, device=x.device)
