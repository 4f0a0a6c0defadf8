"""`torch.compile(fullgraph=True)` of the linear operations: one graph for every lambda, and the gradients of eager
mode."""

import pytest
import torch
from head_samples import DEEP, gradients, our_logits, our_loss, sample_heads, sample_linear
from torch import nn
from torch._dynamo import compiled_autograd

from grl_ext import AdversarialHeads, GRLLinear, _paths, grl_linear, heads_loss, linear_heads

pytestmark = [
    pytest.mark.core,
    pytest.mark.sanitized,
    pytest.mark.usefixtures("path"),
    pytest.mark.filterwarnings(
        "ignore:`torch.jit.script_method` is deprecated"
    ),  # PyTorch's own, on importing its tracer
]

LAMBDAS = [0.0, 0.1, 0.35, 1.0]

no_recompilation = torch._dynamo.config.patch(error_on_recompile=True)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def same_step(compiled, eager, inputs, *args, **tolerance):
    """The value and all gradients, compiled and eager. The tolerances are assert_close's, for sums in another order."""
    results = []
    for f in (compiled, eager):
        y = f(*inputs, *args)
        results.append([y.detach(), *gradients(y, [t for t in inputs if t.requires_grad])])
    torch.testing.assert_close(*results, **tolerance)


def total(result):
    """A number in which all that a loss returns takes part."""
    return result.loss * 2 + result.head_losses[1].square() + sum(z.sin().sum() for z in result.logits)


# Functions of the inputs, then targets, weights of the rows, and lambda.
FUNCTIONS = {
    "grl_linear": ((5,), lambda x, w, b, t, rows, lambda_: grl_linear(x, w, b, lambda_).sin().sum()),
    "linear_heads": (
        (3, 2),
        lambda x, w, v, a, b, t, rows, lambda_: sum(
            z.sin().sum() for z in linear_heads(x, [w, v], [a, b], lambda_=[None, lambda_])
        ),
    ),
    "heads_loss": (
        (3, 2),
        lambda x, w, v, a, b, t, rows, lambda_: (
            heads_loss(
                x,
                [w, v],
                [a, b],
                t,
                lambda_=[None, lambda_],
                sample_weight=rows,
                loss_weight=[1.0, 0.5],
                label_smoothing=0.1,
            ).loss
            * 2
        ),
    ),
    "heads_loss, all that it returns": (
        (3, 2),
        lambda x, w, v, a, b, t, rows, lambda_: total(
            heads_loss(x, [w, v], [a, b], t, lambda_=[None, lambda_], sample_weight=[None, rows])
        ),
    ),
    "heads_loss, several layers": (
        ((4, 3), 2),
        lambda x, w, u, v, a, c, b, t, rows, lambda_: total(
            heads_loss(
                x,
                [[w, u], v],
                [[a, c], b],
                t,
                lambda_=[lambda_, None],
                losses=["mse", "cross_entropy"],
                reduction="sum",
            )
        ),
    ),
}
on_functions = pytest.mark.parametrize("function", FUNCTIONS)


def sample_of(function, device, rows):
    sizes = FUNCTIONS[function][0]
    if function == "grl_linear":
        return sample_linear(device, leading=(rows,)).inputs, [], torch.rand(rows, device=device)
    kinds = ("mse", "classes") if "layers" in function else ("classes", "soft")
    sample = sample_heads(device, leading=(rows,), head_sizes=sizes, kinds=kinds)
    return sample.inputs, sample.targets, torch.rand(rows, device=device)


@on_functions
def test_a_tensor_lambda_is_one_graph(device, function):
    f = FUNCTIONS[function][1]
    step = torch.compile(f, fullgraph=True, backend="aot_eager")
    with no_recompilation:
        for value in LAMBDAS:
            inputs, targets, rows = sample_of(function, device, 70)
            same_step(step, f, inputs, targets, rows, torch.tensor(value, device=device))


@on_functions
def test_the_number_of_rows_may_change(device, function):
    f = FUNCTIONS[function][1]
    step = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    with no_recompilation:
        for count in (9, 70, 11, 64):  # not another size of the sample: equal sizes are one symbol in the graph
            inputs, targets, rows = sample_of(function, device, count)
            same_step(step, f, inputs, targets, rows, torch.tensor(0.3, device=device))


class Network(nn.Module):
    """All ways of putting an adversary onto features."""

    def __init__(self):
        super().__init__()
        self.hidden = GRLLinear(7, 4, lambda_=0.0)
        custom = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
        given = nn.Sequential(nn.Tanh(), nn.Linear(7, 2))
        self.heads = AdversarialHeads(
            7,
            {"digit": 3},
            {"domain": 2, "speaker": [5, 4], "first": custom, "given": given},
            lambda_=0.0,
            losses={"first": "mse"},
        )

    def forward(self, x, targets, rows):
        out = self.heads(x, targets, sample_weight={"domain": rows}, label_smoothing=0.1, loss_weight={"digit": 0.5})
        return (
            out.loss
            + self.hidden(x).square().mean()
            + self.heads(x)["speaker"].sin().mean()
            + out.logits["digit"].square().mean()
        )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_modules_whose_lambda_changes_every_step_are_one_graph(device, backend):
    network = Network().to(device)
    step = torch.compile(network, fullgraph=True, backend=backend)
    names = ("domain", "speaker", "first", "given")
    with no_recompilation:
        for value in LAMBDAS[:3]:
            network.hidden.lambda_ = value
            network.heads.lambda_ = {name: value / (i + 1) for i, name in enumerate(names)}
            x = torch.randn(70, 7, device=device, requires_grad=True)
            targets = {
                name: torch.randint(size, (70,), device=device)
                for name, size in zip(("digit", "domain", "speaker", "given"), (3, 2, 4, 2), strict=True)
            }
            targets["first"] = torch.randn(70, 3, device=device)
            rows = torch.rand(70, device=device)
            inputs = [x, *network.parameters()]
            results = []
            for f in (step, network):
                loss = f(x, targets, rows)
                results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
            torch.testing.assert_close(*results)


def test_frozen_inputs_stay_frozen(device):
    f = FUNCTIONS["heads_loss"][1]
    for frozen in (0, 1):
        torch._dynamo.reset()
        inputs, targets, rows = sample_of("heads_loss", device, 6)
        inputs[frozen].requires_grad_(False)
        step = torch.compile(f, fullgraph=True, backend="aot_eager")
        same_step(step, f, inputs, targets, rows, torch.tensor(0.3, device=device))


def test_lambda_and_weights_given_as_numbers(device):
    def loss(x, w, v, a, b, targets):
        return heads_loss(x, [w, v], [a, b], targets, lambda_=[None, 0.3], loss_weight=(1.0, 0.5), ignore_index=0).loss

    sample = sample_heads(device)
    same_step(torch.compile(loss, fullgraph=True, backend="aot_eager"), loss, sample.inputs, sample.targets)


def test_a_lambda_number_that_changes_is_two_graphs_at_most(device):
    def loss(x, w, v, a, b, targets, lambda_):
        return heads_loss(x, [w, v], [a, b], targets, lambda_=[None, lambda_]).loss

    sample = sample_heads(device)
    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for value in LAMBDAS[:2]:
        same_step(step, loss, sample.inputs, sample.targets, value)
    with no_recompilation:
        for value in LAMBDAS[2:]:
            same_step(step, loss, sample.inputs, sample.targets, value)


def test_autocast_inside_the_graph(device):
    def loss(x, w, v, a, b, targets):
        with torch.autocast(device.type, torch.bfloat16):
            logits = linear_heads(x, [w, v], [a, b], lambda_=[None, 0.3])
            return heads_loss(x, [w, v], [a, b], targets, lambda_=[None, 0.3]).loss + sum(
                z.float().sum() for z in logits
            )

    sample = sample_heads(device)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert compiled(*sample.inputs, sample.targets).dtype == torch.float32
    same_step(
        compiled, loss, sample.inputs, sample.targets, rtol=0.02, atol=0.02
    )  # bfloat16 on both sides, rounded at other places


@pytest.mark.parametrize("path", ["compiled"], indirect=True)  # about the registered operators
def test_numbers_on_the_cpu_may_be_traced_beside_features_elsewhere(path, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(_paths, "of_heads", lambda *_: _paths.Path.OPERATOR)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, weight = (
            torch.empty(4, 8, device="cuda"),
            [torch.empty(3, 8, device="cuda"), torch.empty(2, 8, device="cuda")],
        )
        targets = [torch.zeros(4, dtype=torch.int64, device="cuda")] * 2
        for lambda_ in ([None, 0.3], [None, torch.tensor(0.3)]):
            loss = heads_loss(x, weight, None, targets, lambda_=lambda_, loss_weight=[1.0, 0.5])[0]
            assert loss.device == x.device
            assert linear_heads(x, weight, lambda_=lambda_)[1].shape == (4, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Compiled autograd over an eager forward
# ---------------------------------------------------------------------------------------------------------------------


def _weighted(sample):
    rows = torch.rand(sample.x.shape[:-1], device=sample.x.device)
    return our_loss(sample, sample_weight=rows, loss_weight=[1.0, 0.5, 2.0][: len(sample.targets)], label_smoothing=0.1)


EAGER = {
    "logits": lambda sample: sum(z.sin().sum() for z in our_logits(sample)),
    "one head's logits": lambda sample: our_logits(sample)[1].sin().sum(),
    "loss": lambda sample: our_loss(sample).loss,
    "weighted loss": lambda sample: _weighted(sample).loss * 3,
    "one head's loss": lambda sample: our_loss(sample).head_losses[1] * 3,
    "all that a loss returns": lambda sample: total(_weighted(sample)),
}


@pytest.mark.parametrize(
    ("name", "head_sizes", "dtype"),
    [
        *((name, (3, 2, 1), torch.float32) for name in EAGER),
        *((name, DEEP, torch.float32) for name in EAGER if "logits" not in name),  # which has linear heads only
        ("weighted loss", (3, 2, 1), torch.float16),  # whose gradients are made in the backward
        ("weighted loss", DEEP, torch.float16),
    ],
    ids=str,
)
def test_compiled_autograd_gives_the_gradients_of_the_engine(device, name, head_sizes, dtype):
    sample = sample_heads(device, dtype, head_sizes=head_sizes, bias="mixed")
    inputs = [t for t in sample.inputs if t is not None]
    inputs[1].requires_grad_(False)  # a frozen part
    wanted = [t for t in inputs if t.requires_grad]

    def step():
        torch.manual_seed(0)
        for t in wanted:
            t.grad = None
        EAGER[name](sample).backward()
        return [t.grad for t in wanted]

    expected = step()
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        actual = step()
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        torch.testing.assert_close(a, e)


def test_compiled_autograd_makes_no_graph_for_each_lambda_of_the_heads(device):
    heads = AdversarialHeads(7, {"label": 3}, {"domain": 2, "site": [4, 1]}, device=device)
    targets = {"label": torch.tensor([0, 1, 2, 1], device=device)} | dict.fromkeys(
        ("domain", "site"), torch.tensor([0, 1, 1, 0], device=device)
    )
    captures = torch._dynamo.utils.counters["compiled_autograd"]
    captures.clear()
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        for lambda_ in (0.25, 0.5, 0.0, -0.5, 1.0):
            heads.lambda_ = lambda_
            x = torch.randn(4, 7, device=device, requires_grad=True)
            heads(x, targets).loss.backward()
            actual, x.grad = x.grad, None
            with compiled_autograd._disable():
                heads(x, targets).loss.backward()
            torch.testing.assert_close(actual, x.grad)
    assert captures["captures"] <= 2  # PyTorch makes a second one of its own accord
