"""The operations in plain PyTorch, as a user would write them: what the fuzzer's programs are compared with.

Written apart from `grl_ext._plain`, so that no mistake of that is repeated here.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from head_samples import naive_loss
from torch import Tensor, nn


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, lambda_: Tensor | float) -> Tensor:
        ctx.number = None
        if isinstance(lambda_, Tensor):
            ctx.save_for_backward(lambda_)
        else:
            ctx.number = lambda_
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if ctx.number is not None:
            lambda_ = torch.tensor(float(ctx.number), dtype=torch.float64)
        else:
            (lambda_,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        real = torch.float64 if wide in (torch.float64, torch.complex128) else torch.float32
        scaled = (grad.to(wide) * -lambda_.to(real)).to(grad.dtype)
        return torch.where(lambda_ == 0, torch.zeros((), dtype=grad.dtype), scaled), None


def gradient_reversal(x: Tensor, lambda_: Tensor | float = 1.0) -> Tensor:
    if isinstance(lambda_, Tensor):
        if not x.requires_grad:
            lambda_ = lambda_.detach()
        if lambda_.dim() == 0 and not lambda_.requires_grad:
            lambda_ = lambda_.item()
    return _Reverse.apply(x, lambda_)


def grl_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, lambda_: Tensor | float = 1.0) -> Tensor:
    return F.linear(gradient_reversal(x, lambda_), weight, bias)


class GRL(nn.Module):
    def __init__(self, lambda_: float = 1.0):
        super().__init__()
        self.lambda_ = lambda_

    def forward(self, x: Tensor) -> Tensor:
        return gradient_reversal(x, self.lambda_)


class _Reversal:
    """A lambda, and the one that it was made with."""

    def __init__(self, lambda_: float) -> None:
        self.lambda_ = self.initial_lambda = lambda_


class _Adversaries(nn.ModuleDict):
    def __init__(self, reversals: dict[str, _Reversal]) -> None:
        super().__init__()
        self.reversals = reversals

    def __setitem__(self, name: str, module: nn.Module) -> None:
        if name not in self.reversals or any(isinstance(part, GRL) for part in module.modules()):
            raise ValueError(name)
        super().__setitem__(name, module)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del self.reversals[name]


class AdversarialHeads(nn.Module):
    """Module by module, each adversary behind a reversal of its own."""

    def __init__(self, in_features: int, predictors: dict, adversaries: dict, *, lambda_, losses: dict, dim: int):
        super().__init__()
        lambdas = lambda_ if isinstance(lambda_, dict) else dict.fromkeys(adversaries, lambda_)
        self.in_features, self.dim, self.losses = in_features, dim, dict(losses)
        self.reversals = {name: _Reversal(lambdas.get(name, 1.0)) for name in adversaries}
        self.predictors, self.adversaries = nn.ModuleDict(predictors), _Adversaries(self.reversals)
        self.adversaries.update(adversaries)

    def add_adversary(self, name: str, head, lambda_: float = 1.0, *, loss="cross_entropy", bias=True, dtype=None):
        if not isinstance(head, nn.Module):
            layers, inputs = [], self.in_features
            for size in [head] if isinstance(head, int) else head:
                layers += [nn.Linear(inputs, size, bias, dtype=dtype), nn.ReLU()]
                inputs = size
            head = nn.Sequential(*layers[:-1])
        if name in self.predictors or any(isinstance(part, GRL) for part in head.modules()):
            raise ValueError(name)
        self.reversals[name] = _Reversal(lambda_)
        self.adversaries[name] = head
        self.losses[name] = loss

    @property
    def lambda_(self) -> dict[str, Tensor]:
        return {name: torch.tensor(self.reversals[name].lambda_, dtype=torch.float64) for name in self.adversaries}

    def __setattr__(self, name: str, value) -> None:
        if name != "lambda_":
            return super().__setattr__(name, value)
        values = value if isinstance(value, dict) else dict.fromkeys(self.adversaries, value)
        if not values.keys() <= self.reversals.keys():
            raise ValueError(values)
        for adversary, number in values.items():
            self.reversals[adversary].lambda_ = float(number)

    def get_extra_state(self):
        return {name: reversal.lambda_ for name, reversal in self.reversals.items()}

    def set_extra_state(self, state) -> None:
        assert state.keys() == self.reversals.keys()
        self.lambda_ = state

    def forward(self, features: Tensor, targets: dict | None = None, *, lambda_=None, inputs=None, **options):
        lambdas = {name: reversal.lambda_ for name, reversal in self.reversals.items()}
        if lambda_ is not None:
            lambdas.update(lambda_ if isinstance(lambda_, dict) else dict.fromkeys(lambdas, lambda_))
        heads = [*self.predictors.items(), *self.adversaries.items()]
        if targets is not None:
            if not targets.keys() <= dict(heads).keys():
                raise ValueError(targets)
            heads = [(name, module) for name, module in heads if name in targets]
        given, rows = {}, []  # the logits in their place, and with their dimension at the end
        for name, module in heads:
            seen, others = features, (inputs or {}).get(name, {})
            if name in self.reversals:
                seen = gradient_reversal(features, lambdas[name])
                others = {key: gradient_reversal(value, lambdas[name]) for key, value in others.items()}
            first = module
            while isinstance(first, nn.Sequential) and len(first):
                first = first[0]
            if isinstance(first, nn.Linear):
                rows.append(module(seen.movedim(self.dim, -1), **others))
                given[name] = rows[-1].movedim(-1, self.dim)
            else:
                given[name] = module(seen, **others)
                rows.append(given[name].movedim(self.dim, -1))
        if targets is None:
            return given
        by_name = {"sample_weight": None, "class_weight": None, "loss_weight": 1.0, "label_smoothing": 0.0}
        for option, otherwise in by_name.items():
            if isinstance(value := options.get(option), dict):
                options[option] = [value.get(name, otherwise) for name in given]
        if isinstance(number := options.get("loss_weight"), float):
            options["loss_weight"] = [number] * len(given)
        if isinstance(value := options.get("ignore_index"), dict):
            options["ignore_index"] = [value[name] for name in given]
        losses = [self.losses.get(name, "cross_entropy") for name in given]

        def last(tensor: Tensor | None) -> Tensor | None:
            moves = tensor is not None and tensor.dim() == features.dim()
            return tensor.movedim(self.dim, -1) if moves else tensor

        wanted = [last(targets[name]) for name in given]
        if isinstance(weights := options.get("sample_weight"), list):
            options["sample_weight"] = [last(weight) for weight in weights]
        loss, head_losses, _ = naive_loss(SimpleNamespace(targets=wanted, losses=losses), logits=rows, **options)
        return SimpleNamespace(loss=loss, head_losses=dict(zip(given, head_losses, strict=True)), logits=given)


class LambdaScheduler:
    """Of the adversaries that there are when it is made."""

    def __init__(self, heads: AdversarialHeads, schedule, total_steps: int) -> None:
        self.reversals, self.schedule, self.total_steps = list(heads.reversals.values()), schedule, total_steps
        self.steps = -1
        self.step()

    def step(self) -> None:
        self.steps += 1
        factor = self.schedule(min(self.steps / self.total_steps, 1.0))
        for reversal in self.reversals:
            reversal.lambda_ = factor * reversal.initial_lambda


OPERATIONS = SimpleNamespace(
    gradient_reversal=gradient_reversal,
    grl_linear=grl_linear,
    GRL=GRL,
    AdversarialHeads=AdversarialHeads,
    LambdaScheduler=LambdaScheduler,
)
