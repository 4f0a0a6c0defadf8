"""Random modules as heads: what users hand over, and what stands between a fused first and last layer."""

import random

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Discriminator(nn.Sequential):
    """As libraries write it: layers of its own, the forward of nn.Sequential."""


class Scaled(nn.Sequential):
    """Takes a second input."""

    def forward(self, x: Tensor, factor: Tensor | float = 2.0) -> Tensor:
        return super().forward(x) * factor


def own_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """A loss of rows with classes, or with a value for each output."""
    if targets.dtype == torch.int64:
        return logits.square().add(1).log().sum(1) * (targets + 1)
    return (logits - targets).square().add(1).log().sum(1)


class Residual(nn.Module):
    def __init__(self, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.before(x).tanh())


class HeadKinds:
    """Modules of one dtype over features (*leading, features), or with the features' size in dimension 1 for maps."""

    def __init__(self, numbers: torch.Generator, dtype: torch.dtype, leading: tuple[int, ...], features: int, dim: int):
        self.numbers, self.dtype, self.leading, self.features = numbers, dtype, leading, features
        self.maps = {2: nn.Conv1d, 3: nn.Conv2d}.get(len(leading)) if dim == 1 else None
        self.by_last = dim == -1

    def fill(self, module: nn.Module) -> nn.Module:
        """Its parameters are the program's own numbers."""
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=self.numbers, dtype=torch.float64))
        return module

    def draw(self, choice: random.Random) -> tuple[nn.Module, int]:
        """A module and the size of its logits. It is made from the parameters' dtype, filled, and in eval mode."""
        self.random = choice
        size = choice.choice([1, 1, 2, 3, 5, 45])
        kinds = [self.linear] * 6
        if self.dtype == torch.float64:  # a unit at the kink of a ReLU may be on in float32 here and off there
            kinds += [self.multilayer] * 4
        kinds += [self.between] * 4 + [self.open_end]
        if self.by_last:
            kinds += [self.later, self.own, self.nested]
        if self.maps is not None:
            kinds += [self.convolution] * 4
        module = choice.choice(kinds)(self.features, size)
        if choice.random() < 0.04:
            module = nn.Identity() if choice.random() < 0.5 and self.by_last else nn.Sequential()
            size = self.features
        if choice.random() < 0.05:  # runs as given
            module.register_forward_hook(lambda module, inputs, output: None)
        return self.fill(module.to(self.dtype)), size

    # --- kinds --------------------------------------------------------------------------------------------------------

    def layer(self, inputs: int, outputs: int) -> nn.Module:
        layer = nn.Linear(inputs, outputs, bias=self.random.random() < 0.7)
        return parametrizations.weight_norm(layer) if self.random.random() < 0.04 else layer

    def hidden(self) -> int:
        return self.random.choice([1, 4, 4])

    def sequential(self, *layers: nn.Module) -> nn.Sequential:
        return self.random.choice([nn.Sequential, nn.Sequential, nn.Sequential, Discriminator])(*layers)

    def middle(self, size: int, in_place: bool = False) -> nn.Module:
        """Whatever people put between two linear layers; directly behind one it may work in place."""
        smooth = [nn.Tanh, nn.GELU, nn.Softplus, nn.SiLU, nn.Identity]
        smooth += [lambda: nn.Dropout(0.3).eval(), lambda: nn.Dropout(0.3)]  # in training too: one seed for both
        if len(self.leading) == 1:
            smooth += [lambda: nn.BatchNorm1d(size).eval()]
        if self.dtype == torch.float64:
            smooth += [nn.ReLU, nn.PReLU]
            if size > 1:  # of one element it gives some hundred times the rounding of a zero
                smooth.append(lambda: nn.LayerNorm(size))
            if in_place:
                smooth += [lambda: nn.LeakyReLU(0.2, inplace=True), lambda: nn.ReLU(inplace=True)]
        return self.random.choice(smooth)()

    def linear(self, inputs: int, outputs: int) -> nn.Module:
        layer = self.layer(inputs, outputs)
        return self.sequential(layer) if self.random.random() < 0.1 else layer

    def multilayer(self, inputs: int, outputs: int) -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(self.random.choice([1, 1, 2])):
            size = self.hidden()
            layers += [self.layer(inputs, size), nn.ReLU(inplace=self.random.random() < 0.3)]
            inputs = size
        return self.sequential(*layers, self.layer(inputs, outputs))

    def between(self, inputs: int, outputs: int) -> nn.Module:
        size = self.hidden()
        middle = [self.middle(size, in_place=i == 0) for i in range(self.random.choice([0, 1, 1, 2]))]
        layers = [self.layer(inputs, size), *middle]
        if self.random.random() < 0.3:
            layers += [self.layer(size, size), self.middle(size, in_place=True)]
        return self.sequential(*layers, self.layer(size, outputs))

    def open_end(self, inputs: int, outputs: int) -> nn.Module:
        return self.sequential(self.layer(inputs, outputs), self.middle(outputs, in_place=True))

    def later(self, inputs: int, outputs: int) -> nn.Module:
        return self.sequential(self.middle(inputs), self.layer(inputs, outputs))

    def nested(self, inputs: int, outputs: int) -> nn.Module:
        size = self.hidden()
        inner = self.sequential(self.layer(inputs, size), self.middle(size, in_place=True))
        return self.sequential(inner, self.layer(size, outputs))

    def own(self, inputs: int, outputs: int) -> nn.Module:
        if self.random.random() < 0.5:
            return Scaled(self.layer(inputs, outputs))
        return Residual(self.layer(inputs, inputs), self.layer(inputs, outputs))

    def convolution(self, inputs: int, outputs: int) -> nn.Module:
        layers = [nn.Tanh()] if self.random.random() < 0.3 else []
        if self.random.random() < 0.4:
            size = self.hidden()
            layers += [self.maps(inputs, size, 1), nn.Tanh()]
            inputs = size
        layers.append(self.maps(inputs, outputs, 1))
        return layers[0] if len(layers) == 1 else self.sequential(*layers)
