"""Under autocast the linear operations do what `F.linear` does there, and the loss is float32 as `F.cross_entropy`'s is."""

import pytest
import torch
import torch.nn.functional as F
from head_samples import SWITCH, assert_near, naive_heads, naive_linear, naive_loss, sample_heads
from samples import assert_same

from grl_ext import AdversarialHeads, grl_linear, heads_cross_entropy, linear_heads

pytestmark = pytest.mark.usefixtures("path")

OPERATIONS = ["grl_linear", "linear_heads", "heads_cross_entropy"]
SIZES = [(3, 2), (SWITCH, 2)]


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def dtype(request):
    return request.param


def networks(operation, sample):
    lambda_ = torch.full((*sample.x.shape[:-1], 1), 0.3, device=sample.x.device)
    return {
        "grl_linear": (lambda *t: grl_linear(*t, lambda_), lambda *t: naive_linear(*t, lambda_)),
        "linear_heads": (lambda *t: linear_heads(*t, *sample[4:]), lambda *t: naive_heads(*t, *sample[4:])),
        "heads_cross_entropy": (lambda *t: heads_cross_entropy(*t, *sample[3:]).loss, lambda *t: naive_loss(*t, *sample[3:])),
    }[operation]


@pytest.mark.parametrize("head_sizes", SIZES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_float32_inputs_are_used_in_autocasts_dtype_and_get_float32_gradients(device, dtype, operation, head_sizes):
    sample = sample_heads(device, leading=(70,), head_sizes=head_sizes)
    ours, naive = networks(operation, sample)
    with torch.autocast(device.type, dtype):
        y = ours(*sample.inputs)
    assert y.dtype == (torch.float32 if operation == "heads_cross_entropy" else dtype)
    # The oracle sees what autocast makes of the inputs.
    exact_inputs = [t.detach().to(dtype).double().requires_grad_() for t in sample.inputs]
    exact = naive(*exact_inputs)
    assert_near(y.detach(), exact.detach(), dtype)
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(exact, exact_inputs, grad.double())
    for g, e in zip(torch.autograd.grad(y, sample.inputs, grad), expected, strict=True):
        assert g.dtype == torch.float32
        assert_near(g, e, dtype)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_float64_is_left_alone(device, dtype, operation):
    sample = sample_heads(device, torch.float64)
    ours, _ = networks(operation, sample)
    plain = ours(*sample.inputs)
    with torch.autocast(device.type, dtype):
        assert_same(ours(*sample.inputs), plain)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_dtypes_that_autocast_makes_equal_may_differ(device, dtype, operation):
    sample = sample_heads(device)
    ours, _ = networks(operation, sample)
    with torch.autocast(device.type, dtype):
        expected = ours(*sample.inputs)
        assert_same(ours(sample.x.detach().to(dtype), sample.weight, sample.bias.detach().to(dtype)), _cast_first(ours, sample, dtype))
    assert_near(_cast_first(ours, sample, dtype).detach(), expected.detach().double(), dtype)


def _cast_first(ours, sample, dtype):
    return ours(*(t.detach().to(dtype) for t in sample.inputs))


def test_logits_and_losses_have_the_dtypes_of_the_stock_functions(device, dtype):
    sample = sample_heads(device)
    with torch.autocast(device.type, dtype):
        output = heads_cross_entropy(*sample)
        z = F.linear(*sample.inputs)
        stock_loss = F.cross_entropy(z[:, :3], sample.targets[:, 0])
    assert (output.logits.dtype, output.loss.dtype, output.head_losses.dtype) == (z.dtype, stock_loss.dtype, stock_loss.dtype)


def test_the_backward_may_run_inside_the_region(device, dtype):
    sample = sample_heads(device)
    for operation in OPERATIONS:
        ours, _ = networks(operation, sample)
        with torch.autocast(device.type, dtype):
            y = ours(*sample.inputs)
            inside = torch.autograd.grad(y.float().sum(), sample.inputs, retain_graph=True)
        for a, b in zip(inside, torch.autograd.grad(y.float().sum(), sample.inputs), strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_gradient_penalty_works_under_autocast(device, dtype, operation):
    sample = sample_heads(device)
    ours, naive = networks(operation, sample)
    penalties = []
    for f in (ours, naive):
        with torch.autocast(device.type, dtype):
            loss = f(*sample.inputs).float().square().sum()
        first = torch.autograd.grad(loss, sample.inputs, create_graph=True)
        penalty = sum(g.float().square().sum() for g in first)
        penalties.append(torch.autograd.grad(penalty, sample.inputs))
    # Between two computations in half precision, each with some ten roundings of up to half an eps.
    for a, b in zip(*penalties, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=10 * torch.finfo(dtype).eps * b.abs().max().item())


def test_heads_of_float32_parameters_train_under_autocast(device, dtype):
    heads = AdversarialHeads(7, {"digit": 3}, {"domain": 2}, lambda_=0.3).to(device)
    sample = sample_heads(device)
    with torch.autocast(device.type, dtype):
        output = heads.loss(sample.x, {"digit": sample.targets[:, 0], "domain": sample.targets[:, 1]})
        logits = heads(sample.x)
    output.loss.backward()
    assert output.logits["digit"].dtype == logits["domain"].dtype == dtype and output.loss.dtype == torch.float32
    assert {p.grad.dtype for p in heads.parameters()} == {sample.x.grad.dtype} == {torch.float32}
