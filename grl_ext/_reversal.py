"""The reversal where C++ nodes cannot go: as an autograd.Function, and as recorded operators."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.masked import MaskedTensor, as_masked_tensor

from grl_ext import _paths
from grl_ext._checks import check_lambda, check_tensor
from grl_ext._paths import Path


def scale(grad: Tensor, factor: Tensor | float) -> Tensor:
    """factor * grad in its dtype, rounded once, exact zeros where the factor is 0 (even of an infinite gradient)."""
    if isinstance(grad, MaskedTensor):  # torch.where would take the mask of the zeros
        return as_masked_tensor(scale(grad.get_data(), factor), grad.get_mask())
    if grad.is_complex():  # by parts: the product with a complex number would make NaN of infinity times 0
        return torch.complex(scale(grad.real, factor), scale(grad.imag, factor))
    if grad.layout == torch.sparse_coo and (isinstance(factor, Tensor) or factor == 0):
        if isinstance(factor, Tensor) and factor.numel() > 1:
            return scale(grad.to_dense(), factor)
        entries = grad.coalesce()
        values = scale(entries.values(), factor.reshape(()) if isinstance(factor, Tensor) else factor)
        return torch.sparse_coo_tensor(entries.indices(), values, grad.shape, is_coalesced=True, check_invariants=False)
    if not isinstance(factor, Tensor) and factor != 0:
        return grad * factor
    if not isinstance(factor, Tensor):
        # Not zeros_like: gradients of gradients need the graph.
        return grad.masked_fill(torch.ones((), dtype=torch.bool, device=grad.device), 0)
    wide = torch.promote_types(grad.dtype, torch.float32)
    factor = factor.to(grad.device, wide)
    scaled = (grad.to(wide) * factor).to(grad.dtype)
    return torch.where(factor == 0, torch.zeros((), dtype=grad.dtype, device=grad.device), scaled)


def _minus(lambda_: Tensor | float) -> Tensor | float:
    """Unsigned integers would wrap around, and booleans have no minus."""
    if isinstance(lambda_, Tensor) and not lambda_.is_floating_point():
        lambda_ = lambda_.to(torch.float32)
    return -lambda_


class _Reversal(torch.autograd.Function):
    """No jvp here: torch.compile refuses a Function that has one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, lambda_: Tensor | float) -> Tensor:
        return x.view_as(x) if x.layout is torch.strided or x.is_nested else x.detach()  # sparse ones have no views

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, lambda_ = inputs
        ctx.lambda_ = None if isinstance(lambda_, Tensor) else lambda_
        saved = (lambda_,) if isinstance(lambda_, Tensor) else ()
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return scale(grad, _minus(ctx.saved_tensors[0] if ctx.lambda_ is None else ctx.lambda_)), None


class _ReversalWithJvp(_Reversal):
    """For torch.func: the tangent is -lambda * t, the adjoint of what backward does."""

    @staticmethod
    def jvp(ctx, tangent: Tensor, _) -> Tensor:
        return scale(tangent, _minus(ctx.saved_tensors[0] if ctx.lambda_ is None else ctx.lambda_))


# From 2.14 on make_fx records `detach()` as an alias, through which a gradient passes.
_DETACH_IS_RECORDED = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _without_gradient(tensor: Tensor) -> Tensor:
    """As detach(), in a recording too: the bits seen as integers have no gradient."""
    if _DETACH_IS_RECORDED or torch.compiler.is_compiling():
        return tensor.detach()
    if tensor.is_complex():
        return torch.view_as_complex(_without_gradient(torch.view_as_real(tensor.resolve_conj())))
    return tensor.detach().view(_INTEGERS[tensor.element_size()]).view(tensor.dtype)


def _recorded(x: Tensor, lambda_: Tensor | float) -> Tensor:
    """The value of x, the derivative -lambda: what any recording of operators keeps. Its derivative is 0 where x is not
    finite."""
    if not x.is_floating_point() and not x.is_complex():
        return x.view_as(x)
    value = _without_gradient(x)
    factor = _minus(_without_gradient(lambda_) if isinstance(lambda_, Tensor) else lambda_)
    return torch.where(value.isfinite(), value + scale(x - value, factor), value)


def _read_now(lambda_: Tensor) -> Tensor | float:
    """A 0-d CPU lambda as it is now, so that later changes cannot reach into a graph already built."""
    if type(lambda_) is Tensor and torch._C._len_torch_dispatch_stack() == 0 and not torch.compiler.is_compiling():
        return lambda_.item()
    return lambda_.clone()  # its value cannot be looked at


def gradient_reversal(x: Tensor, lambda_: Tensor | float = 1.0) -> Tensor:
    check_tensor("x", x)
    lambda_ = check_lambda(x, lambda_)
    path = _paths.of_layer()
    in_transform = torch._C._are_functorch_transforms_active()
    if isinstance(lambda_, Tensor):
        if not x.requires_grad and not in_transform:
            lambda_ = lambda_.detach()  # the output must not require a gradient for lambda's sake
        hidden = lambda_.requires_grad or path in (Path.FUNCTION, Path.RECORDED)
        if lambda_.dim() == 0 and lambda_.device.type == "cpu" and not hidden:
            lambda_ = _read_now(lambda_)
    if path is Path.RECORDED:
        return _recorded(x, lambda_)
    if path is Path.FUNCTION:
        return _ReversalWithJvp.apply(x, lambda_)
    # A Function that returns a view may not scale its tangent: forward mode is done by hand.
    primal, tangent = forward_ad.unpack_dual(x) if forward_ad._current_level >= 0 else (x, None)
    y = _Reversal.apply(primal, lambda_)
    return y if tangent is None else forward_ad.make_dual(y, scale(tangent, _minus(lambda_)))


def seen_by(x: Tensor, lambda_: Tensor | float | None) -> Tensor:
    """The features as a head sees them: an adversary's gradient to them is reversed."""
    if lambda_ is None:
        return x
    if _paths.of_layer() is Path.OPERATOR:  # where a Python function's own backward would be lost
        return torch.ops.grl_ext.gradient_reversal(x, for_operator(lambda_))
    return gradient_reversal(x, lambda_)


def for_operator(lambda_: Tensor | float) -> Tensor:
    """A number that changes between calls is symbolic in the second graph. It becomes a tensor by a product, because a
    constant would fix each value in a new graph."""
    return lambda_ if isinstance(lambda_, Tensor) else torch.ones((), dtype=torch.float64) * lambda_
