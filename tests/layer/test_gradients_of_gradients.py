"""Second derivatives, forward mode, and the ways of asking autograd for a gradient.

Each pass through the layer multiplies by -lambda once, and that is all: the n-th derivative in reverse is (-lambda)^n
times the identity's. At lambda = -1 the layer is the identity for autograd too, and PyTorch's numerical checks hold for
it unchanged.
"""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from samples import assert_same
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from grl_ext import GRL, gradient_reversal

pytestmark = [pytest.mark.sanitized, pytest.mark.usefixtures("path")]

LAMBDA_SHAPES = [None, (), (3, 1), (4,), (3, 4)]


def make_lambda(shape, value, device):
    return value if shape is None else torch.full(shape, value, dtype=torch.float64, device=device)


@pytest.fixture
def x(device):
    return torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True)


@pytest.mark.parametrize("shape", LAMBDA_SHAPES, ids=str)
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated"
)  # PyTorch's own, on loading its jvp decompositions
def test_lambda_minus_one_is_the_identity_for_the_numerical_checks(x, shape):
    lambda_ = make_lambda(shape, -1.0, x.device)

    def f(x):
        return (gradient_reversal(x, lambda_) * x).sin()

    assert gradcheck(f, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(f, x, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("shape", LAMBDA_SHAPES, ids=str)
@pytest.mark.parametrize("value", [0.75, -2.0, 0.0])
def test_each_derivative_takes_one_more_factor(x, shape, value):
    # The factors are powers of two times 3: exact. The tolerance is assert_close's own for float64, for the sines.
    def derivatives(layer):
        first = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), x, create_graph=True)[0]
        return first, second, torch.autograd.grad(second.sum(), x)[0]

    ours = derivatives(lambda x: gradient_reversal(x, make_lambda(shape, value, x.device)))
    for order, (our, identity) in enumerate(zip(ours, derivatives(lambda x: x.view_as(x)), strict=True), start=1):
        torch.testing.assert_close(our, (-value) ** order * identity)


@pytest.mark.parametrize("shape", [(), (3, 1), (3, 4)], ids=str)
def test_the_double_backward_reaches_lambda(x, shape):
    # The first gradient is -lambda * w, so its derivative with respect to lambda is -w.
    lambda_ = make_lambda(shape, 0.5, x.device).requires_grad_()
    w = torch.randn_like(x)
    first = torch.autograd.grad((gradient_reversal(x, lambda_) * w).sum(), x, create_graph=True)[0]
    assert_same(torch.autograd.grad(first.sum(), lambda_)[0], (-w).sum_to_size(shape))


def test_a_gradient_penalty_trains_from_a_schedule_that_starts_at_zero(x):
    layer = GRL(0.0).to(x.device)
    weight = torch.ones_like(x, requires_grad=True)
    first = torch.autograd.grad((layer(x) * weight).square().sum(), x, create_graph=True)[0]
    first.square().sum().backward()
    assert_same(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("shape", LAMBDA_SHAPES, ids=str)
def test_forward_mode_multiplies_the_tangent_by_minus_lambda(x, shape):
    lambda_ = make_lambda(shape, 0.75, x.device)
    tangent = torch.randn_like(x)
    for primal in (x, x.detach()):
        with fwAD.dual_level():
            y = gradient_reversal(fwAD.make_dual(primal, tangent), lambda_)
            value, result = fwAD.unpack_dual(y)
            assert_same(value, primal)
            assert_same(result, -0.75 * tangent)


@pytest.mark.parametrize("shape", LAMBDA_SHAPES, ids=str)
def test_forward_mode_passes_through_the_backward(x, shape):
    lambda_ = make_lambda(shape, 0.75, x.device)
    tangent = torch.randn_like(x)
    with fwAD.dual_level():
        dual = fwAD.make_dual(x.detach().requires_grad_(), tangent)
        first = torch.autograd.grad(gradient_reversal(dual, lambda_).square().sum(), dual)[0]
        value, result = fwAD.unpack_dual(first)
    torch.testing.assert_close(value.detach(), -0.75 * 2 * x.detach())
    torch.testing.assert_close(result.detach(), 0.75**2 * 2 * tangent)


def test_vectorised_jacobian_and_batched_gradients(x):
    jacobian = torch.autograd.functional.jacobian(lambda x: gradient_reversal(x, 0.75), x, vectorize=True)
    assert_same(jacobian.view(12, 12), -0.75 * torch.eye(12, dtype=x.dtype, device=x.device))
    y = gradient_reversal(x, make_lambda((3, 1), 0.75, x.device))
    grads = torch.randn(5, 3, 4, dtype=x.dtype, device=x.device)
    assert_same(torch.autograd.grad(y, x, grads, is_grads_batched=True)[0], -0.75 * grads)


@pytest.mark.parametrize("shape", LAMBDA_SHAPES, ids=str)
def test_a_retained_graph_gives_the_same_gradient_again(x, shape):
    loss = (gradient_reversal(x, make_lambda(shape, 0.75, x.device)) * 3).sum()
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        assert_same(x.grad, torch.full_like(x, times * -0.75 * 3))


def test_the_gradient_of_an_intermediate_tensor(x):
    features = x * 2
    reversed_ = gradient_reversal(features, 0.75)
    loss = (reversed_ * 3).sum()
    above, below, leaf = torch.autograd.grad(loss, [reversed_, features, x])
    assert_same(above, torch.full_like(x, 3.0))
    assert_same(below, torch.full_like(x, -0.75 * 3))
    assert_same(leaf, torch.full_like(x, -0.75 * 3 * 2))


def test_complex_layers_at_lambda_minus_one_are_the_identity(device):
    x = torch.randn(3, dtype=torch.complex128, device=device, requires_grad=True)
    assert gradcheck(lambda x: gradient_reversal(x, -1.0) * x.conj(), x, check_forward_ad=True)
    assert gradgradcheck(lambda x: gradient_reversal(x, -1.0) * x.conj(), x)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_activation_checkpointing(x, use_reentrant):
    lambda_ = make_lambda((3, 1), 0.75, x.device)
    checkpoint(lambda x: gradient_reversal(x, lambda_).square(), x, use_reentrant=use_reentrant).sum().backward()
    assert_same(x.grad, -0.75 * 2 * x.detach())


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode_finds_nothing_to_complain_about(x):
    with torch.autograd.detect_anomaly():
        loss = gradient_reversal(x, 0.75).square().sum()
        first = torch.autograd.grad(loss, x, create_graph=True)[0]
        first.sum().backward()
    assert_same(x.grad, torch.full_like(x, 0.75**2 * 2))


def test_saved_tensor_hooks_see_a_tensor_lambda(x):
    lambda_ = make_lambda((3, 1), 0.75, x.device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t * 2):
        y = gradient_reversal(x, lambda_)
    y.sum().backward()
    assert_same(x.grad, torch.full_like(x, -0.75 * 4))
