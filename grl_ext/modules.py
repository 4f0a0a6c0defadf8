"""The layers: what holds lambda, and how it travels with a model."""

import torch
from torch import Tensor, nn

from grl_ext import functional
from grl_ext._reference import check_number

__all__ = ["GRL", "GRLLinear"]


class _LambdaModule(nn.Module):
    """Holds lambda in a buffer: saved, moved between devices, set by assignment, never cast.

    The buffer is float64 (float32 on devices without it), because it is a setting and not an activation: a model in half
    precision still has the lambda its schedule gave it.
    """

    lambda_: Tensor

    def _register_lambda(self, values: Tensor, device=None) -> None:
        self.register_buffer("lambda_", _to_supported(values, device))

    def __setattr__(self, name: str, value) -> None:
        if name == "lambda_" and "lambda_" in self.__dict__.get("_buffers", ()):
            self._set_lambda(value)
        else:
            super().__setattr__(name, value)

    def _set_lambda(self, value: Tensor | float) -> None:
        if isinstance(value, Tensor):
            if value.is_complex():
                raise TypeError(f"lambda_ must be a real number or a real tensor, got a tensor of {value.dtype}")
            if self.lambda_.is_meta:  # load_state_dict(assign=True)
                self._buffers["lambda_"] = _to_supported(value.detach().expand_as(self.lambda_).contiguous(), None)
                return
        with torch.no_grad():
            if isinstance(value, Tensor):
                self.lambda_.copy_(value)
            else:
                self.lambda_.fill_(check_number("lambda_", value))

    def _apply(self, fn, recurse: bool = True):
        kept = self.lambda_
        self._buffers["lambda_"] = kept.float()  # every device has float32; only where fn puts it matters
        super()._apply(fn, recurse)
        moved = self._buffers["lambda_"]
        lambda_ = _to_supported(moved if kept.is_meta else kept, moved.device)
        self._buffers["lambda_"] = lambda_.share_memory_() if moved.is_shared() else lambda_
        return self

    def _shown_lambda(self):
        return "meta" if self.lambda_.is_meta else self.lambda_.tolist()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        # Checkpoints written before the layer was ours have no lambda; the present one stays.
        if prefix + "lambda_" in missing_keys:
            missing_keys.remove(prefix + "lambda_")


def _to_supported(lambda_: Tensor, device) -> Tensor:
    device = torch.device(device) if device is not None else lambda_.device
    return lambda_.to(device, torch.float32 if device.type == "mps" else torch.float64)


def _number(lambda_: float) -> Tensor:
    return torch.tensor(check_number("lambda_", lambda_), dtype=torch.float64)


class GRL(_LambdaModule):
    r"""Gradient reversal layer: the identity forward, the gradient times :math:`-\lambda` backward.

    Args:
        lambda_: a finite number. It lives in a float64 0-d buffer: in ``state_dict``, moved by ``.to(device)``, never cast by
            ``.half()`` and the like. Assign to change it: ``layer.lambda_ = 0.3`` (in place, no synchronisation; under
            ``torch.compile`` no new graph). A checkpoint without it loads strictly and leaves it as it is.

    ``layer(x)`` uses the layer's lambda; ``layer(x, coeff)`` uses ``coeff``, in any form that
    :func:`grl_ext.gradient_reversal` takes. On a CUDA device the buffer is read when the backward runs.

    Raises:
        TypeError, ValueError: as :func:`grl_ext.gradient_reversal`.

    Example:
        >>> adversary = torch.nn.Sequential(grl_ext.GRL(lambda_=0.3), torch.nn.Linear(8, 2))
        >>> adversary(torch.randn(4, 8)).shape
        torch.Size([4, 2])
    """

    def __init__(self, lambda_: float = 1.0) -> None:
        super().__init__()
        self._register_lambda(_number(lambda_))

    def forward(self, x: Tensor, coeff: Tensor | float | None = None) -> Tensor:
        return functional.gradient_reversal(x, self._buffers["lambda_"] if coeff is None else coeff)

    def extra_repr(self) -> str:
        return f"lambda_={self._shown_lambda()}"


class GRLLinear(_LambdaModule, nn.Linear):
    r"""``Sequential(GRL(lambda_), Linear(in_features, out_features))`` as one layer that costs what the linear layer alone does.

    Backward, the gradient to the input is :math:`-\lambda\, dy\, W`; those to weight and bias are not reversed. Parameters are
    named and initialised as in ``nn.Linear``, so that its checkpoints load; lambda is kept as in :class:`GRL`.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``.
        lambda_: a finite number.

    Raises:
        TypeError, ValueError: as :func:`grl_ext.grl_linear`.

    Example:
        >>> adversary = torch.nn.Sequential(grl_ext.GRLLinear(8, 16, lambda_=0.3), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> adversary(torch.randn(4, 8)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, lambda_: float = 1.0, device=None, dtype=None
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._register_lambda(_number(lambda_), device)

    def forward(self, x: Tensor) -> Tensor:
        return functional.grl_linear(x, self.weight, self.bias, self._buffers["lambda_"])

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, lambda_={self._shown_lambda()}"
