"""The matrix's columns: one small network for each operation, with an encoder, a predictor and an adversary, and the
same in plain PyTorch.

All have the same parameters in the same order, and return the sum of two cross entropies.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from head_samples import reversal
from torch import Tensor, nn

from grl_ext import GRL, AdversarialHeads, GRLLinear, gradient_reversal, grl_linear

sys.path.append(str(Path(__file__).parents[2] / "bench"))  # scripts, not part of the package
from baselines import Pasted  # noqa: E402

LAMBDA = 0.3
ROWS, INPUTS, FEATURES, HIDDEN, DIGITS, DOMAINS = 6, 4, 5, 4, 3, 2


class Network(nn.Module):
    """What the columns share; `logits` differs."""

    __jit_unused_properties__ = ["parts", "linears"]

    column: str

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(INPUTS, FEATURES)

    def logits(self, features: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss_of(self.encoder(x).tanh(), labels)

    def loss_of(self, features: Tensor, labels: Tensor) -> Tensor:
        digit, domain = self.logits(features)
        return F.cross_entropy(digit, labels) + F.cross_entropy(domain, labels.clamp(max=1))

    @property
    def parts(self) -> tuple[nn.Module, nn.Module]:
        """The predictor and the adversary."""
        return self.digit, self.domain

    @property
    def linears(self) -> list[nn.Module]:
        """The linear layers of both, each of which is the module or within it."""
        return [layer for part in self.parts for layer in (part[::2] if isinstance(part, nn.Sequential) else [part])]


class Layers(Network):
    """A predictor, and an adversary behind `reversal`: a linear layer each, or with a hidden one."""

    def __init__(self, reversal: nn.Module, hidden: bool = False) -> None:
        super().__init__()
        self.digit, self.reversal, self.domain = nn.Linear(FEATURES, DIGITS), reversal, nn.Linear(FEATURES, DOMAINS)
        if hidden:
            self.digit = with_hidden(nn.Tanh(), DIGITS)
            self.domain = with_hidden(nn.ReLU(), DOMAINS)

    def logits(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.digit(features), self.domain(self.reversal(features))


def with_hidden(between: nn.Module, size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), between, nn.Linear(HIDDEN, size))


class PlainReversal(nn.Module):
    """The value of x and the derivative of -lambda x, by PyTorch's own operations only: what all other columns are
    compared with."""

    def __init__(self) -> None:
        super().__init__()
        self.coeff = LAMBDA

    def forward(self, x: Tensor) -> Tensor:
        return reversal(x, self.coeff)


class OurReversal(nn.Module):
    """The module and the function, each for a half."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = GRL(LAMBDA)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) + gradient_reversal(x, self.layer.lambda_)) / 2


class ByNumber(nn.Linear):
    """An adversary with lambda as a number: the module and the function in front of one class, `grl_linear` for the
    other."""

    def __init__(self) -> None:
        super().__init__(FEATURES, DOMAINS)
        self.layer, self.number = GRL(), LAMBDA

    def forward(self, x: Tensor) -> Tensor:
        reversed_ = (self.layer(x, self.number) + gradient_reversal(x, self.number)) / 2
        one = F.linear(reversed_, self.weight[:1], self.bias[:1])
        return torch.cat([one, grl_linear(x, self.weight[1:], self.bias[1:], self.number)], -1)


class ByRow(ByNumber):
    """The same with a tensor that has a lambda for each row."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.full_like(x.detach()[..., :1], self.number)
        reversed_ = (self.layer(x, rows) + gradient_reversal(x, rows)) / 2
        one = F.linear(reversed_, self.weight[:1], self.bias[:1])
        return torch.cat([one, grl_linear(x, self.weight[1:], self.bias[1:], rows)], -1)


class Linear(Network):
    """An adversary that reverses by itself."""

    def __init__(self, adversary: nn.Module) -> None:
        super().__init__()
        self.digit, self.domain = nn.Linear(FEATURES, DIGITS), adversary

    def logits(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.digit(features), self.domain(features)


class Logits(Network):
    def __init__(self) -> None:
        super().__init__()
        self.heads = AdversarialHeads(FEATURES, {"digit": DIGITS}, {"domain": DOMAINS}, lambda_=LAMBDA)

    def logits(self, features: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.heads(features)
        return logits["digit"], logits["domain"]

    @property
    def parts(self) -> tuple[nn.Module, nn.Module]:
        return self.heads.predictors["digit"], self.heads.adversaries["domain"]


class Loss(Logits):
    def loss_of(self, features: Tensor, labels: Tensor) -> Tensor:
        return self.heads(features, {"digit": labels, "domain": labels.clamp(max=1)}).loss


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """A loss of one's own that has PyTorch's values."""
    return F.cross_entropy(logits, targets, reduction="none")


def labels_at_once(labels: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The domain as several labels, and a weight for each entry."""
    target = torch.stack((labels == 0, labels != 0), -1)
    ones = torch.ones_like(labels, dtype=like.dtype)
    return target, torch.stack((ones / 2, ones), -1)


class Others(Loss):
    """A loss of one's own, and several labels at once with a weight for each."""

    def __init__(self) -> None:
        super().__init__()
        self.heads.losses = {"digit": cross_entropies, "domain": "bce"}

    def loss_of(self, features: Tensor, labels: Tensor) -> Tensor:
        target, weight = labels_at_once(labels, features.detach())
        targets = {"digit": labels, "domain": target}
        return self.heads(features, targets, sample_weight={"domain": weight}).loss


class PlainOthers(Layers):
    def loss_of(self, features: Tensor, labels: Tensor) -> Tensor:
        digit, domain = self.logits(features)
        target, weight = labels_at_once(labels, features.detach())
        entries = F.binary_cross_entropy_with_logits(domain, target.to(domain.dtype), weight, reduction="sum")
        return F.cross_entropy(digit, labels) + entries / weight.sum()


class Hidden(Loss):
    """The adversary's layers are fused; of the predictor's, the first and the last."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = AdversarialHeads(
            FEATURES, {"digit": with_hidden(nn.Tanh(), DIGITS)}, {"domain": [HIDDEN, DOMAINS]}, lambda_=LAMBDA
        )


COMMON = "the common Python layer"
COLUMNS: dict[str, Callable[[], Network]] = {
    "`gradient_reversal`, `GRL`": lambda: Layers(OurReversal()),
    "`GRLLinear`": lambda: Linear(GRLLinear(FEATURES, DOMAINS, lambda_=LAMBDA)),
    "λ a number": lambda: Linear(ByNumber()),
    "λ a tensor, for each row": lambda: Linear(ByRow()),
    "heads' logits": Logits,
    "heads' loss": Loss,
    "heads' loss, hidden layers": Hidden,
    "heads' loss, bce and a function": Others,
    COMMON: lambda: Layers(Pasted(LAMBDA)),
}
LAYER, LINEAR = tuple(COLUMNS)[:2]
OTHER_FORMS = tuple(column for column in COLUMNS if column.startswith("λ"))  # of lambda than the modules' buffer
HEADS = tuple(column for column in COLUMNS if column.startswith("heads'"))
OURS = tuple(COLUMNS)[:-1]
IN_MODULES = (LAYER, LINEAR, *HEADS, COMMON)  # the columns in which a module holds lambda


def network(column: str, seed: int = 1) -> Network:
    """The same parameters in every column and every process."""
    made = COLUMNS[column]()
    made.column = column
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return made


def plain_like(other: nn.Module) -> Network:
    """Layer by layer in plain PyTorch, with the parameters' values of `other`."""
    made = (
        PlainOthers(PlainReversal())
        if isinstance(other, Others)
        else Layers(PlainReversal(), isinstance(other, Hidden))
    )
    values = list(other.parameters())
    made.to(values[0].dtype)
    with torch.no_grad():
        for parameter, value in zip(made.parameters(), values, strict=True):
            parameter.copy_(value)
    return made


def batch(rows: int = ROWS, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, INPUTS, generator=generator), torch.randint(DIGITS, (rows,), generator=generator)


def step(
    call: Callable[[Tensor, Tensor], Tensor], parameters, x: Tensor | None = None, labels: Tensor | None = None
) -> list[Tensor]:
    """The loss of `call`, and its gradients for the inputs and the parameters, by a plain `backward()`."""
    given, own_labels = batch()
    x, labels = (given if x is None else x).detach().requires_grad_(), own_labels if labels is None else labels
    parameters = list(parameters)
    for parameter in parameters:
        parameter.grad = None
    loss = call(x, labels)
    loss.backward()
    return [loss.detach(), x.grad, *(parameter.grad for parameter in parameters)]


def eager(made: nn.Module) -> list[Tensor]:
    return step(made, made.parameters())
