"""The layers: what holds lambda, and how it travels with a model."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from grl_ext import _paths, functional
from grl_ext._checks import check_lambda_number, check_number

__all__ = ["GRL", "GRLLinear"]


# What lambda is called in other layers. A subclass may have such an attribute of its own.
_OTHER_NAMES = frozenset(
    ("alpha", "_alpha", "coeff", "coefficient", "lambda", "_lambda", "lambd", "lamb", "lamda", "lmbda", "lam", "weight")
)


_KEPT = torch.float64  # lambda's dtype, looked up once


class LambdaModule(nn.Module):
    """Holds lambda in a 0-d buffer: saved, moved between devices, set by assignment, never cast, never without a value.

    The buffer is float64 (float32 on devices without it), because it is a setting and not an activation: a model in
    half precision still has the lambda its schedule gave it. Where something casts the buffer itself to a half type
    (FSDP1's `buffer_dtype`), the layer goes on with the number that it was last set to. It is not on the meta device,
    which holds no values: in a layer that is, lambda is on the CPU.

    ``initial_lambda`` keeps the constructor's value as a Python number: what ``reset_parameters`` restores and
    :class:`grl_ext.LambdaScheduler` multiplies.
    """

    _lambda_was_loaded = False  # by a checkpoint, and not written since
    _exact_lambda = None  # the number that was last written; None where it is only in the buffer

    if TYPE_CHECKING:  # torch.jit.script would read these annotations too
        initial_lambda: float

        @property
        def lambda_(self) -> Tensor: ...

        @lambda_.setter
        def lambda_(self, value: Tensor | float) -> None: ...

    def _register_lambda(self, initial: float, device=None) -> None:
        self.initial_lambda = initial
        self.register_buffer("lambda_", self._new_lambda(device))
        self._exact_lambda = initial

    def _new_lambda(self, device=None) -> Tensor:
        """The constructor's lambda in a new buffer; on the CPU where no device is given, also within `with
        torch.device(...)`."""
        value = torch.tensor(self.initial_lambda, dtype=torch.float64, device="cpu")
        device = torch.get_default_device() if device is None else torch.device(device)
        return _to_supported(value, device)

    def reset_parameters(self) -> None:
        """Sets lambda to the constructor's value."""
        self._scale_lambda(1.0)

    def _scale_lambda(self, factor: float) -> None:
        """Sets lambda to ``factor`` times the constructor's value."""
        self._write(factor * self.initial_lambda)

    def _shown_lambda(self):
        return "meta" if self.lambda_.is_meta else self._current_lambda().item()

    def _current_lambda(self) -> Tensor:
        """The buffer; or, where that is of a half type and holds the exact number rounded, the number. Without a
        synchronisation."""
        buffer = self._buffers["lambda_"]
        if buffer.dtype is torch.float64 or buffer.dtype is torch.float32:
            return buffer
        kept = torch.float32 if buffer.device.type == "mps" else torch.float64
        if self._exact_lambda is None:
            return buffer.to(kept)
        exact = torch.full((), self._exact_lambda, dtype=kept, device=buffer.device)
        return torch.where(exact.to(buffer.dtype) == buffer, exact, buffer.to(kept))

    def __setattr__(self, name: str, value) -> None:
        if name != "lambda_" or "lambda_" not in self.__dict__.get("_buffers", ()):
            if name in _OTHER_NAMES and (type(self) is GRL or (type(self) is GRLLinear and name != "weight")):
                raise AttributeError(
                    f"{type(self).__name__} has no {name}, which would change nothing: assign lambda_, as in "
                    "layer.lambda_ = 0.3"
                )
            super().__setattr__(name, value)
        elif self.__dict__.get("_is_replica"):
            self._buffers["lambda_"] = value  # nn.DataParallel gives each replica a copy on its own device
        else:
            self._set_lambda(value)

    def _set_lambda(self, value: Tensor | float) -> None:
        self._write(check_lambda_number("lambda_", value))

    def _write(self, value: Tensor | float) -> None:
        """In place."""
        self._leave_meta()
        self._lambda_was_loaded = False
        if torch.compiler.is_compiling():  # one graph serves all values
            self._exact_lambda = None
        elif isinstance(value, Tensor):
            self._exact_lambda = value.detach().item() if _paths.are_readable(value) else None
        else:
            self._exact_lambda = value
        with torch.no_grad():
            # Through a view: inside a graph of torch.compile, PyTorch loses what is written to a 0-d float64 CPU tensor
            # itself.
            element = self.lambda_.view(-1)
            if isinstance(value, Tensor):
                element.copy_(value)
            else:
                element.fill_(value)

    def _leave_meta(self) -> None:
        """Where something has put the buffer on the meta device, such as accelerate's
        init_empty_weights(include_buffers=True)."""
        if self.lambda_.is_meta:
            self._buffers["lambda_"] = self._new_lambda("cpu")

    def _apply(self, fn, recurse: bool = True):
        self._leave_meta()
        kept = self.lambda_
        # Every device has float32, and only where fn puts it matters.
        self._buffers["lambda_"] = torch.empty(kept.shape, dtype=torch.float32, device=kept.device)
        try:
            super()._apply(fn, recurse)
            moved = self._buffers["lambda_"]
        finally:
            self._buffers["lambda_"] = kept
        lambda_ = _to_supported(self._current_lambda(), moved.device)
        self._buffers["lambda_"] = lambda_.share_memory_() if moved.is_shared() else lambda_
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        exact = self._current_lambda()
        if exact is not self._buffers["lambda_"]:
            destination[prefix + "lambda_"] = exact

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        self._leave_meta()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        loaded = state_dict.get(prefix + "lambda_")
        self._lambda_was_loaded = loaded is not None
        if isinstance(loaded, Tensor):
            readable = _paths.are_readable(loaded) and loaded.numel() == 1
            self._exact_lambda = loaded.item() if readable else None
        # Checkpoints written before the layer was ours have no lambda; the present one stays.
        if prefix + "lambda_" in missing_keys:
            missing_keys.remove(prefix + "lambda_")


def _number(value: Tensor | float, name: str = "lambda_") -> float:
    value = check_lambda_number(name, value)
    return check_number(name, value.item()) if isinstance(value, Tensor) else value


def _to_supported(lambda_: Tensor, device: torch.device) -> Tensor:
    """On that device, but on the CPU instead of the meta device; in float64 where the device has it."""
    if device.type == "meta":
        device = torch.device("cpu")
    return lambda_.to(device, torch.float32 if device.type == "mps" else torch.float64)


class GRL(LambdaModule):
    r"""Gradient reversal layer: the identity forward, the gradient times :math:`-\lambda` backward.

    Args:
        lambda_: a finite number or a tensor of one element. It lives in a float64 0-d buffer: in ``state_dict``, moved
            by ``.to(device)``, never cast by ``.half()`` and the like. Assign to change it: ``layer.lambda_ = 0.3`` (in
            place, no synchronisation; under ``torch.compile`` no new graph). ``layer.alpha = 0.3`` and the like would
            change nothing and are refused. A checkpoint without it loads strictly and
            leaves it as it is.

    Attributes:
        initial_lambda: the constructor's lambda as a Python number, which ``reset_parameters()`` restores and
            :class:`grl_ext.LambdaScheduler` multiplies. A layer on the meta device keeps its lambda, on the CPU.

    ``layer(x)`` uses the layer's lambda; ``layer(x, coeff)`` uses ``coeff``, in any form that
    :func:`grl_ext.gradient_reversal` takes. On a CUDA device the buffer is read when the backward runs.

    Raises:
        TypeError, ValueError: as :func:`grl_ext.gradient_reversal`.

    Example:
        >>> adversary = torch.nn.Sequential(grl_ext.GRL(lambda_=0.3), torch.nn.Linear(8, 2))
        >>> adversary(torch.randn(4, 8)).shape
        torch.Size([4, 2])
    """

    def __init__(self, lambda_: Tensor | float = 1.0) -> None:
        super().__init__()
        self._register_lambda(_number(lambda_))

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, coeff: Tensor | float | None = None) -> Tensor: ...

    def forward(self, x: Tensor, coeff: Tensor | float | None = None) -> Tensor:
        """``x`` itself; backward, the gradient times minus ``coeff``, or minus the layer's lambda if that is None."""
        if torch.jit.is_scripting():
            return functional.gradient_reversal(x, self.lambda_ if coeff is None else coeff)
        else:  # not by way of nn.Module.__getattr__, which takes a tenth of the layer's time
            if coeff is None:
                buffer = self._buffers["lambda_"]
                coeff = buffer if buffer.dtype is _KEPT else self._current_lambda()
            return functional.gradient_reversal(x, coeff)

    def extra_repr(self) -> str:
        return f"lambda_={self._shown_lambda()}"


class GRLLinear(LambdaModule):
    r"""``Sequential(GRL(lambda_), Linear(in_features, out_features))`` as one layer that costs what the linear layer
    alone does.

    Backward, the gradient to the input is :math:`-\lambda\, dy\, W`; those to weight and bias are not reversed.
    Parameters are named and initialised as in ``nn.Linear``, so that its checkpoints load; lambda is kept as in
    :class:`GRL`.

    It is not a subclass of ``nn.Linear``: libraries that replace those by layers of their own (quantisation, LoRA,
    float8) would drop the reversal. They leave this layer as it is; where they are to work on it, write
    ``Sequential(GRL(), Linear(...))``.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``.
        lambda_: a finite number or a tensor of one element.

    Raises:
        TypeError, ValueError: as :func:`grl_ext.grl_linear`.

    Example:
        >>> first = grl_ext.GRLLinear(8, 16, lambda_=0.3)
        >>> adversary = torch.nn.Sequential(first, torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> adversary(torch.randn(4, 8)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        lambda_: Tensor | float = 1.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self._register_lambda(_number(lambda_), device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises weight and bias as ``nn.Linear`` does, and sets lambda to the constructor's value."""
        super().reset_parameters()
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = self.in_features**-0.5 if self.in_features else 0.0
            nn.init.uniform_(self.bias, -bound, bound)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        """The linear layer of ``x``; backward, the gradient to ``x`` times minus the layer's lambda."""
        if torch.jit.is_scripting():
            return functional.grl_linear(x, self.weight, self.bias, self.lambda_)
        else:
            return functional.grl_linear(x, self.weight, self.bias, self._current_lambda())

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, lambda_={self._shown_lambda()}"
