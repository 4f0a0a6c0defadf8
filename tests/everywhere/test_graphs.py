"""The layer and `grl_linear` in every kind of graph that PyTorch makes of a program: the gradient stays reversed in
each."""

import io
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from samples import assert_same
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.export.experimental import _export_forward_backward

from grl_ext import GRL, GRLLinear, LambdaScheduler, gradient_reversal, grl_linear, schedules

pytestmark = [
    pytest.mark.core,
    pytest.mark.usefixtures("path"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),  # PyTorch's own notices that TorchScript is deprecated
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]

LAMBDA = 0.3


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.reversal, self.linear = GRL(LAMBDA), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.reversal(x))


class LayerWithNumber(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.reversal(x, LAMBDA))


class FunctionWithNumber(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(gradient_reversal(x, LAMBDA))


class FunctionWithTensor(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(gradient_reversal(x, torch.full((x.shape[0], 1), LAMBDA)))


class LinearLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = GRLLinear(3, 2, lambda_=LAMBDA)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class LinearWithNumber(LinearLayer):
    def forward(self, x: Tensor) -> Tensor:
        return grl_linear(x, self.linear.weight, self.linear.bias, LAMBDA)


ADVERSARIES = [Layer, LayerWithNumber, FunctionWithNumber, FunctionWithTensor, LinearLayer, LinearWithNumber]


class Network(nn.Module):
    """Features that are trained, and the adversary over them."""

    def __init__(self, adversary: type[nn.Module]):
        super().__init__()
        self.features, self.adversary = nn.Linear(4, 3), adversary()

    def forward(self, x: Tensor) -> Tensor:
        return self.adversary(self.features(x).tanh())


class Loss(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().sum()


def expected_gradients(network: Network, x: Tensor) -> dict[str, Tensor]:
    """By plain PyTorch: the features' own gradients times -lambda, the adversary's as they are."""
    features, linear = network.features, network.adversary.linear
    loss = F.linear(features(x).tanh(), linear.weight, linear.bias).square().sum()
    own, adversary = (torch.autograd.grad(loss, list(m.parameters()), retain_graph=True) for m in (features, linear))
    names = [f"features.{n}" for n, _ in features.named_parameters()] + [
        f"adversary.linear.{n}" for n, _ in linear.named_parameters()
    ]
    return dict(zip(names, [*(-LAMBDA * g for g in own), *adversary], strict=True))


def check(network: Network, call: Callable[[Tensor], Tensor], parameters: dict[str, Tensor] | None = None) -> None:
    """`call` is some form of `network`, whose parameters or copies of them are `parameters`."""
    x = torch.randn(5, 4)
    parameters = dict(network.named_parameters()) if parameters is None else parameters
    gradients = torch.autograd.grad(call(x).square().sum(), [parameters[n] for n, _ in network.named_parameters()])
    for (name, expected), actual in zip(expected_gradients(network, x).items(), gradients, strict=True):
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(params=ADVERSARIES, ids=lambda kind: kind.__name__)
def network(request) -> Network:
    return Network(request.param)


# --- torch.export
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_an_exported_program_is_reversed(network, strict):
    program = torch.export.export(network, (torch.randn(5, 4),), strict=strict)
    module = program.module()
    check(network, module, dict(module.named_parameters()))


def test_an_exported_program_of_any_batch_size_is_reversed(network):
    rows = torch.export.Dim("rows", min=2)
    module = torch.export.export(network, (torch.randn(7, 4),), dynamic_shapes=({0: rows},)).module()
    check(network, module, dict(module.named_parameters()))


def test_a_program_that_was_saved_and_loaded_is_reversed(network):
    file = io.BytesIO()
    torch.export.save(torch.export.export(network, (torch.randn(5, 4),)), file)
    file.seek(0)
    module = torch.export.load(file).module()
    check(network, module, dict(module.named_parameters()))


@pytest.mark.parametrize("kind", ADVERSARIES, ids=lambda kind: kind.__name__)
def test_the_exported_graph_of_forward_and_backward_is_reversed(kind):
    network, x = Loss(kind), torch.randn(5, 4)
    joint = _export_forward_backward(torch.export.export(network, (x,)))
    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    inputs = [
        state[spec.target] if spec.target else x
        for spec in joint.graph_signature.input_specs
        if spec.kind.name != "CONSTANT_TENSOR"
    ]
    outputs = joint.graph_module(*inputs)
    names = [spec.target for spec in joint.graph_signature.output_specs]
    expected = expected_gradients(network, x)
    found = {name: value for name, value in zip(names, outputs, strict=True) if name in expected}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


def test_decompositions_leave_operators_of_pytorch_only(network):
    # For inference, where grl_ext is not installed: PyTorch drops all of autograd here, `detach` too.
    program = torch.export.export(network, (torch.randn(5, 4),)).run_decompositions()
    operators = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert operators and all(operator.namespace == "aten" for operator in operators)
    x = torch.randn(5, 4)
    torch.testing.assert_close(program.module()(x), network(x))


# --- torch.jit
# -------------------------------------------------------------------------------------------------------------


def test_a_trace_is_reversed(network):
    traced = torch.jit.trace(network, (torch.randn(5, 4),))
    for _ in range(3):  # the executor optimises what it has seen before
        check(network, traced)


@pytest.mark.parametrize("saved", [False, True], ids=["", "saved and loaded"])
@pytest.mark.parametrize("kind", [Layer, LinearLayer], ids=lambda kind: kind.__name__)
def test_a_script_is_reversed(kind, saved):
    network = Network(kind)
    script = torch.jit.script(network)
    if saved:
        file = io.BytesIO()
        torch.jit.save(script, file)
        file.seek(0)
        script = torch.jit.load(file)
    for _ in range(3):
        check(network, script, dict(script.named_parameters()))


@pytest.mark.parametrize(
    "coeff", [0.5, torch.tensor(0.5), torch.full((2, 1), 0.5)], ids=["number", "0-d", "per sample"]
)
def test_a_scripted_layer_takes_a_coefficient(coeff):
    x = torch.ones(2, 3, requires_grad=True)
    torch.jit.script(GRL(LAMBDA))(x, coeff).sum().backward()
    assert_same(x.grad, torch.full_like(x, -0.5))


@pytest.mark.parametrize("coeff", [math.nan, math.inf, -math.inf])
def test_a_scripted_layer_refuses_a_coefficient_that_is_not_finite(coeff):
    with pytest.raises(torch.jit.Error, match="lambda_ must be finite"):
        torch.jit.script(GRL(LAMBDA))(torch.ones(2, 3, requires_grad=True), coeff)


def test_the_lambda_of_a_script_and_of_a_trace_can_be_set():
    layer = GRL(LAMBDA)
    for graph in (torch.jit.script(layer), torch.jit.trace(layer, (torch.ones(2, 3, requires_grad=True),))):
        x = torch.ones(2, 3, requires_grad=True)
        layer.lambda_ = 0.5  # the buffer is shared
        graph(x).sum().backward()
        assert_same(x.grad, torch.full_like(x, -0.5))


# --- torch.fx
# --------------------------------------------------------------------------------------------------------------


def test_a_symbolic_trace_is_reversed(network):
    if isinstance(network.adversary, FunctionWithTensor):
        pytest.skip("torch.full cannot be traced symbolically with a size that is not known")
    traced = torch.fx.symbolic_trace(network)
    check(network, traced)


def test_linearize_goes_through(network):
    x, tangent = torch.randn(5, 4), torch.randn(5, 4)
    _, pushforward = torch.func.linearize(network, x)
    torch.testing.assert_close(pushforward(tangent), torch.func.jvp(network, (x,), (tangent,))[1])


# --- compiled autograd
# -----------------------------------------------------------------------------------------------------


def test_compiled_autograd_of_an_eager_forward_is_reversed(network):
    def call(x):
        y = network(x)
        y.register_hook(lambda grad: grad * 1)
        return y

    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        network.zero_grad()
        x = torch.randn(5, 4)
        call(x).square().sum().backward()
    for name, expected in expected_gradients(network, x).items():
        torch.testing.assert_close(network.get_parameter(name).grad, expected)


@pytest.mark.parametrize("frozen", ["features", "adversary"])
@pytest.mark.parametrize("kind", [Layer, LinearLayer], ids=lambda kind: kind.__name__)
def test_compiled_autograd_where_a_part_is_frozen(kind, frozen):
    network = Network(kind)
    getattr(network, frozen).requires_grad_(False)
    x = torch.randn(5, 4)
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        network(x).square().sum().backward()
    network.requires_grad_()
    for name, expected in expected_gradients(network, x).items():
        gradient = network.get_parameter(name).grad
        assert gradient is None if name.startswith(frozen) else torch.testing.assert_close(gradient, expected) is None


def test_compiled_autograd_makes_no_graph_for_each_lambda():
    layers = [GRL(), GRLLinear(3, 3, bias=False)]
    with torch.no_grad():
        layers[1].weight.copy_(torch.eye(3))
    captures = torch._dynamo.utils.counters["compiled_autograd"]
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        for layer in layers:
            captures.clear()
            for lambda_ in (0.25, 0.5, 0.0, -0.5, 1.0):
                layer.lambda_ = lambda_
                x = torch.ones(2, 3, requires_grad=True)
                layer(x).sum().backward()
                assert_same(x.grad, torch.full_like(x, -lambda_) + 0.0)
            assert captures["captures"] <= 2  # PyTorch makes a second one of its own accord


# --- torch.compile
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("value", [lambda v: v, lambda v: torch.tensor(v)], ids=["number", "tensor"])
@pytest.mark.parametrize("make", [GRL, lambda: GRLLinear(3, 2)], ids=["GRL", "GRLLinear"])
def test_lambda_written_inside_a_compiled_region_is_kept(backend, value, make):
    # PyTorch loses in-place writes to a 0-d float64 CPU tensor itself there.
    layer = make()
    write = torch.compile(lambda v: setattr(layer, "lambda_", v), backend=backend, fullgraph=True)
    for expected in (0.25, 0.5, 0.0, 0.75):
        write(value(expected))
        assert layer.lambda_.item() == expected


def test_a_compiled_scheduler_step_writes_lambda():
    layer = GRL(0.5)
    scheduler = LambdaScheduler(layer, schedules.dann(), total_steps=8)
    step = torch.compile(scheduler.step, backend="aot_eager")
    for k in range(1, 9):
        step()
        assert scheduler.last_step == k
        assert layer.lambda_.item() == pytest.approx(0.5 * schedules.dann()(k / 8), abs=1e-12)


@pytest.mark.parametrize("kind", [Layer, LinearLayer], ids=lambda kind: kind.__name__)
def test_a_whole_compiled_training_step_trains_as_the_eager_one(kind):
    curves = []
    for compiled in (False, True):
        torch.manual_seed(1)
        network = Network(kind)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        scheduler = LambdaScheduler(network, schedules.linear(0.0, 1.0), total_steps=4)

        def step(x):
            optimizer.zero_grad()  # noqa: B023
            loss = network(x).square().sum()  # noqa: B023
            loss.backward()
            optimizer.step()  # noqa: B023
            scheduler.step()  # noqa: B023
            return loss.detach()

        if compiled:
            torch._dynamo.reset()
            step = torch.compile(step, backend="aot_eager")
        lambda_ = next(iter(network.buffers()))
        curve = []
        for _ in range(5):
            loss = step(torch.randn(5, 4))
            curve.append(torch.tensor([loss.item(), lambda_.item(), *network.features.weight.flatten().tolist()]))
        curves.append(torch.stack(curve))
    torch.testing.assert_close(*curves)


def test_a_change_between_a_compiled_forward_and_its_backward_never_reaches_it():
    # Where the graph saves lambda's buffer itself, PyTorch says that the forward's value is gone. Where it saves what
    # it computed from it, as without kernels in torch 2.8, the backward has the forward's value, as it does eagerly.
    layer = GRL(LAMBDA)
    x = torch.ones(3, requires_grad=True)
    y = torch.compile(layer, backend="aot_eager")(x)
    layer.lambda_ = 0.5
    try:
        y.sum().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(x.grad, torch.full_like(x, -LAMBDA))


@pytest.mark.parametrize("lambda_", [torch.tensor(2), torch.tensor(2.0), torch.tensor(2, dtype=torch.uint8)], ids=str)
def test_a_dispatch_mode_does_not_delay_the_reading_of_lambda(lambda_):
    x, lambda_ = torch.ones(3, requires_grad=True), lambda_.clone()
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        y = gradient_reversal(x, lambda_)
        lambda_.zero_()
        y.sum().backward()
    assert_same(x.grad, torch.full_like(x, -2.0))
