"""What the linear operations refuse: the same type and text from every entry."""

import pytest
import torch
from head_samples import sample_heads

from grl_ext import grl_linear, heads_cross_entropy, linear_heads

NAN, INF = float("nan"), float("inf")
META = torch.device("meta")

# name: (the argument and what it is replaced by, type, text), over x (5, 7), weight (5, 7), bias (5,), targets (5, 2), heads 3 + 2.
LINEAR = {
    "x: not a tensor": ({"x": 1.0}, TypeError, "x must be a tensor, got float"),
    "weight: not a tensor": ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
    "bias: not a tensor": ({"bias": [1.0]}, TypeError, "bias must be a tensor, got list"),
    "x: 0-d": ({"x": torch.ones(())}, ValueError, "x must have at least one dimension, got shape []"),
    "x: other features": ({"x": torch.ones(5, 6)}, ValueError, "weight must have shape [K, D] with D = x.shape[-1] = 6, got [5, 7]"),
    "weight: 1-d": ({"weight": torch.ones(7)}, ValueError, "weight must have shape [K, D] with D = x.shape[-1] = 7, got [7]"),
    "weight: 3-d": ({"weight": torch.ones(1, 5, 7)}, ValueError, "weight must have shape [K, D] with D = x.shape[-1] = 7, got [1, 5, 7]"),
    "weight: other device": ({"weight": torch.ones(5, 7, device=META)}, ValueError, "weight is on meta but x is on {device}"),
    "weight: other dtype": (
        {"weight": torch.ones(5, 7, dtype=torch.float64)},
        TypeError,
        "x and weight must have the same dtype, float16, bfloat16, float32 or float64, got torch.float32 and torch.float64",
    ),
    "integers": (
        {"x": torch.ones(5, 7, dtype=torch.int64), "weight": torch.ones(5, 7, dtype=torch.int64)},
        TypeError,
        "x and weight must have the same dtype, float16, bfloat16, float32 or float64, got torch.int64 and torch.int64",
    ),
    "float8": (
        {"x": torch.ones(5, 7).to(torch.float8_e5m2), "weight": torch.ones(5, 7).to(torch.float8_e5m2)},
        TypeError,
        "x and weight must have the same dtype, float16, bfloat16, float32 or float64, got torch.float8_e5m2 and torch.float8_e5m2",
    ),
    "complex": (
        {"x": torch.ones(5, 7, dtype=torch.complex64), "weight": torch.ones(5, 7, dtype=torch.complex64)},
        TypeError,
        "x and weight must have the same dtype, float16, bfloat16, float32 or float64, got torch.complex64 and torch.complex64",
    ),
    "bias: wrong size": ({"bias": torch.ones(4)}, ValueError, "bias must have shape [5], got [4]"),
    "bias: 2-d": ({"bias": torch.ones(1, 5)}, ValueError, "bias must have shape [5], got [1, 5]"),
    "bias: other device": ({"bias": torch.ones(5, device=META)}, ValueError, "bias is on meta but x is on {device}"),
    "bias: other dtype": ({"bias": torch.ones(5, dtype=torch.bfloat16)}, TypeError, "bias must have x's dtype torch.float32, got torch.bfloat16"),
}
LAMBDA = {
    "lambda: NaN": ({"lambda_": NAN}, ValueError, "lambda_ must be finite, got nan"),
    "lambda: str": ({"lambda_": "1"}, TypeError, "lambda_ must be a real number or a real tensor, got str"),
    "lambda: complex": ({"lambda_": torch.tensor(1j)}, TypeError, "lambda_ must be a real number or a real tensor, got a tensor of torch.complex64"),
    "lambda: wrong shape": ({"lambda_": torch.ones(5)}, ValueError, "lambda_ of shape [5] does not broadcast to x of shape [5, 7]"),
    "lambda: other device": (
        {"lambda_": torch.ones(7, device=META)},
        ValueError,
        "lambda_ is on meta but x is on {device}: only a 0-d lambda_ may be elsewhere, on the CPU",
    ),
}
HEADS = {
    "head_sizes: none": ({"head_sizes": []}, ValueError, "head_sizes must be positive and sum to the 5 rows of weight, got []"),
    "head_sizes: wrong sum": ({"head_sizes": [3, 3]}, ValueError, "head_sizes must be positive and sum to the 5 rows of weight, got [3, 3]"),
    "head_sizes: zero": ({"head_sizes": [5, 0]}, ValueError, "head_sizes must be positive and sum to the 5 rows of weight, got [5, 0]"),
    "head_sizes: negative": ({"head_sizes": (6, -1)}, ValueError, "head_sizes must be positive and sum to the 5 rows of weight, got [6, -1]"),
    "grad_scale: too few": ({"grad_scale": [1.0]}, ValueError, "grad_scale must hold one number for each of the 2 heads, got shape [1]"),
    "grad_scale: tensor, too many": (
        {"grad_scale": torch.ones(3)},
        ValueError,
        "grad_scale must hold one number for each of the 2 heads, got shape [3]",
    ),
    "grad_scale: 0-d": ({"grad_scale": torch.ones(())}, ValueError, "grad_scale must hold one number for each of the 2 heads, got shape []"),
    "grad_scale: 2-d": ({"grad_scale": torch.ones(2, 1)}, ValueError, "grad_scale must hold one number for each of the 2 heads, got shape [2, 1]"),
    "grad_scale: other device": ({"grad_scale": torch.ones(2, device=META)}, ValueError, "grad_scale is on meta but x is on {device}"),
    "grad_scale: number": ({"grad_scale": 1.0}, TypeError, "grad_scale must be a sequence of real numbers or a tensor, got float"),
    "grad_scale: str": ({"grad_scale": "12"}, TypeError, "grad_scale must be a sequence of real numbers or a tensor, got str"),
    "grad_scale: of str": ({"grad_scale": [1.0, "2"]}, TypeError, "grad_scale must be a real number or a real tensor, got str"),
    "grad_scale: NaN": ({"grad_scale": [1.0, NAN]}, ValueError, "grad_scale must be finite, got nan"),
    "grad_scale: infinity": ({"grad_scale": [INF, 1.0]}, ValueError, "grad_scale must be finite, got inf"),
}
LOSS = {
    "targets: not a tensor": ({"targets": [[0, 0]] * 5}, TypeError, "targets must be a tensor, got list"),
    "targets: int32": ({"targets": torch.zeros(5, 2, dtype=torch.int32)}, TypeError, "targets must be torch.int64, got torch.int32"),
    "targets: float": ({"targets": torch.zeros(5, 2)}, TypeError, "targets must be torch.int64, got torch.float32"),
    "targets: rows": (
        {"targets": torch.zeros(4, 2, dtype=torch.int64)},
        ValueError,
        "targets must have shape [5, 2] (one class per row and head), got [4, 2]",
    ),
    "targets: no heads": (
        {"targets": torch.zeros(5, dtype=torch.int64)},
        ValueError,
        "targets must have shape [5, 2] (one class per row and head), got [5]",
    ),
    "targets: other device": ({"targets": torch.zeros(5, 2, dtype=torch.int64, device=META)}, ValueError, "targets is on meta but x is on {device}"),
    "targets: class": (
        {"targets": torch.tensor([[0, 2]] * 5)},
        IndexError,
        "targets of head 1 must be in [0, 2) or ignore_index (-100), got 2",
    ),
    "loss_weight: too few": ({"loss_weight": [1.0]}, ValueError, "loss_weight must hold one number for each of the 2 heads, got shape [1]"),
    "loss_weight: other device": ({"loss_weight": torch.ones(2, device=META)}, ValueError, "loss_weight is on meta but x is on {device}"),
    "loss_weight: number": ({"loss_weight": 1.0}, TypeError, "loss_weight must be a sequence of real numbers or a tensor, got float"),
    "loss_weight: NaN": ({"loss_weight": [1.0, NAN]}, ValueError, "loss_weight must be finite, got nan"),
    "label_smoothing: above": ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be in [0, 1], got 1.5"),
    "label_smoothing: below": ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be in [0, 1], got -0.1"),
    "label_smoothing: NaN": ({"label_smoothing": NAN}, ValueError, "label_smoothing must be in [0, 1], got nan"),
}

FUNCTIONS = {"grl_linear": grl_linear, "linear_heads": linear_heads, "heads_cross_entropy": heads_cross_entropy}
CASES = [
    *(("grl_linear", name, case) for name, case in {**LINEAR, **LAMBDA}.items()),
    *(("linear_heads", name, case) for name, case in {**LINEAR, **HEADS}.items()),
    *(("heads_cross_entropy", name, case) for name, case in {**LINEAR, **HEADS, **LOSS}.items()),
]
on_cases = pytest.mark.parametrize("function, case", [(f, c) for f, _, c in CASES], ids=[f"{f}, {name}" for f, name, _ in CASES])


def arguments(device, function, changes):
    sample = sample_heads(device)
    kept = {
        "grl_linear": ("x", "weight", "bias"),
        "linear_heads": ("x", "weight", "bias", "head_sizes", "grad_scale"),
        "heads_cross_entropy": sample._fields,
    }[function]
    here = {n: v.to(device) if isinstance(v, torch.Tensor) and not v.is_meta else v for n, v in changes.items()}
    return {name: getattr(sample, name) for name in kept} | here


def check_refusal(call, arguments, expected, text):
    device = next(v.device for v in arguments.values() if isinstance(v, torch.Tensor) and not v.is_meta)
    with pytest.raises(expected) as caught:
        call(**arguments)
    assert type(caught.value) is expected
    assert str(caught.value) == text.format(device=device)


@on_cases
def test_every_path_refuses_with_one_text(path, device, function, case):
    changes, expected, text = case
    if expected is IndexError and device.type != "cpu":
        pytest.skip("looking at the targets would be a synchronisation")
    check_refusal(FUNCTIONS[function], arguments(device, function, changes), expected, text)


def _of_tensors(case):
    """Whether the operator's schema takes what the case gives."""
    changes, _, text = case
    numbers = ("grad_scale", "loss_weight", "lambda_")
    return "must be a tensor" not in text and all(isinstance(v, torch.Tensor) for name, v in changes.items() if name in numbers)


@pytest.mark.parametrize(
    "function, case", [(f, c) for f, _, c in CASES if _of_tensors(c)], ids=[f"{f}, {name}" for f, name, c in CASES if _of_tensors(c)]
)
def test_the_operator_refuses_with_the_same_text(compiled, device, function, case):
    changes, expected, text = case
    if expected is IndexError and device.type != "cpu":
        pytest.skip("looking at the targets would be a synchronisation")
    given = arguments(device, function, changes)
    if function == "grl_linear":
        given.setdefault("lambda_", torch.ones((), device=device))
    elif not isinstance(given["grad_scale"], torch.Tensor):
        given["grad_scale"] = torch.tensor(given["grad_scale"])
    check_refusal(getattr(torch.ops.grl_ext, function), given, expected, text)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_torch_func_transform_refuses_with_the_same_text(path, device, function):
    given = arguments(device, function, {"bias": torch.ones(4)})
    bias = given.pop("bias")
    with pytest.raises(ValueError) as caught:
        torch.func.grad(lambda b: FUNCTIONS[function](bias=b, **given).loss)(bias)
    assert str(caught.value) == "bias must have shape [5], got [4]"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_refusal_leaves_the_arguments_as_they_were(path, device, function):
    given = arguments(device, function, {"bias": torch.ones(4)})
    before = {name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(ValueError):
        FUNCTIONS[function](**given)
    for name, value in before.items():
        assert torch.equal(given[name], value) and given[name]._version == 0
