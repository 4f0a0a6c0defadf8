r"""How lambda changes during training: schedules, which are plain functions of progress, and the object that applies
them.

A schedule takes the progress p, from 0 at the start to 1 at the end (clamped to that range), and returns the factor by
which the constructor's lambda of every layer is multiplied: lambda itself for layers made with ``lambda_=1``, the
default.

Which learning rate lambda changes. In the layers, lambda scales what flows back into the features and nothing else: the
adversary itself learns at its full rate throughout, also while lambda is still near 0, and is a worthy opponent by the
time lambda rises. The other convention lets lambda scale the adversary's own learning rate too: leave the layers at
``lambda_=1`` and put the factor on the loss, ``loss = label_loss + schedule(step / total_steps) * adversary_loss``. Do
one of the two; both together make it lambda squared for the features.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from numbers import Integral

from torch import nn

from grl_ext._checks import check_number
from grl_ext.heads import AdversarialHeads
from grl_ext.modules import LambdaModule

__all__ = ["LambdaScheduler", "Schedule", "constant", "dann", "linear", "warm_start"]

Schedule = Callable[[float], float]


def _clamped(p: float) -> float:
    return min(max(p, 0.0), 1.0)


# Functions of the module and not closures, so that a schedule can be pickled.


def _warm_start(p: float, alpha: float, lo: float, hi: float) -> float:
    # 2 / (1 + exp(-x)) - 1 = tanh(x / 2), which cannot overflow.
    return lo + (hi - lo) * math.tanh(alpha * _clamped(p) / 2)


def _linear(p: float, start: float, end: float) -> float:
    return start + (end - start) * _clamped(p)


def _constant(p: float, value: float) -> float:
    return value


def dann(gamma: float = 10.0) -> Schedule:
    r"""From 0 to nearly 1, the faster the larger gamma: :math:`\lambda(p) = 2 / (1 + e^{-\gamma p}) - 1`.

    Source: Ganin et al., *Domain-Adversarial Training of Neural Networks*, JMLR 2016, section 5.2.2.

    Example:
        >>> [round(grl_ext.schedules.dann()(p), 3) for p in (0.0, 0.1, 0.5, 1.0)]
        [0.0, 0.462, 0.987, 1.0]
    """
    return warm_start(gamma)


def warm_start(alpha: float = 1.0, lo: float = 0.0, hi: float = 1.0) -> Schedule:
    r"""From lo towards hi: :math:`\lambda(p) = \mathrm{lo} + (\mathrm{hi} - \mathrm{lo}) \, (2 / (1 + e^{-\alpha p}) -
    1)`.

    The curve of tllib's ``WarmStartGradientReverseLayer``, but with p the progress of the whole training. That layer
    counts its own forward calls and goes on past its ``max_iters``; what it does in ``total_steps`` steps is
    ``warm_start(alpha * total_steps / max_iters, lo, hi)``.

    Example:
        >>> [round(grl_ext.schedules.warm_start(hi=0.5)(p), 3) for p in (0.0, 0.5, 1.0)]
        [0.0, 0.122, 0.231]
    """
    return partial(_warm_start, alpha=alpha, lo=lo, hi=hi)


def linear(start: float, end: float) -> Schedule:
    """A straight line from start to end.

    Example:
        >>> grl_ext.schedules.linear(0.0, 2.0)(0.25)
        0.5
    """
    return partial(_linear, start=start, end=end)


def constant(value: float) -> Schedule:
    """The same factor throughout.

    Example:
        >>> grl_ext.schedules.constant(0.3)(0.9)
        0.3
    """
    return partial(_constant, value=value)


class LambdaScheduler:
    r"""Multiplies the constructor's lambda of layers by a schedule, as a learning-rate scheduler does the initial
    learning rates.

    Call ``step()`` after each ``optimizer.step()``; a forward call never advances it, so that evaluation, gradient
    accumulation and recomputation leave the curve alone. Lambda is written into the layers' buffers in place: no
    synchronisation, and no new graph under ``torch.compile``. Two adversaries made with 0.1 and 0.01 keep their ratio.

    A framework that calls the optimizer itself (Lightning, accelerate, the Trainer of transformers) needs no callback:
    ``optimizer.register_step_post_hook(scheduler.step)``. A step that ``GradScaler`` leaves out then does not count.

    To resume, load both the model and the scheduler, in either order. Where only the model is loaded, the curve begins
    anew and the first ``step()`` warns that it overwrites the lambda from the checkpoint.

    Args:
        layers: a module, or several. Every :class:`~grl_ext.GRL`, :class:`~grl_ext.GRLLinear` and
            :class:`~grl_ext.AdversarialHeads` inside is set, at once to ``schedule(0)`` times its constructor's lambda.
        schedule: progress in [0, 1] -> factor.
        total_steps: after that many steps the progress is 1, and stays.

    Attributes:
        last_factor: what the constructors' lambda has been multiplied by.

    Raises:
        ValueError: no such layer is found, a layer was made with ``lambda_=0`` (nothing could multiply it), heads with
            it for all adversaries, ``total_steps`` is below 1, or the schedule gives NaN or an infinite number.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), grl_ext.GRL(lambda_=0.2), torch.nn.Linear(8, 2))
        >>> scheduler = grl_ext.LambdaScheduler(model, grl_ext.schedules.linear(0.0, 1.0), total_steps=4)
        >>> scheduler.step()
        >>> model[1]
        GRL(lambda_=0.05)
    """

    def __init__(self, layers: nn.Module | Iterable[nn.Module], schedule: Schedule, total_steps: int) -> None:
        if not callable(schedule):
            raise TypeError(
                "schedule must be a function of the progress, such as grl_ext.schedules.dann(), "
                f"got {type(schedule).__name__}"
            )
        _check_steps("total_steps", total_steps, 1)
        several = isinstance(layers, Iterable) and not isinstance(layers, nn.Module)
        roots = list(layers) if several else [layers]
        for root in roots:
            if not isinstance(root, nn.Module):
                raise TypeError(f"layers must be a module, or several, got {type(root).__name__}")
        # A dict keeps the order and drops what two of the given modules share.
        modules = list({module: None for root in roots for module in root.modules()})
        self.layers = [module for module in modules if isinstance(module, LambdaModule)]
        if not self.layers:
            found = ", ".join(type(root).__name__ for root in roots) or "an empty list"
            raise ValueError(f"layers must hold a GRL, a GRLLinear or an AdversarialHeads; found none in {found}")
        _check_not_off(modules)
        self.schedule = schedule
        self.total_steps = total_steps
        self._overwritten = ""
        self._set_step(0)

    def step(self, *_: object) -> None:
        """Advances by one training step and sets lambda. Takes and ignores what an optimizer gives its hooks."""
        self._set_step(self.last_step + 1)
        if self._overwritten:
            warnings.warn(
                f"{self._overwritten} came from a checkpoint and is overwritten: this LambdaScheduler is at step "
                f"{self.last_step}. To resume, load its state too: scheduler.load_state_dict(...)",
                stacklevel=2,
            )
            self._overwritten = ""

    def _factor(self, step: int, total_steps: int) -> float:
        return check_number("the schedule's factor", self.schedule(min(step / total_steps, 1.0)))

    def _set_step(self, step: int) -> None:
        factor = self._factor(step, self.total_steps)  # before anything has changed
        for layer in self.layers:
            if layer._lambda_was_loaded:
                loaded = layer._current_lambda().item()
                # Where this scheduler stands. A checkpoint may have been cast to float32.
                expected = (factor if step == 0 else self.last_factor) * layer.initial_lambda
                if not math.isclose(loaded, expected, rel_tol=2**-23):
                    self._overwritten = f"the lambda_ {loaded} of a {type(layer).__name__}"
            layer._scale_lambda(factor)
        self.last_step, self.last_factor = step, factor

    def state_dict(self) -> dict[str, int]:
        """Where on the curve the training is. The schedule and the layers are code: make the same ones when
        resuming."""
        return {"last_step": self.last_step, "total_steps": self.total_steps}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continues the saved curve: the saved ``total_steps`` replaces the present one, and the layers are set."""
        step, total_steps = state_dict["last_step"], state_dict["total_steps"]
        _check_steps("last_step", step, 0)
        _check_steps("total_steps", total_steps, 1)
        self._factor(step, total_steps)
        self.total_steps = total_steps
        self._set_step(step)
        self._overwritten = ""


def _check_steps(name: str, steps: object, least: int) -> None:
    if not isinstance(steps, Integral):
        raise TypeError(f"{name} must be an integer, got {steps!r}")
    if steps < least:
        raise ValueError(f"{name} must be at least {least}, got {steps}")


def _check_not_off(modules: Iterable[nn.Module]) -> None:
    """A lambda of 0 cannot be multiplied. Of several adversaries in one AdversarialHeads some may be off."""
    together = [list(module.reversals.values()) for module in modules if isinstance(module, AdversarialHeads)]
    of_heads = {reversal for reversals in together for reversal in reversals}
    alone = [[module] for module in modules if isinstance(module, LambdaModule) and module not in of_heads]
    for layers in (*together, *alone):
        if layers and not any(layer.initial_lambda for layer in layers):
            what = type(layers[0]).__name__ if layers in alone else "AdversarialHeads"
            raise ValueError(
                f"the {what} was made with lambda_=0, which no schedule can multiply: give it the lambda that a "
                "factor of 1 stands for"
            )
