"""Every operation in plain PyTorch: the fallback where nothing is compiled, and the oracle of the tests.

The rules are the compiled operations' own: same results, same errors, same gradients of gradients. It also serves where C++
autograd nodes cannot go: `torch.func` transforms, and devices for which no kernel is compiled.
"""

import contextlib
import math
import numbers
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

# ---------------------------------------------------------------------------------------------------------------------
# Checks. The texts are those of csrc/checks.h.
# ---------------------------------------------------------------------------------------------------------------------


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_tensors(x: object, weight: object, bias: object) -> None:
    check_tensor("x", x)
    check_tensor("weight", weight)
    if bias is not None:
        check_tensor("bias", bias)


def check_number(name: str, value: object) -> float:
    """A finite Python float from any real number; the only place where a lambda's value is judged."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number or a real tensor, got {type(value).__name__}")
    value = float(value)
    if not abs(value) <= sys.float_info.max:  # torch.compile can trace neither math.isfinite nor a comparison with infinity
        raise ValueError(f"{name} must be finite, got {value}")
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
        raise ValueError(f"lambda_ is on {lambda_.device} but x is on {x.device}: only a 0-d lambda_ may be elsewhere, on the CPU")


def check_numbers(name: str, values: object) -> list[float]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name} must be a sequence of real numbers or a tensor, got {type(values).__name__}")
    return [check_number(name, value) for value in values]


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got shape []")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must have shape [K, D] with D = x.shape[-1] = {x.shape[-1]}, got {list(weight.shape)}")
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


def check_per_head(name: str, values: Tensor, x: Tensor, heads: int) -> None:
    if values.shape != (heads,):
        raise ValueError(f"{name} must hold one number for each of the {heads} heads, got shape {list(values.shape)}")
    if values.device != x.device and values.device.type != "cpu":
        raise ValueError(f"{name} is on {values.device} but x is on {x.device}")


def check_heads(x: Tensor, weight: Tensor, bias: Tensor | None, head_sizes: Sequence[int], grad_scale: Tensor) -> None:
    check_linear(x, weight, bias)
    if not head_sizes or any(size <= 0 for size in head_sizes) or sum(head_sizes) != weight.shape[0]:
        raise ValueError(f"head_sizes must be positive and sum to the {weight.shape[0]} rows of weight, got {list(head_sizes)}")
    check_per_head("grad_scale", grad_scale, x, len(head_sizes))


def check_targets(x: Tensor, targets: Tensor, heads: int, loss_weight: Tensor | None, label_smoothing: float) -> None:
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be torch.int64, got {targets.dtype}")
    expected = [*x.shape[:-1], heads]
    if list(targets.shape) != expected:
        raise ValueError(f"targets must have shape {expected} (one class per row and head), got {list(targets.shape)}")
    if targets.device != x.device:
        raise ValueError(f"targets is on {targets.device} but x is on {x.device}")
    if loss_weight is not None:
        check_per_head("loss_weight", loss_weight, x, heads)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing:g}")


# ---------------------------------------------------------------------------------------------------------------------
# gradient_reversal
# ---------------------------------------------------------------------------------------------------------------------


def scale_negate(grad: Tensor, lambda_: Tensor | float) -> Tensor:
    """-lambda * grad in grad's dtype, rounded once, and exact zeros where lambda is 0 (even of an infinite gradient)."""
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
        return grad * -lambda_ if lambda_ != 0 else grad.masked_fill(torch.ones((), dtype=torch.bool, device=grad.device), 0)
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
        if lambda_.dim() == 0 and lambda_.device.type == "cpu" and not (lambda_.requires_grad or functorch):
            lambda_ = read_now(lambda_)
    else:
        lambda_ = check_number("lambda_", lambda_)

    if functorch and torch.compiler.is_compiling():
        # Dynamo loses the backward of a Function inside a transform. This has the same derivatives for finite x.
        return x - (1 + lambda_) * (x - x.detach())
    if functorch:
        return _ReversalWithJvp.apply(x, lambda_)
    # A Function that returns a view may not scale its tangent: forward mode is done by hand.
    primal, tangent = forward_ad.unpack_dual(x) if forward_ad._current_level >= 0 else (x, None)
    y = _Reversal.apply(primal, lambda_)
    return y if tangent is None else forward_ad.make_dual(y, scale_negate(tangent, lambda_))


# ---------------------------------------------------------------------------------------------------------------------
# Linear layers: grl_linear, linear_heads, heads_cross_entropy
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


class _LinearHeads(torch.autograd.Function):
    """z = x W^T + b; backward, dx = sum_h s_h dz_h W_h. No jvp here: torch.compile refuses a Function that has one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, head_sizes: Sequence[int], grad_scale: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, bias, ctx.head_sizes, grad_scale = inputs
        ctx.save_for_backward(x, weight, grad_scale)
        ctx.save_for_forward(x, weight, grad_scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, grad_scale = ctx.saved_tensors
        grad, rows = as_rows(grad), as_rows(x)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            heads = zip(grad.split(ctx.head_sizes, 1), weight.split(ctx.head_sizes), grad_scale, strict=True)
            dx = sum(scale_negate(dz, -scale) @ w for dz, w, scale in heads).view_as(x)
        if ctx.needs_input_grad[1]:
            # Through the reversal, so that a gradient of this gradient reaches x as it would layer by layer.
            heads = zip(grad.split(ctx.head_sizes, 1), grad_scale, strict=True)
            dw = torch.cat([dz.T @ gradient_reversal(rows, -scale) for dz, scale in heads])
        if ctx.needs_input_grad[2]:
            db = grad.sum(0)
        return dx, dw, db, None, None


class _LinearHeadsWithJvp(_LinearHeads):
    """For eager mode and torch.func: a head's tangent counts the features' with the head's scale."""

    @staticmethod
    def jvp(ctx, dx: Tensor | None, dw: Tensor | None, db: Tensor | None, *_) -> Tensor:
        x, weight, grad_scale = ctx.saved_tensors
        parts = []
        if dx is not None:
            heads = zip(weight.split(ctx.head_sizes), grad_scale, strict=True)
            parts.append(torch.cat([F.linear(scale_negate(dx, -scale), w) for w, scale in heads], -1))
        if dw is not None:
            parts.append(F.linear(x, dw))
        if db is not None:
            parts.append(db.expand(*x.shape[:-1], -1))
        return sum(parts)


def _per_head(name: str, values: Tensor | Sequence[float]) -> Tensor:
    if isinstance(values, Tensor):
        # What is on the CPU may change before the backward; what is on a device is read there.
        return values.detach().clone() if values.device.type == "cpu" else values.detach()
    if not torch.compiler.is_compiling():
        values = check_numbers(name, values)
    return torch.tensor(values, dtype=torch.float64)


def linear_heads(
    x: Tensor, weight: Tensor, bias: Tensor | None, head_sizes: Sequence[int], grad_scale: Tensor | Sequence[float]
) -> Tensor:
    check_tensors(x, weight, bias)
    grad_scale = _per_head("grad_scale", grad_scale)
    x, weight, bias = autocast(x, weight, bias)
    check_heads(x, weight, bias, head_sizes, grad_scale)
    head_sizes = tuple(head_sizes)
    with without_autocast(x.device):
        if not torch.compiler.is_compiling():
            return _LinearHeadsWithJvp.apply(x, weight, bias, head_sizes, grad_scale)
        if not torch._C._are_functorch_transforms_active():
            return _LinearHeads.apply(x, weight, bias, head_sizes, grad_scale)
        # Dynamo loses the backward of a Function inside a transform: layer by layer.
        scaled = [gradient_reversal(x, -scale) for scale in grad_scale.unbind()]
        biases = bias.split(head_sizes) if bias is not None else [None] * len(head_sizes)
        return torch.cat([F.linear(*head) for head in zip(scaled, weight.split(head_sizes), biases, strict=True)], -1)


def head_loss(logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float) -> Tensor:
    """Mean cross entropy over the valid rows, 0 where there are none. logits (N, C); C = 1 is binary: softmax over (0, z)."""
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    total = F.cross_entropy(logits, target, reduction="sum", ignore_index=ignore_index, label_smoothing=label_smoothing)
    return total / (target != ignore_index).sum().clamp(min=1)


def check_classes(targets: Tensor, head_sizes: Sequence[int], ignore_index: int) -> None:
    """Values are only looked at where that costs no synchronisation and they exist; elsewhere F.cross_entropy's own check serves."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling() or type(targets) is not Tensor:
        return
    if torch._C._are_functorch_transforms_active():
        return
    targets, classes = as_rows(targets), torch.tensor([max(2, size) for size in head_sizes])
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= classes))
    if wrong.any():
        row, h = wrong.nonzero()[0]
        raise IndexError(
            f"targets of head {h} must be in [0, {classes[h]}) or ignore_index ({ignore_index}), got {targets[row, h]}"
        )


def heads_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    head_sizes: Sequence[int],
    grad_scale: Tensor | Sequence[float],
    loss_weight: Tensor | Sequence[float] | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    check_tensors(x, weight, bias)
    check_tensor("targets", targets)
    grad_scale = _per_head("grad_scale", grad_scale)
    if loss_weight is not None:
        loss_weight = _per_head("loss_weight", loss_weight)
    x, weight, bias = autocast(x, weight, bias)
    check_heads(x, weight, bias, head_sizes, grad_scale)
    check_targets(x, targets, len(head_sizes), loss_weight, label_smoothing)
    check_classes(targets, head_sizes, ignore_index)

    logits = linear_heads(x, weight, bias, head_sizes, grad_scale)
    with without_autocast(x.device):
        rows = as_rows(logits).to(torch.promote_types(logits.dtype, torch.float32))
        columns = as_rows(targets).unbind(1)
        losses = torch.stack(
            [head_loss(z, t, ignore_index, label_smoothing) for z, t in zip(rows.split(tuple(head_sizes), 1), columns, strict=True)]
        )
        weighted = losses if loss_weight is None else losses * loss_weight.to(losses)
    return weighted.sum(), losses.detach(), logits.detach()


# ---------------------------------------------------------------------------------------------------------------------
# Operators
# ---------------------------------------------------------------------------------------------------------------------


def register_operators() -> None:
    """The layer's operators where no extension has registered them: what a graph holds, so that its gradient is reversed too."""
    for name, function, schema in (
        ("gradient_reversal", gradient_reversal, "(Tensor(a) x, Tensor lambda_) -> Tensor(a)"),
        ("grl_linear", grl_linear, "(Tensor x, Tensor weight, Tensor? bias, Tensor lambda_) -> Tensor"),
    ):
        _library.define(name + schema)
        _library.impl(name, function, "CompositeImplicitAutograd")


_library = torch.library.Library("grl_ext", "FRAGMENT")  # what it registers lives as long as it does
