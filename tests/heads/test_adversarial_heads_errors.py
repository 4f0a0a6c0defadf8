"""What `AdversarialHeads` refuses: in the words of what the user wrote, and the same on every path."""

import copy
import math

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
