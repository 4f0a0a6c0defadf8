"""Heads of every kind, with every loss, in one compiled graph and in the recorders of graphs: the values and gradients
of eager mode, and errors that name the head."""

import copy

import pytest
import torch
from head_samples import gradients
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from grl_ext import AdversarialHeads

pytestmark = [
    pytest.mark.core,
    pytest.mark.usefixtures("path"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),  # PyTorch's own, on importing its tracer
]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Weighed(nn.Module):
    """A head with a second input."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x, factor=1.0):
        return self.linear(x.tanh()) * factor


def hinge(logits, targets):
    return (1 - logits * (2 * targets - 1)[:, None]).relu().sum(1)


# By name: the module, its loss and the kind of its targets.
KINDS = {
    "linear": (lambda: nn.Linear(4, 3), "cross_entropy"),
    "layers": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), "cross_entropy"),
    "between": (lambda: nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 1)), "mse"),
    "last": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)), "cross_entropy"),
    "tags": (lambda: nn.Linear(4, 3), "bce"),
    "tags of layers": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), "bce"),
    "critic": (lambda: nn.Linear(4, 1), hinge),
    "given": (Weighed, "cross_entropy"),
}
ADVERSARIES = ("layers", "last", "tags", "critic", "given")


def make(names=KINDS):
    torch.manual_seed(0)
    modules = {name: KINDS[name][0]() for name in names}
    adversaries = {name: module for name, module in modules.items() if name in ADVERSARIES}
    predictors = {name: module for name, module in modules.items() if name not in ADVERSARIES}
    return AdversarialHeads(4, predictors, adversaries, lambda_=0.3, losses={name: KINDS[name][1] for name in names})


def batch(names=KINDS, rows=6):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(2, (rows,), generator=generator)
    tags = torch.rand(rows, 3, generator=generator)
    targets = dict.fromkeys(names, labels)
    for name in names:
        if KINDS[name][1] == "mse":
            targets[name] = labels.float()
        elif KINDS[name][1] == "bce":
            targets[name] = tags > 0.5
    return torch.randn(rows, 4, generator=generator, requires_grad=True), targets, torch.rand(rows, generator=generator)


def same(call, heads, x, reference=None):
    """Everything that a call returns, and the gradients of a number in which all of it takes part."""
    reference = call if reference is None else reference
    results = []
    for f in (call, reference):
        leaves = torch.utils._pytree.tree_leaves(f())
        total = sum((i + 1) * leaf.float().sin().sum() for i, leaf in enumerate(leaves))
        results.append([*(leaf.detach() for leaf in leaves), *gradients(total, [x, *heads.parameters()])])
    torch.testing.assert_close(*results)


CALLS = {
    "logits": lambda heads, x, t, rows: heads(x, lambda_=rows.detach().mean()),
    "loss": lambda heads, x, t, rows: heads(x, t, sample_weight=rows, loss_weight={"linear": 0.5}, label_smoothing=0.1),
    "losses of rows": lambda heads, x, t, rows: heads(x, t, sample_weight=rows, reduction="none"),
    "weights of entries, lambda and inputs of one call": lambda heads, x, t, rows: heads(
        x,
        t,
        sample_weight={"tags": torch.stack([rows, 1 - rows, 0 * rows], 1), "between": rows[:, None]},
        lambda_={"tags": 0.7, "layers": 0.1, "given": 2.0},
        inputs={"given": {"factor": x[:, :1]}},
    ),
}
on_calls = pytest.mark.parametrize("call", CALLS)


@on_calls
def test_one_compiled_graph(device, call):
    heads, (x, targets, rows) = make(), batch()
    f = CALLS[call]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    same(lambda: compiled(heads, x, targets, rows), heads, x, lambda: f(heads, x, targets, rows))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace(device):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = make()

        def forward(self, x):
            return tuple(self.heads(x).values())

    model, (x, _, _) = Model(), batch()
    traced = torch.jit.trace(model, (x,), check_trace=False)
    same(lambda: traced(x), model, x, lambda: model(x))


@on_calls
def test_export(device, call):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = make()

        def forward(self, x, targets, rows):
            return CALLS[call](self.heads, x, targets, rows)

    model, (x, targets, rows) = Model(), batch()
    with torch.no_grad():
        exported = torch.export.export(model, (x, targets, rows)).module()
        leaves = [torch.utils._pytree.tree_leaves(f(x, targets, rows)) for f in (exported, model)]
    torch.testing.assert_close(*leaves)


@on_calls
def test_make_fx(device, call):
    heads, (x, targets, rows) = make(), batch()
    names = list(targets)

    def f(x, rows, *given):
        results = CALLS[call](heads, x, dict(zip(names, given, strict=True)), rows)
        return tuple(torch.utils._pytree.tree_leaves(results))

    inputs = [x, rows, *targets.values()]
    recorded = make_fx(f)(*inputs)
    same(lambda: recorded(*inputs), heads, x, lambda: f(*inputs))


@pytest.mark.parametrize("name", KINDS)
def test_a_bad_target_is_refused_by_the_heads_name_when_the_graph_runs(device, name):
    if KINDS[name][1] in ("mse", hinge):
        pytest.skip("any value is a target of this loss")
    heads, (x, targets, _) = make([name]), batch([name])
    bad = targets | {name: torch.full_like(targets[name], 9, dtype=torch.int64)}
    compiled = torch.compile(lambda heads, x, t: heads(x, t).loss, fullgraph=True, backend="aot_eager")
    text = rf"targets\['{name}'\] must be in"
    with pytest.raises((IndexError, ValueError), match=text):
        heads(x, bad)
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        text += r"|out of range|out of bounds|not in \[0, 1\]"  # torch 2.8 leaves assertions out of the graph
    with pytest.raises((IndexError, ValueError, RuntimeError), match=text):
        compiled(heads, x, bad)


def test_a_copy_has_its_own_functions_and_parameters(device):
    heads, (x, targets, _) = make(), batch()
    other = copy.deepcopy(heads)
    assert other.losses == heads.losses
    torch.testing.assert_close(other(x, targets).loss, heads(x, targets).loss)
