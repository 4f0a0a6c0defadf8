"""What the linear operations refuse: the same type and text from every entry."""

import pytest
import torch
from head_samples import sample_heads, sample_linear
from samples import assert_same

from grl_ext import grl_linear, heads_loss, linear_heads

pytestmark = pytest.mark.sanitized

NAN, INF = float("nan"), float("inf")
META = torch.device("meta")
LABELS = torch.zeros(5, dtype=torch.int64)

SAME_DTYPE = "x and weight must have the same dtype, float16, bfloat16, float32 or float64"

# name: (the argument and what it is replaced by, type, text), over x (5, 7), weight (5, 7), bias (5,).
LINEAR = {
    "x: not a tensor": ({"x": 1.0}, TypeError, "x must be a tensor, got float"),
    "weight: not a tensor": ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
    "bias: not a tensor": ({"bias": [1.0]}, TypeError, "bias must be a tensor, got list"),
    "x: 0-d": ({"x": torch.ones(())}, ValueError, "x must have at least one dimension, got shape []"),
    "x: other features": (
        {"x": torch.ones(5, 6)},
        ValueError,
        "weight must have shape [K, D] with D = x.shape[-1] = 6, got [5, 7]",
    ),
    "weight: 1-d": (
        {"weight": torch.ones(7)},
        ValueError,
        "weight must have shape [K, D] with D = x.shape[-1] = 7, got [7]",
    ),
    "weight: 3-d": (
        {"weight": torch.ones(1, 5, 7)},
        ValueError,
        "weight must have shape [K, D] with D = x.shape[-1] = 7, got [1, 5, 7]",
    ),
    "weight: other device": (
        {"weight": torch.ones(5, 7, device=META)},
        ValueError,
        "weight is on meta but x is on {device}",
    ),
    "weight: other dtype": (
        {"weight": torch.ones(5, 7, dtype=torch.float64)},
        TypeError,
        f"{SAME_DTYPE}, got torch.float32 and torch.float64",
    ),
    "integers": (
        {"x": torch.ones(5, 7, dtype=torch.int64), "weight": torch.ones(5, 7, dtype=torch.int64)},
        TypeError,
        f"{SAME_DTYPE}, got torch.int64 and torch.int64",
    ),
    "float8": (
        {"x": torch.ones(5, 7).to(torch.float8_e5m2), "weight": torch.ones(5, 7).to(torch.float8_e5m2)},
        TypeError,
        f"{SAME_DTYPE}, got torch.float8_e5m2 and torch.float8_e5m2",
    ),
    "complex": (
        {"x": torch.ones(5, 7, dtype=torch.complex64), "weight": torch.ones(5, 7, dtype=torch.complex64)},
        TypeError,
        f"{SAME_DTYPE}, got torch.complex64 and torch.complex64",
    ),
    "bias: wrong size": ({"bias": torch.ones(4)}, ValueError, "bias must have shape [5], got [4]"),
    "bias: 2-d": ({"bias": torch.ones(1, 5)}, ValueError, "bias must have shape [5], got [1, 5]"),
    "bias: other device": ({"bias": torch.ones(5, device=META)}, ValueError, "bias is on meta but x is on {device}"),
    "bias: other dtype": (
        {"bias": torch.ones(5, dtype=torch.bfloat16)},
        TypeError,
        "bias must have x's dtype torch.float32, got torch.bfloat16",
    ),
    "lambda: NaN": ({"lambda_": NAN}, ValueError, "lambda_ must be finite, got nan"),
    "lambda: a tensor of NaN": ({"lambda_": torch.tensor(NAN)}, ValueError, "lambda_ must be finite, got nan"),
    "lambda: infinity in a row": (
        {"lambda_": torch.tensor([[1.0], [1.0], [INF], [1.0], [1.0]])},
        ValueError,
        "lambda_ must be finite, got inf",
    ),
    "lambda: str": ({"lambda_": "1"}, TypeError, "lambda_ must be a real number or a real tensor, got str"),
    "lambda: complex": (
        {"lambda_": torch.tensor(1j)},
        TypeError,
        "lambda_ must be a real number or a real tensor, got a tensor of torch.complex64",
    ),
    "lambda: wrong shape": (
        {"lambda_": torch.ones(5)},
        ValueError,
        "lambda_ of shape [5] does not broadcast to x of shape [5, 7]",
    ),
    "lambda: other device": (
        {"lambda_": torch.ones(7, device=META)},
        ValueError,
        "lambda_ is on meta but x is on {device}: only a 0-d lambda_ may be elsewhere, on the CPU",
    ),
}


def second(tensor):
    """The second head's entry replaced."""
    return lambda entries: [entries[0], tensor, *entries[2:]]


# Over x (5, 7) and two heads of sizes 3 and 2, an adversary the second.
HEADS = {
    "x: not a tensor": ({"x": 1.0}, TypeError, "x must be a tensor, got float"),
    "x: 0-d": ({"x": torch.ones(())}, ValueError, "x must have at least one dimension, got shape []"),
    "x: integers": (
        {"x": torch.ones(5, 7, dtype=torch.int64)},
        TypeError,
        "x must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "x: complex": (
        {"x": torch.ones(5, 7, dtype=torch.complex64)},
        TypeError,
        "x must be float16, bfloat16, float32 or float64, got torch.complex64",
    ),
    "x: other features": (
        {"x": torch.ones(5, 6)},
        ValueError,
        "weight[0] must have shape [K, 6] with K at least 1, got [3, 7]",
    ),
    "weight: none": (
        {"weight": [], "bias": [], "lambda_": [], "targets": []},
        ValueError,
        "weight must hold at least one head's matrix, got none",
    ),
    "weight: not a tensor": ({"weight": second(1.0)}, TypeError, "weight[1] must be a tensor, got float"),
    "weight: 1-d": (
        {"weight": second(torch.ones(7))},
        ValueError,
        "weight[1] must have shape [K, 7] with K at least 1, got [7]",
    ),
    "weight: no rows": (
        {"weight": second(torch.ones(0, 7))},
        ValueError,
        "weight[1] must have shape [K, 7] with K at least 1, got [0, 7]",
    ),
    "weight: other device": (
        {"weight": second(torch.ones(2, 7, device=META))},
        ValueError,
        "weight[1] is on meta but x is on {device}",
    ),
    "weight: other dtype": (
        {"weight": second(torch.ones(2, 7, dtype=torch.float64))},
        TypeError,
        "weight[1] must have x's dtype torch.float32, got torch.float64",
    ),
    "bias: not a tensor": ({"bias": second(1.0)}, TypeError, "bias[1] must be a tensor, got float"),
    "bias: wrong size": ({"bias": second(torch.ones(4))}, ValueError, "bias[1] must have shape [2], got [4]"),
    "bias: 2-d": ({"bias": second(torch.ones(1, 2))}, ValueError, "bias[1] must have shape [2], got [1, 2]"),
    "bias: other device": (
        {"bias": second(torch.ones(2, device=META))},
        ValueError,
        "bias[1] is on meta but x is on {device}",
    ),
    "bias: other dtype": (
        {"bias": second(torch.ones(2, dtype=torch.bfloat16))},
        TypeError,
        "bias[1] must have x's dtype torch.float32, got torch.bfloat16",
    ),
    "lambda: a number": (
        {"lambda_": 1.0},
        TypeError,
        "lambda_ must be a sequence with a number, a 0-d tensor or None for each head, got float",
    ),
    "lambda: a tensor": (
        {"lambda_": torch.ones(2)},
        TypeError,
        "lambda_ must be a sequence with a number, a 0-d tensor or None for each head, got Tensor",
    ),
    "lambda: a string": (
        {"lambda_": "12"},
        TypeError,
        "lambda_ must be a sequence with a number, a 0-d tensor or None for each head, got str",
    ),
    "lambda: too few": ({"lambda_": [1.0]}, ValueError, "lambda_ must have an entry for each of the 2 heads, got 1"),
    "lambda: too many": (
        {"lambda_": [None] * 3},
        ValueError,
        "lambda_ must have an entry for each of the 2 heads, got 3",
    ),
    "lambda: NaN": ({"lambda_": [None, NAN]}, ValueError, "lambda_[1] must be finite, got nan"),
    "lambda: infinity": ({"lambda_": [INF, 1.0]}, ValueError, "lambda_[0] must be finite, got inf"),
    "lambda: of str": (
        {"lambda_": [None, "1"]},
        TypeError,
        "lambda_[1] must be a real number or a real tensor, got str",
    ),
    "lambda: NaN beside a tensor": (
        {"lambda_": [torch.ones(()), NAN]},
        ValueError,
        "lambda_[1] must be finite, got nan",
    ),
    "lambda: a tensor of NaN": (
        {"lambda_": [None, torch.tensor(NAN)]},
        ValueError,
        "lambda_[1] must be finite, got nan",
    ),
    "lambda: an infinite tensor beside a number": (
        {"lambda_": [0.5, torch.tensor(-INF)]},
        ValueError,
        "lambda_[1] must be finite, got -inf",
    ),
    "lambda: 1-d": (
        {"lambda_": [None, torch.ones(2)]},
        ValueError,
        "lambda_[1] must be a number or a 0-d tensor, got shape [2]",
    ),
    "lambda: complex": (
        {"lambda_": [None, torch.tensor(1j)]},
        TypeError,
        "lambda_[1] must be a real number or a real tensor, got a tensor of torch.complex64",
    ),
}

CLASSES = "must be torch.int64 (classes) or floating point (probabilities)"
LOSS = {
    "targets: too few": (
        {"targets": [LABELS]},
        ValueError,
        "targets must have an entry for each of the 2 heads, got 1",
    ),
    "targets: not a tensor": ({"targets": second([0] * 5)}, TypeError, "targets[1] must be a tensor, got list"),
    "targets: bool": ({"targets": second(LABELS.bool())}, TypeError, f"targets[1] {CLASSES}, got torch.bool"),
    "targets: int32": ({"targets": second(LABELS.int())}, TypeError, f"targets[1] {CLASSES}, got torch.int32"),
    "targets: uint8": ({"targets": second(LABELS.byte())}, TypeError, f"targets[1] {CLASSES}, got torch.uint8"),
    "targets: complex": (
        {"targets": second(torch.ones(5, 2, dtype=torch.complex64))},
        TypeError,
        f"targets[1] {CLASSES}, got torch.complex64",
    ),
    "targets: float8": (
        {"targets": second(torch.ones(5, 2).to(torch.float8_e5m2))},
        TypeError,
        f"targets[1] {CLASSES}, got torch.float8_e5m2",
    ),
    "targets: rows": ({"targets": second(LABELS[:4])}, ValueError, "targets[1] must have shape [5], got [4]"),
    "targets: classes with a dimension": (
        {"targets": second(LABELS[:, None])},
        ValueError,
        "targets[1] must have shape [5], got [5, 1]",
    ),
    "targets: probabilities without a dimension": (
        {"targets": second(torch.ones(5))},
        ValueError,
        "targets[1] must have shape [5, 2], got [5]",
    ),
    "targets: other probabilities": (
        {"targets": second(torch.ones(5, 3))},
        ValueError,
        "targets[1] must have shape [5, 2], got [5, 3]",
    ),
    "targets: other device": (
        {"targets": second(LABELS.to(META))},
        ValueError,
        "targets[1] is on meta but x is on {device}",
    ),
    "targets: class": (
        {"targets": second(torch.full((5,), 2))},
        IndexError,
        "targets[1] must be in [0, 2) or ignore_index (-100), got 2",
    ),
    "targets: negative class": (
        {"targets": second(torch.tensor([0, 1, -1, 0, 0]))},
        IndexError,
        "targets[1] must be in [0, 2) or ignore_index (-100), got -1",
    ),
    "losses: unknown": (
        {"losses": ["cross_entropy", "l1"]},
        ValueError,
        "losses[1] must be one of ['cross_entropy', 'mse', 'bce'] or a function, got 'l1'",
    ),
    "losses: too few": ({"losses": ["mse"]}, ValueError, "losses must have an entry for each of the 2 heads, got 1"),
    "mse: classes": (
        {"losses": ["cross_entropy", "mse"]},
        TypeError,
        "targets[1] must be floating point (values), got torch.int64",
    ),
    "mse: shape": (
        {"losses": ["cross_entropy", "mse"], "targets": second(torch.ones(5))},
        ValueError,
        "targets[1] must have shape [5, 2], got [5]",
    ),
    "mse: class weight": (
        {
            "losses": ["cross_entropy", "mse"],
            "targets": second(torch.ones(5, 2)),
            "class_weight": [None, torch.ones(2)],
        },
        ValueError,
        "class_weight[1] is for a cross entropy, this head has a squared error",
    ),
    "mse: smoothing": (
        {"losses": ["cross_entropy", "mse"], "targets": second(torch.ones(5, 2)), "label_smoothing": [0.0, 0.1]},
        ValueError,
        "label_smoothing[1] is for a cross entropy, this head has a squared error",
    ),
    "sample_weight: not a tensor": (
        {"sample_weight": [None, 1.0]},
        TypeError,
        "sample_weight[1] must be a tensor, got float",
    ),
    "sample_weight: too few": (
        {"sample_weight": [None]},
        ValueError,
        "sample_weight must have an entry for each of the 2 heads, got 1",
    ),
    "sample_weight: none at all": (
        {"sample_weight": []},
        ValueError,
        "sample_weight must have an entry for each of the 2 heads, got 0",
    ),
    "sample_weight: integers": (
        {"sample_weight": [None, LABELS]},
        TypeError,
        "sample_weight[1] must be floating point, got torch.int64",
    ),
    "sample_weight: bool": (
        {"sample_weight": LABELS.bool()},
        TypeError,
        "sample_weight[0] must be floating point, got torch.bool",
    ),
    "sample_weight: float8": (
        {"sample_weight": [None, torch.ones(5).to(torch.float8_e5m2)]},
        TypeError,
        "sample_weight[1] must be floating point, got torch.float8_e5m2",
    ),
    "sample_weight: shape": (
        {"sample_weight": [None, torch.ones(5, 1)]},
        ValueError,
        "sample_weight[1] must have shape [5], got [5, 1]",
    ),
    "sample_weight: other device": (
        {"sample_weight": [None, torch.ones(5, device=META)]},
        ValueError,
        "sample_weight[1] is on meta but x is on {device}",
    ),
    "sample_weight: negative": (
        {"sample_weight": [None, torch.tensor([1.0, -0.5, 1.0, 1.0, 1.0])]},
        ValueError,
        "sample_weight[1] must be finite and not negative, got -0.5",
    ),
    "sample_weight: NaN": (
        {"sample_weight": [None, torch.tensor([1.0, NAN, 1.0, 1.0, 1.0])]},
        ValueError,
        "sample_weight[1] must be finite and not negative, got nan",
    ),
    "sample_weight: infinity": (
        {"sample_weight": [torch.tensor([1.0, INF, 1.0, 1.0, 1.0]), None]},
        ValueError,
        "sample_weight[0] must be finite and not negative, got inf",
    ),
    "class_weight: not a tensor": (
        {"class_weight": [None, [1.0, 2.0]]},
        TypeError,
        "class_weight[1] must be a tensor, got list",
    ),
    "class_weight: too many": (
        {"class_weight": [None] * 3},
        ValueError,
        "class_weight must have an entry for each of the 2 heads, got 3",
    ),
    "class_weight: integers": (
        {"class_weight": [None, LABELS[:2]]},
        TypeError,
        "class_weight[1] must be floating point, got torch.int64",
    ),
    "class_weight: shape": (
        {"class_weight": [None, torch.ones(3)]},
        ValueError,
        "class_weight[1] must have shape [2], got [3]",
    ),
    "class_weight: other device": (
        {"class_weight": [None, torch.ones(2, device=META)]},
        ValueError,
        "class_weight[1] is on meta but x is on {device}",
    ),
    "loss_weight: too few": (
        {"loss_weight": [1.0]},
        ValueError,
        "loss_weight must have an entry for each of the 2 heads, got 1",
    ),
    "loss_weight: a tensor of too few": (
        {"loss_weight": torch.ones(1)},
        ValueError,
        "loss_weight must have an entry for each of the 2 heads, got shape [1]",
    ),
    "loss_weight: 2-d": (
        {"loss_weight": torch.ones(2, 1)},
        ValueError,
        "loss_weight must have an entry for each of the 2 heads, got shape [2, 1]",
    ),
    "loss_weight: other device": (
        {"loss_weight": torch.ones(2, device=META)},
        ValueError,
        "loss_weight is on meta but x is on {device}",
    ),
    "loss_weight: complex": (
        {"loss_weight": torch.ones(2, dtype=torch.complex64)},
        TypeError,
        "loss_weight must hold real numbers, got torch.complex64",
    ),
    "loss_weight: NaN": ({"loss_weight": [1.0, NAN]}, ValueError, "loss_weight[1] must be finite, got nan"),
    "loss_weight: a tensor with NaN": (
        {"loss_weight": torch.tensor([1.0, NAN])},
        ValueError,
        "loss_weight must be finite, got nan",
    ),
    "loss_weight: an infinite tensor among numbers": (
        {"loss_weight": [1.0, torch.tensor(INF)]},
        ValueError,
        "loss_weight[1] must be finite, got inf",
    ),
    "loss_weight: str": (
        {"loss_weight": [1.0, "2"]},
        TypeError,
        "loss_weight[1] must be a real number or a real tensor, got str",
    ),
    "label_smoothing: above": ({"label_smoothing": 1.5}, ValueError, "label_smoothing[0] must be in [0, 1], got 1.5"),
    "label_smoothing: below": (
        {"label_smoothing": [0.1, -0.1]},
        ValueError,
        "label_smoothing[1] must be in [0, 1], got -0.1",
    ),
    "label_smoothing: NaN": ({"label_smoothing": [0.1, NAN]}, ValueError, "label_smoothing[1] must be finite, got nan"),
    "label_smoothing: str": (
        {"label_smoothing": [0.1, "0"]},
        TypeError,
        "label_smoothing[1] must be a real number, got str",
    ),
    "label_smoothing: a tensor": (
        {"label_smoothing": torch.tensor(0.1)},
        TypeError,
        "label_smoothing[0] must be a real number, got Tensor",
    ),
    "label_smoothing: a tensor for each": (
        {"label_smoothing": torch.tensor([0.1, 0.2])},
        TypeError,
        "label_smoothing[0] must be a real number, got Tensor",
    ),
    "label_smoothing: None": (
        {"label_smoothing": None},
        TypeError,
        "label_smoothing[0] must be a real number, got NoneType",
    ),
    "label_smoothing: too few": (
        {"label_smoothing": [0.1]},
        ValueError,
        "label_smoothing must have an entry for each of the 2 heads, got 1",
    ),
    "ignore_index: None": (
        {"ignore_index": None},
        TypeError,
        "ignore_index[0] must be an integer, got NoneType",
    ),
    "ignore_index: a tensor": (
        {"ignore_index": torch.tensor(1)},
        TypeError,
        "ignore_index[0] must be an integer, got Tensor",
    ),
    "ignore_index: too large": (
        {"ignore_index": [1, 2**63]},
        ValueError,
        f"ignore_index[1] must fit into int64, got {2**63}",
    ),
    "ignore_index: float": ({"ignore_index": [1, 0.5]}, TypeError, "ignore_index[1] must be an integer, got float"),
    "ignore_index: too few": (
        {"ignore_index": [1]},
        ValueError,
        "ignore_index must have an entry for each of the 2 heads, got 1",
    ),
    "reduction": ({"reduction": "all"}, ValueError, "reduction must be 'mean', 'sum' or 'none', got 'all'"),
}

# Over heads of several layers: of the first, weight (4, 7), (3, 4); the second is a linear one.
LAYERS = {
    "layers that do not fit": (
        {"weight": lambda w: [[w[0][0], torch.ones(3, 5)], w[1]]},
        ValueError,
        "weight[0][1] must have shape [K, 4] with K at least 1, got [3, 5]",
    ),
    "a layer that is no tensor": (
        {"weight": lambda w: [[w[0][0], 1.0], w[1]]},
        TypeError,
        "weight[0][1] must be a tensor, got float",
    ),
    "no layers": (
        {"weight": lambda w: [[], w[1]], "bias": lambda b: [[], b[1]]},
        ValueError,
        "weight[0] must hold at least one layer's matrix, got none",
    ),
    "a bias too few": (
        {"bias": lambda b: [b[0][:1], b[1]]},
        ValueError,
        "bias[0] must have an entry for each of the head's layers, 2, got 1",
    ),
    "another head's bias": (
        {"bias": lambda b: [[*b[0], b[1]], []]},
        ValueError,
        "bias[0] must have an entry for each of the head's layers, 2, got 3",
    ),
    "a bias of another size": (
        {"bias": lambda b: [[b[0][0], torch.ones(4)], b[1]]},
        ValueError,
        "bias[0][1] must have shape [3], got [4]",
    ),
    "biases for one head": (
        {"bias": lambda b: b[:1]},
        ValueError,
        "bias must have an entry for each of the 2 heads, got 1",
    ),
    "the first layer's features": (
        {"weight": lambda w: [[torch.ones(4, 6), w[0][1]], w[1]]},
        ValueError,
        "weight[0][0] must have shape [K, 7] with K at least 1, got [4, 6]",
    ),
    "a first layer without dimensions": (
        {"weight": lambda w: [[w[0][0][0, 0], w[0][1]], w[1]]},
        ValueError,
        "weight[0][0] must have shape [K, 7] with K at least 1, got []",
    ),
    "a first layer of another dtype": (
        {"weight": lambda w: [[w[0][0].double(), w[0][1]], w[1]]},
        TypeError,
        "weight[0][0] must have x's dtype torch.float32, got torch.float64",
    ),
    "a last layer of another dtype": (
        {"weight": lambda w: [[w[0][0], w[0][1].double()], w[1]]},
        TypeError,
        "weight[0][1] must have x's dtype torch.float32, got torch.float64",
    ),
    "a first bias on another device": (
        {"bias": lambda b: [[b[0][0].to(META), b[0][1]], b[1]]},
        ValueError,
        "bias[0][0] is on meta but x is on {device}",
    ),
    "a bias that is no tensor": (
        {"bias": lambda b: [[b[0][0], 1.0], b[1]]},
        TypeError,
        "bias[0][1] must be a tensor, got float",
    ),
    "targets": ({"targets": second(LABELS[:4])}, ValueError, "targets[1] must have shape [5], got [4]"),
    "targets of the layered head": (
        {"targets": lambda t: [t[0][:4], t[1]]},
        ValueError,
        "targets[0] must have shape [5], got [4]",
    ),
    "a class of the layered head": (
        {"targets": lambda t: [torch.full((5,), 9), t[1]]},
        IndexError,
        "targets[0] must be in [0, 3) or ignore_index (-100), got 9",
    ),
    "lambda: NaN": ({"lambda_": [torch.tensor(NAN), 1.0]}, ValueError, "lambda_[0] must be finite, got nan"),
    "lambda: too few": ({"lambda_": [1.0]}, ValueError, "lambda_ must have an entry for each of the 2 heads, got 1"),
    "sample_weight: too few": (
        {"sample_weight": [None]},
        ValueError,
        "sample_weight must have an entry for each of the 2 heads, got 1",
    ),
    "loss_weight: 2-d": (
        {"loss_weight": torch.ones(2, 1)},
        ValueError,
        "loss_weight must have an entry for each of the 2 heads, got shape [2, 1]",
    ),
    "loss_weight: a tensor with NaN": (
        {"loss_weight": torch.tensor([NAN, 1.0])},
        ValueError,
        "loss_weight must be finite, got nan",
    ),
    "label_smoothing: too few": (
        {"label_smoothing": [0.1]},
        ValueError,
        "label_smoothing must have an entry for each of the 2 heads, got 1",
    ),
}

# Over a linear head and one with hidden layers (4, 7), (6, 4), (3, 6): what is wrong with the one in the middle.
MORE_LAYERS = {
    "its dtype": (
        {"weight": lambda w: [w[0], [w[1][0], w[1][1].double(), w[1][2]]]},
        TypeError,
        "weight[1][1] must have x's dtype torch.float32, got torch.float64",
    ),
    "its bias": (
        {"bias": lambda b: [b[0], [b[1][0], b[1][1][:5], b[1][2]]]},
        ValueError,
        "bias[1][1] must have shape [6], got [5]",
    ),
    "its shape": (
        {"weight": lambda w: [w[0], [w[1][0], w[1][1].T, w[1][2]]]},
        ValueError,
        "weight[1][1] must have shape [K, 4] with K at least 1, got [4, 6]",
    ),
    "the next one's shape": (
        {"weight": lambda w: [w[0], [w[1][0], w[1][1][:5], w[1][2]]]},
        ValueError,
        "weight[1][2] must have shape [K, 5] with K at least 1, got [3, 6]",
    ),
}

FUNCTIONS = {
    "grl_linear": grl_linear,
    "linear_heads": linear_heads,
    "heads_loss": heads_loss,
    "heads_loss of layers": heads_loss,
    "heads_loss of more layers": heads_loss,
}
TABLES = {
    "grl_linear": LINEAR,
    "linear_heads": HEADS,
    "heads_loss": {**HEADS, **LOSS},
    "heads_loss of layers": LAYERS,
    "heads_loss of more layers": MORE_LAYERS,
}
CASES = [(function, name) for function, table in TABLES.items() for name in table]
on_cases = pytest.mark.parametrize("function, name", CASES, ids=[f"{f}, {n}" for f, n in CASES])


def arguments(device, function):
    if function == "grl_linear":
        return sample_linear(device)._asdict()
    sizes = {"heads_loss of layers": ((4, 3), 2), "heads_loss of more layers": (2, (4, 6, 3))}.get(function, (3, 2))
    sample = sample_heads(device, head_sizes=sizes)
    weight, bias = (sample.weight, sample.bias) if "layers" in function else sample.linear
    given = {"x": sample.x, "weight": weight, "bias": bias, "lambda_": sample.lambda_}
    return given if function == "linear_heads" else {**given, "targets": sample.targets}


def changed(device, function, changes):
    def there(value):
        if isinstance(value, torch.Tensor):
            return value if value.is_meta else value.to(device)
        return [there(v) for v in value] if isinstance(value, list) else value

    given = arguments(device, function)
    for argument, change in changes.items():
        if argument == "targets" and function == "linear_heads":
            continue
        given[argument] = there(change(given[argument]) if callable(change) else change)
    return given


def check_refusal(call, given, device, expected, text):
    with pytest.raises(expected) as caught:
        call(**given)
    assert type(caught.value) is expected
    assert str(caught.value) == text.format(device=device)


def looks_at_values(text):
    return ") or ignore_index" in text or "finite and not negative" in text


@on_cases
def test_every_path_refuses_with_one_text(path, device, function, name):
    changes, expected, text = TABLES[function][name]
    if looks_at_values(text) and device.type != "cpu":
        pytest.skip("looking at the values would be a synchronisation")
    check_refusal(FUNCTIONS[function], changed(device, function, changes), device, expected, text)


# --- the registered operators
# ----------------------------------------------------------------------------------------------


def operator_arguments(device):
    """What the schemas of grl_linear, linear_heads and heads_loss take."""
    linear = sample_linear(device)
    sample = sample_heads(device, head_sizes=(3, 2))
    weight, bias = sample.linear
    heads = {"x": sample.x, "weight": weight, "bias": bias, "lambda_": [None, torch.tensor(0.3)]}
    options = {name: [None, None] for name in ("sample_weight", "class_weight")}
    options |= {"loss_weight": None, "kind": [0, 0], "label_smoothing": [0.0] * 2, "ignore_index": [-100] * 2}
    return {
        "grl_linear": {**linear._asdict(), "lambda_": torch.ones(())},
        "linear_heads": heads,
        "heads_loss": {**heads, "targets": sample.targets, **options, "mean": True},
    }


CHANGED = [
    ("grl_linear", "x", lambda x: x[:, :6]),
    ("grl_linear", "x", lambda x: x.long()),
    ("grl_linear", "weight", lambda w: w[0]),
    ("grl_linear", "weight", lambda w: w.to(META)),
    ("grl_linear", "bias", lambda b: b[:4]),
    ("grl_linear", "lambda_", lambda own: own.expand(5)),
    ("grl_linear", "lambda_", lambda own: own.to(torch.complex64)),
    ("linear_heads", "x", lambda x: x[0, 0]),
    ("linear_heads", "x", lambda x: x.double()),
    ("linear_heads", "weight", lambda w: []),
    ("linear_heads", "weight", lambda w: [w[0], w[1][:, :6]]),
    ("linear_heads", "bias", lambda b: b[:1]),
    ("linear_heads", "bias", lambda b: [b[0], b[1][:1]]),
    ("linear_heads", "lambda_", lambda own: own[:1]),
    ("linear_heads", "lambda_", lambda own: [None, torch.ones(2)]),
    ("linear_heads", "lambda_", lambda own: [None, torch.ones((), requires_grad=True)]),
    ("linear_heads", "lambda_", lambda own: [None, torch.ones((), device=META)]),
    ("heads_loss", "targets", lambda t: t[:1]),
    ("heads_loss", "targets", lambda t: [t[0], t[1][:4]]),
    ("heads_loss", "targets", lambda t: [t[0], t[1].int()]),
    ("heads_loss", "lambda_", lambda own: [None]),
    ("heads_loss", "kind", lambda k: [0]),
    ("heads_loss", "kind", lambda k: [0, 1]),  # with classes as targets
    ("heads_loss", "label_smoothing", lambda s: [0.0]),
    ("heads_loss", "ignore_index", lambda i: [-100] * 3),
    ("heads_loss", "sample_weight", lambda w: [None]),
    ("heads_loss", "sample_weight", lambda w: [torch.ones(4), None]),
    ("heads_loss", "class_weight", lambda w: [None, torch.ones(3)]),
    ("heads_loss", "class_weight", lambda w: [None, torch.ones(2, requires_grad=True)]),
    ("heads_loss", "loss_weight", lambda w: torch.ones(3)),
    ("heads_loss", "loss_weight", lambda w: torch.ones(2, requires_grad=True)),
]


@pytest.mark.parametrize("number", range(len(CHANGED)))
def test_the_operators_called_by_hand_do_not_take_what_the_functions_refuse(compiled, device, number):
    """Without a text of their own: the functions have the texts."""
    function, argument, change = CHANGED[number]
    given = operator_arguments(device)[function]
    getattr(torch.ops.grl_ext, function)(**given)
    given[argument] = change(given[argument])
    with pytest.raises(ValueError) as caught:
        getattr(torch.ops.grl_ext, function)(**given)
    assert str(caught.value) == f"torch.ops.grl_ext.{function} does not take these; grl_ext.{function} says why"


# --- around it
# -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["grl_linear", "linear_heads", "heads_loss"])
def test_a_torch_func_transform_refuses_with_the_same_text(path, device, function):
    given = arguments(device, function)
    bias = torch.ones(4, device=device)

    def call(b):
        return FUNCTIONS[function](**{**given, "bias": b if function == "grl_linear" else [None, b]})

    text = "bias must have shape [5], got [4]" if function == "grl_linear" else "bias[1] must have shape [2], got [4]"
    with pytest.raises(ValueError) as caught:
        torch.func.grad(lambda b: call(b).loss)(bias)
    assert str(caught.value) == text


@pytest.mark.parametrize("function", ["linear_heads", "heads_loss"])
def test_a_refusal_leaves_the_arguments_as_they_were(path, device, function):
    given = changed(device, function, {"bias": second(torch.ones(4))})
    tensors = [given["x"], *given["weight"], *given["bias"], *given.get("targets", [])]
    before = [t.clone() for t in tensors]
    with pytest.raises(ValueError):
        FUNCTIONS[function](**given)
    for t, value in zip(tensors, before, strict=True):
        assert torch.equal(t, value) and t._version == 0


def test_of_several_wrong_targets_the_first_head_is_reported(path, device):
    if device.type != "cpu":
        pytest.skip("looking at the values would be a synchronisation")
    given = arguments(device, "heads_loss")
    given["targets"][0][3], given["targets"][1][1] = 7, 9
    with pytest.raises(IndexError, match=r"^targets\[0\] .* got 7$"):
        heads_loss(**given)


MASKED = ["x", "weight", "bias", "targets", "sample_weight", "class_weight"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.parametrize("argument", MASKED)
def test_masked_tensors_are_refused_by_name(path, device, argument):
    given = {
        "x": torch.randn(5, 7),
        "weight": torch.randn(3, 7),
        "bias": torch.randn(3),
        "targets": torch.rand(5, 3).softmax(1),
    }
    given = {
        name: tensor.to(device)
        for name, tensor in (given | {"sample_weight": torch.ones(5), "class_weight": torch.ones(3)}).items()
    }
    given[argument] = torch.masked.masked_tensor(given[argument], torch.ones_like(given[argument], dtype=torch.bool))
    lists = {name: [tensor] for name, tensor in given.items() if name != "x"}
    calls = {f"{argument}[0]": lambda: heads_loss(given["x"], **lists, lambda_=[0.5])}
    if argument in MASKED[:3]:
        calls[f"{argument}[0] "] = lambda: linear_heads(given["x"], lists["weight"], lists["bias"], lambda_=[0.5])
        calls[argument] = lambda: grl_linear(given["x"], given["weight"], given["bias"])
    for name, call in calls.items():
        name = "x" if argument == "x" else name.strip()
        with pytest.raises(TypeError) as caught:
            call()
        how = f"pass {name}.to_tensor(value), with the value that masked elements are to have"
        assert str(caught.value) == f"{name} must not be a MaskedTensor: {how}"


def test_no_bias_is_the_default_and_targets_are_needed():
    x, weight, targets = torch.randn(4, 3), [torch.randn(2, 3)], [torch.tensor([0, 1, 1, 0])]
    expected = heads_loss(x, weight, None, targets, lambda_=[0.5])
    assert_same(heads_loss(x, weight, targets=targets, lambda_=[0.5]).loss, expected.loss)
    with pytest.raises(ValueError) as caught:
        heads_loss(x, weight, lambda_=[0.5])
    assert str(caught.value) == "targets must have an entry for each of the 1 heads, got 0"


@pytest.mark.parametrize("biases", [0, 2])
def test_a_linear_head_has_one_bias(path, biases):
    x, weight, target = torch.ones(3, 4), torch.ones(2, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"^bias\[0\] must have an entry for each .* layers, 1, got {biases}$"):
        heads_loss(x, [weight], [[torch.zeros(2)] * biases], [target], lambda_=[None])
