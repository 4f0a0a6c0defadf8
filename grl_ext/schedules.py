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
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from numbers import Integral
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

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


class LambdaScheduler(LRScheduler):
    r"""Multiplies the constructor's lambda of layers by a schedule, as a learning-rate scheduler does the initial
    learning rates.

    With ``optimizer=`` lambda follows that optimizer's steps, whoever calls them, and where the curve stands is in the
    optimizer's ``state_dict()``: a framework that saves and loads the optimizer resumes the curve. Nobody needs to call
    ``step()``, which then does nothing, so that a framework may. What ``GradScaler`` leaves out is no step; made with
    ``fused=True`` an optimizer leaves it out itself, and it counts.

    Without it, call ``step()`` after each ``optimizer.step()``. To resume, load both the model and the scheduler, in
    either order. Where only the model is loaded, the curve begins anew and the first ``step()`` warns that it
    overwrites the lambda from the checkpoint.

    A forward call never advances lambda, so that evaluation, gradient accumulation and recomputation leave the curve
    alone. It is written into the layers' buffers in place: no synchronisation, and no new graph under
    ``torch.compile``. Two adversaries made with 0.1 and 0.01 keep their ratio.

    Args:
        layers: a module, or several. Every :class:`~grl_ext.GRL`, :class:`~grl_ext.GRLLinear` and
            :class:`~grl_ext.AdversarialHeads` inside is set, at once to the constructor's lambda times the schedule at
            the start.
        schedule: progress in [0, 1] -> factor.
        total_steps: after that many steps the progress is 1, and stays. A checkpoint's replaces it.
        optimizer: whose steps count. It may be wrapped, as by accelerate or Lightning. Of two schedulers of one
            optimizer the later takes the place of the earlier where it sets all layers of that one.
        last_step: how many steps are done at the start. Where it is not given, 0, or what the optimizer has from a
            checkpoint that was loaded before.

    Attributes:
        last_step: how many steps are done.
        last_factor: what the constructors' lambda has been multiplied by.

    It is a :class:`torch.optim.lr_scheduler.LRScheduler` that leaves the learning rates alone, for the places where
    only those are taken: with ``optimizer=``, ``ChainedScheduler`` and ``SequentialLR`` take it. In the latter, lambda
    stays at the curve's start until the scheduler's turn.

    Raises:
        ValueError: no such layer is found, a layer was made with ``lambda_=0`` (nothing could multiply it), heads with
            it for all adversaries, ``total_steps`` is below 1, ``last_step`` is below 0, or the schedule gives NaN or
            an infinite number.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), grl_ext.GRL(lambda_=0.2), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters())
        >>> scheduler = grl_ext.LambdaScheduler(model, grl_ext.schedules.linear(0.0, 1.0), 4, optimizer=optimizer)
        >>> optimizer.step()
        >>> scheduler.get_last_lambda()
        [0.05]
        >>> scheduler
        LambdaScheduler(1 GRL, step 1 of 4, factor 0.25, follows SGD)
    """

    last_step: int

    def __init__(  # not the base's, which sets learning rates
        self,
        layers: nn.Module | Iterable[nn.Module],
        schedule: Schedule,
        total_steps: int,
        optimizer: Optimizer | None = None,
        last_step: int | None = None,
    ) -> None:
        if not callable(schedule):
            raise TypeError(
                "schedule must be a function of the progress, such as grl_ext.schedules.dann(), "
                f"got {type(schedule).__name__}"
            )
        _check_steps("total_steps", total_steps, 1)
        if last_step is not None:
            _check_steps("last_step", last_step, 0)
        if not isinstance(optimizer, Optimizer | None):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
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
        self.optimizer: Optimizer | None = optimizer  # type: ignore[assignment]
        self._overwritten = ""
        self._follows = False  # the optimizer's steps
        self._in_sequence = False  # a SequentialLR's
        self._moved = False
        self._calls_in_vain = 0
        self.last_step = last_step or 0
        self.last_factor = self._factor(self.last_step, total_steps)
        self._set_step(self.last_step)
        if last_step is not None:
            self._overwritten = ""
        if optimizer is not None:
            _OptimizerSteps.of(optimizer).add(self, resume=last_step is None)

    def __repr__(self) -> str:
        layers = [f"{count} {name}" for name, count in Counter(type(layer).__name__ for layer in self.layers).items()]
        position = f"step {self.last_step} of {self.total_steps}, factor {self.last_factor:.4g}"
        follows = f", follows {type(self.optimizer).__name__}" if self._follows else ""
        return f"{type(self).__name__}({', '.join(layers)}, {position}{follows})"

    def step(self, *given: object) -> None:
        """Advances by one training step and sets lambda. Takes and ignores what an optimizer gives its hooks. Does
        nothing where the scheduler was made with ``optimizer=``, whose steps alone count."""
        if self.optimizer is None:
            self._set_step(self.last_step + 1)
            self._warn_of_overwritten("load its state too: scheduler.load_state_dict(...)", stacklevel=3)
        elif not self._follows:
            if [type(value) for value in given] == [int]:  # as SequentialLR of older PyTorch begins the next one
                self._begin(*given)  # type: ignore[arg-type]
        elif not self._moved:
            self._calls_in_vain += 1
            if self._calls_in_vain == 3:  # GradScaler may leave out the first steps
                warnings.warn(
                    f"lambda does not move: the {type(self.optimizer).__name__} whose steps this LambdaScheduler "
                    "follows has made none. Give it the optimizer that the training calls",
                    stacklevel=2,
                )

    def get_last_lambda(self) -> list[float]:
        """The lambda that each of ``layers`` has now. On a GPU it waits for their values."""
        return [layer.lambda_.item() for layer in self.layers]

    def get_last_lr(self) -> list[Any]:
        """The optimizer's learning rates, as they are."""
        if self.optimizer is None:
            raise AttributeError("this LambdaScheduler has no learning rates: it was made without optimizer=")
        return [group["lr"] for group in self.optimizer.param_groups]

    get_lr = get_last_lr

    @property
    def last_epoch(self) -> int:
        """``last_step``, under the name that learning-rate schedulers have for it."""
        return self.last_step

    @last_epoch.setter
    def last_epoch(self, value: int) -> None:
        # SequentialLR takes each of its schedulers a step back, to begin it later. ignite's LRScheduler adds a step
        # each time: the optimizer's are the ones that count.
        if self.optimizer is None or value not in (self.last_step - 1, self.last_step, self.last_step + 1):
            raise AttributeError("last_epoch cannot be set: make the LambdaScheduler with last_step=")
        if value < self.last_step:
            _OptimizerSteps.of(self.optimizer).remove(self)
            self.last_step, self._in_sequence = value, True

    def _initial_step(self) -> None:
        self._begin(self.last_step + 1)

    def _update_lr(self, epoch: int | None = None) -> None:
        self._begin(self.last_step + 1 if epoch is None else epoch)

    def _begin(self, step: int) -> None:
        """At its turn in a SequentialLR."""
        assert self.optimizer is not None
        self._go_to(step, self.total_steps)
        _OptimizerSteps.of(self.optimizer).add(self)

    def _warn_of_overwritten(self, how_to_resume: str, stacklevel: int) -> None:
        if self._overwritten:
            warnings.warn(
                f"{self._overwritten} came from a checkpoint and is overwritten: this LambdaScheduler is at step "
                f"{self.last_step}. To resume, {how_to_resume}",
                stacklevel=stacklevel,
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
                if not math.isclose(loaded, self.last_factor * layer.initial_lambda, rel_tol=2**-23):
                    self._overwritten = f"the lambda_ {loaded} of a {type(layer).__name__}"
            layer._scale_lambda(factor)
        self.last_step, self.last_factor = step, factor
        self._step_count = step + 1  # what accelerate reads, and compares with total_steps

    def _go_to(self, step: int, total_steps: int) -> None:
        _check_steps("last_step", step, 0)
        _check_steps("total_steps", total_steps, 1)
        self._factor(step, total_steps)
        self.total_steps = total_steps
        self._set_step(step)
        self._overwritten = ""

    def state_dict(self) -> dict[str, Any]:
        """Where on the curve the training is. The schedule and the layers are code: make the same ones when
        resuming."""
        state: dict[str, Any] = {"last_step": self.last_step, "total_steps": self.total_steps}
        if self._in_sequence:
            state["follows"] = self._follows  # or it is the turn of another one
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the saved curve: the saved ``total_steps`` replaces the present one, and the layers are set."""
        step, total_steps = state_dict["last_step"], state_dict["total_steps"]
        if self.optimizer is None:
            self._go_to(step, total_steps)
        elif state_dict.get("follows", True):
            self._go_to(step, total_steps)
            _OptimizerSteps.of(self.optimizer).add(self)
        else:
            self.last_step, self.total_steps = step, total_steps
            _OptimizerSteps.of(self.optimizer).remove(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy follows the copy of the optimizer, which is without the hooks of its original."""
        self.__dict__.update(state)
        if self._follows:
            assert self.optimizer is not None
            _OptimizerSteps.of(self.optimizer).add(self)


class _OptimizerSteps:
    """The steps of one optimizer, and the schedulers that follow them.

    Where they stand is kept in the optimizer's first parameter group, and so in its checkpoint, which every framework
    saves and loads. As integers, because ``torch.distributed.checkpoint`` takes only numbers there.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.schedulers: list[LambdaScheduler] = []
        self.unclaimed: dict[int, tuple[int, int]] = {}  # of a checkpoint that was loaded before its scheduler was made
        self._after_load()
        for group in optimizer.param_groups:  # as learning-rate schedulers do: SequentialLR takes it as given
            if "lr" in group:
                rate = group["lr"]
                group.setdefault("initial_lr", rate.clone() if isinstance(rate, Tensor) else rate)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_load_state_dict_post_hook(self._after_load)

    @staticmethod
    def of(optimizer: Optimizer) -> "_OptimizerSteps":
        # The wrappers of accelerate and Lightning have no hooks of their own.
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = inner
        if "_lambda_steps" not in optimizer.__dict__:
            optimizer._lambda_steps = _OptimizerSteps(optimizer)  # type: ignore[attr-defined]
        steps: _OptimizerSteps = optimizer.__dict__["_lambda_steps"]
        return steps

    def add(self, scheduler: LambdaScheduler, resume: bool = False) -> None:
        """Last, since the last one to set a layer decides."""
        if scheduler not in self.schedulers:
            for other in list(self.schedulers):
                if set(other.layers) <= set(scheduler.layers):
                    self.remove(other)
            self.schedulers.append(scheduler)
            scheduler._follows = True
            saved = self.unclaimed.pop(len(self.schedulers) - 1, None)
            if resume and saved is not None:
                scheduler._go_to(*saved)
        self._write()

    def remove(self, scheduler: LambdaScheduler) -> None:
        self.schedulers = [other for other in self.schedulers if other is not scheduler]
        scheduler._follows = False
        self._write()

    def _saved(self) -> list[tuple[int, int]]:
        group, saved = self.optimizer.param_groups[0], []
        while f"lambda_step_{len(saved)}" in group:
            saved.append((group[f"lambda_step_{len(saved)}"], group[f"lambda_total_steps_{len(saved)}"]))
        return saved

    def _read(self) -> None:
        for scheduler, saved in zip(self.schedulers, self._saved(), strict=False):
            if saved != (scheduler.last_step, scheduler.total_steps):
                scheduler._go_to(*saved)

    def _write(self) -> None:
        group = self.optimizer.param_groups[0]
        for position in range(len(self._saved())):
            if position not in self.unclaimed:
                del group[f"lambda_step_{position}"], group[f"lambda_total_steps_{position}"]
        for position, scheduler in enumerate(self.schedulers):
            group[f"lambda_step_{position}"] = scheduler.last_step
            group[f"lambda_total_steps_{position}"] = scheduler.total_steps

    def _after_step(self, *_: object) -> None:
        self._read()  # an optimizer that loads without calling hooks
        for scheduler in self.schedulers:
            # A step late: torch.distributed.checkpoint makes one before it loads a new optimizer.
            scheduler._warn_of_overwritten("load the optimizer's state too, which has the step", stacklevel=4)
            scheduler._set_step(scheduler.last_step + 1)
            scheduler._moved = True
        self._write()

    def _after_load(self, *_: object) -> None:
        self._read()
        followed = len(self.schedulers)
        self.unclaimed = dict(enumerate(self._saved()[followed:], followed))
        self._write()


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
