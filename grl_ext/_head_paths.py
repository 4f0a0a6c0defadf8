"""How a head is run: which of its layers are computed by the heads' operations, and why the others are not."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from grl_ext import _foreign
from grl_ext.modules import GRL, GRLLinear


def _own_forward(kind: type[nn.Module]) -> Callable | None:
    """PyTorch's. Libraries replace it to watch or to change what all layers do, some before this is imported."""
    code = getattr(kind.forward, "__code__", None)
    return kind.forward if code and code.co_filename == sys.modules[kind.__module__].__file__ else None


_FORWARD = {kind: _own_forward(kind) for kind in (nn.Linear, nn.ReLU, nn.Sequential)}
_CALL, _ITERATE = nn.Module.__call__, nn.Sequential.__iter__


def why_not_plain(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a module may not be computed as PyTorch's own module of that kind; None if it may."""
    own = type(module)
    if not isinstance(module, kind) or own.forward is not _FORWARD[kind]:
        # Parametrised layers (weight norm, spectral norm, LoRA of torch.nn.utils.parametrize) keep the forward.
        if own is kind:
            return f"nn.{kind.__name__}.forward was replaced"
        name = own.__name__
        return f"{own.__module__ + '.' if name == kind.__name__ else ''}{name} is not nn.{kind.__name__}"
    if own.__call__ is not nn.Module.__call__ or nn.Module.__call__ is not _CALL:
        return "its __call__ was replaced"
    if kind is nn.Sequential and own.__iter__ is not _ITERATE:
        return "its __iter__ was replaced"
    fields = module.__dict__
    if (
        fields["_forward_hooks"]
        or fields["_forward_pre_hooks"]
        or fields["_backward_hooks"]
        or fields["_backward_pre_hooks"]
    ):
        return "it has hooks"
    return "its forward was replaced" if "forward" in fields else None


def weights_and_biases(layers: Sequence[nn.Module]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Of linear layers, without the time of nn.Module's attribute access where there is nothing between."""
    weights, biases = [], []
    for layer in layers:
        parameters = layer._parameters
        if type(layer) is nn.Linear and "weight" in parameters and "bias" in parameters:
            weights.append(parameters["weight"])
            biases.append(parameters["bias"])
        else:
            weights.append(layer.weight)
            biases.append(layer.bias)
    return weights, biases


# By which names wrappers hold the module that they stand for: torch.compile, FSDP1, checkpoint_wrapper; peft's two.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer", "original_module")


def begins_linear(module: nn.Module) -> bool:
    while True:
        wrapped = [module._modules[name] for name in _WRAPPED if name in module._modules]
        if wrapped:
            module = wrapped[0]
        elif isinstance(module, nn.Sequential) and len(module):
            module = module[0]
        else:
            return isinstance(module, nn.Linear)


# What makes probabilities of logits. LogSoftmax does too, and changes no cross entropy of two classes or more.
_NO_LOGITS = (nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid, nn.Softmax, nn.Softmax2d, nn.Softmin)
_PASS_ON = (nn.Identity, nn.Flatten, nn.Unflatten)


def _last_layer(layers: Sequence[nn.Module]) -> nn.Module | None:
    """The layer whose output these in a row return, as far as sequences and wrappers tell."""
    layers = list(layers)
    while layers:
        last = layers.pop()
        wrapped = [last._modules[name] for name in _WRAPPED if name in last._modules]
        if wrapped:
            layers.append(wrapped[0])
        elif isinstance(last, nn.Sequential):
            layers += list(last._modules.values())
        elif not isinstance(last, _PASS_ON):
            return last
    return None


def check_logits(name: str, parts: Sequence[nn.Module]) -> None:
    """A cross entropy makes probabilities itself, and of probabilities it makes other ones."""
    layer = _last_layer(parts)
    if isinstance(layer, _NO_LOGITS):
        kind = type(layer).__name__
        raise ValueError(
            f"head {name!r} ends in a {kind}, but heads give logits, from which the cross entropy makes probabilities "
            f"itself: leave out the {kind}"
        )


def reversal_in(module: nn.Module) -> nn.Module | None:
    if isinstance(module, (GRL, GRLLinear)):
        return module
    for part in module._modules.values():
        found = None if part is None else reversal_in(part)
        if found is not None:
            return found
    return None


def check_reversal(name: str, module: nn.Module) -> None:
    """An adversary's gradient would be reversed twice, which is not at all. Looks at all that the names say."""
    if (reversal := reversal_in(module)) is not None:
        raise ValueError(
            f"adversaries[{name!r}] contains a {type(reversal).__name__}, but AdversarialHeads reverses the "
            "adversaries' gradients itself: leave the GRL out, or use a plain nn.Linear"
        )
    for part in module.modules():
        if (found := _foreign.describe(part)) is not None:
            raise ValueError(
                f"adversaries[{name!r}] {found}, but AdversarialHeads reverses the adversaries' gradients itself: "
                "leave that reversal out, or pass allow_reversal=True if it is none"
            )


def check_reversal_in_call(name: str, part: nn.Module) -> None:
    """The same for what was put into a head later: one look at each layer's class. A graph looks for our own layers
    only."""
    if torch.compiler.is_compiling():
        suspect = reversal_in(part) is not None
    else:
        suspect = _may_reverse(part)
    if suspect:
        check_reversal(name, part)


def _may_reverse(module: nn.Module) -> bool:
    if isinstance(module, (GRL, GRLLinear)) or _foreign.may_reverse(type(module)):
        return True
    return any(part is not None and _may_reverse(part) for part in module._modules.values())


class HeadPath(NamedTuple):
    """A head in its parts: first, hidden, between, last. Where first is None, between begins with the reversal."""

    name: str
    reversal: nn.Module | None  # of an adversary: a GRL, or a wrapper of one
    path: str  # as the repr calls it
    why: str
    first: nn.Module | None = None  # a linear layer
    hidden: tuple[nn.Module, ...] = ()  # ReLU, then linear layers, each with its ReLU
    between: tuple[nn.Module, ...] = ()
    last: nn.Module | None = None  # a linear layer, computed with its loss
    lambda_: Tensor | float | None = None  # for one call, in place of the reversal's
    inputs: Mapping[str, Any] | None = None  # for one call, beside the features


# Functions: Dynamo of torch 2.8 takes no property of a named tuple.


def with_lambda(head: HeadPath, lambda_: Tensor | float) -> HeadPath:
    """For one call. Nor does it take _replace()."""
    parts = head.first, head.hidden, head.between, head.last
    return HeadPath(head.name, head.reversal, head.path, head.why, *parts, lambda_, head.inputs)


def linear_layers(head: HeadPath) -> list[nn.Module] | None:
    """All layers of a linear head, or of one with ReLU between them; None of other heads."""
    if head.path != "fused":
        return None
    if head.last is None:
        return [head.first]
    return [head.first, *head.hidden[1::2], head.last] if head.hidden else None


def layers_of(reversal: nn.Module) -> list[GRL]:
    """Of a wrapper that has a copy, the copy comes last."""
    return [reversal] if isinstance(reversal, GRL) else [part for part in reversal.modules() if isinstance(part, GRL)]


def lambda_of(head: HeadPath) -> Tensor | float | None:
    if head.reversal is None or head.lambda_ is not None:
        return head.lambda_
    return head.reversal._current_lambda()


def reverse(head: HeadPath, tensor: Tensor) -> Tensor:
    """What the head sees of a tensor, where its reversal is called."""
    if head.reversal is None:
        return tensor
    return head.reversal(tensor) if head.lambda_ is None else head.reversal(tensor, head.lambda_)


def path_of(
    name: str, module: nn.Module, reversal: nn.Module | None, inputs: Mapping[str, Any] | None = None
) -> HeadPath:
    if inputs is not None:
        return HeadPath(name, reversal, "as given", "it has inputs of its own", between=(module,), inputs=inputs)
    if _has_any_global_hook():
        return HeadPath(name, reversal, "as given", "there are hooks for all modules", between=(module,))
    if reversal is not None and (why := _why_not_inlined(reversal)):
        return HeadPath(name, reversal, "as given", f"its reversal: {why}", between=(module,))
    if (why := why_not_plain(module, nn.Linear)) is None:
        return HeadPath(name, reversal, "fused", "linear", first=module)
    if not isinstance(module, nn.Sequential):
        return HeadPath(name, reversal, "as given", why, between=(module,))
    if why := why_not_plain(module, nn.Sequential):
        return HeadPath(name, reversal, "as given", why, between=(module,))
    return _path_of_layers(name, list(module._modules.values()), reversal)


def _why_not_inlined(reversal: nn.Module) -> str | None:
    """Why a reversal's own call must be made."""
    if type(reversal) is not GRL:
        return f"{type(reversal).__name__} is not GRL"
    fields = reversal.__dict__
    hooked = fields["_forward_hooks"] or fields["_forward_pre_hooks"] or fields["_backward_hooks"]
    if hooked or fields["_backward_pre_hooks"]:
        return "it has hooks"
    return "its forward was replaced" if "forward" in fields else None


def _path_of_layers(name: str, parts: list[nn.Module], reversal: nn.Module | None) -> HeadPath:
    if not parts:
        return HeadPath(name, reversal, "as given", "empty")
    ends_linear = len(parts) > 1 and why_not_plain(parts[-1], nn.Linear) is None
    last = parts.pop() if ends_linear else None
    if why := why_not_plain(parts[0], nn.Linear):
        path = "last layer fused" if ends_linear else "as given"
        return HeadPath(name, reversal, path, f"its first layer: {why}", between=tuple(parts), last=last)
    if last is None and len(parts) == 1:
        return HeadPath(name, reversal, "fused", "linear", first=parts[0])
    first, end = parts[0], 1 + sum(1 for _ in _hidden(parts[1:]))
    hidden, between = tuple(parts[1:end]), tuple(parts[end:])
    if last is None:
        return HeadPath(name, reversal, "first layer fused", "begins with a linear layer", first, hidden, between)
    if between:
        why = "begins and ends with a linear layer"
        return HeadPath(name, reversal, "first and last layer fused", why, first, hidden, between, last)
    why = "linear layers with ReLU" if hidden else "linear layers"
    return HeadPath(name, reversal, "fused", why, first, hidden, between, last)


def _hidden(parts: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """The longest beginning that is a ReLU, and linear layers of which each has its ReLU behind it."""
    if not parts or why_not_plain(parts[0], nn.ReLU):
        return
    yield parts[0]
    for layer, relu in zip(parts[1::2], parts[2::2], strict=False):
        if why_not_plain(layer, nn.Linear) or why_not_plain(relu, nn.ReLU):
            return
        yield layer
        yield relu
