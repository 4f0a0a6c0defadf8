"""What `gradient_reversal` and `GRL` refuse: the same type and text from every entry, and nothing is changed by it."""

import math

import numpy as np
import pytest
import torch
from samples import assert_same

from grl_ext import GRL, gradient_reversal

pytestmark = pytest.mark.sanitized

X = torch.Size([2, 3])

# name: (lambda_, type of the error, its text)
REFUSED_NUMBERS = {
    "NaN": (math.nan, ValueError, "lambda_ must be finite, got nan"),
    "infinity": (math.inf, ValueError, "lambda_ must be finite, got inf"),
    "minus infinity": (-math.inf, ValueError, "lambda_ must be finite, got -inf"),
    "numpy NaN": (np.float32("nan"), ValueError, "lambda_ must be finite, got nan"),
    "str": ("0.5", TypeError, "lambda_ must be a real number or a real tensor, got str"),
    "complex": (1j, TypeError, "lambda_ must be a real number or a real tensor, got complex"),
    "list": ([0.5], TypeError, "lambda_ must be a real number or a real tensor, got list"),
    "array": (np.ones(3), TypeError, "lambda_ must be a real number or a real tensor, got ndarray"),
}
REFUSED_TENSORS = {
    "NaN in a 0-d tensor": (torch.tensor(math.nan), ValueError, "lambda_ must be finite, got nan"),
    "infinity in a row": (torch.tensor([[1.0], [math.inf]]), ValueError, "lambda_ must be finite, got inf"),
    "complex64": (
        torch.tensor(1j),
        TypeError,
        "lambda_ must be a real number or a real tensor, got a tensor of torch.complex64",
    ),
    "complex128": (
        torch.ones(3, dtype=torch.complex128),
        TypeError,
        "lambda_ must be a real number or a real tensor, got a tensor of torch.complex128",
    ),
    "wrong size": (torch.ones(2), ValueError, "lambda_ of shape [2] does not broadcast to x of shape [2, 3]"),
    "wrong sizes": (torch.ones(3, 2), ValueError, "lambda_ of shape [3, 2] does not broadcast to x of shape [2, 3]"),
    "would enlarge x": (
        torch.ones(4, 2, 3),
        ValueError,
        "lambda_ of shape [4, 2, 3] does not broadcast to x of shape [2, 3]",
    ),
    "one dimension too many": (
        torch.ones(1, 2, 3),
        ValueError,
        "lambda_ of shape [1, 2, 3] does not broadcast to x of shape [2, 3]",
    ),
    "empty": (torch.ones(0), ValueError, "lambda_ of shape [0] does not broadcast to x of shape [2, 3]"),
    "other device": (
        torch.ones(3, device="meta"),
        ValueError,
        "lambda_ is on meta but x is on {device}: only a 0-d lambda_ may be elsewhere, on the CPU",
    ),
    "0-d on another device": (
        torch.ones((), device="meta"),
        ValueError,
        "lambda_ is on meta but x is on {device}: only a 0-d lambda_ may be elsewhere, on the CPU",
    ),
}
# What only their values tell. An operator and a transform do not look at them.
LOOKED_AT = ("NaN in a 0-d tensor", "infinity in a row")
REFUSED = {**REFUSED_NUMBERS, **REFUSED_TENSORS}


def check_refusal(call, x, lambda_, expected, text):
    if isinstance(lambda_, torch.Tensor) and not lambda_.is_meta and "broadcast" in text:
        lambda_ = lambda_.to(x.device)
    before = x.detach().clone()
    with pytest.raises(expected) as caught:
        call(x, lambda_)
    assert type(caught.value) is expected
    assert str(caught.value) == text.format(device=x.device)
    assert_same(x.detach(), before)
    assert x._version == 0 and x.grad is None


@pytest.fixture
def x(device):
    return torch.randn(X, device=device, requires_grad=True)


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("requires_grad", [True, False], ids=["x requires grad", "x does not"])
def test_the_function_and_the_layer_refuse_with_one_text(path, x, case, requires_grad):
    x = x.detach().requires_grad_(requires_grad)
    check_refusal(gradient_reversal, x, *REFUSED[case])
    layer = GRL(0.75).to(x.device)
    check_refusal(layer, x, *REFUSED[case])
    assert layer.lambda_.item() == 0.75


@pytest.mark.parametrize("case", [case for case in REFUSED_TENSORS if case not in LOOKED_AT])
def test_the_operator_called_by_hand_does_not_take_what_the_function_refuses(compiled, x, case):
    text = "torch.ops.grl_ext.gradient_reversal does not take these; grl_ext.gradient_reversal says why"
    check_refusal(torch.ops.grl_ext.gradient_reversal, x, REFUSED_TENSORS[case][0], ValueError, text)


@pytest.mark.parametrize("case", [case for case in REFUSED if case not in LOOKED_AT])
def test_a_torch_func_transform_refuses_with_the_same_text(path, device, case):
    lambda_, expected, text = REFUSED[case]
    if isinstance(lambda_, torch.Tensor) and not lambda_.is_meta and "broadcast" in text:
        lambda_ = lambda_.to(device)
    with pytest.raises(expected) as caught:
        torch.func.grad(lambda x: gradient_reversal(x, lambda_).sum())(torch.ones(X, device=device))
    assert str(caught.value) == text.format(device=torch.ones(0, device=device).device)


@pytest.mark.parametrize("case", REFUSED_NUMBERS)
def test_constructor_and_assignment_refuse_with_the_same_text(case):
    value, expected, text = REFUSED_NUMBERS[case]
    layer = GRL(0.75)
    for attempt in (lambda: GRL(value), lambda: setattr(layer, "lambda_", value)):
        with pytest.raises(expected) as caught:
            attempt()
        assert type(caught.value) is expected and str(caught.value) == text
    assert layer.lambda_.item() == 0.75


@pytest.mark.parametrize("value", [None, 1.0, np.ones(3), [torch.ones(3)]], ids=["None", "float", "array", "list"])
def test_x_must_be_a_tensor(path, value):
    for call in (gradient_reversal, GRL()):
        with pytest.raises(TypeError) as caught:
            call(value)
        assert str(caught.value) == f"x must be a tensor, got {type(value).__name__}"


@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=str)
def test_a_zero_dimensional_x_takes_a_zero_dimensional_lambda_only(path, device, shape):
    x = torch.ones((), device=device, requires_grad=True)
    check_refusal(
        gradient_reversal,
        x,
        torch.ones(shape),
        ValueError,
        f"lambda_ of shape {list(shape)} does not broadcast to x of shape []",
    )


# --- in-place operations
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "modify",
    [
        lambda y: y.add_(1),
        lambda y: y.relu_(),
        lambda y: y[0].zero_(),
        lambda y: y.view(-1).mul_(2),
        lambda y: y.copy_(torch.zeros_like(y)),
    ],
    ids=["add_", "relu_", "row", "view", "copy_"],
)
@pytest.mark.parametrize("lambda_", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "intermediate"])
def test_modifying_the_output_in_place_raises_pytorchs_view_error(path, x, lambda_, leaf, modify):
    features = x if leaf else x * 1
    before = features.detach().clone()
    y = gradient_reversal(features, lambda_)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        modify(y)
    assert_same(features.detach(), before)
    y.sum().backward()
    assert_same(x.grad, torch.full_like(x, -0.5))


def test_an_output_whose_features_were_modified_is_refused(path, x):
    features = x * 1
    y = gradient_reversal(features, 0.5)
    features.add_(1)
    with pytest.raises(RuntimeError, match="view"):
        y.sum().backward()


def test_what_the_documentation_says_to_write_instead_works(path, x):
    gradient_reversal(x, 0.5).clone().add_(1).sum().backward()
    assert_same(x.grad, torch.full_like(x, -0.5))
    x.grad = None
    torch.relu(gradient_reversal(x, 0.5)).sum().backward()
    assert_same(x.grad, -0.5 * (x > 0))
