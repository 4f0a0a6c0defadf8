"""What `AdversarialHeads` refuses: in the words of what the user wrote, and the same on every path."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from samples import assert_same
from torch import nn

from grl_ext import GRL, AdversarialHeads, GRLLinear

pytestmark = [pytest.mark.sanitized, pytest.mark.usefixtures("path")]

SIZES = {"digit": 3, "colour": 1, "domain": 2, "speaker": 4}


def make(lambda_=0.75, **options) -> AdversarialHeads:
    return AdversarialHeads(7, {"digit": 3, "colour": 1}, {"domain": 2, "speaker": [5, 4]}, lambda_=lambda_, **options)


def batch(rows=6):
    targets = {name: torch.randint(max(2, size), (rows,)) for name, size in SIZES.items()}
    return torch.randn(rows, 7, requires_grad=True), targets


@pytest.mark.parametrize(
    "predictors, adversaries, text",
    [
        (None, None, "predictors and adversaries are both empty: at least one head is needed"),
        ({}, {}, "predictors and adversaries are both empty: at least one head is needed"),
        (
            {"a": 2, "b": 2},
            {"b": 2, "a": 3},
            "head names must differ, got ['a', 'b'] among both predictors and adversaries",
        ),
        ({"a": 0}, None, "predictors['a'] must be a size of at least 1, a sequence of such sizes, or a module, got 0"),
        (
            None,
            {"a": 2, "b": -1},
            "adversaries['b'] must be a size of at least 1, a sequence of such sizes, or a module, got -1",
        ),
        (
            {"a": 2.0},
            None,
            "predictors['a'] must be a size of at least 1, a sequence of such sizes, or a module, got 2.0",
        ),
        (
            {"a": True},
            None,
            "predictors['a'] must be a size of at least 1, a sequence of such sizes, or a module, got True",
        ),
        (
            {"a": []},
            None,
            "predictors['a'] must be a size of at least 1, a sequence of such sizes, or a module, got []",
        ),
        (
            {"a": [3, 0]},
            None,
            "predictors['a'] must be a size of at least 1, a sequence of such sizes, or a module, got [3, 0]",
        ),
        (
            {"a": "3"},
            None,
            "predictors['a'] must be a size of at least 1, a sequence of such sizes, or a module, got '3'",
        ),
        ({"a": nn.Linear(6, 2)}, None, "predictors['a'] takes 6 features, but in_features is 7"),
        (None, {"a": nn.Sequential(nn.Linear(6, 2))}, "adversaries['a'] takes 6 features, but in_features is 7"),
        (
            {"type": 2},
            None,
            "predictors cannot have a head named 'type': nn.ModuleDict takes no such name for a module",
        ),
        (None, {"a.b": 2}, "adversaries cannot have a head named 'a.b': nn.ModuleDict takes no such name for a module"),
        ({3: 2}, None, "predictors cannot have a head named 3: nn.ModuleDict takes no such name for a module"),
    ],
    ids=str,
)
def test_heads_that_make_no_sense_are_refused(predictors, adversaries, text):
    with pytest.raises(ValueError) as caught:
        AdversarialHeads(7, predictors, adversaries)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    "module, name",
    [
        (nn.Sequential(GRL(), nn.Linear(7, 2)), "GRL"),
        (GRLLinear(7, 2), "GRLLinear"),
        (nn.Sequential(nn.Sequential(GRL()), nn.Linear(7, 2)), "GRL"),
    ],
    ids=["GRL", "GRLLinear", "nested"],
)
def test_a_reversal_inside_an_adversary_is_refused_and_inside_a_predictor_is_its_own(module, name):
    with pytest.raises(ValueError) as caught:
        AdversarialHeads(7, adversaries={"domain": module})
    assert str(caught.value) == (
        f"adversaries['domain'] contains a {name}, but AdversarialHeads reverses the adversaries' gradients itself: "
        "leave the GRL out, or use a plain nn.Linear"
    )
    heads = AdversarialHeads(7, {"domain": module})
    x = torch.randn(5, 7, requires_grad=True)
    ours = torch.autograd.grad(heads(x)["domain"].sum(), x)[0]
    assert_same(ours, torch.autograd.grad(module(x).sum(), x)[0])


def test_unknown_losses_are_refused():
    with pytest.raises(ValueError) as caught:
        make(losses={"domain": "l1"})
    assert (
        str(caught.value) == "losses['domain'] must be one of ['cross_entropy', 'mse', 'bce'] or a function, got 'l1'"
    )
    with pytest.raises(ValueError) as caught:
        make(losses={"age": "mse"})
    assert str(caught.value) == f"losses names ['age'], but the heads are {list(SIZES)}"


@pytest.mark.parametrize("option", ["sample_weight", "class_weight", "loss_weight", "label_smoothing", "ignore_index"])
def test_unknown_names_in_an_option_are_refused(option):
    heads, (x, targets) = make(), batch()
    with pytest.raises(ValueError) as caught:
        heads(x, targets, **{option: {"age": 1}})
    assert str(caught.value) == f"{option} names ['age'], but the heads are {list(SIZES)}"


def test_unknown_names_and_no_names_in_the_targets_are_refused():
    heads, (x, targets) = make(), batch()
    for given, text in (
        (targets | {"age": targets["domain"]}, f"targets names ['age'], but the heads are {list(SIZES)}"),
        ({}, f"targets is empty; the heads are {list(SIZES)}"),
    ):
        with pytest.raises(ValueError) as caught:
            heads(x, given)
        assert str(caught.value) == text


def test_targets_without_names_are_refused():
    heads, (x, targets) = make(), batch()
    with pytest.raises(TypeError) as caught:
        heads(x, targets["domain"])
    assert str(caught.value) == "targets must be a mapping from head names to tensors, got Tensor"


def masked(tensor):
    with warnings.catch_warnings():  # that MaskedTensor is a prototype
        warnings.simplefilter("ignore")
        return torch.masked.masked_tensor(tensor, torch.ones_like(tensor, dtype=torch.bool))


GIVEN = {
    "linear": 2,
    "layers": [5, 2],
    "first layer": nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2)),
    "given": nn.Sequential(nn.Tanh(), nn.Linear(7, 2)),
}
REFUSED = {
    "targets: list": (lambda t: {"targets": [0] * 6}, TypeError, "targets['domain'] must be a tensor, got list"),
    "targets: bool": (
        lambda t: {"targets": t.bool()},
        TypeError,
        "targets['domain'] must be torch.int64 (classes) or floating point (probabilities), got torch.bool",
    ),
    "targets: shape": (
        lambda t: {"targets": t[:, None]},
        ValueError,
        "targets['domain'] must have shape [6], got [6, 1]",
    ),
    "targets: class": (
        lambda t: {"targets": t.clone().fill_(2)},
        IndexError,
        "targets['domain'] must be in [0, 2) or ignore_index (-100), got 2",
    ),
    "targets: requires grad": (
        lambda t: {"targets": F.one_hot(t, 2).float().requires_grad_()},
        ValueError,
        "targets['domain'] requires a gradient, which the heads' loss does not give: pass targets['domain'].detach(), "
        "or compute this head's loss from heads(features)",
    ),
    "sample_weight: shape": (
        lambda t: {"sample_weight": torch.ones(5)},
        ValueError,
        "sample_weight['domain'] must have shape [6], got [5]",
    ),
    "sample_weight: not a tensor": (
        lambda t: {"sample_weight": {"domain": 1.0}},
        TypeError,
        "sample_weight['domain'] must be a tensor, got float",
    ),
    "sample_weight: negative": (
        lambda t: {"sample_weight": {"domain": -torch.ones(6)}},
        ValueError,
        "sample_weight['domain'] must be finite and not negative, got -1",
    ),
    "class_weight: shape": (
        lambda t: {"class_weight": {"domain": torch.ones(3)}},
        ValueError,
        "class_weight['domain'] must have shape [2], got [3]",
    ),
    "class_weight: not a tensor": (
        lambda t: {"class_weight": {"domain": [1.0, 2.0]}},
        TypeError,
        "class_weight['domain'] must be a tensor, got list",
    ),
    "loss_weight: NaN": (
        lambda t: {"loss_weight": {"domain": math.nan}},
        ValueError,
        "loss_weight['domain'] must be finite, got nan",
    ),
    "label_smoothing": (
        lambda t: {"label_smoothing": {"domain": 1.5}},
        ValueError,
        "label_smoothing['domain'] must be in [0, 1], got 1.5",
    ),
    "label_smoothing: str": (
        lambda t: {"label_smoothing": {"domain": "1"}},
        TypeError,
        "label_smoothing['domain'] must be a real number, got str",
    ),
    "ignore_index": (
        lambda t: {"ignore_index": {"domain": 1.5}},
        TypeError,
        "ignore_index['domain'] must be an integer, got float",
    ),
    "reduction": (lambda t: {"reduction": "all"}, ValueError, "reduction must be 'mean', 'sum' or 'none', got 'all'"),
    "targets: masked": (
        lambda t: {"targets": masked(F.one_hot(t, 2).float())},
        TypeError,
        "targets['domain'] must not be a MaskedTensor: pass targets['domain'].to_tensor(value), with the value that "
        "masked elements are to have",
    ),
    "targets: int32": (
        lambda t: {"targets": t.int()},
        TypeError,
        "targets['domain'] must be torch.int64 (classes) or floating point (probabilities), got torch.int32",
    ),
    "targets: complex": (
        lambda t: {"targets": F.one_hot(t, 2).cfloat()},
        TypeError,
        "targets['domain'] must be torch.int64 (classes) or floating point (probabilities), got torch.complex64",
    ),
    "targets: other columns": (
        lambda t: {"targets": F.one_hot(t, 3).float()},
        ValueError,
        "targets['domain'] must have shape [6, 2], got [6, 3]",
    ),
    "targets: other rows": (
        lambda t: {"targets": t[:5]},
        ValueError,
        "targets['domain'] must have shape [6], got [5]",
    ),
    "targets: no rows": (
        lambda t: {"targets": t[0]},
        ValueError,
        "targets['domain'] must have shape [6], got []",
    ),
    "targets: negative class": (
        lambda t: {"targets": t.clone().fill_(-1)},
        IndexError,
        "targets['domain'] must be in [0, 2) or ignore_index (-100), got -1",
    ),
    "targets: class, with ignore_index": (
        lambda t: {"targets": t.clone().fill_(-100), "ignore_index": {"domain": 0}},
        IndexError,
        "targets['domain'] must be in [0, 2) or ignore_index (0), got -100",
    ),
    "targets: other device": (
        lambda t: {"targets": t.to("meta")},
        ValueError,
        "targets['domain'] is on meta but the features are on cpu",
    ),
    "sample_weight: integers": (
        lambda t: {"sample_weight": torch.ones(6, dtype=torch.int64)},
        TypeError,
        "sample_weight['domain'] must be floating point, got torch.int64",
    ),
    "sample_weight: other device": (
        lambda t: {"sample_weight": torch.ones(6, device="meta")},
        ValueError,
        "sample_weight['domain'] is on meta but the features are on cpu",
    ),
    "sample_weight: requires grad": (
        lambda t: {"sample_weight": torch.ones(6, requires_grad=True)},
        ValueError,
        "sample_weight['domain'] requires a gradient, which the heads' loss does not give: pass "
        "sample_weight['domain'].detach(), or compute this head's loss from heads(features)",
    ),
    "sample_weight: NaN": (
        lambda t: {"sample_weight": torch.full((6,), math.nan)},
        ValueError,
        "sample_weight['domain'] must be finite and not negative, got nan",
    ),
    "sample_weight: infinite": (
        lambda t: {"sample_weight": torch.full((6,), math.inf)},
        ValueError,
        "sample_weight['domain'] must be finite and not negative, got inf",
    ),
    "class_weight: integers": (
        lambda t: {"class_weight": {"domain": torch.tensor([1, 2])}},
        TypeError,
        "class_weight['domain'] must be floating point, got torch.int64",
    ),
    "class_weight: other device": (
        lambda t: {"class_weight": {"domain": torch.ones(2, device="meta")}},
        ValueError,
        "class_weight['domain'] is on meta but the features are on cpu",
    ),
    "class_weight: requires grad": (
        lambda t: {"class_weight": {"domain": torch.ones(2, requires_grad=True)}},
        ValueError,
        "class_weight['domain'] requires a gradient, which the heads' loss does not give: pass "
        "class_weight['domain'].detach(), or compute this head's loss from heads(features)",
    ),
    "loss_weight: str": (
        lambda t: {"loss_weight": {"domain": "1"}},
        TypeError,
        "loss_weight['domain'] must be a real number or a real tensor, got str",
    ),
    "loss_weight: complex": (
        lambda t: {"loss_weight": {"domain": torch.tensor(1j)}},
        TypeError,
        "loss_weight['domain'] must be a real number or a real tensor, got a tensor of torch.complex64",
    ),
    "loss_weight: shape": (
        lambda t: {"loss_weight": {"domain": torch.ones(2)}},
        ValueError,
        "loss_weight['domain'] must be a number or a 0-d tensor, got shape [2]",
    ),
    "loss_weight: requires grad": (
        lambda t: {"loss_weight": {"domain": torch.ones((), requires_grad=True)}},
        ValueError,
        "loss_weight['domain'] requires a gradient, which the heads' loss does not give: pass "
        "loss_weight['domain'].detach(), or compute this head's loss from heads(features)",
    ),
    "loss_weight: infinite tensor": (
        lambda t: {"loss_weight": {"domain": torch.tensor(math.inf)}},
        ValueError,
        "loss_weight['domain'] must be finite, got inf",
    ),
    "label_smoothing: NaN": (
        lambda t: {"label_smoothing": {"domain": math.nan}},
        ValueError,
        "label_smoothing['domain'] must be finite, got nan",
    ),
    "label_smoothing: tensor": (
        lambda t: {"label_smoothing": {"domain": torch.tensor(0.1)}},
        TypeError,
        "label_smoothing['domain'] must be a real number, got Tensor",
    ),
    "label_smoothing: negative": (
        lambda t: {"label_smoothing": {"domain": -0.1}},
        ValueError,
        "label_smoothing['domain'] must be in [0, 1], got -0.1",
    ),
    "ignore_index: None": (
        lambda t: {"ignore_index": {"domain": None}},
        TypeError,
        "ignore_index['domain'] must be an integer, got NoneType",
    ),
    "ignore_index: too large": (
        lambda t: {"ignore_index": {"domain": 2**63}},
        ValueError,
        "ignore_index['domain'] must fit into int64, got 9223372036854775808",
    ),
}


@pytest.mark.parametrize("head", GIVEN)
@pytest.mark.parametrize("name", REFUSED)
def test_every_way_of_running_a_head_refuses_by_its_name_with_one_text(head, name):
    heads = AdversarialHeads(7, {"digit": 3}, {"speaker": 4, "domain": copy.deepcopy(GIVEN[head])}, lambda_=0.5)
    x, targets = batch()
    targets = {"digit": targets["digit"], "speaker": targets["speaker"], "domain": targets["domain"]}
    change, expected, text = REFUSED[name]
    options = change(targets["domain"])
    if "targets" in options:
        targets["domain"] = options.pop("targets")
    if isinstance(options.get("sample_weight"), torch.Tensor):
        options["sample_weight"] = {"domain": options["sample_weight"]}
    with pytest.raises(expected) as caught:
        heads(x, targets, **options)
    assert type(caught.value) is expected
    assert str(caught.value) == text


def test_features_and_weights_that_do_not_agree_are_refused_by_name():
    heads = AdversarialHeads(7, {"digit": 3}, {"speaker": [5, 4], "domain": nn.Linear(7, 2, dtype=torch.float64)})
    x, targets = batch()
    del targets["colour"]
    for call in (lambda: heads(x), lambda: heads(x, targets)):
        with pytest.raises(TypeError) as caught:
            call()
        assert str(caught.value) == "weight['domain'] must have the features' dtype torch.float32, got torch.float64"
    with pytest.raises(TypeError) as caught:
        heads([1.0])
    assert str(caught.value) == "features must be a tensor, got list"


# What a head with a squared error does not take.
REFUSED_VALUES = {
    "classes": (
        lambda v: {"targets": v.long()},
        TypeError,
        "targets['age'] must be floating point (values), got torch.int64",
    ),
    "shape": (lambda v: {"targets": v[:, None, None]}, ValueError, "targets['age'] must have shape [6], got [6, 1, 1]"),
    "class_weight": (
        lambda v: {"class_weight": {"age": torch.ones(2)}},
        ValueError,
        "class_weight['age'] is for a cross entropy, this head has a squared error",
    ),
    "label_smoothing": (
        lambda v: {"label_smoothing": {"age": 0.1}},
        ValueError,
        "label_smoothing['age'] is for a cross entropy, this head has a squared error",
    ),
}


@pytest.mark.parametrize("head", [1, [5, 1], nn.Sequential(nn.Tanh(), nn.Linear(7, 1)), nn.Sequential(nn.Linear(7, 1))])
@pytest.mark.parametrize("name", REFUSED_VALUES)
def test_what_is_no_value_is_refused_for_a_squared_error(head, name):
    heads = AdversarialHeads(7, {"digit": 3, "age": copy.deepcopy(head)}, losses={"age": "mse"})
    change, expected, text = REFUSED_VALUES[name]
    options = change(torch.rand(6))
    targets = {"digit": torch.randint(3, (6,)), "age": options.pop("targets", torch.rand(6))}
    with pytest.raises(expected) as caught:
        heads(torch.randn(6, 7), targets, **options)
    assert type(caught.value) is expected and str(caught.value) == text


# Features, and layers that do not fit them. Of heads whose first layer is computed here.
REFUSED_FEATURES = {
    "width": (
        lambda: torch.randn(6, 8),
        ValueError,
        "features must have in_features = 7 elements in dimension -1, got shape [6, 8]",
    ),
    "0-d": (lambda: torch.tensor(1.0), ValueError, "features must have at least one dimension, got shape []"),
    "integers": (
        lambda: torch.ones(6, 7, dtype=torch.int64),
        TypeError,
        "features must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "complex": (
        lambda: torch.ones(6, 7, dtype=torch.complex64),
        TypeError,
        "features must be float16, bfloat16, float32 or float64, got torch.complex64",
    ),
    "dtype": (
        lambda: torch.ones(6, 7, dtype=torch.float64),
        TypeError,
        "weight['domain'] must have the features' dtype torch.float64, got torch.float32",
    ),
    "device": (
        lambda: torch.ones(6, 7, device="meta"),
        ValueError,
        "weight['domain'] is on cpu but the features are on meta",
    ),
    "masked": (
        lambda: masked(torch.ones(6, 7)),
        TypeError,
        "features must not be a MaskedTensor: pass features.to_tensor(value), with the value that masked elements are "
        "to have",
    ),
}


@pytest.mark.parametrize("head", [head for head in GIVEN if head != "given"])
@pytest.mark.parametrize("name", REFUSED_FEATURES)
def test_features_that_do_not_fit_are_refused_by_the_users_words(head, name):
    heads = AdversarialHeads(7, adversaries={"domain": copy.deepcopy(GIVEN[head])})
    make, expected, text = REFUSED_FEATURES[name]
    for targets in ((), ({"domain": torch.zeros(6, dtype=torch.int64)},)):
        with pytest.raises(expected) as caught:
            heads(make(), *targets)
        assert type(caught.value) is expected and str(caught.value) == text


# A layer that was changed after the heads were made: (which parameter, its new value, the error).
REFUSED_PARAMETERS = {
    "weight: columns": ("weight", torch.ones(2, 6), ValueError, "must have shape [K, 7] with K at least 1, got [2, 6]"),
    "weight: device": ("weight", torch.ones(2, 7, device="meta"), ValueError, "is on meta but the features are on cpu"),
    "weight: dtype": (
        "weight",
        torch.ones(2, 7, dtype=torch.float64),
        TypeError,
        "must have the features' dtype torch.float32, got torch.float64",
    ),
    "bias: shape": ("bias", torch.ones(3), ValueError, "must have shape [2], got [3]"),
    "bias: device": ("bias", torch.ones(2, device="meta"), ValueError, "is on meta but the features are on cpu"),
    "bias: dtype": (
        "bias",
        torch.ones(2, dtype=torch.float64),
        TypeError,
        "must have the features' dtype torch.float32, got torch.float64",
    ),
}


@pytest.mark.parametrize("name", REFUSED_PARAMETERS)
def test_a_layer_that_does_not_fit_the_features_is_refused_by_its_heads_name(name):
    parameter, value, expected, text = REFUSED_PARAMETERS[name]
    heads = AdversarialHeads(7, {"digit": 3}, {"domain": 2})
    setattr(heads.adversaries["domain"], parameter, nn.Parameter(value))
    x, targets = batch()
    for arguments in ((), ({"domain": targets["domain"]},)):
        with pytest.raises(expected) as caught:
            heads(x, *arguments)
        assert type(caught.value) is expected and str(caught.value) == f"{parameter}['domain'] {text}"


@pytest.mark.parametrize(
    "dim, text", [(2, "dim is 2, but features have shape [6, 7]"), (-3, "dim is -3, but features have shape [6, 7]")]
)
def test_a_dimension_that_the_features_do_not_have_is_refused(dim, text):
    heads = AdversarialHeads(7, adversaries={"domain": 2}, dim=dim)
    with pytest.raises(ValueError) as caught:
        heads(torch.randn(6, 7))
    assert str(caught.value) == text


class Returns(nn.Module):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, x):
        return self.result


@pytest.mark.parametrize(
    "result, expected, text",
    [
        ([torch.ones(6, 2)], TypeError, "a head must return one tensor, its logits; 'domain' returned list"),
        (torch.tensor(1.0), ValueError, "a head must return logits (..., size) for a loss; 'domain' returned shape []"),
        (torch.ones(5, 2), ValueError, "targets['domain'] must have shape [5], got [6]"),
    ],
    ids=["list", "0-d", "other rows"],
)
def test_what_a_head_returns_is_looked_at(result, expected, text):
    heads = AdversarialHeads(7, adversaries={"domain": Returns(result)})
    x, targets = batch()
    with pytest.raises(expected) as caught:
        heads(x, {"domain": targets["domain"]})
    assert type(caught.value) is expected and str(caught.value) == text


@pytest.mark.parametrize(
    "change, expected, text",
    [
        (
            lambda heads: heads.adversaries.__setitem__("site", nn.Linear(7, 2)),
            ValueError,
            "adversaries['site'] has no lambda_: add an adversary with "
            "heads.add_adversary('site', module, lambda_=...)",
        ),
        (
            lambda heads: heads.add_adversary("digit", 2),
            ValueError,
            "head names must differ, got ['digit'] among both predictors and adversaries",
        ),
        (
            lambda heads: heads.add_adversary("site", 0),
            ValueError,
            "adversaries['site'] must be a size of at least 1, a sequence of such sizes, or a module, got 0",
        ),
        (
            lambda heads: heads.add_adversary("site", nn.ModuleList([nn.Linear(7, 2)])),
            TypeError,
            "adversaries['site'] must be a module that can be called, got ModuleList: for layers in a row use "
            "nn.Sequential",
        ),
        (
            lambda heads: heads.add_adversary("site", 2, loss="l1"),
            ValueError,
            "losses['site'] must be one of ['cross_entropy', 'mse', 'bce'] or a function, got 'l1'",
        ),
        (
            lambda heads: heads.add_adversary("site", 2, lambda_=math.nan),
            ValueError,
            "lambda_ must be finite, got nan",
        ),
        (
            lambda heads: setattr(heads, "lambda_", {"digit": 1.0}),
            ValueError,
            "lambda_ names ['digit'], but the adversaries are ['domain', 'speaker']",
        ),
        (
            lambda heads: setattr(heads, "lambda_", torch.ones(2)),
            ValueError,
            "lambda_ must be a number or a 0-d tensor, got shape [2]",
        ),
        (
            lambda heads: setattr(heads, "lambda_", {"domain": "1"}),
            TypeError,
            "lambda_['domain'] must be a real number or a real tensor, got str",
        ),
        (
            lambda heads: AdversarialHeads(7, adversaries=[2]),
            TypeError,
            "adversaries must be a mapping from head names to heads, got list",
        ),
        (lambda heads: AdversarialHeads(7, {"a": 2}, dim="1"), TypeError, "dim must be an integer, got str"),
    ],
    ids=[
        "adversary without lambda",
        "name of a predictor",
        "size",
        "ModuleList",
        "loss",
        "lambda",
        "lambda of a predictor",
        "two lambdas",
        "lambda by name",
        "a list of heads",
        "dim",
    ],
)
def test_changes_that_make_no_sense_are_refused_and_change_nothing(change, expected, text):
    heads = make()
    with pytest.raises(expected) as caught:
        change(heads)
    assert type(caught.value) is expected and str(caught.value) == text
    assert heads.head_names == tuple(SIZES) and {own.item() for own in heads.lambda_.values()} == {0.75}


def test_a_reversal_that_is_none_is_refused_in_the_call():
    heads, (x, _) = make(), batch()
    heads.reversals["domain"] = nn.Identity()
    with pytest.raises(TypeError) as caught:
        heads(x)
    assert str(caught.value) == "reversals['domain'] must be a GRL, got Identity"
    del heads.reversals["domain"]
    with pytest.raises(ValueError, match=r"^adversaries\['domain'\] has no lambda_: add an adversary with heads"):
        heads(x)
