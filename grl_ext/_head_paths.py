"""How a head is run: which of its layers are computed together with those of the others, and why; and errors by the
heads' names."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn


def own_call(module: nn.Module) -> str | None:
    """What of a module only its own call would honour; None if its forward may be computed elsewhere."""
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return "it has hooks"
    return "its forward was replaced" if "forward" in own else None


def why_not_linear(module: nn.Module) -> str | None:
    """Why a module is not run as a plain linear layer; None if it is."""
    # Parametrised layers (weight norm, spectral norm, pruning, LoRA of torch.nn.utils.parametrize) keep this forward.
    if type(module) is not nn.Linear and getattr(type(module), "forward", None) is not nn.Linear.forward:
        name = type(module).__name__
        return f"{type(module).__module__ + '.' if name == 'Linear' else ''}{name} is not nn.Linear"
    return own_call(module)


def weights_and_biases(layers: Sequence[nn.Module]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Of linear layers, without the time of nn.Module's attribute access where there is nothing between."""
    weights, biases = [], []
    for layer in layers:
        own = layer._parameters
        if type(layer) is nn.Linear and "weight" in own and "bias" in own:
            weights.append(own["weight"])
            biases.append(own["bias"])
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


class HeadPath(NamedTuple):
    name: str
    module: nn.Module
    index: int  # its number in lambda_, -1 for a predictor
    # How it is run: the path's name in the repr, the reason, the linear layers that are computed together, and what
    # follows them.
    path: str
    why: str
    layers: tuple[nn.Module, ...]
    rest: tuple[nn.Module, ...]


def path_of(module: nn.Module) -> tuple[str, str, tuple[nn.Module, ...], tuple[nn.Module, ...]]:
    """path, why, layers and rest of a head, where no hooks are set for all modules."""
    if (why := why_not_linear(module)) is None:
        return "fused", "linear", (module,), ()
    if type(module) is not nn.Sequential:
        return "as given", why, (), ()
    if why := own_call(module):
        return "as given", why, (), ()
    parts = tuple(module)
    if not parts or (why := why_not_linear(parts[0])):
        return "as given", f"its first layer: {why}" if parts else "empty", (), ()
    if len(parts) % 2 == 1 and all(why_not_linear(part) is None for part in parts[::2]):
        if all(type(part) is nn.ReLU and own_call(part) is None for part in parts[1::2]):
            return "fused", "linear layers with ReLU", parts[::2], parts[1:]
    return "first layer fused", "begins with a linear layer", parts[:1], parts[1:]


_PLACE = re.compile(
    r"\b(lambda_|weight|bias|targets|sample_weight|class_weight|loss_weight|label_smoothing|ignore_index)\[(\d+)\]"
)
ERRORS = (TypeError, ValueError, IndexError)


def named(error: Exception, heads: Sequence[HeadPath]) -> Exception:
    """The error with the heads' names in place of their numbers."""
    return with_names(error, [head.name for head in heads], [head.name for head in heads for _ in head.layers])


def with_names(error: Exception, names: Sequence[str], layers: Sequence[str]) -> Exception:
    def name(match: re.Match[str]) -> str:
        known = layers if match[1] in ("weight", "bias") else names
        return f"{match[1]}[{known[int(match[2])]!r}]"

    return type(error)(_PLACE.sub(name, str(error)))


@contextlib.contextmanager
def renamed(names: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except ERRORS as error:
        raise with_names(error, names, ()) from None
