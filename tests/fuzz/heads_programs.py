"""Random heads over the same features: their shapes, options, and what is asked of their losses and logits.

As in `autograd_programs`, a program is drawn from its seed while it runs, and never looks at values. In float32 heads
are linear
only: a hidden unit at ReLU's kink may be on in one implementation and off in the other.
"""

import random
from types import SimpleNamespace

import torch
from torch import Tensor, nn

NAMES = ["label", "digit", "domain", "speaker"]


class Program:
    def __init__(self, seed: int, operations: SimpleNamespace):
        self.random = random.Random(seed)
        self.numbers = torch.Generator().manual_seed(seed)
        self.records: list[tuple[str, object]] = []
        self.dtype = self.random.choice([torch.float32, torch.float64, torch.float64])
        self.leading = self.random.choice([(5,), (1,), (0,), (70,), (2, 3), (3, 1, 4), ()])
        self.features = self.random.choice([1, 2, 3, 7, 8, 33])
        scale = self.random.choice([1, 1, 30]) if self.dtype == torch.float64 else 1  # 30: saturated losses
        self.x = (self.tensor(*self.leading, self.features) * scale).requires_grad_(self.flip(0.9))
        modules = {name: self.head() for name in self.random.sample(NAMES, self.random.randint(1, 4))}
        split = self.random.randint(0, len(modules))
        self.sizes = {name: size for name, (_, size) in modules.items()}
        predictors, adversaries = list(modules)[:split], list(modules)[split:]
        self.losses = {name: "mse" for name in modules if self.flip(0.2)}
        self.heads = operations.AdversarialHeads(
            self.features,
            {name: modules[name][0] for name in predictors},
            {name: modules[name][0] for name in adversaries},
            lambda_={name: self.random.choice([0.0, 0.3, 1.0, -2.0]) for name in adversaries},
            losses=self.losses,
        )
        self.adversaries = adversaries
        self.leaves = [self.x, *self.heads.parameters()]
        for parameter in self.leaves[1:]:
            parameter.requires_grad_(self.flip(0.85))

    def flip(self, probability: float) -> bool:
        return self.random.random() < probability

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.numbers, dtype=torch.float64).to(self.dtype)

    def linear(self, inputs: int, outputs: int) -> nn.Linear:
        layer = nn.Linear(inputs, outputs, bias=self.flip(0.7), dtype=self.dtype)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(self.tensor(*parameter.shape))
        return layer

    def head(self) -> tuple[nn.Module, int]:
        size = self.random.choice([1, 1, 2, 3, 5, 45])
        form = self.random.random() if self.dtype == torch.float64 else 0
        if form < 0.5:
            return self.linear(self.features, size), size
        hidden = self.random.choice([1, 4])
        if form < 0.8:
            return nn.Sequential(self.linear(self.features, hidden), nn.ReLU(), self.linear(hidden, size)), size
        if form < 0.9:
            return nn.Sequential(self.linear(self.features, hidden), nn.Tanh(), self.linear(hidden, size)), size
        return nn.Sequential(nn.Tanh(), self.linear(self.features, size)), size

    # --- a call's arguments
    # --------------------------------------------------------------------------------------------

    def target(self, name: str) -> Tensor:
        size = self.sizes[name]
        if name in self.losses:
            return self.tensor(*self.leading, size)
        if self.flip(0.3):
            soft = self.tensor(*self.leading, size)
            return soft.sigmoid() if size == 1 else soft.softmax(-1)
        target = torch.randint(max(2, size), self.leading, generator=self.numbers)
        share = self.random.choice([0, 0, 0.4, 1])
        return target.masked_fill(torch.rand(self.leading, generator=self.numbers) < share, -7)

    def rows(self) -> Tensor:
        weight = torch.rand(self.leading, generator=self.numbers, dtype=torch.float64).to(self.dtype)
        return weight * (torch.rand(self.leading, generator=self.numbers) > self.random.choice([0, 0.3, 1]))

    def options(self, names: list[str]) -> dict[str, object]:
        options: dict[str, object] = {"ignore_index": -7}
        if self.flip(0.4):
            options["sample_weight"] = (
                self.rows() if self.flip(0.5) else {name: self.rows() for name in names if self.flip(0.5)}
            )
        if self.flip(0.3):
            classes = [name for name in names if name not in self.losses]
            options["class_weight"] = {
                name: self.tensor(max(2, self.sizes[name])).abs() for name in classes if self.flip(0.6)
            }
        if self.flip(0.4):
            options["loss_weight"] = {name: self.random.choice([0.0, 0.5, 3.0]) for name in names if self.flip(0.6)}
        if self.flip(0.3):
            options["label_smoothing"] = self.random.choice([0.1, 1.0])
        if self.flip(0.3):
            options["reduction"] = "sum"
        return options

    # --- steps
    # ---------------------------------------------------------------------------------------------------------

    def total(self) -> Tensor:
        """One number of what the heads give for features that somebody else may use too."""
        features = self.random.choice([lambda x: x, torch.tanh, lambda x: x * 2, lambda x: x[...]])(self.x)
        if features.requires_grad and self.flip(0.3):
            seen: list[Tensor] = []
            features.register_hook(lambda grad: seen.append(grad.detach().clone()))
            self.hooked = seen
        parts = [features.square().sum() * 0.1] if self.flip(0.3) else []
        if self.flip(0.2):
            logits = self.heads(features)
            self.records += [(f"logits of {name}", z.detach()) for name, z in logits.items()]
            asked = self.random.sample(list(logits), self.random.randint(1, len(logits)))
            parts += [logits[name].sin().sum() for name in asked]
        else:
            names = self.random.sample(list(self.sizes), self.random.randint(1, len(self.sizes)))
            targets = {name: self.target(name) for name in names}
            out = self.heads(features, targets, **self.options(names))
            self.records.append(("loss", out.loss.detach()))
            self.records += [(f"loss of {name}", loss.detach()) for name, loss in out.head_losses.items()]
            self.records += [(f"logits of {name}", z.detach()) for name, z in out.logits.items()]
            if self.flip(0.8):
                parts.append(out.loss * self.random.choice([1, 1, 0.5, -3, 0]))
            if self.flip(0.25) or not parts:
                parts.append(out.head_losses[names[0]] * self.random.choice([1, 2]))
            if self.flip(0.25):
                parts.append(out.logits[names[-1]].sigmoid().sum())
        return sum(parts)

    def differentiate(self, total: Tensor) -> None:
        forms = ["backward", "backward", "twice", "grad"] + ["second order"] * (
            self.dtype == torch.float64
        )  # whose terms are large
        form = self.random.choice(forms)
        inputs = [t for t in self.leaves if t.requires_grad]
        if not inputs:
            return
        asked = self.random.sample(inputs, self.random.randint(1, len(inputs)))
        # A frozen head's own loss has no graph; a fused node has one, which must give nothing.
        total = total + torch.zeros(()).requires_grad_()
        if form == "backward":
            total.backward()
        elif form == "twice":
            total.backward(retain_graph=True)
            total.backward()
        elif form == "grad":
            self.record("asked", torch.autograd.grad(total, asked, allow_unused=True))
        else:
            first = torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True)
            self.record("first", first)
            penalty = sum([g.square().sum() for g in first if g is not None], torch.zeros(()))
            none = [None] * len(inputs)
            second = torch.autograd.grad(penalty, inputs, allow_unused=True) if penalty.requires_grad else none
            # A fused node cannot tell a gradient of gradients that is 0 from none at all: zeros for None, and hooks may
            # see them.
            self.hooked = []
            self.record(
                "second", [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, second, strict=True)]
            )

    def record(self, name: str, gradients) -> None:
        self.records += [(f"{name} {i}", None if g is None else g.detach().clone()) for i, g in enumerate(gradients)]

    def run(self) -> list[tuple[str, object]]:
        self.hooked: list[Tensor] = []
        for _ in range(self.random.randint(1, 3)):
            self.differentiate(self.total())
            self.record("hooked", self.hooked)
            self.record("gradient", [t.grad for t in self.leaves])
            change = self.random.choice(["nothing", "values", "lambda", "zero"])
            with torch.no_grad():
                for leaf in self.leaves:
                    if change == "values":
                        leaf.mul_(0.9)
                    elif change == "zero":
                        leaf.grad = None
            if change == "lambda" and self.adversaries:
                self.heads.lambda_ = {self.random.choice(self.adversaries): self.random.choice([0.0, 0.5])}
        return self.records


def run(seed: int, operations: SimpleNamespace) -> list[tuple[str, object]]:
    return Program(seed, operations).run()
