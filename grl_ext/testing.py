"""What a test of an adversarial network asks: does a module reverse the gradient of its features?"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from grl_ext._checks import check_tensor
from grl_ext._plain import without_autocast

__all__ = ["reverses"]

_DIRECTIONS = 16
# Between the derivatives that are followed and those that are found, one for each direction.
_CORRELATION = 0.9


def reverses(module: Callable[[Tensor], Tensor], features: Tensor) -> bool:
    r"""Whether the gradient that a module gives its features is reversed: points against the module's own derivative.

    An adversary given to :class:`grl_ext.AdversarialHeads` must not reverse, because the heads do. A layer or a
    function with a usual name is refused there. This finds what has another name: it compares the gradient of a random
    projection of the output with finite differences, which know nothing of a backward.

    Args:
        module: a module or a function of the features, which returns one tensor. It is run as it is, in its own mode:
            call ``module.eval()`` before to ask about evaluation.
        features: a small batch as the module takes it, float32 or float64. The module is run on it 34 times.

    Returns:
        True for a reversal by any positive lambda, False for a gradient that is the derivative, or a positive multiple.

    Random numbers of PyTorch (dropout) are the same in each run. Everything is left as it was: PyTorch's generators,
    the module's mode, its buffers and numbers such as counters, and ``.grad``.

    Raises:
        TypeError: ``features`` are not float32 or float64, or the output is no floating-point tensor.
        ValueError: it cannot be told. The message says why: no gradient arrives (lambda 0), the output does not depend
            on the features, two runs differ, or the gradient is neither the derivative nor its reverse, as where one
            part of the features is reversed and another is not, or where rounding is passed straight through.

    Example:
        >>> from grl_ext.testing import reverses
        >>> adversary = torch.nn.Linear(8, 2)
        >>> reverses(adversary, torch.randn(4, 8))
        False
        >>> reverses(torch.nn.Sequential(grl_ext.GRL(0.3), adversary), torch.randn(4, 8))
        True
    """
    check_tensor("features", features)
    if features.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"features must be float32 or float64, got {features.dtype}")
    if features.is_meta or features.numel() == 0:
        raise ValueError(f"features must hold values, got shape {list(features.shape)} on {features.device}")
    generator = torch.Generator().manual_seed(0)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    x = features.detach()
    with _left_as_it_was(module, x.device) as restart, without_autocast(x.device):

        def run(x: Tensor) -> Tensor:
            restart()
            y = module(x)
            if not isinstance(y, Tensor) or not y.is_floating_point():
                raise TypeError(
                    "module must return one floating-point tensor, got "
                    + (str(y.dtype) if isinstance(y, Tensor) else type(y).__name__)
                )
            return y

        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            y = run(leaf.view_as(leaf))  # no leaf, so that the module may write into it
            projection = random(y)
            grad = torch.autograd.grad(y, leaf, projection, allow_unused=True)[0] if y.requires_grad else None
        with torch.no_grad():
            change = (run(x.clone()) - y).norm()
            if change > 1e-4 * y.norm():  # without a graph PyTorch may take other kernels
                raise ValueError(_cannot("two runs of the module on the same features differ"))
            step = (6e-6 if x.dtype == torch.float64 else 5e-3) * float(x.square().mean().sqrt().clamp(min=1e-3))
            followed, found = [], []
            for _ in range(_DIRECTIONS):
                direction = random(x)
                difference = run(x + step * direction).double() - run(x - step * direction).double()
                found.append((difference * projection.double()).sum() / (2 * step))
                followed.append(torch.zeros_like(found[-1]) if grad is None else (grad * direction).double().sum())
    derivative, ours = torch.stack(found), torch.stack(followed)
    if not (derivative.isfinite().all() and ours.isfinite().all()):
        raise ValueError(_cannot("its output or its gradient is infinite or NaN"))
    if not derivative.any():
        raise ValueError(_cannot("its output does not depend on the features"))
    if not ours.any():
        raise ValueError(_cannot("no gradient arrives at the features"))
    correlation = torch.dot(derivative, ours) / (derivative.norm() * ours.norm())
    if correlation.abs() < _CORRELATION:
        raise ValueError(_cannot("the gradient is neither the module's derivative nor its reverse"))
    return bool(correlation < 0)


def _cannot(why: str) -> str:
    return f"whether the module reverses cannot be told: {why}"


@contextlib.contextmanager
def _left_as_it_was(module: object, device: torch.device) -> Iterator[Callable[[], None]]:
    """Gives a function that puts everything back, and calls it at the end."""
    modules = list(module.modules()) if isinstance(module, nn.Module) else []
    modules = [own for own in modules if not isinstance(own, torch.jit.ScriptModule)]  # which hide what they hold
    tensors = {own: dict(own._buffers) for own in modules}
    values = {b: b.detach().clone() for buffers in tensors.values() for b in buffers.values() if b is not None}
    numbers = {own: {k: v for k, v in vars(own).items() if isinstance(v, (bool, int, float))} for own in modules}

    def restart() -> None:
        torch.set_rng_state(cpu_state)
        if accelerator is not None:
            accelerator.set_rng_state(state, device)
        for own in modules:
            own._buffers.update(tensors[own])
            own.__dict__.update(numbers[own])
        with torch.no_grad():
            for buffer, value in values.items():
                if not torch.equal(buffer, value):
                    buffer.copy_(value)

    accelerator = None if device.type == "cpu" else getattr(torch, device.type)
    cpu_state = torch.get_rng_state()
    state = None if accelerator is None else accelerator.get_rng_state(device)
    try:
        yield restart
    finally:
        restart()
