"""Heads are named: lambdas, losses and checkpoints go by name; so does what is added, removed, replaced and renamed."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from head_samples import check_heads, lambdas_of
from samples import assert_same
from torch import nn

from grl_ext import GRL, AdversarialHeads, GRLLinear, LambdaScheduler, schedules

pytestmark = pytest.mark.usefixtures("path")

SIZES = {"digit": 3, "age": 1, "domain": 2, "speaker": 4, "site": 5, "new": 3}
LAMBDAS = {"domain": 0.1, "speaker": 5.0, "site": -0.5}
CONTAINS = (
    "adversaries['{}'] contains a {}, but AdversarialHeads reverses the adversaries' gradients itself: "
    "leave the GRL out, or use a plain nn.Linear"
)
WITHOUT_LAMBDA = (
    "adversaries['new'] has no lambda_: add an adversary with heads.add_adversary('new', module, lambda_=...)"
)


def module(name: str, features: int = 7) -> nn.Module:
    """One that is run in a way of its own."""
    size = SIZES[name]
    return {
        "digit": lambda: nn.Linear(features, size),
        "age": lambda: nn.Linear(features, size),
        "domain": lambda: nn.Linear(features, size),
        "speaker": lambda: nn.Sequential(nn.Linear(features, 5), nn.ReLU(), nn.Linear(5, size)),
        "site": lambda: nn.Sequential(nn.Linear(features, 4), nn.Tanh(), nn.Linear(4, size)),
        "new": lambda: nn.Sequential(nn.Tanh(), nn.Linear(features, size)),
    }[name]()


def make(predictors=("digit", "age"), adversaries=("domain", "speaker", "site"), lambda_=None, **options):
    heads = AdversarialHeads(
        7,
        {name: module(name) for name in predictors},
        {name: module(name) for name in adversaries},
        lambda_={name: LAMBDAS[name] for name in adversaries} if lambda_ is None else lambda_,
        **options,
    )
    return heads.double()


def batch(heads):
    x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    targets = {}
    for name in heads.head_names:
        if heads.losses[name] == "mse":
            targets[name] = torch.randn(6, SIZES[name])
        else:
            targets[name] = torch.randint(max(2, SIZES[name]), (6,))
    return x, targets


def check(heads, **options):
    """Each head, run by its name, is its module behind its own lambda."""
    assert set(lambdas_of(heads)) == set(heads.adversaries) == set(heads.reversals)
    check_heads(heads, *batch(heads), **options)
    text = repr(heads)
    assert [line for line in text.splitlines() if line.startswith("  (")][: len(heads.head_names)] == [
        line for name in heads.head_names for line in text.splitlines() if line.startswith(f"  ({name}) ")
    ]
    for name, value in lambdas_of(heads).items():
        assert f"({name}): {type(heads.reversals[name]).__name__}(lambda_={value})" in text


def refusal(call) -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    return str(caught.value)


# --- checkpoints
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "predictors, adversaries",
    [
        (("digit", "age"), ("speaker", "site", "domain")),
        (("age", "digit"), ("site", "speaker", "domain")),
        (("age", "digit"), ("domain", "speaker", "site")),
    ],
)
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_checkpoint_does_not_depend_on_the_order_in_which_heads_are_declared(predictors, adversaries, assign):
    heads, other = make(), make(predictors, adversaries, lambda_=1.0)
    x, targets = batch(heads)
    keys = other.load_state_dict(copy.deepcopy(heads.state_dict()), strict=True, assign=assign)
    assert not keys.missing_keys and not keys.unexpected_keys
    assert lambdas_of(other) == LAMBDAS
    ours, theirs = (torch.autograd.grad(own(x, targets).loss, x)[0] for own in (heads, other))
    torch.testing.assert_close(ours, theirs)
    for name, loss in heads(x, targets).head_losses.items():
        torch.testing.assert_close(other(x, targets).head_losses[name], loss)
    check(other)


def test_a_checkpoint_names_each_lambda():
    names = [name for name in make().state_dict() if "lambda_" in name]
    assert names == ["reversals.domain.lambda_", "reversals.speaker.lambda_", "reversals.site.lambda_"]


def test_a_lambda_alone_is_loaded_by_name():
    heads = make()
    state = {"reversals.speaker.lambda_": torch.tensor(0.25, dtype=torch.float64)}
    heads.load_state_dict(state, strict=False)
    assert lambdas_of(heads) == {**LAMBDAS, "speaker": 0.25}


def test_a_checkpoint_of_heads_that_are_not_there_is_reported_by_name():
    heads = make(adversaries=("speaker", "site"))
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "reversals.domain.lambda_"'):
        heads.load_state_dict(make().state_dict())
    keys = heads.load_state_dict(make().state_dict(), strict=False)
    assert all("domain" in key for key in keys.unexpected_keys) and not keys.missing_keys
    assert lambdas_of(heads) == {"speaker": 5.0, "site": -0.5}


# --- taking out
# -----------------------------------------------------------------------------------------------------------


REMOVE = {
    "del": lambda heads, name: heads.adversaries.__delitem__(name),
    "del of an attribute": lambda heads, name: delattr(heads.adversaries, name),
    "pop": lambda heads, name: heads.adversaries.pop(name),
}


@pytest.mark.parametrize("how", REMOVE)
@pytest.mark.parametrize("name", LAMBDAS)
def test_an_adversary_that_is_taken_out_leaves_the_others_their_lambdas(how, name):
    heads = make()
    REMOVE[how](heads, name)
    rest = {other: value for other, value in LAMBDAS.items() if other != name}
    assert lambdas_of(heads) == rest and heads.head_names == ("digit", "age", *rest)
    assert not any(name in key for key in heads.state_dict())
    check(heads)


def test_all_heads_of_a_kind_may_be_taken_out():
    heads = make()
    heads.adversaries.clear()
    assert lambdas_of(heads) == {} and heads.head_names == ("digit", "age")
    check(heads)
    heads.lambda_ = 0.5  # of none
    heads = make()
    del heads.predictors["digit"], heads.predictors["age"]
    assert lambdas_of(heads) == LAMBDAS
    check(heads)


def test_a_head_that_was_taken_out_is_unknown_to_targets_options_and_lambda():
    heads = make()
    x, targets = batch(heads)
    del heads.adversaries["domain"]
    known = "['digit', 'age', 'speaker', 'site']"
    assert refusal(lambda: heads(x, targets)) == f"targets names ['domain'], but the heads are {known}"
    del targets["domain"]
    text = refusal(lambda: heads(x, targets, loss_weight={"domain": 0.5}))
    assert text == f"loss_weight names ['domain'], but the heads are {known}"
    text = refusal(lambda: setattr(heads, "lambda_", {"domain": 0.5}))
    assert text == "lambda_ names ['domain'], but the adversaries are ['speaker', 'site']"


@pytest.mark.parametrize("remove", [lambda a: a.__delitem__("none"), lambda a: a.pop("none")], ids=["del", "pop"])
def test_what_is_not_there_cannot_be_taken_out(remove):
    heads = make()
    with pytest.raises(KeyError):
        remove(heads.adversaries)
    with pytest.raises(AttributeError):
        del heads.adversaries.none
    assert lambdas_of(heads) == LAMBDAS


# --- putting in
# -----------------------------------------------------------------------------------------------------------


def test_a_predictor_may_be_added_and_replaced():
    heads = make(predictors=("digit",))
    heads.predictors["new"] = module("new").double()
    heads.predictors["digit"] = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    heads.losses["new"] = "cross_entropy"
    check(heads)


@pytest.mark.parametrize("declared", [False, True])
def test_the_options_know_a_predictor_that_was_added(declared):
    heads = make(predictors=("digit",))
    heads.predictors["new"] = module("new").double()
    if declared:
        heads.losses["new"] = "mse"
    x = torch.randn(6, 7, dtype=torch.float64)
    z = heads(x)["new"]
    target = torch.randn(6, 3, dtype=torch.float64) if declared else torch.randint(3, (6,))
    exact = F.mse_loss(z, target) if declared else F.cross_entropy(z, target, label_smoothing=0.1)
    for smoothing in (0.1, {"digit": 0.3} if declared else {"new": 0.1}):
        out = heads(x, {"new": target, "digit": torch.zeros(6, dtype=torch.int64)}, label_smoothing=smoothing)
        torch.testing.assert_close(out.head_losses["new"], exact)
    out = heads(x, {"new": target}, label_smoothing=0.1, loss_weight={"new": 0.5}, ignore_index={"digit": 1})
    torch.testing.assert_close(out.loss, 0.5 * exact)


@pytest.mark.parametrize("head", [3, [5, 3], module("new")], ids=["size", "sizes", "module"])
def test_an_adversary_is_added_with_its_lambda(head):
    heads = make(lambda_={"domain": 0.1})
    before = dict(heads.named_parameters())
    heads.add_adversary("new", copy.deepcopy(head), lambda_=0.25, dtype=torch.float64)
    heads.double()
    assert lambdas_of(heads) == {"domain": 0.1, "speaker": 1.0, "site": 1.0, "new": 0.25}
    assert heads.reversals["new"].initial_lambda == 0.25
    assert all(dict(heads.named_parameters())[name] is p for name, p in before.items())
    check(heads)


def test_an_adversary_is_added_with_its_loss_bias_and_dtype():
    heads = make()
    heads.add_adversary("new", [4, 3], torch.tensor(0.5), loss="mse", bias=False, dtype=torch.float64)
    assert [name for name, _ in heads.adversaries["new"].named_parameters()] == ["0.weight", "2.weight"]
    assert heads.losses["new"] == "mse" and "mse=['new']" in repr(heads)
    check(heads)


def test_an_adversary_that_is_added_again_is_replaced_with_its_lambda():
    heads = make()
    heads.losses["site"] = "mse"
    heads.add_adversary("site", 5, 0.75, dtype=torch.float64)
    assert lambdas_of(heads) == {**LAMBDAS, "site": 0.75} and heads.losses["site"] == "cross_entropy"
    check(heads)


def test_an_adversary_that_is_replaced_keeps_its_lambda():
    heads = make()
    buffer = heads.lambda_["site"]
    heads.adversaries["site"] = nn.Linear(7, 5).double()
    assert heads.lambda_["site"] is buffer
    check(heads)
    heads.adversaries.update({"speaker": nn.Linear(7, 4).double()})
    check(heads)


def test_a_head_is_renamed_by_taking_it_out_and_adding_it():
    heads = make()
    lambda_ = heads.lambda_["site"]
    heads.add_adversary("new", heads.adversaries.pop("site"), lambda_)
    assert lambdas_of(heads) == {"domain": 0.1, "speaker": 5.0, "new": -0.5}
    heads.predictors["site"] = heads.predictors.pop("digit")
    x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    targets = {"site": torch.randint(3, (6,)), "new": torch.randint(5, (6,))}
    check_heads(heads, x, {**targets, "age": torch.rand(6), "domain": targets["site"] % 2, "speaker": targets["site"]})


@pytest.mark.parametrize(
    "put",
    [
        lambda heads: heads.adversaries.__setitem__("new", module("new")),
        lambda heads: heads.adversaries.update({"new": module("new")}),
    ],
    ids=["item", "update"],
)
def test_an_adversary_without_a_lambda_is_refused_at_once(put):
    heads = make()
    assert refusal(lambda: put(heads)) == WITHOUT_LAMBDA
    assert list(heads.adversaries) == list(LAMBDAS)
    check(heads)


@pytest.mark.parametrize(
    "put",
    [
        lambda heads: setattr(heads.adversaries, "new", module("new")),
        lambda heads: heads.adversaries.add_module("new", module("new")),
        lambda heads: heads.adversaries.register_module("new", module("new")),
        lambda heads: heads.add_adversary("new", module("new")) or heads.reversals.pop("new"),
    ],
    ids=["attribute", "add_module", "register_module", "its reversal taken out"],
)
def test_an_adversary_without_a_lambda_that_came_in_past_the_dictionary_is_refused_by_every_call(put):
    heads = make()
    x, targets = batch(heads)
    put(heads)
    heads.double()
    for call in (
        lambda: heads(x),
        lambda: heads(x, {**targets, "new": torch.zeros(6, dtype=torch.int64)}),
        lambda: heads.lambda_,
        lambda: setattr(heads, "lambda_", 0.5),
    ):
        assert refusal(call) == WITHOUT_LAMBDA
    assert f"(new) refused: {WITHOUT_LAMBDA}" in repr(heads)
    assert heads(x, targets).loss.isfinite()  # the others are run
    del heads.adversaries["new"]
    check(heads)


@pytest.mark.parametrize("where", ["predictor", "predictor by attribute", "adversary"])
def test_one_name_among_both_kinds_is_refused_whenever_it_comes_about(where):
    heads = make()
    x, targets = batch(heads)
    if where == "adversary":
        text = refusal(lambda: heads.add_adversary("digit", 3))
        assert text == "head names must differ, got ['digit'] among both predictors and adversaries"
        check(heads)
        return
    if where == "predictor":
        heads.predictors["domain"] = module("domain").double()
    else:
        heads.predictors.domain = module("domain").double()
    text = "head names must differ, got ['domain'] among both predictors and adversaries"
    for call in (lambda: heads(x), lambda: heads(x, targets), lambda: heads(x, {"domain": targets["domain"]})):
        assert refusal(call) == text
    assert f"(domain) refused: {text}" in repr(heads)
    del heads.predictors["domain"]
    check(heads)


@pytest.mark.parametrize(
    "name, head, options, text",
    [
        ("a.b", 2, {}, "adversaries cannot have a head named 'a.b': nn.ModuleDict takes no such name for a module"),
        ("keys", 2, {}, "adversaries cannot have a head named 'keys': nn.ModuleDict takes no such name for a module"),
        (
            "new",
            0,
            {},
            "adversaries['new'] must be a size of at least 1, a sequence of such sizes, or a module, got 0",
        ),
        ("new", nn.Linear(6, 2), {}, "adversaries['new'] takes 6 features, but in_features is 7"),
        ("new", nn.Sequential(GRL(), nn.Linear(7, 2)), {}, CONTAINS.format("new", "GRL")),
        ("new", GRLLinear(7, 2), {}, CONTAINS.format("new", "GRLLinear")),
        ("new", 2, {"lambda_": float("nan")}, "lambda_ must be finite, got nan"),
        ("new", 2, {"lambda_": torch.tensor(float("inf"))}, "lambda_ must be finite, got inf"),
        ("new", 2, {"lambda_": torch.ones(2)}, "lambda_ must be a number or a 0-d tensor, got shape [2]"),
        ("new", 2, {"lambda_": "1"}, "lambda_ must be a real number or a real tensor, got str"),
        (
            "new",
            2,
            {"loss": "l1"},
            "losses['new'] must be one of ['cross_entropy', 'mse', 'bce'] or a function, got 'l1'",
        ),
    ],
)
def test_an_adversary_that_makes_no_sense_is_not_added(name, head, options, text):
    heads = make()
    assert refusal(lambda: heads.add_adversary(name, head, **options)) == text
    assert list(heads.adversaries) == list(heads.reversals) == list(LAMBDAS) and "new" not in heads.losses
    check(heads)


# --- a reversal inside an adversary
# ---------------------------------------------------------------------------------------


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4)).double()


@pytest.mark.parametrize(
    "inner",
    [GRL, lambda: nn.Sequential(GRL()), lambda: nn.ModuleList([nn.Identity(), GRL()])],
    ids=["GRL", "in a Sequential", "in a ModuleList"],
)
@pytest.mark.parametrize("place", range(4))
def test_a_reversal_inside_a_replacement_is_refused_at_once(inner, place):
    heads, replacement = make(), layers()
    replacement.insert(place, inner())
    assert refusal(lambda: heads.adversaries.__setitem__("speaker", replacement)) == CONTAINS.format("speaker", "GRL")
    assert refusal(lambda: heads.adversaries.update({"speaker": replacement})) == CONTAINS.format("speaker", "GRL")
    check(heads)


PUT = {
    "by attribute": lambda heads: setattr(
        heads.adversaries, "speaker", nn.Sequential(nn.Linear(7, 5), GRL(), nn.Linear(5, 4)).double()
    ),
    "GRLLinear by attribute": lambda heads: setattr(heads.adversaries, "speaker", GRLLinear(7, 4).double()),
    "insert": lambda heads: heads.adversaries["speaker"].insert(0, GRL()),
    "insert before the last": lambda heads: heads.adversaries["speaker"].insert(2, GRL()),
    "append": lambda heads: heads.adversaries["speaker"].append(GRL()),
    "extend": lambda heads: heads.adversaries["speaker"].extend([nn.Identity(), GRL()]),
    "the first": lambda heads: heads.adversaries["speaker"].__setitem__(0, GRLLinear(7, 5).double()),
    "the relu": lambda heads: heads.adversaries["speaker"].__setitem__(1, GRL()),
    "the last": lambda heads: heads.adversaries["speaker"].__setitem__(2, GRLLinear(5, 4).double()),
    "nested": lambda heads: heads.adversaries["speaker"].__setitem__(1, nn.Sequential(nn.ReLU(), GRL())),
}


@pytest.mark.parametrize("put", PUT)
def test_a_reversal_that_is_put_into_an_adversary_is_refused_by_every_call(put):
    heads = make()
    x, targets = batch(heads)
    PUT[put](heads)
    text = CONTAINS.format("speaker", "GRLLinear" if "GRLLinear" in repr(heads.adversaries["speaker"]) else "GRL")
    for call in (lambda: heads(x), lambda: heads(x, targets), lambda: heads(x, {"speaker": targets["speaker"]})):
        assert refusal(call) == text
    assert f"(speaker) refused: {text}" in repr(heads)
    heads.adversaries["speaker"] = layers()
    check(heads)


def test_a_reversal_that_is_put_into_a_predictor_is_its_own():
    heads = make()
    heads.predictors["digit"] = nn.Sequential(GRL(0.5), nn.Linear(7, 3)).double()
    heads.predictors["age"] = nn.Sequential(nn.Linear(7, 3), GRL(0.5), nn.Linear(3, 1)).double()
    x, targets = batch(heads)
    for name in ("digit", "age"):
        ours, theirs = (torch.autograd.grad(z.sin().sum(), x)[0] for z in (heads(x)[name], heads.predictors[name](x)))
        torch.testing.assert_close(ours, theirs)
    check_heads(heads, x, targets)


# --- lambda and its reversals
# --------------------------------------------------------------------------------------------


def test_an_adversarys_reversal_is_a_layer_like_any_other():
    heads = make()
    heads.reversals["speaker"].lambda_ = 0.25
    assert lambdas_of(heads) == {**LAMBDAS, "speaker": 0.25}
    check(heads)
    heads.reversals["site"] = GRL(2.0)
    assert lambdas_of(heads) == {**LAMBDAS, "speaker": 0.25, "site": 2.0}
    check(heads)
    heads.reversals["speaker"].reset_parameters()
    assert lambdas_of(heads)["speaker"] == 5.0


@pytest.mark.parametrize("name", LAMBDAS)
def test_hooks_and_subclasses_of_a_reversal_are_run(name):
    seen = []
    heads = make()
    handle = heads.reversals[name].register_full_backward_hook(lambda *_: seen.append(name))
    assert f"({name}) as given: its reversal: it has hooks" in repr(heads)
    check(heads)
    assert seen
    handle.remove()
    assert "as given: its reversal" not in repr(heads)

    class Loud(GRL):
        def forward(self, x, coeff=None):
            seen.append("Loud")
            return super().forward(x, coeff)

    heads.reversals[name] = Loud(LAMBDAS[name])
    seen.clear()
    check(heads)
    assert "Loud" in seen and f"({name}) as given: its reversal: Loud is not GRL" in repr(heads)


def test_a_reversals_replaced_forward_is_the_one_that_runs():
    heads = make()
    heads.reversals["domain"].forward = lambda x: x * 1.0
    x, _ = batch(heads)
    ours, theirs = (torch.autograd.grad(z.sum(), x)[0] for z in (heads(x)["domain"], heads.adversaries["domain"](x)))
    assert_same(ours, theirs)


def test_what_is_no_reversal_is_refused_in_its_place():
    heads = make()
    heads.reversals["domain"] = nn.Identity()
    x, targets = batch(make())
    for call in (lambda: heads(x), lambda: heads(x, targets), lambda: heads.lambda_):
        assert refusal(call) == "reversals['domain'] must be a GRL, got Identity"
    assert "(domain) refused: reversals['domain'] must be a GRL, got Identity" in repr(heads)


# --- losses
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digit", "domain", "speaker", "site"])
def test_a_loss_that_is_changed_is_obeyed(name):
    heads = make()
    check(heads)
    heads.losses[name] = "mse"
    assert f"mse=['{name}']" in repr(heads)
    check(heads)
    heads.losses[name] = "cross_entropy"
    assert "mse=" not in repr(heads)
    check(heads)
    heads.losses[name] = "l1"
    x, targets = batch(heads)
    text = f"losses['{name}'] must be one of ['cross_entropy', 'mse', 'bce'] or a function, got 'l1'"
    assert refusal(lambda: heads(x, targets)) == text
    assert refusal(lambda: heads(x, {name: targets[name]})) == text


def test_the_loss_of_a_head_that_was_taken_out_does_not_matter():
    heads = make(losses={"domain": "mse", "digit": "mse"})
    del heads.adversaries["domain"], heads.predictors["digit"]
    assert "mse=" not in repr(heads)
    check(heads)


# --- copies of heads that were changed
# -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))], ids=["deepcopy", "pickle"])
def test_a_copy_of_heads_that_were_changed_is_whole_and_independent(how):
    heads = make()
    del heads.adversaries["domain"]
    heads.add_adversary("new", [4, 3], 0.25, loss="mse", dtype=torch.float64)
    heads.predictors["domain"] = nn.Linear(7, 2).double()  # the name is free
    other = how(heads)
    assert lambdas_of(other) == lambdas_of(heads) == {"speaker": 5.0, "site": -0.5, "new": 0.25}
    x, targets = batch(heads)
    assert_same(other(x, targets).loss, heads(x, targets).loss)
    check(other)
    del other.adversaries["site"], other.predictors["domain"]
    other.add_adversary("domain", 2, 2.0, dtype=torch.float64)
    other.lambda_ = {"speaker": 1.0}
    assert list(other.reversals) == list(other.adversaries) == ["speaker", "new", "domain"]
    assert refusal(lambda: other.adversaries.__setitem__("site", nn.Linear(7, 5))).startswith("adversaries['site'] has")
    assert lambdas_of(heads) == {"speaker": 5.0, "site": -0.5, "new": 0.25}
    check(heads)
    check(other)


def test_heads_made_from_the_modules_of_others_share_them():
    heads = make()
    other = AdversarialHeads(7, heads.predictors, heads.adversaries, lambda_=heads.lambda_)
    assert other.adversaries["speaker"] is heads.adversaries["speaker"]
    assert lambdas_of(other) == LAMBDAS
    del other.adversaries["speaker"]
    check(heads)
    check(other)


# --- schedulers
# -----------------------------------------------------------------------------------------------------------


def test_a_scheduler_sets_each_adversarys_lambda_by_its_name():
    heads = make()
    scheduler = LambdaScheduler(heads, schedules.linear(0.0, 1.0), 4)
    assert scheduler.layers == [heads.reversals[name] for name in LAMBDAS]
    for factor in (0.0, 0.25, 0.5, 0.75, 1.0):
        assert lambdas_of(heads) == {name: factor * value for name, value in LAMBDAS.items()}
        check(heads, penalty=False)
        scheduler.step()


def test_a_scheduler_over_heads_that_were_changed_sets_those_that_are_left_and_new():
    heads = make()
    LambdaScheduler(heads, schedules.constant(0.5), 4)
    del heads.adversaries["domain"]
    heads.add_adversary("new", 3, 2.0, dtype=torch.float64)
    scheduler = LambdaScheduler(heads, schedules.constant(0.25), 4)
    assert lambdas_of(heads) == {"speaker": 1.25, "site": -0.125, "new": 0.5}
    scheduler.step()
    check(heads)


def test_a_scheduler_whose_heads_change_goes_on_with_the_others():
    heads = make()
    scheduler = LambdaScheduler(heads, schedules.linear(0.0, 1.0), 2)
    del heads.adversaries["domain"]
    heads.add_adversary("new", 3, 2.0, dtype=torch.float64)
    scheduler.step()
    assert lambdas_of(heads) == {"speaker": 2.5, "site": -0.25, "new": 2.0}


def test_a_run_is_resumed_with_heads_in_another_order():
    heads = make()
    scheduler = LambdaScheduler(heads, schedules.dann(), 10)
    for _ in range(3):
        scheduler.step()
    other = make(adversaries=("site", "domain", "speaker"))
    resumed = LambdaScheduler(other, schedules.dann(), 10)
    other.load_state_dict(heads.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.step()
        scheduler.step()
    assert lambdas_of(other) == lambdas_of(heads)


class Saved(nn.Module):
    """As peft wraps modules that it is to save: the copy is the one that is used."""

    def __init__(self, module):
        super().__init__()
        self.original_module, self.copy = module, copy.deepcopy(module)

    def forward(self, *inputs):
        return self.copy(*inputs)


def test_a_wrapped_reversal_is_called_and_set():
    heads, x = AdversarialHeads(4, {"p": 2}, {"a": [5, 2]}, lambda_=0.3), torch.randn(6, 4, requires_grad=True)
    expected = torch.autograd.grad(heads(x)["a"].sin().sum(), x)
    heads.reversals["a"] = Saved(heads.reversals["a"])
    torch.testing.assert_close(torch.autograd.grad(heads(x)["a"].sin().sum(), x), expected)
    heads.lambda_ = 0.6
    assert heads.lambda_["a"] == heads.reversals["a"].original_module.lambda_ == 0.6
    doubled = torch.autograd.grad(heads(x)["a"].sin().sum(), x)[0]
    torch.testing.assert_close(doubled, 2 * expected[0])
    torch.testing.assert_close(torch.autograd.grad(heads(x, lambda_=0.3)["a"].sin().sum(), x), expected)
    with pytest.raises(TypeError, match=r"reversals\['a'\] must be a GRL, got Linear"):
        heads.reversals["a"] = nn.Linear(4, 4)
        heads(x)
