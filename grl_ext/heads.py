"""Predictors and adversaries over the same features: modules by name, and how each of them is run."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, overload

import torch
from torch import Tensor, nn

from grl_ext import functional
from grl_ext._reference import check_tensor
from grl_ext._reference_heads import (
    HeadsOptions,
    check_ignored,
    check_options,
    check_smoothing,
    loss_of_head,
    numbers,
    total_loss,
)
from grl_ext.modules import GRL, GRLLinear, _LambdaModule

__all__ = ["AdversarialHeads", "HeadsOutput"]

Head = int | Sequence[int] | nn.Module


class HeadsOutput(NamedTuple):
    """What :class:`AdversarialHeads` returns for targets, by head name. All of it is differentiable.

    The gradients of ``loss`` are made beside it. Asking for those of ``head_losses`` or ``logits`` costs one more pass over the
    features in the backward.
    """

    loss: Tensor
    head_losses: dict[str, Tensor]
    logits: dict[str, Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# How a head is run
# ---------------------------------------------------------------------------------------------------------------------


def _own_call(module: nn.Module) -> str | None:
    """What of a module only its own call would honour; None if its forward may be computed elsewhere."""
    if "forward" in module.__dict__:
        return "its forward was replaced"
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return "it has hooks" if hooks else None


def _why_not_linear(module: nn.Module) -> str | None:
    """Why a module is not run as a plain linear layer; None if it is."""
    # Parametrised layers (weight norm, spectral norm, pruning, LoRA of torch.nn.utils.parametrize) keep this forward.
    if getattr(type(module), "forward", None) is not nn.Linear.forward:
        return f"{type(module).__name__} is not nn.Linear"
    return _own_call(module)


def _begins_linear(module: nn.Module) -> bool:
    while isinstance(module, nn.Sequential) and len(module):
        module = module[0]
    return isinstance(module, nn.Linear)


class _Path(NamedTuple):
    """How a head is run: its name in the repr, with the reason, and the linear layers that are computed together."""

    how: str
    why: str
    layers: tuple[nn.Module, ...] = ()
    rest: tuple[nn.Module, ...] = ()


def _path_of(module: nn.Module) -> _Path:
    why = _why_not_linear(module)
    if why is None:
        return _Path("fused", "linear", (module,))
    if type(module) is not nn.Sequential:
        return _Path("as given", why)
    if why := _own_call(module):
        return _Path("as given", why)
    parts = tuple(module)
    if not parts or (why := _why_not_linear(parts[0])):
        return _Path("as given", f"its first layer: {why}" if parts else "empty")
    if len(parts) % 2 == 1 and all(_why_not_linear(part) is None for part in parts[::2]):
        if all(type(part) is nn.ReLU and _own_call(part) is None for part in parts[1::2]):
            return _Path("fused", "linear layers with ReLU", parts[::2], parts[1:])
    return _Path("first layer fused", "begins with a linear layer", parts[:1], parts[1:])


# ---------------------------------------------------------------------------------------------------------------------
# The module
# ---------------------------------------------------------------------------------------------------------------------


class AdversarialHeads(_LambdaModule):
    r"""Predictors and adversaries over the same features. Each is a module of its own; an adversary's gradient is reversed.

    A head is given as a size (an ``nn.Linear``), as a sequence of sizes (linear layers with ReLU between them), or as any module,
    which is used as it is. How it is run shows in the repr:

    ===================  ==============================================  =====================================================
    how                  which                                           what happens
    ===================  ==============================================  =====================================================
    fused                an ``nn.Linear``; an ``nn.Sequential`` of       linear heads: one pass over the features for logits,
                         them with ReLU between                          losses and gradients. Several layers: one node, in
                                                                         matrix products; the last one with its loss
    first layer fused    any other ``nn.Sequential`` that begins with    the first layers of these heads together, the rest as it
                         an ``nn.Linear``                                is
    as given             any other module, and one with hooks            behind the reversal, layer by layer
    ===================  ==============================================  =====================================================

    The result is the same. Parametrised layers (weight norm, spectral norm) are fused; what works by hooks (pruning, the old weight
    norm, accelerate) or by another class (LoRA wrappers, quantisation) runs as given.

    Args:
        in_features: D, the features' size.
        predictors, adversaries: heads by name, such as ``{"digit": 10}``, ``{"domain": [100, 1]}``, ``{"speaker": module}``. Size 1
            is a binary head with one logit, or a value for a squared error. A given adversary must not reverse the gradient
            itself.
        bias: whether the linear layers made here have one.
        lambda_: one finite number for all adversaries, or one by name. Kept in a float64 buffer ``(number of adversaries,)``
            with the rules of :class:`GRL`'s; assign a number, or numbers by name, to change it:
            ``heads.lambda_ = 0.3``, ``heads.lambda_ = {"domain": 0.3}``.
        losses: ``"cross_entropy"`` (the default; binary for size 1) or ``"mse"`` by name.
        dim: which dimension of the features holds them; 1 for maps ``(N, C, H, W)``. Logits have theirs in the same place. Maps in
            ``channels_last`` memory are read as they are; others are copied. A module that does not begin with an ``nn.Linear``
            gets the features as they are.
        device, dtype: of the linear layers made here.

    Attributes:
        predictors, adversaries: ``nn.ModuleDict`` of the heads.

    ``heads(features)`` gives the logits by name, ``(..., size)`` each; any loss may follow.

    ``heads(features, targets, ...)`` gives a :class:`HeadsOutput`. The options are those of :func:`grl_ext.heads_loss`, one for all
    heads or by name:

        targets: by head name. A head left out takes no part: no loss, and the ``.grad`` of its parameters stays as it is.
        sample_weight: ``(...)``, for all heads or by name.
        class_weight: ``(classes,)`` by name.
        loss_weight: a number for all heads, or numbers by name; 1 for those not named.
        label_smoothing, ignore_index: for all heads or by name.
        reduction: ``"mean"`` or ``"sum"``.

    Raises:
        ValueError, TypeError: no head at all, a size below 1, a name used twice, an unknown name, a reversal inside a given
            adversary, or the input checks of :func:`grl_ext.heads_loss`.

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
        lambda_: float | Mapping[str, float] = 1.0,
        losses: Mapping[str, str] | None = None,
        dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        predictors, adversaries = dict(predictors or {}), dict(adversaries or {})
        if not predictors and not adversaries:
            raise ValueError("predictors and adversaries are both empty: at least one head is needed")
        if shared := predictors.keys() & adversaries.keys():
            raise ValueError(f"head names must differ, got {sorted(shared)} among both predictors and adversaries")
        self.in_features = in_features
        self.dim = dim

        def modules(kind: str, given: Mapping[str, Head]) -> nn.ModuleDict:
            made = {name: _module_of(f"{kind}[{name!r}]", head, in_features, bias, device, dtype) for name, head in given.items()}
            return nn.ModuleDict(made)

        self.predictors = modules("predictors", predictors)
        self.adversaries = modules("adversaries", adversaries)
        for name, module in self.adversaries.items():
            if reversal := next((part for part in module.modules() if isinstance(part, GRL | GRLLinear)), None):
                raise ValueError(
                    f"adversaries[{name!r}] contains a {type(reversal).__name__}, but AdversarialHeads reverses the adversaries' "
                    "gradients itself: leave the GRL out, or use a plain nn.Linear"
                )
        self._check_names("losses", losses or {})
        self.losses = {name: (losses or {}).get(name, "cross_entropy") for name in self.head_names}
        self._kinds = {name: functional.kind_of(f"losses[{name!r}]", loss) for name, loss in self.losses.items()}
        self._register_lambda(torch.ones(len(adversaries), dtype=torch.float64), device)
        self._set_lambda(lambda_)

    if TYPE_CHECKING:

        @overload
        def __call__(self, features: Tensor) -> dict[str, Tensor]: ...

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
        ) -> HeadsOutput: ...

        def __call__(self, features, targets=None, **options): ...

    @property
    def head_names(self) -> tuple[str, ...]:
        """Predictors first."""
        return (*self.predictors, *self.adversaries)

    def _heads(self) -> Iterator[tuple[str, nn.Module, int]]:
        """(name, module, its number in lambda_ or -1)"""
        for name, module in self.predictors._modules.items():
            yield name, module, -1
        for index, (name, module) in enumerate(self.adversaries._modules.items()):
            yield name, module, index

    def _set_lambda(self, value) -> None:
        if not isinstance(value, Mapping):
            super()._set_lambda(value)
            return
        if unknown := value.keys() - self.adversaries.keys():
            raise ValueError(f"lambda_ names {sorted(unknown)}, but the adversaries are {list(self.adversaries)}")
        with _Named(list(value)):
            given = dict(zip(value, numbers("lambda_", list(value.values())).unbind(), strict=True)) if value else {}
        with torch.no_grad():
            for i, name in enumerate(self.adversaries):
                if name in given:
                    self.lambda_[i].copy_(given[name])

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
    ) -> dict[str, Tensor] | HeadsOutput:
        check_tensor("features", features)
        if targets is None:
            return self._logits(features)
        self._check_names("targets", targets)
        if not targets:
            raise ValueError(f"targets is empty; the heads are {list(self.head_names)}")
        heads = [head for head in self._heads() if head[0] in targets]
        names = [name for name, *_ in heads]
        options = HeadsOptions(
            self._per_head("sample_weight", sample_weight, names, None),
            self._per_head("class_weight", class_weight, names, None),
            self._loss_weight(loss_weight, names),
            [self._kinds[name] for name in names] if any(self._kinds[name] for name in names) else None,
            self._smoothing(label_smoothing, names),
            self._ignored(ignore_index, names),
            functional.check_reduction(reduction),
        )
        if self.dim not in (-1, features.dim() - 1):
            targets = {
                name: target.movedim(self.dim, -1) if isinstance(target, Tensor) and target.dim() == features.dim() else target
                for name, target in targets.items()
            }
        return self._loss(features, heads, [targets[name] for name in names], options)

    # -- logits ---------------------------------------------------------------------------------------------------

    def _logits(self, features: Tensor) -> dict[str, Tensor]:
        heads = list(self._heads())
        paths = [_path_of(module) for _, module, _ in heads]
        return self._run(features, heads, paths)

    def _run(self, features: Tensor, heads: Sequence[tuple[str, nn.Module, int]], paths: Sequence[_Path]) -> dict[str, Tensor]:
        """The logits by name: the first linear layers together, and what follows them; other modules behind the reversal."""
        lambda_ = self._buffers["lambda_"]
        joined = [(head, path) for head, path in zip(heads, paths, strict=True) if path.layers]
        first: dict[str, Tensor] = {}
        if joined:
            layers = [path.layers[0] for _, path in joined]
            names = [name for (name, *_), _ in joined]
            with _Named(names, names):
                outputs = functional.run_linear_heads(
                    self._last(features),
                    [layer.weight for layer in layers],
                    [layer.bias for layer in layers],
                    lambda_,
                    [index for (*_, index), _ in joined],
                )
            for ((name, *_), path), output in zip(joined, outputs, strict=True):
                for part in path.rest:
                    output = part(output)
                first[name] = self._back(output, features)
        result = {}
        for name, module, index in heads:
            if name in first:
                result[name] = first[name]
                continue
            seen = features if index < 0 else functional.gradient_reversal(features, lambda_[index])
            # A linear layer takes its features from the last dimension, however it is run.
            result[name] = self._back(module(self._last(seen)), features) if _begins_linear(module) else module(seen)
        return result

    def _last(self, features: Tensor) -> Tensor:
        return features if self.dim in (-1, features.dim() - 1) else features.movedim(self.dim, -1)

    def _back(self, logits: Tensor, features: Tensor) -> Tensor:
        """Logits of a head that took `_last(features)`, with their dimension in the features' place."""
        moved = self.dim not in (-1, features.dim() - 1) and logits.dim() == features.dim()
        return logits.movedim(-1, self.dim) if moved else logits

    # -- loss -----------------------------------------------------------------------------------------------------

    def _loss(
        self, features: Tensor, heads: Sequence[tuple[str, nn.Module, int]], targets: Sequence[Tensor], options: HeadsOptions
    ) -> HeadsOutput:
        paths = [_path_of(module) for _, module, _ in heads]
        names = [name for name, *_ in heads]
        fused = [i for i, path in enumerate(paths) if path.how == "fused"]
        if len(fused) == len(heads):
            loss, head_losses, logits = self._fused_loss(features, heads, paths, targets, options)
            return HeadsOutput(loss, dict(zip(names, head_losses, strict=True)), dict(zip(names, logits, strict=True)))

        options = options.filled(len(heads))
        losses: dict[str, Tensor] = {}
        logits: dict[str, Tensor] = {}
        total: list[Tensor] = []
        if fused:
            loss, *by_head = self._fused_loss(
                features, [heads[i] for i in fused], [paths[i] for i in fused], [targets[i] for i in fused], _some(options, fused)
            )
            total.append(loss)
            for i, own_loss, own_logits in zip(fused, *by_head, strict=True):
                losses[names[i]], logits[names[i]] = own_loss, own_logits
        others = [i for i in range(len(heads)) if i not in fused]
        outputs = self._run(features, [heads[i] for i in others], [paths[i] for i in others])
        rows = [self._last(z) if z.dim() == features.dim() else z for z in outputs.values()]
        own, own_targets = _some(options, others), [targets[i] for i in others]
        with _Named([names[i] for i in others]):
            for h, z in enumerate(rows):
                check_tensor(f"targets[{h}]", own_targets[h])
                check_options(z, [z.shape[-1]], own_targets[h : h + 1], _some(own, [h]), first=h)
            own_losses = [loss_of_head(z, own_targets, own, h) for h, z in enumerate(rows)]
        total.append(total_loss(own_losses, own.loss_weight))
        losses |= dict(zip(outputs, own_losses, strict=True))
        logits |= outputs
        return HeadsOutput(sum(total), {name: losses[name] for name in names}, {name: logits[name] for name in names})

    def _fused_loss(
        self,
        features: Tensor,
        heads: Sequence[tuple[str, nn.Module, int]],
        paths: Sequence[_Path],
        targets: Sequence[Tensor],
        options: HeadsOptions,
    ) -> functional.HeadsLoss:
        layers = [layer for path in paths for layer in path.layers]
        depth = None if len(layers) == len(heads) else [len(path.layers) for path in paths]
        names = [name for name, *_ in heads]
        with _Named(names, [name for name, path in zip(names, paths, strict=True) for _ in path.layers]):
            loss, head_losses, logits = functional.run_heads_loss(
                self._last(features),
                [layer.weight for layer in layers],
                [layer.bias for layer in layers],
                depth,
                targets,
                self._buffers["lambda_"],
                [index for *_, index in heads],
                options,
            )
        return functional.HeadsLoss(loss, head_losses, [self._back(z, features) for z in logits])

    # -- options --------------------------------------------------------------------------------------------------

    def _per_head(self, option: str, given, names: Sequence[str], otherwise) -> list | None:
        """One for all or by name, as a list for the heads `names`."""
        if given is None:
            return None
        if not isinstance(given, Mapping):
            return [given] * len(names)
        self._check_names(option, given)
        return [given.get(name, otherwise) for name in names]

    def _loss_weight(self, given, names: Sequence[str]) -> Tensor | None:
        values = self._per_head("loss_weight", given, names, 1.0)
        if values is None:
            return None
        with _Named(names):
            return numbers("loss_weight", values)

    def _smoothing(self, given: float | Mapping[str, float], names: Sequence[str]) -> list[float] | None:
        if isinstance(given, Mapping):
            values = self._per_head("label_smoothing", given, names, 0.0)
        elif given == 0:
            return None
        else:
            values = [0.0 if self.losses[name] == "mse" else given for name in names]  # for all that have one
        with _Named(names):
            return check_smoothing(values)

    def _ignored(self, given: int | Mapping[str, int], names: Sequence[str]) -> list[int] | None:
        if given == -100:
            return None
        with _Named(names):
            return check_ignored(self._per_head("ignore_index", given, names, -100))

    def _check_names(self, what: str, given: Mapping[str, object]) -> None:
        if unknown := [name for name in given if name not in self.predictors and name not in self.adversaries]:
            raise ValueError(f"{what} names {unknown}, but the heads are {list(self.head_names)}")

    def extra_repr(self) -> str:
        lambdas = "meta" if self.lambda_.is_meta else dict(zip(self.adversaries, self.lambda_.tolist(), strict=True))
        paths = {name: _path_of(module) for name, module, _ in self._heads()}
        lines = [f"in_features={self.in_features}, lambda_={lambdas}" + (f", dim={self.dim}" if self.dim != -1 else "")]
        if squared := [name for name, loss in self.losses.items() if loss == "mse"]:
            lines[0] += f", mse={squared}"
        return "\n".join(lines + [f"({name}) {path.how}: {path.why}" for name, path in paths.items()])


class _Named:
    """Puts the heads' names in place of their numbers in errors; `layers` are the names of the layers' heads."""

    _PLACE = re.compile(r"\b(lambda_|weight|bias|targets|sample_weight|class_weight|loss_weight|label_smoothing|ignore_index)\[(\d+)\]")

    def __init__(self, names: Sequence[str], layers: Sequence[str] = ()) -> None:
        self.names, self.layers = names, layers

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, TypeError | ValueError | IndexError) and self._PLACE.search(str(error)):
            raise type(error)(self._PLACE.sub(self._name, str(error))) from None

    def _name(self, match: re.Match) -> str:
        names = self.layers if match[1] in ("weight", "bias") else self.names
        return f"{match[1]}[{names[int(match[2])]!r}]"


def _some(options: HeadsOptions, heads: Sequence[int]) -> HeadsOptions:
    """The options of some heads; all lists filled."""

    def some(values):
        return [values[h] for h in heads]

    sample_weight, class_weight, loss_weight, kind, label_smoothing, ignore_index, mean = options
    return HeadsOptions(
        some(sample_weight),
        some(class_weight),
        None if loss_weight is None else loss_weight[list(heads)],
        some(kind),
        some(label_smoothing),
        some(ignore_index),
        mean,
    )


def _module_of(name: str, head: Head, in_features: int, bias: bool, device, dtype) -> nn.Module:
    if isinstance(head, nn.Module):
        first = head[0] if isinstance(head, nn.Sequential) and len(head) else head
        if _why_not_linear(first) is None and first.in_features != in_features:
            raise ValueError(f"{name} takes {first.in_features} features, but in_features is {in_features}")
        return head
    sizes = [head] if isinstance(head, int) else head
    valid = isinstance(sizes, Sequence) and not isinstance(sizes, str) and len(sizes) > 0
    if not valid or not all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in sizes):
        raise ValueError(f"{name} must be a size of at least 1, a sequence of such sizes, or a module, got {head!r}")
    layers: list[nn.Module] = []
    for size in sizes:
        layers += [nn.Linear(in_features, size, bias, device=device, dtype=dtype), nn.ReLU()]
        in_features = size
    return layers[0] if len(sizes) == 1 else nn.Sequential(*layers[:-1])
