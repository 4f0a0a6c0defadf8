"""Heads with hidden layers, put together in one call of the compiled extension: which arguments it takes, that it gives
what Python's composition of the same operations gives, and what a forward-mode tangent of a gradient becomes."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from grl_ext import AdversarialHeads, _backend, functional, heads_loss

pytestmark = [
    pytest.mark.core,
    pytest.mark.sanitized,
    pytest.mark.skipif(_backend.C is None, reason="is about the compiled extension"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # PyTorch's own, in forward mode
]


def layers(heads: int, generator: torch.Generator) -> tuple[list, list, list]:
    """Of equal sizes, so that an exchanged tensor would fit."""

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    weight = [[drawn(5, 4), drawn(5, 5), drawn(3, 5)] for _ in range(heads)]
    bias = [[drawn(5), drawn(5), drawn(3)] for _ in range(heads)]
    return weight, bias, [torch.randint(3, (6,), generator=generator) for _ in range(heads)]


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_each_head_keeps_its_own_parameters_and_its_lambda(heads):
    generator = torch.Generator().manual_seed(heads)
    weight, bias, targets = layers(heads, generator)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    lambdas = [0.5 + h for h in range(heads)]
    result = _backend.C.heads_loss(x, weight, bias, targets, lambdas, None)
    assert result is not None
    parameters = [own for head in (*weight, *bias) for own in head]
    found = torch.autograd.grad(result[0], [x, *parameters])
    of_x = torch.zeros_like(x)
    for h in range(heads):
        z = nn.functional.linear(x, weight[h][0], bias[h][0])
        for w, b in zip(weight[h][1:], bias[h][1:], strict=True):
            z = nn.functional.linear(z.relu(), w, b)
        torch.testing.assert_close(result[2][h], z)
        loss = nn.functional.cross_entropy(z, targets[h])
        torch.testing.assert_close(result[1][h], loss)
        own = torch.autograd.grad(loss, [x, *weight[h], *bias[h]])
        of_x -= lambdas[h] * own[0]
        for gradient, tensor in zip(own[1:], [*weight[h], *bias[h]], strict=True):
            place = next(i for i, parameter in enumerate(parameters) if parameter is tensor)
            torch.testing.assert_close(found[1 + place], gradient)
    torch.testing.assert_close(found[0], of_x)


OPTIONS = {
    "none": {},
    "weights": {"sample_weight": torch.linspace(0, 1, 6), "loss_weight": {"label": 0.5, "site": 2.0, "age": 0.25}},
    "classes": {"class_weight": {"site": torch.tensor([1.0, 0.5, 2.0])}, "label_smoothing": 0.1, "ignore_index": 1},
    "sum": {"reduction": "sum"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_the_compiled_composition_is_pythons(option, dtype, monkeypatch):
    torch.manual_seed(0)
    heads = AdversarialHeads(
        4,
        {"label": 3, "age": [7, 1]},
        {"site": [5, 6, 3]},
        lambda_=0.3,
        losses={"age": "mse"},
        dtype=dtype,
    )
    x = torch.randn(6, 4, dtype=dtype, requires_grad=True)
    targets = {"label": torch.randint(3, (6,)), "age": torch.randn(6), "site": torch.randint(3, (6,))}
    options = {
        name: given.to(dtype) if isinstance(given, torch.Tensor) else given for name, given in OPTIONS[option].items()
    }
    taken = []

    class DeclinesSeveralLayers:
        def __getattr__(self, name):
            return getattr(compiled, name)

        def heads_loss(self, x, weight, *others):
            result = compiled.heads_loss(x, weight, *others)
            if all(len(layers) == 1 for layers in weight):
                return result
            taken.append(result)
            return None

    def computed() -> tuple:
        out = heads(x, targets, **options)
        return out, torch.autograd.grad(out.loss, [x, *heads.parameters()])

    compiled = _backend.C
    ours, gradients = computed()
    monkeypatch.setattr(_backend, "C", DeclinesSeveralLayers())
    theirs, expected = computed()
    assert [result is not None for result in taken] == [True]
    for name, loss in theirs.head_losses.items():
        assert torch.equal(ours.head_losses[name], loss) and torch.equal(ours.logits[name], theirs.logits[name])
    assert torch.equal(ours.loss, theirs.loss)
    # The features' gradient is a sum over the heads, in the order in which the engine comes to them.
    torch.testing.assert_close(gradients[0], expected[0])
    for found, wanted in zip(gradients[1:], expected[1:], strict=True):
        assert torch.equal(found, wanted)


MALFORMED = {
    "no heads": ([], [], [], []),
    "too few biases": ("[w, w]", "[b]", "[t, t]", "[None, None]"),
    "no biases": ("[w, w]", "[]", "[t, t]", "[None, None]"),
    "too many biases": ("[w]", "[b, b]", "[t]", "[None]"),
    "too few biases of a head": ("[w]", "[b[:1]]", "[t]", "[None]"),
    "too many biases of a head": ("[w]", "[b + b]", "[t]", "[None]"),
    "too few targets": ("[w, w]", "[b, b]", "[t]", "[None, None]"),
    "too few lambdas": ("[w, w]", "[b, b]", "[t, t]", "[None]"),
    "a head without layers": ("[[], w]", "[[], b]", "[t, t]", "[None, None]"),
    "matrices of no dimension": ("[[w[0], w[1].sum()]]", "[b]", "[t]", "[None]"),
    "matrices of one dimension": ("[[w[0][0], w[1]]]", "[b]", "[t]", "[None]"),
    "layers that do not fit": ("[[w[0], w[0]]]", "[b]", "[t]", "[None]"),
}


def test_the_direct_call_declines_what_does_not_fit_together():
    # In a process of its own, which a read outside of a list would end.
    calls = "\n".join(
        f"assert C.heads_loss(x, {', '.join(map(str, given))}, None) is None, {name!r}"
        for name, given in MALFORMED.items()
    )
    program = f"""
import torch
from grl_ext._backend import C
x, t = torch.randn(6, 4), torch.zeros(6, dtype=torch.int64)
w, b = [torch.randn(5, 4), torch.randn(3, 5)], [torch.randn(5), torch.randn(3)]
assert C.heads_loss(x, [w], [b], [t], [None], None) is not None
{calls}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def kinds() -> dict:
    return {
        "linear": nn.Linear(4, 3),
        "hidden": nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)  # float16 keeps the logits' gradients
@pytest.mark.parametrize("of", ["logits", "loss", "head loss"])
@pytest.mark.parametrize("kind", kinds())
def test_a_gradients_tangent_reaches_the_gradients(kind, of, dtype):
    """Forward over reverse, where the graph was recorded outside: the gradients' tangents for a seed that has one."""
    torch.manual_seed(0)
    module = kinds()[kind].to(dtype)
    heads = AdversarialHeads(4, adversaries={"site": module}, lambda_=0.3)
    x = torch.randn(6, 4, dtype=dtype, requires_grad=True)
    targets = torch.randint(3, (6,))
    if of == "logits":
        ours, theirs = heads(x)["site"], module(x)
    else:
        out = heads(x, {"site": targets})
        ours = out.loss if of == "loss" else out.head_losses["site"]
        theirs = nn.functional.cross_entropy(module(x), targets)
    wanted = [x, *module.parameters()]
    seed, tangent = torch.randn_like(ours), torch.randn_like(ours)
    expected = torch.autograd.grad(theirs, wanted, grad_outputs=tangent)  # a backward is linear in its seed
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(seed, tangent)
        found = [forward_ad.unpack_dual(own).tangent for own in torch.autograd.grad(ours, wanted, grad_outputs=dual)]
        assert all(own is not None for own in found)
        close = {} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.01}  # several roundings of values near 1
        torch.testing.assert_close(found[0], -0.3 * expected[0], **close)
        for own, gradient in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(own, gradient, **close)


def test_lists_of_layers_are_one_call(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight, bias, targets = layers(2, generator)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    expected = heads_loss(x, weight, bias, targets, lambda_=[None, 0.5])
    monkeypatch.setattr(functional, "run_linear_heads", None)  # which Python's composition calls
    found = heads_loss(x, weight, bias, targets, lambda_=[None, 0.5])
    assert torch.equal(found.loss, expected.loss)
