r"""How lambda changes during training: schedules, which are plain functions of progress, and the object that applies them.

A schedule takes the progress p, from 0 at the start to 1 at the end (clamped to that range), and returns lambda.

Which learning rate lambda changes. In the layers, lambda scales what flows back into the features and nothing else: the adversary
itself learns at its full rate throughout, also while lambda is still near 0, and is a worthy opponent by the time lambda rises.
The other convention lets lambda scale the adversary's own learning rate too: leave the layers at ``lambda_=1`` and put the factor
on the loss, ``loss = label_loss + schedule(step / total_steps) * adversary_loss``. Do one of the two; both together make it
lambda squared for the features.
"""

import math
from collections.abc import Callable, Iterable

from torch import nn

from grl_ext.modules import _LambdaModule

__all__ = ["LambdaScheduler", "Schedule", "constant", "dann", "linear", "warm_start"]

Schedule = Callable[[float], float]


def _clamped(p: float) -> float:
    return min(max(p, 0.0), 1.0)


def dann(gamma: float = 10.0) -> Schedule:
    r"""From 0 to nearly 1, the faster the larger gamma: :math:`\lambda(p) = 2 / (1 + e^{-\gamma p}) - 1`.

    Source: Ganin et al., *Domain-Adversarial Training of Neural Networks*, JMLR 2016, section 5.2.2.

    Example:
        >>> [round(grl_ext.schedules.dann()(p), 3) for p in (0.0, 0.1, 0.5, 1.0)]
        [0.0, 0.462, 0.987, 1.0]
    """
    return warm_start(gamma)


def warm_start(alpha: float = 1.0, lo: float = 0.0, hi: float = 1.0) -> Schedule:
    r"""From lo towards hi: :math:`\lambda(p) = \mathrm{lo} + (\mathrm{hi} - \mathrm{lo}) \, (2 / (1 + e^{-\alpha p}) - 1)`.

    The curve of tllib's ``WarmStartGradientReverseLayer``, but with p the progress of the whole training. That layer counts its
    own forward calls and goes on past its ``max_iters``; what it does in ``total_steps`` steps is
    ``warm_start(alpha * total_steps / max_iters, lo, hi)``.

    Example:
        >>> [round(grl_ext.schedules.warm_start(hi=0.5)(p), 3) for p in (0.0, 0.5, 1.0)]
        [0.0, 0.122, 0.231]
    """
    # 2 / (1 + exp(-x)) - 1 = tanh(x / 2), which cannot overflow.
    return lambda p: lo + (hi - lo) * math.tanh(alpha * _clamped(p) / 2)


def linear(start: float, end: float) -> Schedule:
    """A straight line from start to end.

    Example:
        >>> grl_ext.schedules.linear(0.0, 2.0)(0.25)
        0.5
    """
    return lambda p: start + (end - start) * _clamped(p)


def constant(value: float) -> Schedule:
    """The same lambda throughout.

    Example:
        >>> grl_ext.schedules.constant(0.3)(0.9)
        0.3
    """
    return lambda p: value


class LambdaScheduler:
    r"""Sets the lambda of layers by a schedule, as a learning-rate scheduler sets learning rates.

    Call ``step()`` after each ``optimizer.step()``; a forward call never advances it, so that evaluation, gradient accumulation
    and recomputation leave the curve alone. Lambda is written into the layers' buffers in place: no synchronisation, and no new
    graph under ``torch.compile``.

    Args:
        layers: a module, or several. Every :class:`~grl_ext.GRL`, :class:`~grl_ext.GRLLinear` and
            :class:`~grl_ext.AdversarialHeads` inside is set, at once to ``schedule(0)``; an ``AdversarialHeads`` for all of its
            adversaries.
        schedule: progress in [0, 1] -> lambda.
        total_steps: after that many steps the progress is 1, and stays.

    Attributes:
        last_lambda: the value the layers have been given.

    Raises:
        ValueError: no such layer is found, ``total_steps`` is below 1, or the schedule gives NaN or an infinite number.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), grl_ext.GRL(), torch.nn.Linear(8, 2))
        >>> scheduler = grl_ext.LambdaScheduler(model, grl_ext.schedules.linear(0.0, 1.0), total_steps=4)
        >>> scheduler.step()
        >>> model[1]
        GRL(lambda_=0.25)
    """

    def __init__(self, layers: nn.Module | Iterable[nn.Module], schedule: Schedule, total_steps: int) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        roots = [layers] if isinstance(layers, nn.Module) else list(layers)
        # A dict keeps the order and drops what two of the given modules share.
        self.layers = list({module: None for root in roots for module in root.modules() if isinstance(module, _LambdaModule)})
        if not self.layers:
            found = ", ".join(type(root).__name__ for root in roots) or "an empty list"
            raise ValueError(f"layers must hold a GRL, a GRLLinear or an AdversarialHeads; found none in {found}")
        self.schedule = schedule
        self.total_steps = total_steps
        self._set_step(0)

    def step(self) -> None:
        """Advances by one training step and sets lambda."""
        self._set_step(self.last_step + 1)

    def _set_step(self, step: int) -> None:
        lambda_ = self.schedule(step / self.total_steps)
        for layer in self.layers:
            layer.lambda_ = lambda_  # refuses what is not a finite number, before anything has changed
        self.last_step, self.last_lambda = step, lambda_

    def state_dict(self) -> dict[str, int]:
        """Where on the curve the training is. The schedule itself is code: give the same one when resuming."""
        return {"last_step": self.last_step, "total_steps": self.total_steps}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continues the saved curve: the saved ``total_steps`` replaces the present one, and the layers are set."""
        self.total_steps = state_dict["total_steps"]
        self._set_step(state_dict["last_step"])
