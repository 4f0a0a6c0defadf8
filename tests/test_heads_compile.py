"""`torch.compile(fullgraph=True)` of the linear operations: one graph for every lambda, and the gradients of eager mode."""

import pytest
import torch
from head_samples import sample_heads
from torch import nn

from grl_ext import AdversarialHeads, GRLLinear, functional, grl_linear, heads_cross_entropy, linear_heads

pytestmark = [
    pytest.mark.usefixtures("path"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # PyTorch's own, on importing its tracer
]

LAMBDAS = [0.0, 0.1, 0.35, 0.6, 1.0]

no_recompilation = torch._dynamo.config.patch(error_on_recompile=True)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def same_step(compiled, eager, inputs, *args):
    """The value and all gradients, compiled and eager. The tolerances are assert_close's, for sums in another order."""
    results = []
    for f in (compiled, eager):
        y = f(*inputs, *args)
        results.append([y.detach(), *torch.autograd.grad(y, [t for t in inputs if t.requires_grad])])
    torch.testing.assert_close(*results)


FUNCTIONS = {
    "grl_linear": lambda x, w, b, targets, lambda_: grl_linear(x, w, b, lambda_).sin().sum(),
    "linear_heads": lambda x, w, b, targets, lambda_: linear_heads(x, w, b, [3, 2], torch.stack([torch.ones_like(lambda_), -lambda_])).sin().sum(),
    "heads_cross_entropy": lambda x, w, b, targets, lambda_: (
        heads_cross_entropy(x, w, b, targets, [3, 2], torch.stack([torch.ones_like(lambda_), -lambda_]), loss_weight=[1.0, 0.5]).loss * 2
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_tensor_lambda_is_one_graph(device, function):
    step = torch.compile(FUNCTIONS[function], fullgraph=True, backend="aot_eager")
    with no_recompilation:
        for value in LAMBDAS:
            sample = sample_heads(device, leading=(70,))
            same_step(step, FUNCTIONS[function], sample.inputs, sample.targets, torch.tensor(value, device=device))


class Network(nn.Module):
    """All three ways of putting an adversary onto features."""

    def __init__(self):
        super().__init__()
        self.hidden = GRLLinear(7, 4, lambda_=0.0)
        self.heads = AdversarialHeads(7, {"digit": 3}, {"domain": 2, "speaker": 4}, lambda_=0.0)

    def forward(self, x, digit, domain):
        loss, head_losses, logits = self.heads.loss(x, {"digit": digit, "domain": domain}, label_smoothing=0.1)
        return loss + self.hidden(x).square().mean() + self.heads(x)["speaker"].sin().mean() + 0 * logits["digit"].sum()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_modules_whose_lambda_changes_every_step_are_one_graph(device, backend):
    network = Network().to(device)
    step = torch.compile(network, fullgraph=True, backend=backend)
    with no_recompilation:
        for value in LAMBDAS:
            network.hidden.lambda_ = value
            network.heads.lambda_ = {"domain": value, "speaker": value / 2}
            sample = sample_heads(device, leading=(70,))
            x, parameters = sample.x, list(network.parameters())
            results = []
            for f in (step, network):
                loss = f(x, *sample.targets.unbind(1))
                results.append([loss.detach(), *torch.autograd.grad(loss, [x, *parameters])])
            torch.testing.assert_close(*results)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_number_of_rows_may_change(device, function):
    step = torch.compile(FUNCTIONS[function], fullgraph=True, dynamic=True, backend="aot_eager")
    with no_recompilation:
        for rows in (6, 70, 11, 64):  # not another size of the sample: equal sizes are one symbol in the graph
            sample = sample_heads(device, leading=(rows,))
            same_step(step, FUNCTIONS[function], sample.inputs, sample.targets, torch.tensor(0.3, device=device))


def test_frozen_inputs_stay_frozen(device):
    for frozen in (0, 1):
        torch._dynamo.reset()
        sample = sample_heads(device)
        sample.inputs[frozen].requires_grad_(False)
        step = torch.compile(FUNCTIONS["heads_cross_entropy"], fullgraph=True, backend="aot_eager")
        same_step(step, FUNCTIONS["heads_cross_entropy"], sample.inputs, sample.targets, torch.tensor(0.3, device=device))


def test_scales_and_weights_given_as_numbers(device):
    def loss(x, w, b, targets):
        return heads_cross_entropy(x, w, b, targets, [3, 2], [1.0, -0.3], loss_weight=(1.0, 0.5), ignore_index=0).loss

    sample = sample_heads(device)
    same_step(torch.compile(loss, fullgraph=True, backend="aot_eager"), loss, sample.inputs, sample.targets)


def test_autocast_inside_the_graph(device):
    def loss(x, w, b, targets):
        with torch.autocast(device.type, torch.bfloat16):
            return heads_cross_entropy(x, w, b, targets, [3, 2], [1.0, -0.3]).loss + linear_heads(x, w, b, [3, 2], [1.0, -0.3]).float().sum()

    sample = sample_heads(device)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for f in (compiled, loss):
        y = f(*sample.inputs, sample.targets)
        assert y.dtype == torch.float32
        results.append([y.detach(), *torch.autograd.grad(y, sample.inputs)])
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)  # bfloat16 on both sides, rounded at other places


@pytest.mark.parametrize("path", ["compiled"], indirect=True)  # about the registered operators
def test_numbers_on_the_cpu_may_be_traced_beside_features_elsewhere(path):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        x, weight = torch.empty(4, 8, device="cuda"), torch.empty(5, 8, device="cuda")
        for numbers in ([1.0, -0.3], torch.tensor([1.0, -0.3])):
            assert functional._on_device(numbers, x).device == x.device
        targets = torch.zeros(4, 2, dtype=torch.int64, device="cuda")
        scale = functional._on_device([1.0, -0.3], x)
        loss = torch.ops.grl_ext.heads_cross_entropy(x, weight, None, targets, [3, 2], scale, functional._on_device([1.0, 0.5], x))[0]
        assert loss.device == x.device
        assert torch.ops.grl_ext.linear_heads(x, weight, None, [3, 2], scale).shape == (4, 5)
