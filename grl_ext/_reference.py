"""Every operation in plain PyTorch: the fallback where nothing is compiled, and the oracle of the tests.

The rules are the compiled operations' own: same results, same errors, same gradients of gradients. It also serves where
C++
autograd nodes cannot go: `torch.func` transforms, and devices for which no kernel is compiled.
"""

import contextlib
import math
import numbers
import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.masked import MaskedTensor, as_masked_tensor

# ---------------------------------------------------------------------------------------------------------------------
# Checks. The texts are those of csrc/checks.h.
# ---------------------------------------------------------------------------------------------------------------------


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_operand(name: str, value: object) -> None:
    """What a linear layer or a loss takes."""
    check_tensor(name, value)
    if isinstance(value, MaskedTensor):
        raise TypeError(
            f"{name} must not be a MaskedTensor: pass {name}.to_tensor(value), with the value that masked elements are to have"
        )


def check_tensors(x: object, weight: object, bias: object) -> None:
    check_operand("x", x)
    check_operand("weight", weight)
    if bias is not None:
        check_operand("bias", bias)


def check_number(name: str, value: object) -> float:
    """A finite Python float from any real number; the only place where a lambda's value is judged."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number or a real tensor, got {type(value).__name__}")
    value = float(value)
    if (
        not abs(value) <= sys.float_info.max
    ):  # torch.compile can trace neither math.isfinite nor a comparison with infinity
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def check_scalar(name: str, value: object) -> Tensor | float:
    """A finite number, or a 0-d tensor as it is."""
    if not isinstance(value, Tensor):
        return check_number(name, value)
    if value.is_complex():
        raise TypeError(f"{name} must be a real number or a real tensor, got a tensor of {value.dtype}")
    if value.dim() != 0:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {list(value.shape)}")
    return value


def check_lambda(x: Tensor, lambda_: Tensor) -> None:
    if lambda_.is_complex():
        raise TypeError(f"lambda_ must be a real number or a real tensor, got a tensor of {lambda_.dtype}")
    if lambda_.dim() > 0:
        if lambda_.device != x.device:
            raise ValueError(
                f"lambda_ is on {lambda_.device} but x is on {x.device}: only a 0-d lambda_ may be elsewhere, on the CPU"
            )
        offset = x.dim() - lambda_.dim()
        if offset < 0 or any(b not in (1, x.shape[offset + d]) for d, b in enumerate(lambda_.shape)):
            raise ValueError(f"lambda_ of shape {list(lambda_.shape)} does not broadcast to x of shape {list(x.shape)}")
    elif lambda_.device != x.device and lambda_.device.type != "cpu":
        raise ValueError(
            f"lambda_ is on {lambda_.device} but x is on {x.device}: only a 0-d lambda_ may be elsewhere, on the CPU"
        )


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got shape []")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight must have shape [K, D] with D = x.shape[-1] = {x.shape[-1]}, got {list(weight.shape)}"
        )
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device} but x is on {x.device}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64) or weight.dtype != x.dtype:
        raise TypeError(
            f"x and weight must have the same dtype, float16, bfloat16, float32 or float64, got {x.dtype} and {weight.dtype}"
        )
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
        if bias.device != x.device:
            raise ValueError(f"bias is on {bias.device} but x is on {x.device}")
        if bias.dtype != x.dtype:
            raise TypeError(f"bias must have x's dtype {x.dtype}, got {bias.dtype}")


# ---------------------------------------------------------------------------------------------------------------------
# gradient_reversal
# ---------------------------------------------------------------------------------------------------------------------


def scale_negate(grad: Tensor, lambda_: Tensor | float) -> Tensor:
    """-lambda * grad in grad's dtype, rounded once, and exact zeros where lambda is 0 (even of an infinite
    gradient)."""
    if isinstance(grad, MaskedTensor):  # torch.where would take the mask of the zeros
        return as_masked_tensor(scale_negate(grad.get_data(), lambda_), grad.get_mask())
    if grad.is_complex():  # by parts: the product with a complex number would make NaN of infinity times 0
        return torch.complex(scale_negate(grad.real, lambda_), scale_negate(grad.imag, lambda_))
    if grad.layout == torch.sparse_coo and (isinstance(lambda_, Tensor) or lambda_ == 0):
        if isinstance(lambda_, Tensor) and lambda_.numel() > 1:
            return scale_negate(grad.to_dense(), lambda_)
        entries = grad.coalesce()
        values = scale_negate(entries.values(), lambda_.reshape(()) if isinstance(lambda_, Tensor) else lambda_)
        return torch.sparse_coo_tensor(entries.indices(), values, grad.shape, is_coalesced=True, check_invariants=False)
    if not isinstance(lambda_, Tensor):
        # Not zeros_like: gradients of gradients need the graph.
        return (
            grad * -lambda_
            if lambda_ != 0
            else grad.masked_fill(torch.ones((), dtype=torch.bool, device=grad.device), 0)
        )
    wide = torch.promote_types(grad.dtype, torch.float32)
    factor = -lambda_.to(grad.device, wide)
    scaled = (grad.to(wide) * factor).to(grad.dtype)
    return torch.where(factor == 0, torch.zeros((), dtype=grad.dtype, device=grad.device), scaled)


class _Reversal(torch.autograd.Function):
    """No jvp here: torch.compile refuses a Function that has one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, lambda_: Tensor | float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, lambda_ = inputs
        ctx.lambda_ = None if isinstance(lambda_, Tensor) else lambda_
        saved = (lambda_,) if isinstance(lambda_, Tensor) else ()
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        lambda_ = ctx.saved_tensors[0] if ctx.lambda_ is None else ctx.lambda_
        return scale_negate(grad, lambda_), None


class _ReversalWithJvp(_Reversal):
    """For torch.func: the tangent is -lambda * t, the adjoint of what backward does."""

    @staticmethod
    def jvp(ctx, tangent: Tensor, _) -> Tensor:
        lambda_ = ctx.saved_tensors[0] if ctx.lambda_ is None else ctx.lambda_
        return scale_negate(tangent, lambda_)


def in_a_graph() -> bool:
    """Whether PyTorch makes a graph of the program, in which an operator keeps its backward."""
    if torch._C._are_functorch_transforms_active():
        return False
    return torch.compiler.is_compiling() or (torch._C._is_tracing() and not torch.onnx.is_in_onnx_export())


# Whether torch.fx records what runs; under the second name in torch 2.8.
fx_records = getattr(torch.fx._symbolic_trace, "is_fx_symbolic_tracing", torch.fx._symbolic_trace.is_fx_tracing)


def in_make_fx() -> bool:
    """Whether make_fx records what runs: PyTorch's operators below autograd, so that a Function's own backward is
    lost."""
    return not torch.compiler.is_compiling() and fx_records()


def reversal_by_operators(x: Tensor, lambda_: Tensor | float) -> Tensor:
    """The value of x, the derivative -lambda: what any recording of operators keeps. The derivative is 0 where x is not
    finite."""
    if not x.is_floating_point() and not x.is_complex():
        return x.view_as(x)
    value = x.detach()
    lambda_ = lambda_.detach() if isinstance(lambda_, Tensor) else lambda_
    return torch.where(value.isfinite(), value + scale_negate(x - value, lambda_), value)


def read_now(lambda_: Tensor) -> Tensor | float:
    """A 0-d CPU lambda as it is now, so that later changes cannot reach into a graph already built."""
    if type(lambda_) is Tensor and torch._C._len_torch_dispatch_stack() == 0 and not torch.compiler.is_compiling():
        return lambda_.item()
    return lambda_.clone()  # its value cannot be looked at


def gradient_reversal(x: Tensor, lambda_: Tensor | float = 1.0) -> Tensor:
    check_tensor("x", x)
    functorch = torch._C._are_functorch_transforms_active()
    if isinstance(lambda_, Tensor):
        check_lambda(x, lambda_)
        if not x.requires_grad and not functorch:
            lambda_ = lambda_.detach()  # the output must not require a gradient for lambda's sake
        if (
            lambda_.dim() == 0
            and lambda_.device.type == "cpu"
            and not (lambda_.requires_grad or functorch or in_make_fx())
        ):
            lambda_ = read_now(lambda_)
    else:
        lambda_ = check_number("lambda_", lambda_)

    if in_make_fx() or (functorch and torch.compiler.is_compiling()):
        # make_fx loses the backward of a Function, and so does Dynamo inside a transform.
        return reversal_by_operators(x, lambda_)
    if functorch:
        return _ReversalWithJvp.apply(x, lambda_)
    # A Function that returns a view may not scale its tangent: forward mode is done by hand.
    primal, tangent = forward_ad.unpack_dual(x) if forward_ad._current_level >= 0 else (x, None)
    y = _Reversal.apply(primal, lambda_)
    return y if tangent is None else forward_ad.make_dual(y, scale_negate(tangent, lambda_))


# ---------------------------------------------------------------------------------------------------------------------
# grl_linear, and what the operations on linear layers share
# ---------------------------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result  # Dynamo of torch 2.11 does not know the function inside
def has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As F.linear under autocast: floating-point tensors in autocast's dtype, float64 left alone."""
    device = tensors[0].device.type
    if not has_autocast(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    eligible = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(t.to(dtype) if t is not None and t.dtype in eligible else t for t in tensors)


def without_autocast(device: torch.device):
    return torch.autocast(device.type, enabled=False) if has_autocast(device.type) else contextlib.nullcontext()


def as_rows(x: Tensor) -> Tensor:
    """(..., D) -> (N, D), also where D is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def grl_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, lambda_: Tensor | float = 1.0) -> Tensor:
    check_tensors(x, weight, bias)
    if isinstance(lambda_, Tensor):
        check_lambda(x, lambda_)
    else:
        lambda_ = check_number("lambda_", lambda_)
    x, weight, bias = autocast(x, weight, bias)
    check_linear(x, weight, bias)
    return F.linear(gradient_reversal(x, lambda_), weight, bias)


# ---------------------------------------------------------------------------------------------------------------------
# Operators
# ---------------------------------------------------------------------------------------------------------------------


def register_operators() -> None:
    """The layer's operators where no extension has registered them: what a graph holds, so that its gradient is
    reversed too."""
    for name, function, schema in (
        ("gradient_reversal", gradient_reversal, "(Tensor(a) x, Tensor lambda_) -> Tensor(a)"),
        ("grl_linear", grl_linear, "(Tensor x, Tensor weight, Tensor? bias, Tensor lambda_) -> Tensor"),
    ):
        _library.define(name + schema)
        _library.impl(name, function, "CompositeImplicitAutograd")


_library = torch.library.Library("grl_ext", "FRAGMENT")  # what it registers lives as long as it does
