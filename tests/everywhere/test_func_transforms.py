"""Compositions of `torch.func`, beyond the rows of `tests/matrix`. As in eager mode, each derivative multiplies the
identity's by -lambda once."""

import pytest
import torch
from samples import assert_same
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

from grl_ext import GRL, gradient_reversal

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("path")]

LAMBDA = 0.75  # a power of two times 3: products with it are exact


@pytest.fixture(params=["float", "0-d", "per element"])
def lambda_(request, device):
    shape = {"float": None, "0-d": (), "per element": (4,)}[request.param]
    return LAMBDA if shape is None else torch.full(shape, LAMBDA, dtype=torch.float64, device=device)


@pytest.fixture
def x(device):
    return torch.randn(4, dtype=torch.float64, device=device)


def cubes(lambda_):
    """Through the layer: sum(x^3), whose derivatives are 3x^2 and 6x."""
    return lambda x: gradient_reversal(x, lambda_).pow(3).sum()


def test_grad_of_grad(x, lambda_):
    second = grad(lambda x: grad(cubes(lambda_))(x).sum())
    torch.testing.assert_close(second(x), LAMBDA**2 * 6 * x)
    torch.testing.assert_close(grad(lambda x: second(x).sum())(x), torch.full_like(x, -(LAMBDA**3) * 6))


def test_jvp_of_grad_and_grad_of_jvp(x, lambda_):
    v = torch.randn_like(x)
    _, tangent = jvp(grad(cubes(lambda_)), (x,), (v,))
    torch.testing.assert_close(tangent, LAMBDA**2 * 6 * x * v)
    directional = lambda x: jvp(cubes(lambda_), (x,), (v,))[1]  # noqa: E731  -lambda * 3x^2 . v
    torch.testing.assert_close(grad(directional)(x), LAMBDA**2 * 6 * x * v)


def test_second_derivatives_by_every_pair_of_modes(x, lambda_):
    for second in (lambda f: jacrev(jacfwd(f)), lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))):
        torch.testing.assert_close(second(cubes(lambda_))(x), LAMBDA**2 * 6 * x.diag())


def test_vmap_of_vmap(x):
    rows = torch.randn(5, 4, dtype=x.dtype, device=x.device)
    assert_same(vmap(vmap(lambda x: gradient_reversal(x, LAMBDA)))(rows), rows)
    cubed = grad(lambda x: gradient_reversal(x, LAMBDA).pow(3))
    torch.testing.assert_close(vmap(vmap(cubed))(rows), -LAMBDA * 3 * rows**2)


def test_vmap_over_a_lambda_per_sample(device):
    x = torch.randn(5, 4, dtype=torch.float64, device=device)
    lambdas = torch.tensor([1.0, 0.5, 0.0, -0.5, 2.0], dtype=torch.float64, device=device)
    result = vmap(grad(lambda x, lambda_: gradient_reversal(x, lambda_).pow(3).sum()))(x, lambdas)
    torch.testing.assert_close(result, -lambdas[:, None] * 3 * x**2)
    one_x = vmap(grad(lambda x, lambda_: gradient_reversal(x, lambda_).pow(3).sum()), in_dims=(None, 0))(x[0], lambdas)
    torch.testing.assert_close(one_x, -lambdas[:, None] * 3 * x[0] ** 2)


def test_gradient_through_vmap(x, lambda_):
    rows = torch.randn(5, 4, dtype=x.dtype, device=x.device, requires_grad=True)
    vmap(cubes(lambda_))(rows).sum().backward()
    torch.testing.assert_close(rows.grad, -LAMBDA * 3 * rows.detach() ** 2)


def test_lambda_zero_gives_zeros_of_an_infinite_gradient(x):
    for zero in (0.0, x.new_zeros(()), torch.zeros_like(x)):
        assert_same(grad(lambda x: (gradient_reversal(x, zero) * float("inf")).sum())(x), torch.zeros_like(x))  # noqa: B023


@pytest.mark.parametrize("lambda_", [torch.tensor(2, dtype=torch.uint8), torch.tensor(True)], ids=["uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (4,)])
def test_a_lambda_of_a_type_without_negative_numbers(x, lambda_, shape):
    lambda_ = lambda_.expand(shape).to(x.device)
    expected = -int(lambda_.max()) * 3 * x**2
    torch.testing.assert_close(grad(cubes(lambda_))(x), expected)
    torch.testing.assert_close(jvp(cubes(lambda_), (x,), (torch.ones_like(x),))[1], expected.sum())
    cubes(lambda_)(x.requires_grad_()).backward()
    torch.testing.assert_close(x.grad, expected.detach())


def test_no_gradient_reaches_lambda(x):
    value, pull_back = vjp(lambda x, lambda_: gradient_reversal(x, lambda_), x, torch.full_like(x, LAMBDA))
    assert_same(pull_back(torch.ones_like(value))[1], torch.zeros_like(x))


def test_functional_call_with_another_lambda_and_per_sample_gradients(x):
    net = torch.nn.Sequential(GRL(1.0), torch.nn.Linear(4, 1, dtype=torch.float64)).to(x.device)
    rows = torch.randn(5, 4, dtype=x.dtype, device=x.device)
    state = {**dict(net.named_parameters()), "0.lambda_": torch.tensor(LAMBDA, dtype=torch.float64, device=x.device)}
    per_sample = vmap(grad(lambda x: functional_call(net, state, (x,)).sum()))(rows)
    assert_same(per_sample, (-LAMBDA * net[1].weight.detach()).expand(5, 4))
    assert net[0].lambda_.item() == 1.0
