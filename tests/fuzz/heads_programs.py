"""Random heads over the same features: their modules and options, what becomes of them between steps, and what is asked
of their losses and logits.

As in `autograd_programs`, a program is drawn from its seed while it runs, and never looks at values. Heads are added,
removed, renamed and replaced, and a checkpoint of them is loaded into heads that are declared in another order.
"""

import copy
import random
from collections.abc import Callable
from types import SimpleNamespace

import torch
from head_kinds import HeadKinds, Scaled, own_loss
from torch import Tensor, nn

NAMES = ["label", "digit", "domain", "speaker", "site", "age"]
LAMBDAS = [0.0, 0.3, 1.0, -2.0]
LOSSES = ["mse", "bce", own_loss, "cross_entropy", "cross_entropy"]


class Program:
    def __init__(self, seed: int, operations: SimpleNamespace):
        self.random = random.Random(seed)
        self.numbers = torch.Generator().manual_seed(seed)
        self.operations = operations
        self.records: list[tuple[str, object]] = []
        self.dtype = self.random.choice([torch.float32, torch.float64, torch.float64])
        self.leading = self.random.choice([(5,), (1,), (0,), (70,), (2, 3), (3, 1, 4), ()])
        self.features = self.random.choice([1, 2, 3, 7, 8, 33])
        self.dim = self.random.choice([1, 1, 0, -2]) if len(self.leading) and self.flip(0.15) else -1
        self.kinds = HeadKinds(self.numbers, self.dtype, self.leading, self.features, self.dim)
        scale = self.random.choice([1, 1, 30]) if self.dtype == torch.float64 else 1  # 30: saturated losses
        self.x = (self.tensor(*self.shape(self.features)) * scale).requires_grad_(self.flip(0.9))
        self.leaves = [self.x]
        self.sizes: dict[str, int] = {}  # of the heads that there are
        self.scheduler = None
        names = self.random.sample(NAMES, self.random.randint(1, 4))
        split = self.random.randint(0, len(names))
        self.heads = self.made(
            {name: self.head(name) for name in names[:split]}, {name: self.head(name) for name in names[split:]}
        )
        self.keep_parameters()

    def flip(self, probability: float) -> bool:
        return self.random.random() < probability

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.numbers, dtype=torch.float64).to(self.dtype)

    def shape(self, size: int) -> tuple[int, ...]:
        shape = list(self.leading)
        shape.insert(self.dim % (len(shape) + 1), size)
        return tuple(shape)

    # --- heads --------------------------------------------------------------------------------------------------------

    def head(self, name: str) -> nn.Module:
        if self.sizes and self.flip(0.03):  # layers that two heads share
            other = self.random.choice(list(self.sizes))
            module = self.modules[other]
            self.sizes[name] = self.sizes[other]
        else:
            module, self.sizes[name] = self.kinds.draw(self.random)
        self.modules[name] = module
        return module

    @property
    def modules(self) -> dict[str, nn.Module]:
        return self.__dict__.setdefault("_modules", {})

    def made(self, predictors: dict[str, nn.Module], adversaries: dict[str, nn.Module], losses=None):
        if losses is None:
            losses = {name: self.random.choice(LOSSES) for name in (*predictors, *adversaries) if self.flip(0.4)}
        lambda_ = {name: self.random.choice(LAMBDAS) for name in adversaries if self.flip(0.9)}
        return self.operations.AdversarialHeads(
            self.features,
            predictors,
            adversaries,
            lambda_=self.random.choice(LAMBDAS) if self.flip(0.2) else lambda_,
            losses=losses,
            dim=self.dim,
        )

    def keep_parameters(self) -> None:
        """What was taken out stays among the leaves: no later step may reach it."""
        for parameter in self.heads.parameters():
            if not any(parameter is leaf for leaf in self.leaves):
                self.leaves.append(parameter.requires_grad_(self.flip(0.85)))

    def loss_of(self, name: str) -> str:
        return self.heads.losses.get(name, "cross_entropy")

    # --- a call's arguments -------------------------------------------------------------------------------------------

    def target(self, name: str) -> Tensor:
        size = self.sizes[name]
        loss = self.loss_of(name)
        if loss == "mse" or (loss is own_loss and self.flip(0.5)):
            return self.tensor(*self.shape(size))
        if loss == "bce":
            numbers = torch.rand(self.shape(size), generator=self.numbers, dtype=torch.float64)
            return self.random.choice([numbers.to(self.dtype), numbers > 0.4, (numbers > 0.4).long()])
        if loss is not own_loss and self.flip(0.3):
            soft = self.tensor(*self.shape(size))
            return soft.sigmoid() if size == 1 else soft.softmax(self.dim)
        target = torch.randint(max(2, size), self.leading, generator=self.numbers)
        share = self.random.choice([0, 0, 0.4, 1])
        return target.masked_fill(torch.rand(self.leading, generator=self.numbers) < share, -7)

    def rows(self, name: str | None = None) -> Tensor:
        """Weights of rows, or of the entries of one head."""
        of_entries = name is not None and self.loss_of(name) in ("mse", "bce") and self.flip(0.5)
        shape = self.shape(self.sizes[name]) if of_entries else self.leading
        weight = torch.rand(shape, generator=self.numbers, dtype=torch.float64).to(self.dtype)
        return weight * (torch.rand(shape, generator=self.numbers) > self.random.choice([0, 0.3, 1]))

    def options(self, names: list[str]) -> dict[str, object]:
        classes = [name for name in names if self.loss_of(name) == "cross_entropy"]

        def some(among: list[str], draw: Callable[[str], object]) -> dict[str, object]:
            return {name: draw(name) for name in among if self.flip(0.6)}

        options: dict[str, object] = {"ignore_index": -7 if self.flip(0.8) else dict.fromkeys(names, -7)}
        if self.flip(0.4):
            options["sample_weight"] = self.rows() if self.flip(0.5) else some(names, self.rows)
        if self.flip(0.3):
            options["class_weight"] = some(classes, lambda name: self.tensor(max(2, self.sizes[name])).abs())
        if self.flip(0.4):
            numbers = [0.0, 0.5, 3.0]
            by_name = some(names, lambda name: self.random.choice(numbers))
            options["loss_weight"] = self.random.choice(numbers) if self.flip(0.2) else by_name
        if self.flip(0.3):
            number = self.random.choice([0.1, 1.0])
            options["label_smoothing"] = number if self.flip(0.7) else some(classes, lambda name: number)
        if self.flip(0.3):
            options["reduction"] = self.random.choice(["sum", "none"])
        return options

    def of_call(self, names) -> dict[str, object]:
        """What logits take too."""
        options: dict[str, object] = {}
        if self.flip(0.1):
            options["lambda_"] = self.random.choice(LAMBDAS)
        elif self.flip(0.1) and (name := self.any_of(self.heads.adversaries)):
            options["lambda_"] = {name: torch.tensor(self.random.choice(LAMBDAS), dtype=torch.float64)}
        if taking := [name for name in names if isinstance(self.modules[name], Scaled)]:
            self.leaves.append(self.tensor().requires_grad_(self.flip(0.7)))
            options["inputs"] = {name: {"factor": self.leaves[-1]} for name in taking}
        return options

    # --- what becomes of the heads ------------------------------------------------------------------------------------

    def change(self) -> None:
        changes = [self.add, self.remove, self.rename, self.replace, self.set_lambda, self.set_lambda, self.set_loss]
        changes += [self.load_into_another_order, self.copy, self.schedule, self.schedule, self.turn, self.refuse]
        self.random.choice(changes)()
        self.keep_parameters()
        lambdas = {name: value.item() for name, value in self.heads.lambda_.items()}
        self.records.append(("heads", f"{list(self.heads.predictors)} {lambdas}"))
        repr(self.heads)

    def unused(self) -> str | None:
        return self.random.choice([name for name in NAMES if name not in self.sizes] or [None])

    def any_of(self, heads) -> str | None:
        return self.random.choice(list(heads) or [None])

    def add(self) -> None:
        if (name := self.unused()) is None:
            return
        if self.flip(0.4):
            self.heads.predictors[name] = self.head(name)
            return
        lambda_, loss = self.random.choice(LAMBDAS), self.random.choice(LOSSES)
        if self.flip(0.3):  # layers that the heads make themselves
            sizes = [self.random.choice([1, 4])] * (self.dtype == torch.float64) + [self.random.choice([1, 2, 5])]
            given = sizes[0] if len(sizes) == 1 and self.flip(0.5) else sizes
            bias = self.flip(0.7)
            self.heads.add_adversary(name, given, lambda_, loss=loss, bias=bias, dtype=self.dtype)
            self.modules[name], self.sizes[name] = self.kinds.fill(self.heads.adversaries[name]), sizes[-1]
        else:
            self.heads.add_adversary(name, self.head(name), lambda_, loss=loss)

    def remove(self) -> None:
        if len(self.sizes) == 1:
            return
        name = self.any_of(self.sizes)
        part = self.heads.predictors if name in self.heads.predictors else self.heads.adversaries
        if self.flip(0.5):
            del part[name]
        else:
            part.pop(name)
        del self.sizes[name]

    def rename(self) -> None:
        old, new = self.any_of(self.sizes), self.unused()
        if new is None:
            return
        loss = self.loss_of(old)
        if old in self.heads.predictors:
            self.heads.predictors[new] = self.heads.predictors.pop(old)
        elif self.flip(0.5):
            module, lambda_ = self.heads.adversaries[old], self.heads.lambda_[old].item()
            del self.heads.adversaries[old]
            self.heads.add_adversary(new, module, lambda_)
        else:  # with its reversal, which a scheduler may hold
            self.heads.reversals[new] = self.heads.reversals[old]
            self.heads.adversaries[new] = self.heads.adversaries.pop(old)
        self.heads.losses[new] = loss
        self.sizes[new] = self.sizes.pop(old)
        self.modules[new] = self.modules.pop(old)

    def replace(self) -> None:
        """The module; lambda and loss stay."""
        name = self.any_of(self.sizes)
        part = self.heads.predictors if name in self.heads.predictors else self.heads.adversaries
        part[name] = self.head(name)

    def turn(self) -> None:
        """A predictor becomes an adversary, or the other way round."""
        name = self.any_of(self.sizes)
        if name in self.heads.predictors:
            self.heads.add_adversary(name, self.heads.predictors.pop(name), self.random.choice(LAMBDAS))
        else:
            self.heads.predictors[name] = self.heads.adversaries.pop(name)

    def set_lambda(self) -> None:
        name, value = self.any_of(self.heads.adversaries), self.random.choice(LAMBDAS)
        if name is None:
            return
        if self.flip(0.3):
            self.heads.lambda_ = torch.tensor(value) if self.flip(0.3) else value
        elif self.flip(0.5):
            self.heads.lambda_ = {name: value}
        else:
            self.heads.reversals[name].lambda_ = value

    def set_loss(self) -> None:
        self.heads.losses[self.any_of(self.sizes)] = self.random.choice(LOSSES)

    def schedule(self) -> None:
        if self.scheduler is None:
            if any(reversal.initial_lambda != 0 for reversal in self.heads.reversals.values()):
                factor = self.random.choice([lambda p: p, lambda p: 1 - p, lambda p: 2 * p * p])
                self.scheduler = self.operations.LambdaScheduler(self.heads, factor, self.random.choice([1, 2, 4]))
            return
        for _ in range(self.random.randint(1, 3)):
            self.scheduler.step()

    def load_into_another_order(self) -> None:
        # Together, so that shared layers are shared again.
        parts = copy.deepcopy((dict(self.heads.predictors.items()), dict(self.heads.adversaries.items())))
        predictors, adversaries = (
            {name: part[name] for name in self.random.sample(list(part), len(part))} for part in parts
        )
        self.modules.update(predictors | adversaries)
        for module in (*predictors.values(), *adversaries.values()):
            self.kinds.fill(module)
        losses = {name: self.loss_of(name) for name in self.sizes}
        state = self.heads.state_dict()
        self.heads = self.made(predictors, adversaries, losses)
        self.heads.load_state_dict(state)
        self.scheduler = None

    def copy(self) -> None:
        self.heads, self.scheduler = copy.deepcopy(self.heads), None
        self.modules.update(self.heads.predictors.items())
        self.modules.update(self.heads.adversaries.items())

    def refuse(self) -> None:
        """What the heads do not take leaves them as they were."""
        new, adversary = self.unused(), self.any_of(self.heads.adversaries)
        layer = nn.Linear(self.features, 2, dtype=self.dtype)
        reversed_ = nn.Sequential(self.operations.GRL(), layer)

        def assign(name: str, module: nn.Module) -> None:
            self.heads.adversaries[name] = module

        wrong: list[Callable[[], object]] = [
            lambda: setattr(self.heads, "lambda_", {"nobody": 0.5}),
            lambda: self.heads(self.x, {"nobody": torch.zeros(self.leading)}),
        ]
        if new is not None:
            wrong += [lambda: assign(new, layer), lambda: self.heads.add_adversary(new, reversed_)]
        if adversary is not None:
            wrong.append(lambda: assign(adversary, reversed_))
        if predictor := self.any_of(self.heads.predictors):
            wrong.append(lambda: self.heads.add_adversary(predictor, layer))
        try:
            self.random.choice(wrong)()
        except ValueError:
            self.records.append(("refused", "ValueError"))

    # --- steps --------------------------------------------------------------------------------------------------------

    def total(self) -> Tensor:
        """One number of what the heads give for features that somebody else may use too."""
        features = self.random.choice([lambda x: x, torch.tanh, lambda x: x * 2, lambda x: x[...]])(self.x)
        if features.requires_grad and self.flip(0.3):
            seen: list[Tensor] = []
            features.register_hook(lambda grad: seen.append(grad.detach().clone()))
            self.hooked = seen
        parts = [features.square().sum() * 0.1] if self.flip(0.3) else []
        torch.manual_seed(self.random.randrange(1000))  # of dropout
        if self.flip(0.2):
            logits = self.heads(features, **self.of_call(self.sizes))
            self.records += [(f"logits of {name}", z.detach()) for name, z in logits.items()]
            asked = self.random.sample(list(logits), self.random.randint(1, len(logits)))
            parts += [logits[name].sin().sum() for name in asked]
        else:
            names = self.random.sample(list(self.sizes), self.random.randint(1, len(self.sizes)))
            targets = {name: self.target(name) for name in names}
            out = self.heads(features, targets, **self.options(names), **self.of_call(names))
            self.records.append(("loss", out.loss.detach()))
            self.records += [(f"loss of {name}", loss.detach()) for name, loss in out.head_losses.items()]
            self.records += [(f"logits of {name}", z.detach()) for name, z in out.logits.items()]
            if self.flip(0.8):
                parts.append(out.loss.sum() * self.random.choice([1, 1, 0.5, -3, 0]))
            if self.flip(0.25) or not parts:
                parts.append(out.head_losses[names[0]].sum() * self.random.choice([1, 2]))
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
            while self.flip(0.4):
                self.change()
            total = self.total()
            if self.flip(0.15):  # the backward is of the heads as they were in the forward
                self.change()
            self.differentiate(total)
            self.record("hooked", self.hooked)
            self.record("gradient", [t.grad for t in self.leaves])
            form = self.random.choice(["nothing", "values", "zero"])
            with torch.no_grad():
                for leaf in self.leaves:
                    if form == "values":
                        leaf.mul_(0.9)
                    elif form == "zero":
                        leaf.grad = None
        return self.records


def run(seed: int, operations: SimpleNamespace) -> list[tuple[str, object]]:
    return Program(seed, operations).run()
