"""`grl_ext.testing.reverses`: what it finds, what it says that it cannot tell, and that it leaves all as it was."""

import copy

import pytest
import torch
from torch import nn

from grl_ext import GRL, AdversarialHeads, GRLLinear, gradient_reversal
from grl_ext.testing import reverses

pytestmark = pytest.mark.usefixtures("path")


class Scaled(torch.autograd.Function):
    """The identity, with a gradient times a factor; no word of a reversal in its name."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor * grad, None


class Hidden(nn.Module):
    def __init__(self, factor=-1.0, only_in_training=False):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))
        self.factor, self.only_in_training, self.calls = factor, only_in_training, 0

    def forward(self, x):
        self.calls += 1
        if self.training or not self.only_in_training:
            x = Scaled.apply(x, self.factor)
        return self.layers(x)


def batch(dtype=torch.float32):
    return torch.randn(5, 6, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("factor, expected", [(-1.0, True), (-0.01, True), (1.0, False), (50.0, False)])
def test_a_reversal_inside_a_forward_is_found(dtype, factor, expected):
    assert reverses(Hidden(factor).to(dtype), batch(dtype)) is expected


def test_our_own_reversals_are_found_in_modules_and_functions():
    linear = nn.Linear(6, 2)
    assert reverses(nn.Sequential(GRL(0.1), linear), batch())
    assert reverses(GRLLinear(6, 2, lambda_=3.0), batch())
    assert reverses(lambda x: linear(gradient_reversal(x, 0.5)).tanh(), batch())
    assert not reverses(nn.Sequential(GRL(0.1), GRL(0.1), linear), batch())
    assert not reverses(nn.Sequential(GRL(-1.0), linear), batch())
    heads = AdversarialHeads(6, {"digit": 3}, {"domain": [4, 2]})
    assert reverses(lambda x: heads(x)["domain"], batch())
    assert not reverses(lambda x: heads(x)["digit"], batch())


@pytest.mark.parametrize(
    "make",
    [lambda: nn.LSTMCell(6, 3), lambda: nn.TransformerEncoderLayer(6, 2, 8)],
    ids=["LSTMCell", "TransformerEncoderLayer"],
)
def test_other_layers_do_not_reverse(make):
    module = make()
    call = module if isinstance(module, nn.TransformerEncoderLayer) else lambda x: module(x)[0]
    assert not reverses(call, batch())
    assert reverses(lambda x: call(Scaled.apply(x, -0.3)), batch())


def test_a_module_is_asked_in_its_own_mode():
    module = Hidden(only_in_training=True)
    assert reverses(module, batch()) and not reverses(module.eval(), batch())
    assert not module.training


def test_everything_is_left_as_it_was():
    module, features = Hidden(), batch().requires_grad_()
    module(features).sum().backward()
    before = copy.deepcopy(module)
    gradients = [p.grad.clone() for p in (*module.parameters(), features)]
    generator = torch.get_rng_state()
    assert reverses(module, features) and reverses(module, features)
    assert torch.equal(torch.get_rng_state(), generator)
    assert module.calls == before.calls == 1 and module.training
    for (name, ours), (_, theirs) in zip(module.state_dict().items(), before.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    assert all(torch.equal(p.grad, g) for p, g in zip((*module.parameters(), features), gradients, strict=True))


def test_a_layer_that_warms_up_is_asked_about_where_it_stands():
    class WarmStart(nn.Module):
        step = 0

        def __init__(self):
            super().__init__()
            self.step = 0

        def forward(self, x):
            self.step += 1
            return 2 * Scaled.apply(x, -float(self.step - 1))

    layer = WarmStart()
    with pytest.raises(ValueError, match=r"cannot be told: no gradient arrives at the features$"):
        reverses(layer, batch())
    layer(batch())
    assert layer.step == 1 and reverses(layer, batch())


class PartReversed(nn.Module):
    def forward(self, x):
        return torch.cat([Scaled.apply(x[:, :3], -1.0), x[:, 3:]], 1)


@pytest.mark.parametrize(
    "module, why",
    [
        (lambda x: x @ torch.randn(6, 2, generator=NOISE), "two runs of the module on the same features differ"),
        (lambda x: torch.ones(5, 2), "its output does not depend on the features"),
        (lambda x: x.detach() * 2, "no gradient arrives at the features"),
        (nn.Sequential(GRL(0.0), nn.Linear(6, 2)), "no gradient arrives at the features"),
        (PartReversed(), "the gradient is neither the module's derivative nor its reverse"),
        (lambda x: x / 0, "its output or its gradient is infinite or NaN"),
    ],
    ids=["stochastic", "constant", "detached", "lambda 0", "in part", "infinite"],
)
def test_what_cannot_be_told_is_said(module, why):
    with pytest.raises(ValueError) as caught:
        reverses(module, batch())
    assert str(caught.value) == f"whether the module reverses cannot be told: {why}"


NOISE = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    "module, features, expected, text",
    [
        (nn.Linear(6, 2), [1.0], TypeError, "features must be a tensor, got list"),
        (nn.Linear(6, 2), torch.ones(5, 6).half(), TypeError, "features must be float32 or float64, got torch.float16"),
        (nn.Linear(6, 2), torch.ones(0, 6), ValueError, "features must hold values, got shape [0, 6] on cpu"),
        (
            nn.Linear(6, 2),
            torch.ones(5, 6, device="meta"),
            ValueError,
            "features must hold values, got shape [5, 6] on meta",
        ),
        (nn.LSTMCell(6, 2), torch.ones(5, 6), TypeError, "module must return one floating-point tensor, got tuple"),
        (lambda x: x > 0, torch.ones(5, 6), TypeError, "module must return one floating-point tensor, got torch.bool"),
    ],
    ids=["list", "half", "no rows", "meta", "tuple", "bool"],
)
def test_what_cannot_be_asked_is_refused(module, features, expected, text):
    with pytest.raises(expected) as caught:
        reverses(module, features)
    assert str(caught.value) == text
