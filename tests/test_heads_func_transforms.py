"""`torch.func` on the linear operations: what it gives for the network layer by layer."""

import pytest
import torch
from head_samples import naive_heads, naive_linear, naive_loss, sample_heads
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap

from grl_ext import AdversarialHeads, grl_linear, heads_cross_entropy, linear_heads

pytestmark = pytest.mark.usefixtures("path")

OPERATIONS = ["grl_linear", "linear_heads", "heads_cross_entropy"]


@pytest.fixture
def sample(device):
    sample = sample_heads(device, torch.float64, head_sizes=(3, 1, 2))
    sample.targets[0, 0] = -100
    return sample._replace(x=sample.x.detach(), weight=sample.weight.detach(), bias=sample.bias.detach())


@pytest.fixture(params=OPERATIONS)
def networks(request, sample):
    """Ours and the layers', as functions of x, weight and bias that give a tensor."""
    return {
        "grl_linear": (lambda *t: grl_linear(*t, 0.3), lambda *t: naive_linear(*t, 0.3)),
        "linear_heads": (lambda *t: linear_heads(*t, *sample[4:]), lambda *t: naive_heads(*t, *sample[4:])),
        "heads_cross_entropy": (
            lambda *t: heads_cross_entropy(*t, *sample[3:], loss_weight=[0.5, 2.0, 1.0], label_smoothing=0.1).loss,
            lambda *t: naive_loss(*t, *sample[3:], loss_weight=[0.5, 2.0, 1.0], label_smoothing=0.1),
        ),
    }[request.param]


def same(networks, transform, *args):
    ours, naive = (transform(f)(*args) for f in networks)
    torch.testing.assert_close(ours, naive)


def numbers(networks):
    """The same as functions that give one number, with second derivatives."""
    return tuple(lambda *t, f=f: f(*t).sin().sum() for f in networks)


def test_grad_of_every_input(sample, networks):
    same(numbers(networks), lambda f: grad(f, argnums=(0, 1, 2)), *sample.inputs)


def test_vjp(sample, networks):
    cotangent = torch.randn_like(networks[0](*sample.inputs))
    same(networks, lambda f: lambda *t: vjp(f, *t)[1](cotangent), *sample.inputs)


def test_jvp(sample, networks):
    tangents = tuple(torch.randn_like(t) for t in sample.inputs)
    same(networks, lambda f: lambda *t: jvp(f, t, tangents), *sample.inputs)


def test_hessian_vector_products(sample, networks):
    tangents = tuple(torch.randn_like(t) for t in sample.inputs)
    same(numbers(networks), lambda f: lambda *t: jvp(grad(f, argnums=(0, 1, 2)), t, tangents)[1], *sample.inputs)
    same(numbers(networks), lambda f: lambda *t: vjp(grad(f, argnums=(0, 1, 2)), *t)[1](tangents), *sample.inputs)


def test_jacobians_and_hessian_of_the_weight(sample, networks):
    for transform in (jacrev, jacfwd):
        same(networks, lambda f: transform(f, argnums=1), *sample.inputs)  # noqa: B023
    same(numbers(networks), lambda f: hessian(f, argnums=2), *sample.inputs)


def test_vmap_over_weights_is_an_ensemble(sample, networks):
    weights, biases = torch.randn(4, *sample.weight.shape).to(sample.weight), torch.randn(4, *sample.bias.shape).to(sample.bias)
    same(networks, lambda f: vmap(f, in_dims=(None, 0, 0)), sample.x, weights, biases)
    same(numbers(networks), lambda f: vmap(grad(f, argnums=(0, 1)), in_dims=(None, 0, 0)), sample.x, weights, biases)


def test_per_sample_gradients_of_the_loss(sample):
    def per_sample(loss):
        f = lambda w, x, t: loss(x, w, sample.bias, t, sample.head_sizes, sample.grad_scale)  # noqa: E731
        return vmap(grad(f), in_dims=(None, 0, 0))(sample.weight, sample.x, sample.targets)

    torch.testing.assert_close(per_sample(lambda *a: heads_cross_entropy(*a).loss), per_sample(_one_row_loss))


def _one_row_loss(x, weight, bias, targets, head_sizes, grad_scale):
    """The naive loss of a single row, without the selection of rows that vmap cannot do."""
    losses = []
    for z, t in zip(naive_heads(x, weight, bias, head_sizes, grad_scale).split(head_sizes), targets, strict=True):
        z = torch.cat([torch.zeros_like(z), z]) if len(z) == 1 else z
        picked = z.log_softmax(0).gather(0, t.clamp(min=0)[None])[0]
        losses.append(torch.where(t == -100, torch.zeros_like(picked), -picked))
    return torch.stack(losses).sum()


def test_vmap_over_the_scales(sample):
    scales = torch.tensor([[1.0, -0.5, 0.0], [0.0, 2.0, 1.0]], dtype=torch.float64, device=sample.x.device)
    f = lambda x, s: linear_heads(x, sample.weight, sample.bias, sample.head_sizes, s).sin().sum()  # noqa: E731
    batched = vmap(grad(f), in_dims=(None, 0))(sample.x, scales)
    torch.testing.assert_close(batched, torch.stack([grad(f)(sample.x, s) for s in scales]))


def test_functional_call_of_the_heads_with_another_lambda(device):
    heads = AdversarialHeads(7, {"digit": 3}, {"domain": 2}, lambda_=1.0, dtype=torch.float64).to(device)
    x = torch.randn(5, 7, dtype=torch.float64, device=device)
    targets = {"domain": torch.tensor([0, 1, 1, 0, 1], device=device)}

    def loss(x, lambda_):
        state = {**dict(heads.named_parameters()), "lambda_": torch.tensor([lambda_], dtype=torch.float64, device=device)}
        return functional_call(heads, state, (x,))["domain"].log_softmax(1).gather(1, targets["domain"][:, None]).mean()

    one, half = (grad(loss)(x, value) for value in (1.0, 0.5))
    torch.testing.assert_close(half, one / 2)
    assert heads.lambda_.item() == 1.0
    gradient, value = grad_and_value(lambda x: heads.loss(x, targets).loss)(x)
    torch.testing.assert_close(gradient, -one)
    torch.testing.assert_close(value, -loss(x, 1.0))
