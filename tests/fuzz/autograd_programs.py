"""Random autograd programs around the reversal and `grl_linear`.

A program is drawn from its seed while it runs. What it does depends on the seed, on shapes and on flags of its tensors,
never on values, so that two implementations run the same one. It records all that a user could see: results, what hooks
were given, what was held on to, and the errors. After an error it goes on, but for one in a derivative.
"""

import random
import re
import threading
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DTYPES = [torch.float32] * 6 + [torch.float64, torch.float64, torch.complex64, torch.float16, torch.bfloat16]


def kind_of(error: Exception) -> str:
    """Errors of one kind have different texts in C++ and Python."""
    text = str(error)
    for word in (
        "inplace|in-place",
        "second time|already been freed",
        "does not require grad",
        "unused|not have been used",
        "single memory location",
    ):
        if re.search(word, text):
            return f"{type(error).__name__}: {word}"
    return f"{type(error).__name__}: {text[:60]}"


class Program:
    def __init__(self, seed: int, operations: SimpleNamespace):
        self.random = random.Random(seed)
        self.numbers = torch.Generator().manual_seed(seed)
        self.operations = operations
        self.records: list[tuple[str, object]] = []
        self.hooks: list[list[Tensor]] = []
        self.held: list[Tensor] = []
        self.lambdas: list[Tensor] = []
        self.layers: list[nn.Module] = []
        self.linear_outputs: list[Tensor] = []
        self.hooked_outputs: list[Tensor] = []  # of linear_outputs
        self.may_use_threads = True
        self.recomputation = threading.Lock()  # of a checkpoint, which two threads may want at once
        self.leaves = [self.leaf() for _ in range(self.random.randint(1, 3))]
        self.live = list(self.leaves)

    # --- what a program is made of ------------------------------------------------------------------------------------

    def tensor(self, shape, dtype=torch.float32) -> Tensor:
        if dtype.is_complex:
            return torch.complex(self.tensor(shape), self.tensor(shape)).to(dtype)
        return torch.randn(tuple(shape), generator=self.numbers, dtype=torch.float64).to(dtype)

    def leaf(self) -> Tensor:
        shape = [
            self.random.choice([1, 2, 3, 4, 4, 4, 0] if self.random.random() < 0.1 else [1, 2, 4, 4])
            for _ in range(self.random.choice([0, 1, 2, 2, 2, 3]))
        ]
        t = self.tensor(shape, self.random.choice(DTYPES))
        if self.random.random() < 0.2 and t.dim() > 1:
            t = t.transpose(0, 1).contiguous().transpose(0, 1)
        return t.requires_grad_(self.random.random() < 0.85)

    def pick(self) -> Tensor:
        return self.random.choice(self.live)

    def lambda_for(self, x: Tensor) -> Tensor | float:
        value = self.random.choice([0.0, 1.0, 0.3, -0.7, 2.0, 1.0])
        form = self.random.randrange(11)
        if form < 3:
            return value if form else int(value)
        if form == 3:
            return torch.tensor(value, dtype=self.random.choice([torch.float32, torch.float64, torch.float16]))
        if form == 4:
            return torch.tensor(
                int(value),
                dtype=self.random.choice([torch.int64, torch.bool, torch.uint8 if value >= 0 else torch.int8]),
            )
        if form == 5:
            return torch.tensor(value, requires_grad=True)
        shape = list(x.shape)
        if form == 6:
            shape = [1] * min(1, len(shape))
        elif form == 7:
            shape = [shape[0]] + [1] * (len(shape) - 1) if shape else []
        elif form == 8:
            shape = shape[-1:]
        elif form == 9:
            shape = [1 if self.random.random() < 0.5 else size for size in shape]
        dtype = self.random.choice([torch.float32, torch.float64])
        t = self.tensor(shape, dtype) * self.random.choice([0.0, 1.0, 1.0])
        if self.random.random() < 0.2:
            t = t.requires_grad_()
        elif t.dim() and t.numel() and self.random.random() < 0.3:
            t = torch.stack([t, t], -1)[..., 0]
        return t

    def reverse(self, x: Tensor) -> Tensor:
        if self.random.random() < 0.3:
            if not self.layers or self.random.random() < 0.5:
                self.layers.append(self.operations.GRL(self.random.choice([0.5, 1.0, 0.0])))
            return self.random.choice(self.layers)(x)
        lambda_ = self.lambda_for(x)
        if isinstance(lambda_, Tensor):
            self.lambdas.append(lambda_)
        return self.operations.gradient_reversal(x, lambda_)

    def linear(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.is_complex():
            return self.reverse(x)
        rows = self.random.choice([1, 2, 4])
        weight = self.tensor((rows, x.shape[-1]), x.dtype).requires_grad_(self.random.random() < 0.7)
        bias = self.tensor((rows,), x.dtype).requires_grad_() if self.random.random() < 0.5 else None
        self.leaves += [t for t in (weight, bias) if t is not None]
        lambda_ = self.lambda_for(x)
        if isinstance(lambda_, Tensor):
            self.lambdas.append(lambda_)
        if not self.linear_outputs:
            self.records.append(("fused", True))
        self.linear_outputs.append(self.operations.grl_linear(x, weight, bias, lambda_))
        return self.linear_outputs[-1]

    def unary(self, x: Tensor) -> Tensor:
        return self.random.choice(
            [
                torch.sin,
                torch.tanh,
                torch.neg,
                torch.clone,
                torch.square,
                lambda t: t * 0.5,
                lambda t: t + 1,
                torch.abs,
                Tensor.contiguous,
            ]
        )(x)

    def binary(self, x: Tensor) -> Tensor:
        others = [t for t in self.live if t.shape == x.shape and t.dtype == x.dtype]
        other = self.random.choice(others)
        # Without the product PyTorch gives both the same memory as .grad where they have one element, and adds to it
        # twice: the gradients of stack and sum are views of one number.
        forms = [torch.add, torch.mul, torch.sub, lambda a, b: (torch.stack([a, b]) * 1).sum(0)]
        return self.random.choice(forms)(x, other)

    def view(self, x: Tensor) -> Tensor:
        forms: list[Callable[[Tensor], Tensor]] = [
            lambda t: t.view_as(t),
            lambda t: t.unsqueeze(0),
            lambda t: t[None],
            lambda t: t.expand(2, *t.shape),
        ]
        if x.dim():
            forms += [
                lambda t: t.transpose(0, -1),
                lambda t: t[..., ::2],
                lambda t: t.narrow(0, 0, (t.shape[0] + 1) // 2),
                lambda t: t.flip(0),
                lambda t: t.flatten(),
            ]
            forms += [lambda t: t.chunk(2)[0], lambda t: t[: t.shape[0] // 2]]
            if x.shape[0]:
                forms += [lambda t: t[0], lambda t: t.unbind()[-1], lambda t: t.sum(0, keepdim=True)]
        if x.is_complex():
            forms += [lambda t: t.real, lambda t: t.imag, lambda t: t.conj()]
        return self.random.choice(forms)(x)

    def cast(self, x: Tensor) -> Tensor:
        if x.is_complex():
            return x.to(self.random.choice([torch.complex64, torch.complex128]))
        return x.to(self.random.choice([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]))

    def chain(self, x: Tensor) -> Tensor:
        for _ in range(self.random.randint(1, 3)):
            x = self.random.choice([self.unary, self.reverse, self.reverse, self.linear, self.view])(x)
        return x

    def checkpointed(self, x: Tensor) -> Tensor:
        state = self.random.getstate(), self.numbers.get_state()
        leaves, lambdas, layers = list(self.leaves), list(self.lambdas), list(self.layers)
        made: dict[str, object] = {}

        def segment(t):
            with self.recomputation:
                return compute(t)

        def compute(t):
            # Recomputation runs the very same calls; only what was drawn the first time is kept.
            after = self.random.getstate(), self.numbers.get_state(), self.leaves, self.lambdas, self.layers
            self.random.setstate(state[0])
            self.numbers.set_state(state[1])
            self.leaves, self.lambdas, self.layers = list(leaves), list(lambdas), list(layers)
            try:
                return self.pure_chain(t)
            finally:
                if not made:
                    made["done"] = True
                else:
                    self.random.setstate(after[0])
                    self.numbers.set_state(after[1])
                self.leaves, self.lambdas, self.layers = after[2:]

        reentrant = self.random.random() < 0.2
        self.may_use_threads &= not reentrant  # its backward inside a backward adds to .grad, from each thread
        return checkpoint(segment, x, use_reentrant=reentrant)

    def pure_chain(self, x: Tensor) -> Tensor:
        """Without parameters of its own, which a recomputation would make anew."""
        for _ in range(self.random.randint(1, 3)):
            if self.random.random() < 0.5:
                x = self.unary(x)
            else:
                x = self.operations.gradient_reversal(
                    x, self.random.choice([0.0, 0.5, -2, torch.tensor(0.3), torch.full(x.shape, 0.25)])
                )
        return x

    def hook(self, x: Tensor) -> None:
        form = self.random.randrange(6)
        given: list[Tensor] = []
        self.hooks.append(given)

        def keep(grad: Tensor) -> None:
            given.append(grad.detach().clone())
            if form == 0:
                self.held.append(grad)  # must never be overwritten

        def keep_all(grads: tuple[Tensor | None, ...]) -> None:
            for grad in grads:
                if grad is not None:
                    keep(grad)

        # PyTorch makes the grad_fn of a view whose base was modified when it is asked for. In register_hook() it does
        # so at a moment that makes plain PyTorch crash: y = x.view(-1); x.mul_(2); y.register_hook(...).
        _ = x.grad_fn
        if any(x is y for y in self.linear_outputs):
            self.hooked_outputs.append(x)
        if form <= 1:
            x.register_hook(keep)
        elif form == 2:
            x.register_hook(lambda grad: grad * 0.5)
        elif form == 3:
            x.retain_grad()
            self.may_use_threads = False  # two of them would add to x.grad at once
        elif x.grad_fn is None or any(x is y for y in self.linear_outputs):
            pass  # the node of a fused operation is its own affair
        elif form == 4:
            x.grad_fn.register_prehook(keep_all)
        elif (
            x.grad_fn.next_functions[0][0] is not None
        ):  # else PyTorch's own nodes compute nothing, a Python Function all the same
            x.grad_fn.register_hook(lambda ins, outs: keep_all(ins))

    def modify(self, x: Tensor) -> None:
        memory = x.untyped_storage().data_ptr()
        if any(memory == y.untyped_storage().data_ptr() for y in self.hooked_outputs):
            return  # F.linear's result is a view where it has a bias and more than two dimensions, and loses its hooks
        others = [t for t in self.live if t.shape == x.shape and t.dtype == x.dtype and t is not x]
        forms: list[Callable[[], object]] = [lambda: x.mul_(2), lambda: x.add_(1), lambda: x.zero_(), lambda: x.neg_()]
        if x.dim() and x.shape[0]:
            forms += [lambda: x[0].zero_(), lambda: x[:1].mul_(3)]
        if others:
            other = self.random.choice(others)
            forms += [lambda: x.add_(other), lambda: x.copy_(other), lambda: x.add_(other)]
        self.random.choice(forms)()

    def step(self) -> None:
        x = self.pick()
        action = self.random.choices(
            [
                "unary",
                "binary",
                "view",
                "reverse",
                "linear",
                "checkpointed",
                "cast",
                "hook",
                "modify",
                "lambda",
                "no_grad",
                "detach",
            ],
            [5, 4, 4, 8, 4, 1, 1, 3, 2, 1, 1, 1],
        )[0]
        if action == "hook":
            if x.requires_grad:
                self.hook(x)
        elif action == "modify":
            self.modify(x)
        elif action == "lambda":
            if self.layers and self.random.random() < 0.5:
                self.random.choice(self.layers).lambda_ = self.random.choice([0.0, 0.25, 1.5])
            elif self.lambdas:
                lambda_ = self.random.choice(self.lambdas)
                if lambda_.dim() == 0 and not lambda_.requires_grad:
                    lambda_.fill_(1)  # which concerns later calls only
        elif action == "no_grad":
            with torch.no_grad():
                self.live.append(self.chain(x))
        elif action == "detach":
            self.live.append(self.pick().detach().requires_grad_(self.random.random() < 0.5))
        else:
            self.live.append(getattr(self, action)(x))

    def read(self, index: int, t: Tensor) -> None:
        self.records.append((f"tensor {index}", t.detach().clone()))
        self.records.append((f"requires grad {index}", t.requires_grad))
        if t.is_leaf or t.retains_grad:
            self.records.append((f"gradient {index}", None if t.grad is None else t.grad.detach().clone()))

    # --- running it ---------------------------------------------------------------------------------------------------

    def attempt(self, what: str, action: Callable[[], object]) -> None:
        before = len(self.live)
        try:
            action()
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            self.records.append((f"{what} failed", kind_of(error)))
            del self.live[before:]
        if len(self.live) > before and self.live[-1].numel() > 4096:
            self.live.pop()

    def loss(self) -> Tensor:
        roots = self.random.sample(self.live, min(len(self.live), self.random.randint(1, 3)))
        total = torch.zeros((), dtype=torch.float64)
        for root in roots:
            total = total + (root.abs() if root.is_complex() else root).double().sum()
        return total

    def differentiate(self, index: int, last: bool) -> None:
        form = self.random.choice(["backward", "backward", "twice", "grad", "given", "second order", "threads"])
        if form == "threads" and not self.may_use_threads:
            form = "grad"
        inputs = self.random.sample(self.leaves, self.random.randint(1, len(self.leaves)))
        inputs = [t for t in inputs if t.requires_grad] or self.leaves[:1]
        retain = not last

        def record(name: str, gradients) -> None:
            for i, gradient in enumerate(gradients):
                self.records.append((f"{index} {name} {i}", None if gradient is None else gradient.detach().clone()))
                if gradient is not None and self.random.random() < 0.3:
                    self.held.append(gradient)

        if form == "backward":
            self.loss().backward(retain_graph=retain)
        elif form == "twice":
            loss = self.loss()
            loss.backward(retain_graph=True)
            loss.backward(retain_graph=retain)
        elif form == "grad":
            record("grad", torch.autograd.grad(self.loss(), inputs, retain_graph=retain, allow_unused=True))
        elif form == "given":
            root = self.pick()
            gradient = self.tensor(root.shape, root.dtype)
            self.held.append(gradient)
            root.backward(gradient, retain_graph=retain)
        elif form == "second order":
            first = torch.autograd.grad(self.loss(), inputs, create_graph=True, allow_unused=True)
            record("first", first)
            differentiable = [g for g in first if g is not None and g.requires_grad]
            parameters = [t for t in [*self.leaves, *self.lambdas] if t.requires_grad and t.is_leaf]
            second = [None] * len(parameters)
            if differentiable:
                total = sum((g.abs() if g.is_complex() else g).double().square().sum() for g in differentiable)
                second = torch.autograd.grad(total, parameters, retain_graph=retain, allow_unused=True)
            if self.linear_outputs:  # F.linear's result may be a view, which has a graph after zero_() too
                second = [torch.zeros_like(t) if g is None else g for t, g in zip(parameters, second, strict=True)]
            record("second", second)
        else:
            losses, results = [self.loss(), self.loss()], [None, None]

            def work(i):
                try:
                    results[i] = torch.autograd.grad(losses[i], inputs, retain_graph=True, allow_unused=True)
                except RuntimeError as error:
                    results[i] = kind_of(error)

            # Which thread is first is not determined, so that hooks and what they hold are left out.
            kept, self.held, calls = self.held, [], [len(given) for given in self.hooks]
            threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.held = kept
            for given, before in zip(self.hooks, calls, strict=True):
                del given[before:]
            for i, result in enumerate(results):
                self.records.append((f"{index} thread {i}", result)) if isinstance(result, str) else record(
                    f"thread {i}", result
                )

    def run(self) -> list[tuple[str, object]]:
        for index in range(self.random.randint(3, 14)):
            self.attempt(f"step {index}", self.step)
        derivatives = self.random.randint(1, 3)
        for index in range(derivatives):
            self.attempt(f"derivative {index}", lambda index=index: self.differentiate(index, index == derivatives - 1))
            if self.records and self.records[-1][0] == f"derivative {index} failed":
                return self.records  # what it had done by then depends on the number of nodes
            if self.random.random() < 0.3:
                self.attempt(f"step after derivative {index}", self.step)
        for i, t in enumerate([*self.leaves, *self.live]):
            self.attempt(f"reading {i}", lambda i=i, t=t: self.read(i, t))
        for i, t in enumerate([*self.held, *self.lambdas]):
            self.records.append((f"held {i}", t.detach().clone()))
            self.records.append((f"gradient of held {i}", t.grad if t.is_leaf else None))
        # By hook: which of two is called first depends on the number of nodes between.
        self.records += [(f"hook {i}", grad) for i, given in enumerate(self.hooks) for grad in given]
        return self.records


def run(seed: int, operations: SimpleNamespace) -> list[tuple[str, object]]:
    return Program(seed, operations).run()
