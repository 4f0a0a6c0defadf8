"""What the rows of `tests/matrix` do not say of graphs: scripts that take a lambda, parts that are frozen, how many
graphs there are, and lambda written inside of one."""

import math

import pytest
import torch
from matrix.networks import LAMBDA, LAYER, LINEAR, batch, network, plain_like
from samples import assert_same
from torch._dynamo import compiled_autograd

from grl_ext import GRL, GRLLinear, LambdaScheduler, gradient_reversal, schedules

pytestmark = [
    pytest.mark.core,
    pytest.mark.usefixtures("path"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),  # PyTorch's own notices that TorchScript is deprecated
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]

on_layers = pytest.mark.parametrize("column", [LAYER, LINEAR])


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- torch.jit
# -------------------------------------------------------------------------------------------------------------


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


# --- compiled autograd
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["encoder", "domain"])
@on_layers
def test_compiled_autograd_where_a_part_is_frozen(column, frozen):
    made = network(column)
    plain = plain_like(made)
    for either in (made, plain):
        getattr(either, frozen).requires_grad_(False)
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        made(*batch()).backward()
    plain(*batch()).backward()
    for ours, theirs in zip(made.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.testing.assert_close(ours.grad, theirs.grad) is None


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


@on_layers
def test_a_whole_compiled_training_step_and_its_schedule_train_as_the_eager_ones(column):
    curves = []
    for compiled in (False, True):
        made = network(column)
        optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
        scheduler = LambdaScheduler(made, schedules.linear(0.0, 1.0), total_steps=4)

        def step(x, labels):
            optimizer.zero_grad()  # noqa: B023
            loss = made(x, labels)  # noqa: B023
            loss.backward()
            optimizer.step()  # noqa: B023
            scheduler.step()  # noqa: B023
            return loss.detach()

        step = torch.compile(step, backend="aot_eager") if compiled else step
        lambda_ = next(iter(made.buffers()))
        curve = []
        for seed in range(5):
            loss = step(*batch(seed=seed))
            curve.append(torch.tensor([loss.item(), lambda_.item(), *made.encoder.weight.flatten().tolist()]))
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
