"""Under autocast the linear operations do what `F.linear` does there, and the loss is float32 as `F.cross_entropy`'s
is."""

import pytest
import torch
import torch.nn.functional as F
from head_samples import (
    WIDE,
    assert_near,
    gradients,
    naive_linear,
    naive_logits,
    naive_loss,
    our_logits,
    our_loss,
    sample_heads,
    sample_linear,
)
from samples import assert_same
from torch import nn

from grl_ext import AdversarialHeads, grl_linear

pytestmark = [pytest.mark.sanitized, pytest.mark.usefixtures("path")]

KINDS = ("classes", "soft", "mse")
NETWORKS = {
    "grl_linear": (),
    "linear_heads": (3, 2),
    "linear_heads, wide": WIDE,
    "heads_loss": (3, 1, 2),
    "heads_loss, wide": WIDE,
    "heads_loss, several layers": ((6, 3), 2),
}
on_networks = pytest.mark.parametrize("network", NETWORKS)


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def dtype(request):
    return request.param


def networks(network, device, dtype=torch.float32, leading=(5,)):
    """The inputs, and ours and the layers' as functions of them that give a tensor."""
    if network == "grl_linear":
        sample = sample_linear(device, dtype, leading)
        lambda_ = torch.full((*leading, 1), 0.3, device=device)
        return sample.inputs, lambda *t: grl_linear(*t, lambda_), lambda *t: naive_linear(*t, lambda_)
    sample = sample_heads(device, dtype, leading, head_sizes=NETWORKS[network], kinds=KINDS)
    if "several" in network:  # numbers that no rounding carries across the corner of a ReLU
        sample = sample.map(lambda t: (t * 2).round() / 2)
    if network.startswith("linear_heads"):
        return sample.inputs, *(lambda *t, f=f: torch.cat(f(sample.of(t)), -1) for f in (our_logits, naive_logits))
    return sample.inputs, *(lambda *t, f=f: f(sample.of(t)).loss for f in (our_loss, naive_loss))


@on_networks
def test_float32_inputs_are_used_in_autocasts_dtype_and_get_float32_gradients(device, dtype, network):
    inputs, ours, naive = networks(network, device, leading=(70,))
    with torch.autocast(device.type, dtype):
        y = ours(*inputs)
    assert y.dtype == (torch.float32 if network.startswith("heads_loss") else dtype)
    # The oracle sees what autocast makes of the inputs.
    exact_inputs = [t.detach().to(dtype).double().requires_grad_() for t in inputs]
    exact = naive(*exact_inputs)
    assert_near(y.detach(), exact.detach(), dtype)
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(exact, exact_inputs, grad.double())
    for g, e in zip(torch.autograd.grad(y, inputs, grad), expected, strict=True):
        assert g.dtype == torch.float32
        assert_near(g, e, dtype)


@on_networks
def test_float64_is_left_alone(device, dtype, network):
    inputs, ours, _ = networks(network, device, torch.float64)
    plain = ours(*inputs)
    with torch.autocast(device.type, dtype):
        assert_same(ours(*inputs), plain)


@on_networks
def test_dtypes_that_autocast_makes_equal_may_differ(device, dtype, network):
    inputs, ours, _ = networks(network, device)
    cast = [t.detach().to(dtype) for t in inputs]
    with torch.autocast(device.type, dtype):
        expected = ours(*inputs)
        assert_same(ours(cast[0], *inputs[1:-1], cast[-1]), expected)


def test_logits_and_losses_have_the_dtypes_of_the_stock_functions(device, dtype):
    sample = sample_heads(device)
    with torch.autocast(device.type, dtype):
        result = our_loss(sample)
        z = F.linear(sample.x, sample.weight[0][0], sample.bias[0][0])
        stock_loss = F.cross_entropy(z, sample.targets[0])
    assert result.loss.dtype == result.head_losses[0].dtype == stock_loss.dtype
    assert {own.dtype for own in result.logits} == {z.dtype}


@on_networks
def test_the_backward_may_run_inside_the_region(device, dtype, network):
    inputs, ours, _ = networks(network, device)
    with torch.autocast(device.type, dtype):
        y = ours(*inputs)
        inside = torch.autograd.grad(y.float().sum(), inputs, retain_graph=True)
    for a, b in zip(inside, torch.autograd.grad(y.float().sum(), inputs), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("head_sizes", [(3, 2), ((6, 3), 2)], ids=str)
@pytest.mark.parametrize("asked", ["head losses", "logits"])
def test_what_a_later_pass_computes_does_not_depend_on_where_it_runs(device, dtype, head_sizes, asked):
    """A float32 forward outside of the region stays one when its backward runs inside."""
    sample = sample_heads(device, head_sizes=head_sizes)
    result = our_loss(sample)
    value = (
        sum(result.head_losses)
        if asked == "head losses"
        else result.loss + sum(z.square().sum() for z in result.logits)
    )
    outside = gradients(value, sample.inputs, retain_graph=True)
    with torch.autocast(device.type, dtype):
        inside = gradients(value, sample.inputs)
    # Plain PyTorch's own nodes round to autocast's dtype there; nothing is lost beyond that.
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=20 * torch.finfo(dtype).eps * max(1, b.abs().max().item()))


def test_the_linear_layers_backward_does_not_depend_on_where_it_runs(path, device, dtype):
    if path == "fallback":
        pytest.skip("F.linear's own backward rounds to autocast's dtype there")
    x, weight = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((6, 8), (4, 8)))
    y = grl_linear(x, weight, lambda_=0.5)
    outside = torch.autograd.grad(y.square().sum(), [x, weight], retain_graph=True)
    with torch.autocast(device.type, dtype):
        inside = torch.autograd.grad(y.square().sum(), [x, weight])
    for a, b in zip(inside, outside, strict=True):
        assert_same(a, b)


@on_networks
def test_a_gradient_penalty_works_under_autocast(device, dtype, network):
    inputs, *both = networks(network, device)
    penalties = []
    for f in both:
        with torch.autocast(device.type, dtype):
            loss = f(*inputs).float().square().sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        penalty = sum(g.float().square().sum() for g in first)
        penalties.append(gradients(penalty, inputs))
    # Between two computations in half precision, each with some ten roundings of up to half an eps.
    for a, b in zip(*penalties, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=10 * torch.finfo(dtype).eps * b.abs().max().item())


@pytest.mark.parametrize(
    "adversary",
    [2, [6, 2], nn.Sequential(nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 2))],
    ids=["linear", "layers", "first layer"],
)
def test_heads_of_float32_parameters_train_under_autocast(device, dtype, adversary):
    heads = AdversarialHeads(7, {"digit": 3}, {"domain": adversary}, lambda_=0.3).to(device)
    sample = sample_heads(device)
    rows = torch.rand(5, device=device)
    with torch.autocast(device.type, dtype):
        output = heads(sample.x, {"digit": sample.targets[0], "domain": sample.targets[1]}, sample_weight=rows)
        logits = heads(sample.x)
    heads.zero_grad()
    output.loss.backward()
    assert output.logits["digit"].dtype == output.logits["domain"].dtype == logits["domain"].dtype == dtype
    assert output.loss.dtype == output.head_losses["domain"].dtype == torch.float32
    assert {p.grad.dtype for p in heads.parameters()} == {sample.x.grad.dtype} == {torch.float32}
