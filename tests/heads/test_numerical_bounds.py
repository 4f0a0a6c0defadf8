"""Extreme numbers: saturated softmaxes, infinities, subnormals, sums over millions of rows. Within stated bounds of
float64, and the same bits in every run. Large logits in general are in `test_heads_loss.py`."""

import math

import pytest
import torch
import torch.nn.functional as F
from head_samples import SWITCH, Sample, gradients, our_loss
from samples import assert_same
from torch import Tensor

from grl_ext import gradient_reversal, grl_linear, heads_loss, linear_heads

pytestmark = pytest.mark.usefixtures("path")

EPS = torch.finfo(torch.float32).eps
TINY = torch.finfo(torch.float32).smallest_normal
SUBNORMAL = 2.0**-149  # the distance of two float32 numbers near 0

SIZES = [1, 2, 10, SWITCH + 1]  # binary, narrow, and by matrix products


def twice(f) -> list[Tensor]:
    """What f gives, twice with the same bits."""
    first, second = f(), f()
    for a, b in zip(first, second, strict=True):
        assert_same(a, b)
    return first


def one_head(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lambda_: float | None = 0.5) -> Sample:
    return Sample(x, [[weight]], [[bias]], [targets], [lambda_])


def loss_and_gradients(sample: Sample) -> list[Tensor]:
    result = our_loss(sample)
    return [result.loss.detach(), *gradients(result.loss, sample.wanted)]


# --- saturation
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("as_probabilities", [False, True], ids=["classes", "one-hot"])
@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_a_softmax_saturated_at_one_class(device, size, dtype, as_probabilities, right):
    # Class c of row i has the logit 1e4 where c = i, and 0 elsewhere: e^-1e4 is 0 in every type. The loss is 0 or 1e4
    # and the gradient of the logits 0 or +-1/N, all exact: no rounding, no NaN.
    n, classes, large = 8, max(2, size), 9984.0  # which bfloat16 has, and so has 8 times its reciprocal
    logits = torch.zeros(n, classes)
    logits[torch.arange(n), torch.arange(n) % classes] = large
    target = (torch.arange(n) + (0 if right else 1)) % classes
    columns = logits if size > 1 else logits[:, 1:] - logits[:, :1]
    weight = columns.T.to(device, dtype).contiguous().requires_grad_()
    x = torch.eye(n, device=device, dtype=dtype, requires_grad=True)
    given = F.one_hot(target, classes).to(dtype) if as_probabilities else target
    given = given[:, 1] if as_probabilities and size == 1 else given
    loss, grad_x, grad_weight = twice(lambda: loss_and_gradients(one_head(x, weight, None, given.to(device))))
    grad_logits = torch.zeros(n, classes)
    if not right:
        grad_logits[torch.arange(n), torch.arange(n) % classes] = 1 / n
        grad_logits[torch.arange(n), target] = -1 / n
    grad_logits = grad_logits if size > 1 else grad_logits[:, 1:]
    assert loss.item() == (0.0 if right else large)
    torch.testing.assert_close(grad_weight.cpu().float(), grad_logits.T, rtol=0, atol=0)
    exact = -0.5 * grad_logits.double() @ columns.T.double()
    torch.testing.assert_close(
        grad_x.cpu().double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps * exact.abs().max().item()
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 8.0, 30.0, 1e4])
def test_the_loss_of_a_sure_head_is_right_to_roundings_of_one(device, size, dtype, scale):
    # The logarithm of 1 + (classes - 1) e^-scale, as F.cross_entropy has it: an error of some eps, and never below 0.
    classes, eps = max(2, size), torch.finfo(dtype).eps
    weight = torch.zeros(size, 1, dtype=dtype, device=device)
    weight[-1] = scale
    x = torch.ones(16, 1, dtype=dtype, device=device, requires_grad=True)
    target = torch.full((16,), classes - 1, device=device)
    loss, grad_x = twice(lambda: loss_and_gradients(one_head(x, weight, None, target)))
    rest = (classes - 1) * math.exp(-scale)
    assert 0 <= loss.item() == pytest.approx(math.log1p(rest), rel=4 * eps, abs=4 * eps)
    exact = 0.5 * scale / 16 * rest / (1 + rest)  # -lambda times (softmax - 1) * scale / N
    assert grad_x.flatten().tolist() == pytest.approx([exact] * 16, rel=4 * eps, abs=4 * eps * scale / 16)


# --- infinities
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)  # binary: the cross entropy over the logits 0 and z
@pytest.mark.parametrize("value", [math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("of_target", [False, True], ids=["another class", "the target's class"])
def test_an_infinite_logit_gives_pytorchs_loss(device, size, value, of_target):
    x = torch.randn(5, 3, device=device, requires_grad=True)
    weight = torch.randn(size, 3, device=device, requires_grad=True)
    bias = torch.zeros(size, device=device)
    bias[min(1, size - 1)] = value
    target = torch.full((5,), 1 if of_target else 0, device=device)
    loss, *found = twice(lambda: loss_and_gradients(one_head(x, weight, bias, target)))
    z = F.linear(x.double(), weight.double(), bias.double())
    plain = F.cross_entropy(F.pad(z, (1, 0)) if size == 1 else z, target)
    torch.testing.assert_close(loss.double(), plain.detach(), equal_nan=True, rtol=1e-6, atol=0)
    if plain.isfinite():
        expected = gradients(plain, [x, weight])
        torch.testing.assert_close(found, [-0.5 * expected[0], expected[1]])


# --- subnormals
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["gradient_reversal", "grl_linear", "linear_heads", "heads_loss"])
@pytest.mark.parametrize("columns", [2, SWITCH + 1])
def test_subnormals_are_not_flushed_to_zero(device, operation, columns):
    # Weights of some units of 2^-149, so that the features' gradient is as small. Each product and sum may be rounded
    # to the next subnormal, which is an absolute error of 2^-149 for each of the columns.
    rows, features = 5, 9
    weight = (torch.randint(1, 1000, (columns, features), device=device) * 2.0**-140).requires_grad_()
    assert 0 < weight.abs().min() < TINY and weight.abs().max() < TINY
    x = torch.randn(rows, features, device=device, requires_grad=True)
    target = torch.randint(columns, (rows,), device=device)

    def run() -> list[Tensor]:
        if operation == "gradient_reversal":
            y = F.linear(gradient_reversal(x, 0.5), weight).sum()
        elif operation == "grl_linear":
            y = grl_linear(x, weight, None, 0.5).sum()
        elif operation == "linear_heads":
            y = linear_heads(x, [weight], None, lambda_=[0.5])[0].sum()
        else:
            y = heads_loss(x, [weight], None, [target], lambda_=[0.5], reduction="sum").loss
        return gradients(y, [x])

    (grad_x,) = twice(run)
    exact_weight = weight.detach().double()
    grad_logits = torch.ones(rows, columns, dtype=torch.float64, device=device)
    if operation == "heads_loss":
        grad_logits = grad_logits / columns - F.one_hot(target, columns)
    exact = -0.5 * grad_logits @ exact_weight
    torch.testing.assert_close(grad_x.double(), exact, rtol=4 * EPS * columns, atol=(columns + 2) * SUBNORMAL)
    assert (grad_x != 0).float().mean() > 0.9


def test_a_tiny_lambda_times_a_small_gradient_is_rounded_once(device):
    x = torch.randn(257, device=device, requires_grad=True)
    grad = torch.randn(257, device=device) * 1e-12
    (found,) = torch.autograd.grad(gradient_reversal(x, 2.0**-100), x, grad)
    assert_same(found, (grad.double() * -(2.0**-100)).float())
    assert found.any() and found.abs().max() < TINY


# --- long sums
# -------------------------------------------------------------------------------------------------------------

# The compiled sums go by blocks of rows. Where roundings go in both directions the bound is the 64 eps of every other
# test of the loss. The fallback's sums are those of PyTorch's products.
compiled_only = pytest.mark.parametrize("path", ["compiled"], indirect=True)


@compiled_only
@pytest.mark.parametrize("size", [1, 2])
def test_sums_over_a_million_rows(path, device, size):
    n = 1_000_000
    x = torch.empty(n, 1, device=device).uniform_(0.5, 1.5).requires_grad_()
    weight = torch.linspace(0.3, 0.7, size, device=device)[:, None].requires_grad_()
    bias = torch.zeros(size, device=device, requires_grad=True)
    target = torch.randint(2, (n,), device=device)
    loss, grad_x, grad_weight, grad_bias = twice(lambda: loss_and_gradients(one_head(x, weight, bias, target)))
    with torch.no_grad():
        z = F.linear(x.double(), weight.double())
        z = F.pad(z, (1, 0)) if size == 1 else z
        exact = F.cross_entropy(z, target)
        grad = ((z.softmax(1) - F.one_hot(target, 2)) / n)[:, -size:]
        terms = grad.abs().T @ x.double()  # what is added up, without the signs
    assert loss.item() == pytest.approx(exact.item(), rel=64 * EPS)
    torch.testing.assert_close(
        grad_weight.double(), grad.T @ x.detach().double(), rtol=0, atol=64 * EPS * terms.max().item()
    )
    torch.testing.assert_close(grad_bias.double(), grad.sum(0), rtol=0, atol=64 * EPS * grad.abs().sum(0).max().item())
    torch.testing.assert_close(grad_x.double(), -0.5 * grad @ weight.detach().double(), rtol=0, atol=64 * EPS / n)


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_over_ten_million_rows(path, device, threads, dtype):
    # All rows the same: the exact sums are known, and all roundings may go in one direction. Added one after the other,
    # the sums of the blocks of rows would be off by 1.6e-3; in two levels they are off by 6e-6 on the CPU, PyTorch's
    # own product by 7e-4. In a half type a sum of ones would stop at 2^11 or 2^8.
    threads(2)
    x = torch.ones(10_000_000, 1, device=device, dtype=dtype)
    weight, bias = (torch.zeros(*shape, device=device, dtype=dtype, requires_grad=True) for shape in ((2, 1), (2,)))
    target = torch.zeros(len(x), dtype=torch.int64, device=device)
    loss, grad_weight, grad_bias = loss_and_gradients(one_head(x, weight, bias, target))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(math.log(2), rel=64 * EPS)
    rel = 256 * EPS if dtype == torch.float32 and x.device.type == "cpu" else 4e-3
    assert grad_weight.flatten().tolist() == grad_bias.tolist() == pytest.approx([-0.5, 0.5], rel=rel)
