"""Predictors and adversaries over the same features: modules by name, and how each of them is run."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from grl_ext import functional
from grl_ext._checks import (
    Names,
    check_lambda_number,
    check_loss,
    check_mapping,
    check_numbers,
    check_reduction,
    check_tensor,
    from_array,
    kind_of,
)
from grl_ext._head_paths import (
    HeadPath,
    begins_linear,
    check_logits,
    check_reversal,
    check_reversal_in_call,
    lambda_of,
    layers_of,
    linear_layers,
    path_of,
    reverse,
    weights_and_biases,
    why_not_plain,
    with_lambda,
)
from grl_ext._options import (
    CROSS_ENTROPY,
    DEFAULTS,
    SQUARED_ERROR,
    HeadsOptions,
    Kind,
    LossOfRows,
    is_by_logits,
    is_own,
)
from grl_ext._plain import LossAndLogits, add_losses, loss_of_logits
from grl_ext.modules import GRL

__all__ = ["AdversarialHeads", "HeadsOutput"]

Head = int | Sequence[int] | nn.Module
Loss = str | LossOfRows
Lambda = Tensor | float | Mapping[str, Tensor | float]


class HeadsOutput(NamedTuple):
    """What :class:`AdversarialHeads` returns for targets, by head name. All of it is differentiable.

    The gradients of ``loss`` are made beside it. Asking for those of ``head_losses`` or ``logits`` costs one more pass
    over the features in the backward. With ``reduction="none"`` each loss has the rows' shape ``(...)``.
    """

    loss: Tensor
    head_losses: dict[str, Tensor]
    logits: dict[str, Tensor]


class _Adversaries(nn.ModuleDict):
    """An adversary has its reversal under the same name: it is not added without one, nor taken out alone."""

    def __init__(
        self, modules: Mapping[str, nn.Module], reversals: nn.ModuleDict, allow_reversal: bool | Collection[str]
    ) -> None:
        super().__init__()
        self.__dict__["_reversals"] = reversals  # not a child: the heads hold it under a name of its own
        # Adversaries in which what looks like a reversal is none; a dict, because Dynamo knows those best.
        self._allowed = dict.fromkeys(modules if allow_reversal is True else allow_reversal or ())
        self.update(modules)

    def __setitem__(self, name: str, module: nn.Module) -> None:
        if name not in self._reversals:
            raise ValueError(_no_reversal(name))
        if name not in self._allowed:
            check_reversal(name, module)
        super().__setitem__(name, module)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._forget(name)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self._forget(name)

    def _forget(self, name: str) -> None:
        self._reversals._modules.pop(name, None)
        self._allowed.pop(name, None)

    def clear(self) -> None:
        super().clear()
        self._reversals.clear()
        self._allowed.clear()

    def _get_name(self) -> str:  # in the repr
        return "ModuleDict"


def _no_reversal(name: str) -> str:
    add = f"heads.add_adversary({name!r}, module, lambda_=...)"
    return f"adversaries[{name!r}] has no lambda_: add an adversary with {add}"


class AdversarialHeads(nn.Module):
    r"""Predictors and adversaries over the same features: modules by name. An adversary's gradient is reversed.

    A head is given as a size (an ``nn.Linear``), as a sequence of sizes (linear layers with ReLU between them), or as
    any module, which is used as it is. How it is run shows in the repr:

    ==========================  ========================================  ============================================
    how                         which                                     what happens
    ==========================  ========================================  ============================================
    fused                       an ``nn.Linear``; an ``nn.Sequential``    linear heads: one pass over the features for
                                of them with ReLU between                 logits, losses and gradients. Several layers:
                                                                          matrix products, the hidden ones in one
                                                                          node, the last one with its loss
    first and last layer fused  any other ``nn.Sequential`` that begins   the first layers of these heads together, each
    (or one of the two)         or ends with an ``nn.Linear``             last one with its loss, the rest as it is
    as given                    any other module, and one with hooks      behind the reversal, layer by layer
    ==========================  ========================================  ============================================

    The result is the same. A subclass of ``nn.Sequential`` that keeps its forward counts as one. Parametrised layers
    (weight norm, spectral norm) are fused; what works by hooks (pruning, the old weight norm, accelerate) or by another
    class (LoRA wrappers, quantisation) runs as given.

    Heads give logits. One that ends in a sigmoid or a softmax would have a wrong loss: leave that layer out.

    Args:
        in_features: D, the features' size.
        predictors, adversaries: heads by name, such as ``{"digit": 10}``, ``{"domain": [100, 1]}``, ``{"speaker":
            module}``. Size 1 is a binary head with one logit, or a value for a squared error. A given adversary must
            not reverse the gradient itself: leave its reversal out. One that a name gives away is refused (a layer
            ``RevGrad``, a ``grad_reverse`` that the forward calls); :func:`grl_ext.testing.reverses` finds others.
        bias: whether the linear layers made here have one.
        lambda_: one finite number for all adversaries, or one by name. Each adversary has its own in a :class:`GRL`
            under its name, ``heads.reversals["domain"]``, with that layer's rules. ``heads.lambda_`` reads them by
            name; assign a number, or numbers by name, to change them: ``heads.lambda_ = 0.3``,
            ``heads.lambda_ = {"domain": 0.3}``.
        losses: by name ``"cross_entropy"`` (the default; binary for size 1), ``"mse"``, ``"bce"`` (several labels at
            once, each 0 or 1), or a function of logits and targets that gives a loss for each row.
        dim: which dimension of the features holds them; 1 for maps ``(N, C, H, W)``. Logits have theirs in the same
            place. Maps in ``channels_last`` memory are read as they are; others are copied. A module that does not
            begin with an ``nn.Linear`` gets the features as they are.
        allow_reversal: True, or names of adversaries: takes them although they seem to reverse the gradient themselves.
        device, dtype: of the linear layers made here.

    Attributes:
        predictors, adversaries: ``nn.ModuleDict`` of the heads. Heads may be replaced and taken out, and predictors
            added: ``heads.predictors["age"] = module``, ``del heads.adversaries["domain"]``. An adversary is added with
            its lambda by :meth:`add_adversary`.
        reversals: ``nn.ModuleDict`` of the adversaries' :class:`GRL`.
        losses: each head's loss by name; may be changed.

    ``heads(features)`` gives the logits by name, ``(..., size)`` each; any loss may follow.

    ``heads(features, targets, ...)`` gives a :class:`HeadsOutput`. The options are those of :func:`grl_ext.heads_loss`,
    one for all heads or by name:

    - ``targets``: by head name. A head left out has no loss, and the ``.grad`` of its parameters stays as it is.
    - ``sample_weight``: ``(...)``, for all heads or by name; by name also ``(..., size)`` for ``"mse"`` and ``"bce"``.
    - ``class_weight``: ``(classes,)`` by name.
    - ``loss_weight``: a number for all heads, or numbers by name; 1 for those not named.
    - ``label_smoothing``, ``ignore_index``: for all heads or by name.
    - ``reduction``: ``"mean"``, ``"sum"`` or ``"none"``.

    Both also take, for this call only:

    - ``lambda_``: in place of the adversaries' own, a number for all, or numbers by name.
    - ``inputs``: by name, keyword arguments for that head's module: ``inputs={"speaker": {"lengths": lengths}}``. The
      module then runs as given. What an adversary sends back to tensors among them is reversed too.

    Raises:
        ValueError, TypeError: no head at all, a size below 1, a name used twice or that ``nn.ModuleDict`` refuses
            ("type", "keys", one with a dot), an unknown name, a reversal inside a given adversary, or the input checks
            of :func:`grl_ext.heads_loss`.

    Example:
        >>> heads = grl_ext.AdversarialHeads(8, predictors={"digit": 10}, adversaries={"domain": [16, 1]}, lambda_=0.3)
        >>> features = torch.randn(4, 8, requires_grad=True)
        >>> out = heads(features, {"digit": torch.tensor([3, 1, 4, 1]), "domain": torch.tensor([0, 0, 1, 1])})
        >>> out.loss.backward()
        >>> out.logits["digit"].shape
        torch.Size([4, 10])
        >>> optimizer = torch.optim.Adam([{"params": heads.predictors.parameters()},
        ...                               {"params": heads.adversaries.parameters(), "lr": 1e-2}], lr=1e-3)
    """

    def __init__(
        self,
        in_features: int,
        predictors: Mapping[str, Head] | None = None,
        adversaries: Mapping[str, Head] | None = None,
        *,
        bias: bool = True,
        lambda_: Tensor | float | Mapping[str, Tensor | float] = 1.0,
        losses: Mapping[str, Loss] | None = None,
        dim: int = -1,
        allow_reversal: bool | Collection[str] = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        predictors, adversaries = _by_name("predictors", predictors), _by_name("adversaries", adversaries)
        if not predictors and not adversaries:
            raise ValueError("predictors and adversaries are both empty: at least one head is needed")
        if shared := predictors.keys() & adversaries.keys():
            raise ValueError(_shared(sorted(shared)))
        if not isinstance(dim, int):
            raise TypeError(f"dim must be an integer, got {type(dim).__name__}")
        self.in_features = in_features
        self.dim = dim
        made = {"in_features": in_features, "bias": bias, "device": device, "dtype": dtype}
        self.predictors = nn.ModuleDict(
            {name: _module_of("predictors", name, head, **made) for name, head in predictors.items()}
        )
        modules = {name: _module_of("adversaries", name, head, **made) for name, head in adversaries.items()}
        if isinstance(lambda_, Mapping):
            _check_known("lambda_", lambda_, adversaries, "adversaries")
            lambdas = {name: check_lambda_number(f"lambda_[{name!r}]", lambda_.get(name, 1.0)) for name in adversaries}
        else:
            lambdas = dict.fromkeys(adversaries, check_lambda_number("lambda_", lambda_))
        self.reversals = nn.ModuleDict({name: _reversal(value, device) for name, value in lambdas.items()})
        if not isinstance(allow_reversal, bool):
            _check_known("allow_reversal", allow_reversal, adversaries, "adversaries")
        self.adversaries = _Adversaries(modules, self.reversals, allow_reversal)
        self.losses: dict[str, Loss] = dict.fromkeys((*predictors, *adversaries), "cross_entropy")
        _check_known("losses", losses or {}, self.losses, "heads")
        self.losses.update(losses or {})
        for name, loss in self.losses.items():
            kind_of(f"losses[{name!r}]", loss)

    if TYPE_CHECKING:

        @overload
        def __call__(
            self,
            features: Tensor,
            *,
            lambda_: Lambda | None = None,
            inputs: Mapping[str, Mapping[str, Any]] | None = None,
        ) -> dict[str, Tensor]: ...

        @overload
        def __call__(
            self,
            features: Tensor,
            targets: Mapping[str, Tensor],
            *,
            sample_weight: Tensor | Mapping[str, Tensor] | None = None,
            class_weight: Mapping[str, Tensor] | None = None,
            loss_weight: float | Mapping[str, float] | None = None,
            label_smoothing: float | Mapping[str, float] = 0.0,
            ignore_index: int | Mapping[str, int] = -100,
            reduction: str = "mean",
            lambda_: Lambda | None = None,
            inputs: Mapping[str, Mapping[str, Any]] | None = None,
        ) -> HeadsOutput: ...

        def __call__(self, features, targets=None, **options): ...

    @property
    def head_names(self) -> tuple[str, ...]:
        """Predictors first."""
        return (*self.predictors, *self.adversaries)

    def add_adversary(
        self,
        name: str,
        head: Head,
        lambda_: Tensor | float = 1.0,
        *,
        loss: Loss = "cross_entropy",
        bias: bool = True,
        allow_reversal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Adds an adversary, or replaces one with its lambda. All arguments are those of the constructor, for one head.

        Its parameters are new: give them to the optimizer.

        Raises:
            ValueError, TypeError: as the constructor.

        Example:
            >>> heads = grl_ext.AdversarialHeads(8, {"digit": 10}, {"site": 2})
            >>> heads.add_adversary("new_site", [16, 3], lambda_=0.1)
            >>> heads.lambda_["new_site"].item()
            0.1
        """
        module = _module_of("adversaries", name, head, self.in_features, bias, device, dtype)
        if name in self.predictors:
            raise ValueError(_shared([name]))
        if not allow_reversal:
            check_reversal(name, module)
        kind_of(f"losses[{name!r}]", loss)
        self.reversals[name] = _reversal(check_lambda_number("lambda_", lambda_), device)
        self.adversaries._allowed.pop(name, None)
        if allow_reversal:
            self.adversaries._allowed[name] = None
        self.adversaries[name] = module
        self.losses[name] = loss

    @property
    def lambda_(self) -> dict[str, Tensor]:
        """Each adversary's lambda, the 0-d buffer of its reversal."""
        return {name: layers_of(self._reversal_of(name))[-1].lambda_ for name in self.adversaries}

    @lambda_.setter
    def lambda_(self, value: Tensor | float | Mapping[str, Tensor | float]) -> None:
        if isinstance(value, Mapping):
            _check_known("lambda_", value, self.adversaries, "adversaries")
            numbers = {name: check_lambda_number(f"lambda_[{name!r}]", number) for name, number in value.items()}
        else:
            numbers = dict.fromkeys(self.adversaries, check_lambda_number("lambda_", value))
        for name, number in numbers.items():
            for layer in layers_of(self._reversal_of(name)):
                layer.lambda_ = number

    def _reversal_of(self, name: str) -> nn.Module:
        """A GRL, or a wrapper of one, such as peft's for modules to be saved."""
        reversal = self._modules["reversals"]._modules.get(name)
        if reversal is None:
            raise ValueError(_no_reversal(name))
        if not isinstance(reversal, GRL) and not layers_of(reversal):
            raise TypeError(f"reversals[{name!r}] must be a GRL, got {type(reversal).__name__}")
        return reversal

    def _heads(
        self,
        names: Mapping[str, object] | None = None,
        lambda_: Lambda | None = None,
        inputs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> list[HeadPath]:
        """Those with one of the names, or all; predictors first."""
        heads = []
        lambdas = {} if lambda_ is None else self._lambdas_of_call(lambda_)
        inputs = {} if inputs is None else self._checked_inputs(inputs)
        predictors = self._modules["predictors"]._modules
        for name, module in predictors.items():
            if names is None or name in names:
                heads.append(path_of(name, module, None, inputs.get(name)))
        adversaries = self._modules["adversaries"]
        for name, module in adversaries._modules.items():
            if names is None or name in names:
                if name in predictors:
                    raise ValueError(_shared([name]))
                head = path_of(name, module, self._reversal_of(name), inputs.get(name))
                heads.append(with_lambda(head, lambdas[name]) if name in lambdas else head)
                if name not in adversaries._allowed:
                    for part in head.between:
                        check_reversal_in_call(name, part)
        return heads

    def _lambdas_of_call(self, lambda_: Lambda) -> dict[str, Tensor | float]:
        if isinstance(lambda_, Mapping):
            _check_known("lambda_", lambda_, self.adversaries, "adversaries")
            return {name: check_lambda_number(f"lambda_[{name!r}]", value) for name, value in lambda_.items()}
        value = check_lambda_number("lambda_", lambda_)
        return {name: value for name in self.adversaries}  # noqa: C420 - Dynamo of torch 2.8 knows no fromkeys of these

    def _checked_inputs(self, inputs: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
        check_mapping("inputs", inputs, "keyword arguments")
        self._check_names("inputs", inputs)
        for name, given in inputs.items():
            if not isinstance(given, Mapping):
                raise TypeError(
                    f"inputs[{name!r}] must be a mapping with keyword arguments of the head's module, "
                    f"got {type(given).__name__}"
                )
        return inputs

    def forward(
        self,
        features: Tensor,
        targets: Mapping[str, Tensor] | None = None,
        *,
        sample_weight: Tensor | Mapping[str, Tensor] | None = None,
        class_weight: Mapping[str, Tensor] | None = None,
        loss_weight: float | Mapping[str, float] | None = None,
        label_smoothing: float | Mapping[str, float] = 0.0,
        ignore_index: int | Mapping[str, int] = -100,
        reduction: str = "mean",
        lambda_: Lambda | None = None,
        inputs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> dict[str, Tensor] | HeadsOutput:
        """The logits by name; with targets by name, a :class:`HeadsOutput` of losses and logits. The options are said
        in the class's docstring."""
        if isinstance(features, torch.fx.Proxy):
            given = {"lambda_": lambda_, "inputs": inputs}
            if targets is not None:
                given |= {"sample_weight": sample_weight, "class_weight": class_weight, "loss_weight": loss_weight}
                given |= {"label_smoothing": label_smoothing, "ignore_index": ignore_index, "reduction": reduction}
            return self._symbolic(features, targets, given)
        check_tensor("features", features)
        if self.dim != -1 and not -features.dim() <= self.dim < features.dim():
            raise ValueError(f"dim is {self.dim}, but features have shape {list(features.shape)}")
        if targets is None:
            return self._logits(features, self._heads(None, lambda_, inputs))
        if type(targets) is not dict:
            check_mapping("targets", targets, "tensors")
        heads = self._heads(targets, lambda_, inputs)
        names = [head.name for head in heads]
        if len(heads) != len(targets):
            self._check_names("targets", targets)
        if not heads:
            raise ValueError(f"targets is empty; the heads are {list(self.head_names)}")
        given = [targets[name] for name in names]
        if self.dim != -1:
            given = self._all_last(given, features)
        kind = self._kinds(names)
        smoothed = type(label_smoothing) is not float or label_smoothing != 0
        plain = sample_weight is class_weight is loss_weight is kind is None and reduction == "mean" and not smoothed
        if plain and type(ignore_index) is int and ignore_index == -100:
            options = DEFAULTS
        else:
            options = HeadsOptions(
                self._all_last(self._per_head("sample_weight", sample_weight, names, None), features),
                self._per_head("class_weight", class_weight, names, None),
                self._per_head("loss_weight", loss_weight, names, 1.0),
                kind,
                self._smoothing(label_smoothing, names, kind) if smoothed else None,
                self._per_head("ignore_index", ignore_index, names, -100),
                check_reduction(reduction),
            )
            check_numbers(options, Names("features", names))
        loss, head_losses, logits = self._losses(features, heads, given, options, Names("features", names))
        # As many as there are names. zip's `strict` would take twice the time of the rest, in steps of 50 us.
        return HeadsOutput(loss, dict(zip(names, head_losses)), dict(zip(names, logits)))  # noqa: B905

    # -- logits -------------------------------------------------------------------------------------------------------

    def _logits(self, features: Tensor, heads: Sequence[HeadPath]) -> dict[str, Tensor]:
        logits = {}
        for head, before_last in zip(heads, self._before_last(features, heads), strict=True):
            z = before_last.pop() if head.last is None else head.last(before_last.pop())
            logits[head.name] = self._checked(head, self._back(z, features) if self._is_by_last(head) else z)
        return logits

    def _before_last(self, features: Tensor, heads: Sequence[HeadPath]) -> list[list[Tensor]]:
        """What each head's last layer takes, or its logits where that is none of the head's parts.

        Each in a list of its own, from which it is taken, so that nothing is kept longer than autograd needs it.
        """
        outputs: list[list[Tensor]] = [[] for _ in heads]
        if joined := [h for h, head in enumerate(heads) if head.first is not None]:
            self._check_features(features)
            weights, biases = weights_and_biases([heads[h].first for h in joined])
            lambdas = [lambda_of(heads[h]) for h in joined]
            names = Names("features", [heads[h].name for h in joined])
            # A list of our own: Dynamo takes nothing out of an operator's.
            firsts = list(functional.run_linear_heads(self._last(features), weights, biases, lambdas, names))
            for h in joined:
                outputs[h].append(firsts.pop(0))
                if hidden := heads[h].hidden:
                    layers = weights_and_biases(hidden[1::2])
                    names = Names("features", [heads[h].name] * len(layers[0]))
                    outputs[h].append(functional.hidden_layers(outputs[h].pop(), *layers, names))
        for output, head in zip(outputs, heads, strict=True):
            if head.first is None:
                seen = reverse(head, features)
                # A linear layer takes its features from the last dimension, however it is run.
                output.append(self._last(seen) if self._is_by_last(head) else seen)
            if head.inputs is not None:
                output.append(head.between[0](output.pop(), **_seen_inputs(head)))
                continue
            for part in head.between:
                output.append(part(output.pop()))
        return outputs

    def _check_features(self, features: Tensor) -> None:
        if features.dim() > 0 and features.size(self.dim) != self.in_features:
            raise ValueError(
                f"features must have in_features = {self.in_features} elements in dimension {self.dim}, "
                f"got shape {list(features.shape)}"
            )

    @staticmethod
    def _is_by_last(head: HeadPath) -> bool:
        """Whether the head takes its features from the last dimension."""
        return head.first is not None or (len(head.between) > 0 and begins_linear(head.between[0]))

    @staticmethod
    def _checked(head: HeadPath, logits: object) -> Tensor:
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"a head must return one tensor, its logits; {head.name!r} returned {type(logits).__name__}"
            )
        return logits

    def _is_moved(self, features: Tensor) -> bool:
        return self.dim != -1 and self.dim != features.dim() - 1

    def _last(self, features: Tensor) -> Tensor:
        return features.movedim(self.dim, -1) if self._is_moved(features) else features

    def _all_last(self, tensors: list | None, features: Tensor) -> list | None:
        """The same for what stands beside logits, such as their targets; what has a number for each row stays."""
        if tensors is None or not self._is_moved(features):
            return tensors
        rank = features.dim()
        return [t.movedim(self.dim, -1) if isinstance(t, Tensor) and t.dim() == rank else t for t in tensors]

    def _back(self, logits: Tensor, features: Tensor) -> Tensor:
        """Logits of a head that took `_last(features)`, with their dimension in the features' place."""
        moved = self._is_moved(features) and logits.dim() == features.dim()
        return logits.movedim(-1, self.dim) if moved else logits

    def _symbolic(self, features: torch.fx.Proxy, targets, options: dict[str, object]) -> torch.fx.Proxy:
        """For `torch.fx.symbolic_trace`: one call of this module in the graph, as of PyTorch's own modules."""
        try:
            name = features.tracer.path_of_module(self)
        except NameError:
            name = ""
        if not name:  # the heads are the root of the trace, or are not in it
            raise TypeError(
                "features must be a tensor: trace a module that holds the heads, which are one call in its graph"
            )
        return features.tracer.create_proxy("call_module", name, (features, targets), options)

    # -- loss ---------------------------------------------------------------------------------------------------------

    def _losses(
        self,
        features: Tensor,
        heads: Sequence[HeadPath],
        targets: Sequence[Tensor],
        options: HeadsOptions,
        names: Names,
    ) -> LossAndLogits:
        """Linear heads and those with ReLU between their layers together, then the others one by one."""
        layers = [linear_layers(head) for head in heads]
        if None not in layers:
            return self._losses_of_layers(features, heads, layers, targets, options, names)
        total: Tensor | None = None
        losses: dict[int, Tensor] = {}
        logits: dict[int, Tensor] = {}
        if fused := [h for h, own in enumerate(layers) if own is not None]:
            some = [heads[h] for h in fused], [layers[h] for h in fused], [targets[h] for h in fused]
            total, *by_head = self._losses_of_layers(features, *some, options.some(fused), names.some(fused))
            losses, logits = (dict(zip(fused, own, strict=True)) for own in by_head)
        others = [h for h in range(len(heads)) if h not in losses]
        for h, before_last in zip(others, self._before_last(features, [heads[h] for h in others]), strict=True):
            head, alone = heads[h], ([targets[h]], options.some([h]), names.some([h]))
            if head.last is None or is_by_logits(options, h) or (self.dim != -1 and not self._is_by_last(head)):
                z = before_last.pop() if head.last is None else head.last(before_last.pop())
                z = self._checked(head, z)
                loss, (losses[h],), (logits[h],) = self._loss_of_logits(features, head, z, *alone)
            else:
                weights, biases = weights_and_biases([head.last])
                loss, (losses[h],), (z,) = functional.run_heads_loss(
                    before_last.pop(), [weights], [biases], alone[0], [None], *alone[1:]
                )
                logits[h] = self._back(z, features)
            total = loss if total is None else add_losses(total, loss)
        every = range(len(heads))
        return total, [losses[h] for h in every], [logits[h] for h in every]

    def _losses_of_layers(
        self,
        features: Tensor,
        heads: Sequence[HeadPath],
        layers: Sequence[Sequence[nn.Module]],
        targets: Sequence[Tensor],
        options: HeadsOptions,
        names: Names,
    ) -> LossAndLogits:
        self._check_features(features)
        lambdas = [lambda_of(head) for head in heads]
        parameters = [weights_and_biases(own) for own in layers]
        weights, biases = [weights for weights, _ in parameters], [biases for _, biases in parameters]
        loss, losses, logits = functional.run_heads_loss(
            self._last(features), weights, biases, targets, lambdas, options, names
        )
        return loss, losses, logits if self.dim == -1 else [self._back(z, features) for z in logits]

    def _loss_of_logits(
        self,
        features: Tensor,
        head: HeadPath,
        logits: Tensor,
        targets: Sequence[Tensor],
        options: HeadsOptions,
        names: Names,
    ) -> LossAndLogits:
        """Of a head whose last layer is not computed with its loss."""
        kind = CROSS_ENTROPY if options.kind is None else options.kind[0]
        if head.last is None and not is_own(kind) and kind != SQUARED_ERROR:
            check_logits(head.name, head.between)
        by_last = self._is_by_last(head)
        if logits.dim() == 0:
            raise ValueError(f"a head must return logits (..., size) for a loss; {head.name!r} returned shape []")
        # Logits of the features' rank have theirs in the same place.
        rows = self._last(logits) if not by_last and logits.dim() == features.dim() else logits
        check_loss(rows, [rows.shape[-1]], targets, options, names)
        loss, losses, _ = loss_of_logits([rows], targets, options)
        return loss, losses, [self._back(logits, features) if by_last else logits]

    # -- options ------------------------------------------------------------------------------------------------------

    def _kinds(self, names: Sequence[str]) -> list[Kind] | None:
        losses = [self.losses.get(name, "cross_entropy") for name in names]
        if losses == ["cross_entropy"] * len(losses):
            return None
        return [kind_of(f"losses[{name!r}]", loss) for name, loss in zip(names, losses, strict=True)]

    def _per_head(self, option: str, given, names: Sequence[str], otherwise) -> list | None:
        """One for all or by name, as a list for the heads `names`."""
        if given is None and option != "ignore_index":
            return None
        if not isinstance(given, Mapping):
            return [from_array(given)] * len(names)
        self._check_names(option, given)
        return [from_array(given.get(name, otherwise)) for name in names]

    def _smoothing(self, given: float | Mapping[str, float], names: Sequence[str], kind) -> list[float] | None:
        if isinstance(given, Mapping):
            return self._per_head("label_smoothing", given, names, 0.0)
        return functional.smoothing_of_all(from_array(given), kind, len(names))

    def _check_names(self, what: str, given: Mapping[str, object]) -> None:
        if unknown := [name for name in given if name not in self.predictors and name not in self.adversaries]:
            raise ValueError(f"{what} names {unknown}, but the heads are {list(self.head_names)}")

    def extra_repr(self) -> str:
        lines = [f"in_features={self.in_features}" + (f", dim={self.dim}" if self.dim != -1 else "")]
        by_loss: dict[str, list[str]] = {}
        for name in self.head_names:
            loss = self.losses.get(name, "cross_entropy")
            shown = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
            by_loss.setdefault(shown, []).append(name)
        for loss, names in by_loss.items():
            lines[0] += f", {loss}={names}" if loss != "cross_entropy" else ""
        for name in dict.fromkeys(self.head_names):
            try:
                (head,) = self._heads({name: None})
                lines.append(f"({name}) {head.path}: {head.why}")
            except (TypeError, ValueError) as error:  # as a call would
                lines.append(f"({name}) refused: {error}")
        return "\n".join(lines)


def _shared(names: list[str]) -> str:
    return f"head names must differ, got {names} among both predictors and adversaries"


def _by_name(kind: str, heads: Mapping[str, Head] | None) -> dict[str, Head]:
    heads = {} if heads is None else heads
    if not isinstance(heads, nn.ModuleDict):
        check_mapping(kind, heads, "heads")
    return dict(heads)


def _check_known(what: str, given: Iterable[str], known, of: str) -> None:
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{what} names {unknown}, but the {of} are {list(known)}")


def _seen_inputs(head: HeadPath) -> dict[str, Any]:
    """The head's further inputs. An adversary's gradient for tensors among them is reversed as the features' is."""

    def seen(tensor: Tensor) -> Tensor:
        return reverse(head, tensor) if tensor.is_floating_point() or tensor.is_complex() else tensor

    return tree_map_only(Tensor, seen, dict(head.inputs))


def _reversal(value: Tensor | float, device) -> GRL:
    reversal = GRL(value)
    return reversal if device is None else reversal.to(device)


_EMPTY = nn.ModuleDict()


def _module_of(kind: str, name: str, head: Head, in_features: int, bias: bool, device, dtype) -> nn.Module:
    if not isinstance(name, str) or not name or "." in name or hasattr(_EMPTY, name):
        raise ValueError(f"{kind} cannot have a head named {name!r}: nn.ModuleDict takes no such name for a module")
    if isinstance(head, nn.Module):
        if getattr(head.forward, "__func__", None) is nn.Module.forward:  # as of nn.ModuleList
            raise TypeError(
                f"{kind}[{name!r}] must be a module that can be called, got {type(head).__name__}: for layers in a row "
                "use nn.Sequential"
            )
        # One with a forward of its own may give its first layer something else.
        first = head[0] if why_not_plain(head, nn.Sequential) is None and len(head) else head
        if why_not_plain(first, nn.Linear) is None and first.in_features != in_features:
            raise ValueError(f"{kind}[{name!r}] takes {first.in_features} features, but in_features is {in_features}")
        return head
    sizes = [head] if isinstance(head, int) else head
    valid = isinstance(sizes, Sequence) and not isinstance(sizes, str) and len(sizes) > 0
    if not valid or not all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in sizes):
        raise ValueError(
            f"{kind}[{name!r}] must be a size of at least 1, a sequence of such sizes, or a module, got {head!r}"
        )
    layers: list[nn.Module] = []
    for size in sizes:
        layers += [nn.Linear(in_features, size, bias, device=device, dtype=dtype), nn.ReLU()]
        in_features = size
    return layers[0] if len(sizes) == 1 else nn.Sequential(*layers[:-1])
