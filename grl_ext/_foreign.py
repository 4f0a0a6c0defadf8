"""Reversals that are not ours, found by their names: pasted layers, those of other libraries, functions that a forward
calls. What has another name, or is called by way of another object, is found by `grl_ext.testing.reverses` only."""

import re
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from weakref import WeakKeyDictionary

import torch
from torch import nn

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of CamelCase, snake_case and both
_GRADIENT = {"grad", "grads", "gradient", "gradients"}
_REVERSING = set("rev reverse reversal reversed reverser reversing flip flipper negate negation".split())
_ONE_WORD = re.compile("grl|grlayer|rev(erse|ersal)?grad(ient)?|grad(ient)?(rev|reverse|reversal)(layer)?")
_REVERSAL = {"rev", "reverse", "reversal"}
_NEUTRAL = {"layer", "layers", "module", "function", "func", "fn", "op", "f", "domain", "adversarial", "my", "dann"}


def says_reversal(name: str, alone: bool = False) -> bool:
    """Whether it names a reversal of gradients. With `alone` also where "reverse" stands without "gradient"."""
    words = [word.lower() for word in _WORD.findall(name)]
    if any(_ONE_WORD.fullmatch(word) for word in words) or words[:2] == ["gr", "layer"]:
        return True
    if any(word in _GRADIENT for word in words) and any(word in _REVERSING for word in words):
        return True
    left = [word for word in words if word not in _NEUTRAL]
    return alone and len(left) == 1 and left[0] in _REVERSAL


def _is_pytorchs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("torch", "builtins")


def _name_of_reversal(value: object) -> str | None:
    """The name of a class, a function or a bound `apply`, if it says so."""
    value = getattr(value, "func", value)  # of functools.partial
    owner = getattr(value, "__self__", None)  # of Function.apply
    for own in (value, owner, type(value)):
        if isinstance(own, type) and not _is_pytorchs(own):
            alone = issubclass(own, (nn.Module, torch.autograd.Function))
            if (name := own.__name__) and says_reversal(name, alone):
                return name
    name = getattr(value, "__name__", None)
    is_function = callable(value) and not isinstance(value, (type, ModuleType))
    return name if is_function and isinstance(name, str) and says_reversal(name) else None


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _called_by(function: Callable, kind: type, seen: set[FunctionType]) -> Iterator[str]:
    """Names of reversals in a method's code, and in that of the methods and of the module's functions that it names."""
    function = getattr(function, "__wrapped__", function)
    if not isinstance(function, FunctionType) or function in seen:
        return
    seen.add(function)
    for name in dict.fromkeys(name for code in _codes(function.__code__) for name in code.co_names):
        value = function.__globals__.get(name)
        if value is None:
            value = getattr(kind, name, None)
        if isinstance(value, ModuleType) or name == "grl_ext":
            continue
        if (found := _name_of_reversal(value)) is not None or says_reversal(name):
            yield found or name
        elif isinstance(value, FunctionType) and value.__module__ == function.__module__:
            yield from _called_by(value, kind, seen)


_OF_CLASS: WeakKeyDictionary[type, tuple[bool, tuple[str, ...]]] = WeakKeyDictionary()


def _in_class(kind: type) -> tuple[bool, tuple[str, ...]]:
    """Whether its name or that of a class that it is made of says so, and what its forward calls."""
    if kind not in _OF_CLASS:
        own = [base for base in kind.__mro__ if not _is_pytorchs(base)]
        named = any(says_reversal(base.__name__, alone=True) for base in own)
        _OF_CLASS[kind] = (named, tuple(dict.fromkeys(_called_by(kind.forward, kind, set()))) if own else ())
    return _OF_CLASS[kind]


def may_reverse(kind: type) -> bool:
    """One look into a table, for every call."""
    named, called = _in_class(kind)
    return named or len(called) > 0


def _is_off(module: nn.Module) -> bool:
    """scGPT's `reverse_grad=False` and the like: the name stands in the code, and is not called."""
    return any(
        value is None or value is False
        for name, value in vars(module).items()
        if says_reversal(name.removeprefix("use_"), alone=True)
    )


def describe(module: nn.Module) -> str | None:
    """How the module's own class, code or attributes name a reversal, as "contains the layer ..." or "calls ..."."""
    kind, fields = type(module), vars(module)
    named, called = _in_class(kind)
    if named:
        return f"contains the layer {kind.__name__}"
    # Submodules are looked at by themselves, and `self.grl_weight` is a number.
    held = {*module._modules, *module._buffers, *module._parameters}
    held |= {attribute for attribute, value in fields.items() if not callable(value)}
    called = [name for name in called if name not in held]
    if called and not _is_off(module):
        return f"calls {called[0]} in {kind.__name__}.forward"
    for attribute, value in fields.items():
        if callable(value) and (name := _name_of_reversal(value)) is not None:
            return f"holds {name} as {kind.__name__}.{attribute}"
    return None
