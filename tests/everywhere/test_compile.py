"""`torch.compile(fullgraph=True)`: one graph for every lambda, and the gradients of eager mode.

A compilation restarts inside PyTorch now and then, so that calls of a backend do not count graphs. What counts is a
recompilation that was asked for, which `error_on_recompile` turns into an error.
"""

import math

import pytest
import torch
from samples import assert_same, expected_gradient
from torch import nn
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from grl_ext import GRL, gradient_reversal

pytestmark = [
    pytest.mark.core,
    pytest.mark.usefixtures("path"),
    pytest.mark.filterwarnings(
        "ignore:`torch.jit.script_method` is deprecated"
    ),  # PyTorch's own, on importing its tracer
]

# A schedule as training has it: it begins at 0.
LAMBDAS = [0.0, *torch.linspace(0.1, 1.1, 11).tolist()]

no_recompilation = torch._dynamo.config.patch(error_on_recompile=True)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compare(compiled, x, *args, lambda_):
    """One step of `compiled`, which is sum(3 * reversed) of x."""
    x = x.detach().clone().requires_grad_()
    compiled(x, *args).backward()
    assert_same(x.grad, expected_gradient(torch.full_like(x, 3.0), lambda_))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.reversal = GRL(0.0)

    def forward(self, x):
        return (self.reversal(x) * 3).sum()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_module_whose_lambda_changes_every_step_is_one_graph(device, backend):
    network = Network().to(device)
    step = torch.compile(network, fullgraph=True, backend=backend)
    with no_recompilation:
        for value in LAMBDAS:
            network.reversal.lambda_ = value
            compare(step, torch.randn(4, 5, device=device), lambda_=value)


@pytest.mark.parametrize("where", ["0-d on the CPU", "0-d on the device", "per sample"])
def test_a_tensor_lambda_is_one_graph(device, where):
    step = torch.compile(
        lambda x, lambda_: (gradient_reversal(x, lambda_) * 3).sum(), fullgraph=True, backend="aot_eager"
    )
    with no_recompilation:
        for value in LAMBDAS:
            lambda_ = {
                "0-d on the CPU": torch.tensor(value),
                "0-d on the device": torch.tensor(value, device=device),
                "per sample": torch.linspace(0, value, 4, device=device)[:, None],
            }[where]
            compare(step, torch.randn(4, 5, device=device), lambda_, lambda_=lambda_)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_float_lambda_is_two_graphs_at_most(device, backend):
    step = torch.compile(lambda x, lambda_: (gradient_reversal(x, lambda_) * 3).sum(), fullgraph=True, backend=backend)
    for value in LAMBDAS[:2]:
        compare(step, torch.randn(4, 5, device=device), value, lambda_=value)
    with no_recompilation:
        for value in LAMBDAS[2:]:
            compare(step, torch.randn(4, 5, device=device), value, lambda_=value)


def test_dynamic_shapes_are_one_graph(device):
    step = torch.compile(
        lambda x, lambda_: (gradient_reversal(x, lambda_) * 3).sum(), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    with no_recompilation:
        for rows in (3, 8, 5, 11):
            lambda_ = torch.randn(rows, 1, device=device)
            compare(step, torch.randn(rows, 5, device=device), lambda_, lambda_=lambda_)


def test_lambda_zero_gives_zeros_of_an_infinite_gradient(device):
    step = torch.compile(
        lambda x, lambda_: (gradient_reversal(x, lambda_) * float("inf")).sum(), fullgraph=True, backend="aot_eager"
    )
    for lambda_ in (torch.tensor(0.0), torch.zeros(4, 1, device=device), 0.0):
        x = torch.randn(4, 5, device=device, requires_grad=True)
        step(x, lambda_).backward()
        assert_same(x.grad, torch.zeros_like(x))


# Each derivative of sum(reversed^2) multiplies the identity's, 2x and then 2, by -lambda once. Dynamo leaves the
# backward of a Python autograd.Function out when a transform of torch.func is inside the compiled region, and says
# nothing.
TRANSFORMS = {
    "grad": (grad, lambda x: -0.75 * 2 * x),
    "vmap of grad": (lambda f: vmap(grad(f)), lambda x: -0.75 * 2 * x),
    "jvp": (lambda f: lambda x: jvp(f, (x,), (torch.ones_like(x),))[1], lambda x: (-0.75 * 2 * x).sum()),
    "grad of grad": (lambda f: grad(lambda x: grad(f)(x).sum()), lambda x: torch.full_like(x, 0.75**2 * 2)),
}


# float64 and one for each sample: the features' dtype stays all the same.
FORMS = {"float": 0.75, "0-d": torch.tensor(0.75), "per feature": torch.full((5,), 0.75, dtype=torch.float64)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_of_torch_func_compiles(device, transform, form, dtype):
    apply, expected = TRANSFORMS[transform]
    lambda_ = FORMS[form] if form != "per feature" else FORMS[form].to(device)
    compiled = torch.compile(
        apply(lambda x: gradient_reversal(x, lambda_).square().sum()), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(4, 5, device=device, dtype=dtype)
    torch.testing.assert_close(compiled(x), expected(x))


@pytest.mark.parametrize("lambda_", [0.0, torch.tensor(0.0), torch.zeros(5)], ids=["float", "0-d", "per feature"])
def test_lambda_0_gives_zeros_in_a_compiled_transform_whatever_comes_in(device, lambda_):
    lambda_ = lambda_.to(device) if isinstance(lambda_, torch.Tensor) and lambda_.dim() else lambda_
    weight = torch.tensor([math.inf, -math.inf, math.nan, 1.0, 2.0], device=device)
    compiled = torch.compile(
        grad(lambda x: (gradient_reversal(x, lambda_) * weight).sum()), fullgraph=True, backend="aot_eager"
    )
    assert_same(compiled(torch.randn(4, 5, device=device)), torch.zeros(4, 5, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["0-d", "per feature"])
def test_half_types_are_rounded_once_in_what_records_operators(device, dtype, form):
    lambda_ = torch.tensor(0.3) if form == "0-d" else torch.full((5,), 0.3, dtype=torch.float64, device=device)
    weight = torch.tensor([3.0, 7.0, 11.0, 13.0, 999.0], device=device, dtype=dtype)
    x = torch.randn(4, 5, device=device, dtype=dtype, requires_grad=True)

    def loss(x):
        return (gradient_reversal(x, lambda_) * weight).sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    compiled = torch.compile(grad(loss), fullgraph=True, backend="aot_eager")
    assert_same(compiled(x.detach()), expected)
    recorded = make_fx(lambda x: torch.autograd.grad(loss(x), x)[0])(x)
    assert_same(recorded(x), expected)


def test_features_that_are_not_finite_keep_their_value_in_a_compiled_transform(device):
    x = torch.tensor([1.0, math.inf, -math.inf, math.nan], device=device)
    compiled = torch.compile(vmap(lambda x: gradient_reversal(x, 0.5)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "lambda_", [0.75, torch.tensor(0.75), torch.full((4, 1), 0.75)], ids=["float", "0-d", "per sample"]
)
def test_forward_and_backward_trace_into_aten_operators_only(device, lambda_):
    lambda_ = lambda_.to(device) if isinstance(lambda_, torch.Tensor) and lambda_.dim() else lambda_

    def gradient(x):
        return torch.autograd.grad((gradient_reversal(x, lambda_) * 3).sum(), x)[0]

    x = torch.randn(4, 5, device=device, requires_grad=True)
    graph = make_fx(gradient)(x)
    operators = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    assert operators and all(operator.namespace == "aten" for operator in operators)
    other = torch.randn(4, 5, device=device, requires_grad=True)
    assert_same(graph(other), torch.full_like(other, -0.75 * 3))
