"""`torch.func` on the linear operations: what it gives for the network layer by layer."""

import pytest
import torch
from head_samples import naive_linear, naive_logits, naive_loss, our_logits, our_loss, sample_heads, sample_linear
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap

from grl_ext import AdversarialHeads, grl_linear, linear_heads

pytestmark = [pytest.mark.sanitized, pytest.mark.usefixtures("path")]

OPERATIONS = ["grl_linear", "linear_heads", "heads_loss", "heads_loss, several layers"]
KINDS = ("classes", "soft", "mse")


@pytest.fixture(params=OPERATIONS)
def networks(request, device):
    """Inputs, and ours and the layers' as functions of them that give a tensor."""
    if request.param == "grl_linear":
        inputs = [t.detach() for t in sample_linear(device, torch.float64).inputs]
        return inputs, (lambda *t: grl_linear(*t, 0.3), lambda *t: naive_linear(*t, 0.3))
    sizes = ((4, 3), 1) if "several" in request.param else (3, 1, 2)
    sample = sample_heads(device, torch.float64, head_sizes=sizes, kinds=KINDS)
    inputs = [t.detach() for t in sample.inputs]
    if request.param == "linear_heads":
        return inputs, tuple(lambda *t, f=f: torch.cat(f(sample.of(t)), -1) for f in (our_logits, naive_logits))
    options = {
        "loss_weight": [0.5, 2.0, 1.0][: len(sizes)],
        "label_smoothing": 0.1,
        "sample_weight": torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0], device=device),
        "class_weight": [torch.rand(3, device=device), None, None][: len(sizes)],
    }
    return inputs, tuple(lambda *t, f=f: f(sample.of(t), **options).loss for f in (our_loss, naive_loss))


def same(both, transform, *args):
    ours, naive = (transform(f)(*args) for f in both)
    torch.testing.assert_close(ours, naive)


def numbers(both):
    """The same as functions that give one number, with second derivatives."""
    return tuple(lambda *t, f=f: f(*t).sin().sum() for f in both)


def test_grad_of_every_input(networks):
    inputs, both = networks
    same(numbers(both), lambda f: grad(f, argnums=tuple(range(len(inputs)))), *inputs)


def test_vjp(networks):
    inputs, both = networks
    cotangent = torch.randn_like(both[0](*inputs))
    same(both, lambda f: lambda *t: vjp(f, *t)[1](cotangent), *inputs)


def test_jvp(networks):
    inputs, both = networks
    tangents = tuple(torch.randn_like(t) for t in inputs)
    same(both, lambda f: lambda *t: jvp(f, t, tangents), *inputs)


def test_hessian_vector_products(networks):
    inputs, both = networks
    tangents = tuple(torch.randn_like(t) for t in inputs)
    every = tuple(range(len(inputs)))
    same(numbers(both), lambda f: lambda *t: jvp(grad(f, argnums=every), t, tangents)[1], *inputs)
    same(numbers(both), lambda f: lambda *t: vjp(grad(f, argnums=every), *t)[1](tangents), *inputs)


def test_jacobians_and_hessian_of_a_weight_and_a_bias(networks):
    inputs, both = networks
    for transform in (jacrev, jacfwd):
        same(both, lambda f: transform(f, argnums=1), *inputs)  # noqa: B023
    same(numbers(both), lambda f: hessian(f, argnums=len(inputs) - 1), *inputs)


def test_vmap_over_weights_is_an_ensemble(networks):
    (x, *parameters), (ours, _) = networks
    several = [torch.randn(4, *t.shape).to(t) for t in parameters]

    def of(f, *args):
        return vmap(f, in_dims=(None, *[0] * len(parameters)))(x, *args)

    torch.testing.assert_close(of(ours, *several), torch.stack([ours(x, *(t[i] for t in several)) for i in range(4)]))
    pulled = grad(numbers((ours,))[0], argnums=(0, 1))
    single = [pulled(x, *(t[i] for t in several)) for i in range(4)]
    torch.testing.assert_close(of(pulled, *several), tuple(map(torch.stack, zip(*single, strict=True))))


def test_per_sample_gradients_of_the_loss(device):
    sample = sample_heads(device, torch.float64, head_sizes=(3, 1, 2), kinds=KINDS)
    sample.targets[0][0] = -100
    x, *parameters = (t.detach() for t in sample.inputs)

    def loss(parameters, x, targets, row_weight):
        return our_loss(sample.of([x, *parameters])._replace(targets=targets), sample_weight=row_weight).loss

    rows = torch.tensor([1.0, 0.0, 0.5, 1.0, 2.0], device=device, dtype=torch.float64)
    batched = vmap(grad(loss), in_dims=(None, 0, 0, 0))(parameters, x, sample.targets, rows)
    single = [grad(loss)(parameters, x[i], [t[i] for t in sample.targets], rows[i]) for i in range(5)]
    for a, b in zip(batched, map(torch.stack, zip(*single, strict=True)), strict=True):
        torch.testing.assert_close(a, b)
    first = naive_loss(sample.of([x[2:3], *parameters])._replace(targets=[t[2:3] for t in sample.targets])).loss
    torch.testing.assert_close(loss(parameters, x[2], [t[2] for t in sample.targets], rows[3]), first)


def test_vmap_over_lambda(device):
    sample = sample_heads(device, torch.float64, head_sizes=(3, 1, 2))
    x, lambdas = sample.x.detach(), torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64, device=device)
    weight, bias = ([t.detach() for t in own] for own in sample.linear)
    f = lambda x, value: sum(z.sin().sum() for z in linear_heads(x, weight, bias, lambda_=[None, value, 0.3]))  # noqa: E731
    batched = vmap(grad(f), in_dims=(None, 0))(x, lambdas)
    torch.testing.assert_close(batched, torch.stack([grad(f)(x, value) for value in lambdas]))


@pytest.mark.parametrize("adversary", [2, [4, 2]], ids=["linear", "layers"])
def test_functional_call_of_the_heads_with_another_lambda(device, adversary):
    heads = AdversarialHeads(7, {"digit": 3}, {"domain": adversary}, lambda_=1.0, dtype=torch.float64).to(device)
    x = torch.randn(5, 7, dtype=torch.float64, device=device)
    target = torch.tensor([0, 1, 1, 0, 1], device=device)

    def loss(x, lambda_):
        state = {
            **dict(heads.named_parameters()),
            "reversals.domain.lambda_": torch.tensor(lambda_, dtype=torch.float64, device=device),
        }
        return functional_call(heads, state, (x,))["domain"].log_softmax(1).gather(1, target[:, None]).mean()

    one, half = (grad(loss)(x, value) for value in (1.0, 0.5))
    torch.testing.assert_close(half, one / 2)
    assert heads.lambda_["domain"].item() == 1.0
    gradient, value = grad_and_value(lambda x: heads(x, {"domain": target}).loss)(x)
    torch.testing.assert_close(gradient, -one)
    torch.testing.assert_close(value, -loss(x, 1.0))


def test_gradients_of_the_modules_parameters(device):
    heads = AdversarialHeads(7, {"digit": 3}, {"domain": [4, 2]}, lambda_=0.5, dtype=torch.float64).to(device)
    x = torch.randn(5, 7, dtype=torch.float64, device=device)
    targets = {
        "digit": torch.tensor([0, 1, 2, 0, 1], device=device),
        "domain": torch.tensor([0, 1, 1, 0, 1], device=device),
    }
    parameters = dict(heads.named_parameters())
    ours = grad(lambda p: functional_call(heads, p, (x, targets)).loss)(
        {name: p.detach() for name, p in parameters.items()}
    )
    heads(x, targets).loss.backward()
    for name, p in parameters.items():
        torch.testing.assert_close(ours[name], p.grad)
