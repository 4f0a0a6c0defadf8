"""Predictors and adversaries over the same features: modules by name, and how each of them is run."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from grl_ext import functional
from grl_ext._head_paths import (
    ERRORS,
    HeadPath,
    begins_linear,
    named,
    path_of,
    renamed,
    weights_and_biases,
    why_not_linear,
    with_names,
)
from grl_ext._reference import check_operand, check_tensor
from grl_ext._reference_heads import (
    HeadsOptions,
    check_ignored,
    check_options,
    check_smoothing,
    loss_of_head,
    numbers,
    total_loss,
)
from grl_ext.modules import GRL, GRLLinear, _LambdaModule, _number

__all__ = ["AdversarialHeads", "HeadsOutput"]

Head = int | Sequence[int] | nn.Module
Losses = tuple[Tensor, list[Tensor], list[Tensor]]  # loss, head_losses, logits


class HeadsOutput(NamedTuple):
    """What :class:`AdversarialHeads` returns for targets, by head name. All of it is differentiable.

    The gradients of ``loss`` are made beside it. Asking for those of ``head_losses`` or ``logits`` costs one more pass
    over the features in the backward.
    """

    loss: Tensor
    head_losses: dict[str, Tensor]
    logits: dict[str, Tensor]


_DEFAULTS = HeadsOptions()  # made once, not in every step


class AdversarialHeads(_LambdaModule):
    r"""Predictors and adversaries over the same features: modules by name. An adversary's gradient is reversed.

    A head is given as a size (an ``nn.Linear``), as a sequence of sizes (linear layers with ReLU between them), or as
    any module, which is used as it is. How it is run shows in the repr:

    =================  ==========================================  ===================================================
    how                which                                       what happens
    =================  ==========================================  ===================================================
    fused              an ``nn.Linear``; an ``nn.Sequential`` of   linear heads: one pass over the features for logits,
                       them with ReLU between                      losses and gradients. Several layers: one node, in
                                                                   matrix products; the last one with its loss
    first layer fused  any other ``nn.Sequential`` that begins     the first layers of these heads together, the rest
                       with an ``nn.Linear``                       as it is
    as given           any other module, and one with hooks        behind the reversal, layer by layer
    =================  ==========================================  ===================================================

    The result is the same. Parametrised layers (weight norm, spectral norm) are fused; what works by hooks (pruning,
    the old weight norm, accelerate) or by another class (LoRA wrappers, quantisation) runs as given.

    Args:
        in_features: D, the features' size.
        predictors, adversaries: heads by name, such as ``{"digit": 10}``, ``{"domain": [100, 1]}``, ``{"speaker":
            module}``. Size 1 is a binary head with one logit, or a value for a squared error. A given adversary must
            not reverse the gradient itself.
        bias: whether the linear layers made here have one.
        lambda_: one finite number for all adversaries, or one by name. Kept in a float64 buffer ``(number of
            adversaries,)`` with the rules of :class:`GRL`'s; assign a number, or numbers by name, to change it:
            ``heads.lambda_ = 0.3``, ``heads.lambda_ = {"domain": 0.3}``.
        losses: ``"cross_entropy"`` (the default; binary for size 1) or ``"mse"`` by name.
        dim: which dimension of the features holds them; 1 for maps ``(N, C, H, W)``. Logits have theirs in the same
            place. Maps in ``channels_last`` memory are read as they are; others are copied. A module that does not
            begin with an ``nn.Linear`` gets the features as they are.
        device, dtype: of the linear layers made here.

    Attributes:
        predictors, adversaries: ``nn.ModuleDict`` of the heads.

    ``heads(features)`` gives the logits by name, ``(..., size)`` each; any loss may follow.

    ``heads(features, targets, ...)`` gives a :class:`HeadsOutput`. The options are those of :func:`grl_ext.heads_loss`,
    one for all heads or by name:

        targets: by head name. A head left out takes no part: no loss, and the ``.grad`` of its parameters stays as it
            is.
        sample_weight: ``(...)``, for all heads or by name.
        class_weight: ``(classes,)`` by name.
        loss_weight: a number for all heads, or numbers by name; 1 for those not named.
        label_smoothing, ignore_index: for all heads or by name.
        reduction: ``"mean"`` or ``"sum"``.

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
            empty = nn.ModuleDict()
            for name in given:
                if not isinstance(name, str) or not name or "." in name or hasattr(empty, name):
                    raise ValueError(
                        f"{kind} cannot have a head named {name!r}: nn.ModuleDict takes no such name for a module"
                    )
            made = {
                name: _module_of(f"{kind}[{name!r}]", head, in_features, bias, device, dtype)
                for name, head in given.items()
            }
            return nn.ModuleDict(made)

        self.predictors = modules("predictors", predictors)
        self.adversaries = modules("adversaries", adversaries)
        for name, module in self.adversaries.items():
            if reversal := next((part for part in module.modules() if isinstance(part, (GRL, GRLLinear))), None):
                raise ValueError(
                    f"adversaries[{name!r}] contains a {type(reversal).__name__}, but AdversarialHeads reverses the adversaries' "
                    "gradients itself: leave the GRL out, or use a plain nn.Linear"
                )
        self._check_names("losses", losses or {})
        self.losses = {name: (losses or {}).get(name, "cross_entropy") for name in self.head_names}
        self._kinds = {name: functional.kind_of(f"losses[{name!r}]", loss) for name, loss in self.losses.items()}
        self._squared = any(loss == "mse" for loss in self.losses.values())
        initial = dict.fromkeys(adversaries, 1.0)
        initial.update(lambda_ if isinstance(lambda_, Mapping) else dict.fromkeys(adversaries, lambda_))
        self._check_lambda_names(initial)
        text = "lambda_[{!r}]" if isinstance(lambda_, Mapping) else "lambda_"
        self._register_lambda(tuple(_number(number, text.format(name)) for name, number in initial.items()), device)

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

    def _heads(self, names: Mapping[str, object] | None = None) -> list[HeadPath]:
        """Those with one of the names, or all; predictors first."""
        hooked = ("as given", "there are hooks for all modules", (), ()) if _has_any_global_hook() else None
        heads = []
        for name, module in self._modules["predictors"]._modules.items():
            if names is None or name in names:
                heads.append(HeadPath(name, module, -1, *(hooked or path_of(module))))
        for index, (name, module) in enumerate(self._modules["adversaries"]._modules.items()):
            if names is None or name in names:
                heads.append(HeadPath(name, module, index, *(hooked or path_of(module))))
        return heads

    def _set_lambda(self, value) -> None:
        if not isinstance(value, Mapping):
            super()._set_lambda(value)
            return
        self._check_lambda_names(value)
        with renamed(list(value)):
            given = dict(zip(value, numbers("lambda_", list(value.values())).unbind(), strict=True)) if value else {}
        with torch.no_grad():
            for i, name in enumerate(self.adversaries):
                if name in given:
                    self.lambda_[i].copy_(given[name])

    def _check_lambda_names(self, value: Mapping[str, float]) -> None:
        if unknown := value.keys() - self.adversaries.keys():
            raise ValueError(f"lambda_ names {sorted(unknown)}, but the adversaries are {list(self.adversaries)}")

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
        if isinstance(features, torch.fx.Proxy):
            given = {"sample_weight": sample_weight, "class_weight": class_weight, "loss_weight": loss_weight}
            given |= {"label_smoothing": label_smoothing, "ignore_index": ignore_index, "reduction": reduction}
            return self._symbolic(features, targets, given)
        check_tensor("features", features)
        if targets is None:
            return self._logits(features, self._heads())
        if type(targets) is not dict and not isinstance(targets, Mapping):
            raise TypeError(f"targets must be a mapping from head names to tensors, got {type(targets).__name__}")
        heads = self._heads(targets)
        if len(heads) < len(targets):
            self._check_names("targets", targets)
        if not heads:
            raise ValueError(f"targets is empty; the heads are {list(self.head_names)}")
        names = [head.name for head in heads]
        given = [targets[name] for name in names]
        if self.dim != -1 and self._is_moved(features):
            given = [
                target.movedim(self.dim, -1)
                if isinstance(target, Tensor) and target.dim() == features.dim()
                else target
                for target in given
            ]
        kind = [self._kinds[name] for name in names] if self._squared else None
        plain = (
            sample_weight is class_weight is loss_weight is kind is None
            and not label_smoothing
            and ignore_index == -100
        )
        if plain and reduction == "mean":
            options = _DEFAULTS
        else:
            options = HeadsOptions(
                self._per_head("sample_weight", sample_weight, names, None),
                self._per_head("class_weight", class_weight, names, None),
                self._loss_weight(loss_weight, names) if loss_weight is not None else None,
                kind,
                self._smoothing(label_smoothing, names) if label_smoothing else None,
                None if ignore_index == -100 else self._ignored(ignore_index, names),
                functional.check_reduction(reduction),
            )
        run = self._mixed_loss if [head for head in heads if head.path != "fused"] else self._fused_loss
        loss, head_losses, logits = run(features, heads, given, options)
        # As many as there are names. zip's `strict` would take twice the time of the rest, in steps of 50 us.
        return HeadsOutput(loss, dict(zip(names, head_losses)), dict(zip(names, logits)))  # noqa: B905

    # -- logits ---------------------------------------------------------------------------------------------------

    def _logits(self, features: Tensor, heads: Sequence[HeadPath]) -> dict[str, Tensor]:
        """The first linear layers together, and what follows them; other modules behind the reversal."""
        lambda_ = self._buffers["lambda_"]
        joined = [head for head in heads if head.layers]
        logits: dict[str, Tensor] = {}
        if joined:
            weights, biases = weights_and_biases([head.layers[0] for head in joined])
            try:
                outputs = functional.run_linear_heads(
                    self._last(features), weights, biases, lambda_, [head.index for head in joined]
                )
            except ERRORS as error:
                names = [head.name for head in joined]  # one layer of each
                raise with_names(error, names, names) from None
            for head, output in zip(joined, outputs, strict=True):
                for part in head.rest:
                    output = part(output)
                logits[head.name] = self._back(output, features)
        for head in heads:
            if head.layers:
                continue
            seen = features if head.index < 0 else functional.gradient_reversal(features, lambda_[head.index])
            # A linear layer takes its features from the last dimension, however it is run.
            linear = begins_linear(head.module)
            logits[head.name] = self._back(head.module(self._last(seen)), features) if linear else head.module(seen)
        return {head.name: logits[head.name] for head in heads}

    def _is_moved(self, features: Tensor) -> bool:
        return self.dim != -1 and self.dim != features.dim() - 1

    def _last(self, features: Tensor) -> Tensor:
        return features.movedim(self.dim, -1) if self._is_moved(features) else features

    def _back(self, logits: Tensor, features: Tensor) -> Tensor:
        """Logits of a head that took `_last(features)`, with their dimension in the features' place."""
        return logits.movedim(-1, self.dim) if self._is_moved(features) and logits.dim() == features.dim() else logits

    def _symbolic(self, features: torch.fx.Proxy, targets, options: dict[str, object]) -> torch.fx.Proxy:
        """For `torch.fx.symbolic_trace`: one call of this module in the graph, as of PyTorch's own modules."""
        try:
            name = features.tracer.path_of_module(self)
        except NameError:
            raise TypeError(
                "features must be a tensor: trace a module that holds the heads, which are one call in its graph"
            ) from None
        return features.tracer.create_proxy(
            "call_module", name, (features, targets), {} if targets is None else options
        )

    # -- loss -----------------------------------------------------------------------------------------------------

    def _fused_loss(
        self, features: Tensor, heads: Sequence[HeadPath], targets: Sequence[Tensor], options: HeadsOptions
    ) -> Losses:
        layers = [layer for head in heads for layer in head.layers]
        weights, biases = weights_and_biases(layers)
        try:
            loss, head_losses, logits = functional.run_heads_loss(
                features if self.dim == -1 else self._last(features),
                weights,
                biases,
                None if len(layers) == len(heads) else [len(head.layers) for head in heads],
                targets,
                self._buffers["lambda_"],
                [head.index for head in heads],
                options,
            )
        except ERRORS as error:
            raise named(error, heads) from None
        if self.dim != -1:
            logits = [self._back(own, features) for own in logits]
        return loss, head_losses, logits

    def _mixed_loss(
        self, features: Tensor, heads: Sequence[HeadPath], targets: Sequence[Tensor], options: HeadsOptions
    ) -> Losses:
        """The fused heads by their operator, the others' losses from their logits."""
        options = options.filled(len(heads))
        losses: dict[int, Tensor] = {}
        logits: dict[int, Tensor] = {}
        totals: list[Tensor] = []
        fused = [h for h, head in enumerate(heads) if head.path == "fused"]
        others = [h for h in range(len(heads)) if h not in fused]
        if fused:
            total, *by_head = self._fused_loss(
                features, [heads[h] for h in fused], [targets[h] for h in fused], _some(options, fused)
            )
            totals.append(total)
            for h, loss, own in zip(fused, *by_head, strict=True):
                losses[h], logits[h] = loss, own
        logits.update(zip(others, self._logits(features, [heads[h] for h in others]).values(), strict=True))
        for h in others:
            # Logits of the features' rank have theirs in the same place.
            rows = self._last(logits[h]) if logits[h].dim() == features.dim() else logits[h]
            try:
                check_operand(f"targets[{h}]", targets[h])
                check_options(rows, [rows.shape[-1]], [targets[h]], _some(options, [h]), first=h)
            except ERRORS as error:
                raise named(error, heads) from None
            losses[h] = loss_of_head(rows, targets, options, h)
        totals.append(total_loss([losses[h] for h in others], _some(options, others).loss_weight))
        every = range(len(heads))
        return sum(totals), [losses[h] for h in every], [logits[h] for h in every]

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
        with renamed(names):
            return numbers("loss_weight", values)

    def _smoothing(self, given: float | Mapping[str, float], names: Sequence[str]) -> list[float] | None:
        if isinstance(given, Mapping):
            values = self._per_head("label_smoothing", given, names, 0.0)
        else:
            values = [0.0 if self.losses[name] == "mse" else given for name in names]  # for all that have one
        with renamed(names):
            return check_smoothing(values)

    def _ignored(self, given: int | Mapping[str, int], names: Sequence[str]) -> list[int] | None:
        with renamed(names):
            return check_ignored(self._per_head("ignore_index", given, names, -100))

    def _check_names(self, what: str, given: Mapping[str, object]) -> None:
        if unknown := [name for name in given if name not in self.predictors and name not in self.adversaries]:
            raise ValueError(f"{what} names {unknown}, but the heads are {list(self.head_names)}")

    def extra_repr(self) -> str:
        lambdas = "meta" if self.lambda_.is_meta else dict(zip(self.adversaries, self.lambda_.tolist(), strict=True))
        lines = [f"in_features={self.in_features}, lambda_={lambdas}" + (f", dim={self.dim}" if self.dim != -1 else "")]
        if squared := [name for name, loss in self.losses.items() if loss == "mse"]:
            lines[0] += f", mse={squared}"
        return "\n".join(lines + [f"({head.name}) {head.path}: {head.why}" for head in self._heads()])


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
        if why_not_linear(first) is None and first.in_features != in_features:
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
