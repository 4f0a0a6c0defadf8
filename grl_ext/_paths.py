"""Who computes an operation: the one place that looks at what PyTorch is doing when it is called.

=========================================  ========  ===================================================================
what PyTorch is doing                      path      why
=========================================  ========  ===================================================================
running eagerly, plain tensors             EAGER     a direct call of the compiled operation
torch.compile, torch.export, jit.trace     OPERATOR  a graph keeps the registered operator and its backward
torch.func, also inside torch.compile      FUNCTION  transforms ignore a C++ node, they take a Python autograd.Function
make_fx, torch.func inside torch.compile   RECORDED  these record PyTorch's operators and lose a function's backward
features distributed by rows (DTensor)     BY_ROWS   each process runs the heads over its own rows, then sums are added
forward mode, ONNX, other subclasses of    PLAIN     plain PyTorch: these know PyTorch's own operators only
Tensor, devices without kernels, and
where nothing is compiled
=========================================  ========  ===================================================================
"""

import sys
from collections.abc import Iterable
from enum import Enum, auto

import torch
from torch import Tensor
from torch.autograd import forward_ad

from grl_ext import _backend


class Path(Enum):
    EAGER = auto()
    OPERATOR = auto()
    FUNCTION = auto()
    RECORDED = auto()
    BY_ROWS = auto()
    PLAIN = auto()


# Subclasses (jagged, masked, distributed, quantised) know the operators of plain PyTorch.
EXACT = (Tensor, torch.nn.Parameter)

# Whether torch.fx records what runs; under the second name in torch 2.8.
_fx_records = getattr(torch.fx._symbolic_trace, "is_fx_symbolic_tracing", torch.fx._symbolic_trace.is_fx_tracing)


def of_layer() -> Path:
    """The path of a reversal; where it is EAGER the caller still looks at the tensors' types."""
    if torch._C._are_functorch_transforms_active():
        return Path.RECORDED if torch.compiler.is_compiling() or _fx_records() else Path.FUNCTION
    if torch.compiler.is_compiling():
        return Path.OPERATOR
    if torch._C._is_tracing():
        return Path.PLAIN if torch.onnx.is_in_onnx_export() else Path.OPERATOR
    if _fx_records():
        return Path.RECORDED
    return Path.PLAIN if _backend.C is None else Path.EAGER


def of_linear(tensors: Iterable[Tensor | None]) -> Path:
    """The path of one reversed linear layer. Where it is EAGER the compiled function may still decline."""
    path = of_layer()
    if forward_ad._current_level >= 0 or path in (Path.FUNCTION, Path.RECORDED):
        return Path.PLAIN  # whose reversals ask of_layer() again
    return Path.PLAIN if path is Path.OPERATOR and _any_wraps(tensors) else path


def of_heads(features: Tensor, others: Iterable[Tensor | None]) -> Path:
    """The path of several heads, where the compiled function may decline too."""
    path = of_layer()
    if forward_ad._current_level >= 0 or path in (Path.FUNCTION, Path.RECORDED):
        return Path.PLAIN
    if path is Path.OPERATOR:
        return path if _has_operator(features, others) else Path.PLAIN
    if type(features) not in EXACT and _is_distributed(features):
        return Path.BY_ROWS
    return path


def _has_operator(features: Tensor, others: Iterable[Tensor | None]) -> bool:
    """Whether a graph takes the heads' operators for these tensors."""
    if not isinstance(features, Tensor) or not _backend.has_kernels(features.device):
        return False
    if not torch.compiler.is_compiling():
        return False  # torch.jit.trace knows no lists of optional tensors. The reversal stays an operator there.
    return not _any_wraps((features, *others))


def _any_wraps(tensors: Iterable[Tensor | None]) -> bool:
    """A subclass in a graph, such as DTensor, has a strategy for each of PyTorch's own operators, and none for ours."""
    return any(tensor is not None and hasattr(type(tensor), "__tensor_flatten__") for tensor in tensors)


def _is_distributed(features: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # which is slow to import, and is where there is a DTensor
    return module is not None and isinstance(features, module.DTensor)


def are_readable(*tensors: Tensor | None) -> bool:
    """Whether the values can be looked at without waiting for a device, and are there at all."""
    if any(t is not None and (type(t) not in EXACT or t.device.type != "cpu") for t in tensors):
        return False
    if torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    return not _fx_records() and torch._C._len_torch_dispatch_stack() == 0
