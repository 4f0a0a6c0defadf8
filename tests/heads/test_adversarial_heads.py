"""`AdversarialHeads`: predictors and adversaries by name, their losses and options, their lambdas, and a model's life.

How each head is run is in test_adversarial_heads_paths.py, what users do to a head's layers in
test_adversarial_heads_layers.py.
"""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from head_samples import lambdas_of, logits_of_modules, losses_of_modules
from samples import assert_same
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from grl_ext import AdversarialHeads, HeadsOutput

pytestmark = [pytest.mark.sanitized, pytest.mark.usefixtures("path")]

SIZES = {"digit": 3, "colour": 1, "domain": 2, "speaker": 4}


def make(lambda_=0.75, **options) -> AdversarialHeads:
    return AdversarialHeads(7, {"digit": 3, "colour": 1}, {"domain": 2, "speaker": [5, 4]}, lambda_=lambda_, **options)


def batch(device="cpu", dtype=torch.float32, rows=6):
    """Features that require grad and targets by name, one of them without a label."""
    targets = {name: torch.randint(max(2, size), (rows,), device=device) for name, size in SIZES.items()}
    targets["digit"][0] = -100
    return torch.randn(rows, 7, device=device, dtype=dtype, requires_grad=True), targets


def layer_by_layer(heads, x, targets):
    """The same from the modules themselves and PyTorch's own losses."""
    logits = logits_of_modules(heads, x, targets)
    losses = losses_of_modules(heads, logits, targets)
    return HeadsOutput(sum(losses.values()), losses, logits)


def check(heads, x, targets, output, expected):
    assert list(output.head_losses) == list(output.logits) == [name for name in heads.head_names if name in targets]
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.head_losses, expected.head_losses)
    torch.testing.assert_close(output.logits, expected.logits)
    inputs = [x, *(p for p in heads.parameters() if p.requires_grad)]
    ours = torch.autograd.grad(output.loss, inputs, allow_unused=True)
    theirs = torch.autograd.grad(expected.loss, inputs, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def reversal_by_name(heads) -> dict[str, float]:
    """The factor with which each head's gradient reaches the features."""
    factors = {}
    for name, module in [*heads.predictors.items(), *heads.adversaries.items()]:
        weight = next(heads.parameters())
        x, seen = (torch.ones(1, 7, dtype=weight.dtype, device=weight.device, requires_grad=True) for _ in range(2))
        heads(x)[name].sum().backward()
        module(seen).sum().backward()
        factors[name] = round((x.grad @ seen.grad.T / seen.grad.square().sum()).item(), 6)
    return factors


# --- forward and loss
# ------------------------------------------------------------------------------------------------------


def test_forward_gives_each_heads_logits_by_name(device):
    heads = make(device=device)
    x, _ = batch(device)
    for features in (x, x.view(2, 3, 7), x[0], x[:0]):
        logits = heads(features)
        assert list(logits) == list(SIZES)
        for name, z in logits.items():
            module = (heads.predictors if name in heads.predictors else heads.adversaries)[name]
            assert z.shape == (*features.shape[:-1], SIZES[name])
            torch.testing.assert_close(z, module(features))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_loss_and_its_gradients_are_the_layers(device, bias):
    heads = make(bias=bias, device=device, dtype=torch.float64, lambda_={"domain": 0.5, "speaker": 2.0})
    x, targets = batch(device, torch.float64)
    check(heads, x, targets, heads(x, targets), layer_by_layer(heads, x, targets))


@pytest.mark.parametrize(
    "given", [["digit"], ["domain"], ["speaker", "digit"], ["domain", "speaker"], ["colour"]], ids=str
)
def test_a_head_left_out_is_ignored(device, given):
    heads = make(device=device, dtype=torch.float64)
    x, targets = batch(device, torch.float64)
    targets = {name: targets[name] for name in given}
    with torch.no_grad():  # would show
        for name in set(SIZES) - set(given):
            next((heads.predictors if name in heads.predictors else heads.adversaries)[name].parameters()).fill_(
                math.nan
            )
    check(heads, x, targets, heads(x, targets), layer_by_layer(heads, x, targets))
    heads(x, targets).loss.backward()
    for modules in (heads.predictors, heads.adversaries):
        for name, module in modules.items():
            assert all((p.grad is not None) == (name in given) for p in module.parameters())


def test_a_head_left_out_does_not_decay_under_adamw(device):
    heads, (x, targets) = make(device=device), batch(device)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=0.1, weight_decay=0.5)
    before = copy.deepcopy(heads.state_dict())
    heads(x, {"domain": targets["domain"]}).loss.backward()
    optimizer.step()
    for name, value in heads.state_dict().items():
        assert torch.equal(value, before[name]) == ("domain" not in name or "lambda_" in name)


def test_the_options_are_for_all_heads_or_by_name(device):
    heads, (x, targets) = make(device=device), batch(device)
    names = list(SIZES)
    rows = torch.rand(6, device=device)
    weights = {"digit": torch.rand(3, device=device), "colour": torch.rand(2, device=device)}
    targets = {name: target.clamp(min=0) for name, target in targets.items()}
    targets["digit"][1] = 1
    for one, by_name in (
        ({"sample_weight": rows}, {"sample_weight": dict.fromkeys(names, rows)}),
        ({"label_smoothing": 0.1}, {"label_smoothing": dict.fromkeys(names, 0.1)}),
        ({"ignore_index": 1}, {"ignore_index": dict.fromkeys(names, 1)}),
        ({"loss_weight": 0.5}, {"loss_weight": dict.fromkeys(names, 0.5)}),
        ({}, {"sample_weight": {}, "class_weight": {}, "loss_weight": {}, "label_smoothing": {}, "ignore_index": {}}),
    ):
        assert_same(heads(x, targets, **one).loss, heads(x, targets, **by_name).loss)
    out = heads(
        x,
        targets,
        class_weight=weights,
        sample_weight={"digit": rows},
        ignore_index={"digit": 1},
        label_smoothing={"digit": 0.2},
    )
    z = heads(x)
    losses = F.cross_entropy(
        z["digit"], targets["digit"], weights["digit"], ignore_index=1, label_smoothing=0.2, reduction="none"
    )
    norm = (rows * weights["digit"][targets["digit"]])[targets["digit"] != 1].sum()
    torch.testing.assert_close(out.head_losses["digit"], (losses * rows).sum() / norm)
    torch.testing.assert_close(out.head_losses["domain"], F.cross_entropy(z["domain"], targets["domain"]))


@pytest.mark.parametrize("value", [0, 0.0, 2, 0.5])
def test_a_loss_weight_for_all_heads_is_one_also_if_it_is_zero(device, value):
    heads, (x, targets) = make(device=device), batch(device)
    torch.testing.assert_close(heads(x, targets, loss_weight=value).loss, value * heads(x, targets).loss)


def test_loss_weights_by_name_weigh_the_heads(device):
    heads, (x, targets) = make(device=device), batch(device)
    plain = heads(x, targets)
    for weights in ({"domain": 0.5}, {"digit": 2, "domain": 0}, {"speaker": torch.tensor(0.25)}):
        expected = sum(float(weights.get(name, 1)) * loss for name, loss in plain.head_losses.items())
        torch.testing.assert_close(heads(x, targets, loss_weight=weights).loss, expected)


def test_a_sum_is_given_where_it_is_asked_for(device):
    heads, (x, targets) = make(device=device), batch(device)
    expected = F.cross_entropy(heads(x)["domain"], targets["domain"], reduction="sum")
    torch.testing.assert_close(heads(x, {"domain": targets["domain"]}, reduction="sum").loss, expected)


@pytest.mark.parametrize(
    "head", [1, 2, [5, 2], nn.Sequential(nn.Tanh(), nn.Linear(7, 2))], ids=["value", "linear", "layers", "given"]
)
def test_a_squared_error_is_declared_by_name(device, head):
    heads = AdversarialHeads(
        7, {"digit": 3}, {"market": copy.deepcopy(head)}, losses={"market": "mse"}, lambda_=0.5
    ).to(device)
    x, targets = batch(device)
    size = heads(x)["market"].shape[1]
    values = torch.randn(6, size, device=device)
    rows = torch.tensor([1.0, 0.0, 1.0, 2.0, 1.0, 1.0], device=device)
    out = heads(x, {"digit": targets["digit"], "market": values}, sample_weight={"market": rows}, label_smoothing=0.1)
    errors = F.mse_loss(heads(x)["market"], values, reduction="none").mean(1)
    torch.testing.assert_close(out.head_losses["market"], (errors * rows).sum() / rows.sum())
    dx = torch.autograd.grad(out.head_losses["market"], x, retain_graph=True)[0]
    plain = torch.autograd.grad(
        (F.mse_loss(heads.adversaries["market"](x), values, reduction="none").mean(1) * rows).sum() / rows.sum(), x
    )[0]
    torch.testing.assert_close(dx, -0.5 * plain)
    assert "mse=['market']" in repr(heads)


def test_targets_may_be_laid_out_in_any_way(device):
    heads, (x, targets) = make(device=device), batch(device)
    expected = heads(x, targets)
    table = torch.stack(list(targets.values()), 1)
    for columns in (table, table.repeat_interleave(2, 0)[::2], table.flip(0).T.flip(1).T):
        assert_same(heads(x, dict(zip(SIZES, columns.unbind(1), strict=True))).loss, expected.loss)
    cubes = {name: target.view(2, 3) for name, target in targets.items()}
    output = heads(x.view(2, 3, 7), cubes)
    assert_same(output.loss, expected.loss)
    assert_same(output.logits["speaker"], expected.logits["speaker"].view(2, 3, 4))
    one = {name: target[:1].expand(6) for name, target in targets.items() if name != "digit"}
    assert_same(heads(x, one).loss, heads(x, {name: target.contiguous() for name, target in one.items()}).loss)


def test_the_order_of_the_targets_does_not_matter(device):
    heads, (x, targets) = make(device=device), batch(device)
    output = heads(x, dict(reversed(targets.items())))
    assert list(output.logits) == list(SIZES)
    assert_same(output.loss, heads(x, targets).loss)


@pytest.mark.parametrize(
    "predictors, adversaries", [({"digit": 3}, None), (None, {"domain": 2}), ({}, {"domain": [4, 2]})]
)
def test_predictors_alone_and_adversaries_alone(device, predictors, adversaries):
    heads = AdversarialHeads(7, predictors, adversaries, lambda_=0.5, device=device)
    name = "digit" if predictors else "domain"
    x, targets = batch(device)
    targets = {name: targets[name].clamp(min=0)}
    check(heads, x, targets, heads(x, targets), layer_by_layer(heads, x, targets))


def test_training_equals_the_layers_step_by_step(device):
    body = nn.Linear(5, 7, device=device, dtype=torch.float64)
    heads = make(device=device, dtype=torch.float64)
    models = [nn.ModuleList([body, heads]), copy.deepcopy(nn.ModuleList([body, heads]))]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.2, momentum=0.9) for m in models]
    for step in range(4):
        x, targets = torch.randn(8, 5, device=device, dtype=torch.float64), batch(device, rows=8)[1]
        for (own_body, own_heads), optimizer, f in zip(
            models, optimizers, (lambda h, *a: h(*a), layer_by_layer), strict=True
        ):
            own_heads.lambda_ = {"domain": 0.2 * step, "speaker": 0.5}
            optimizer.zero_grad()
            f(own_heads, own_body(x), targets).loss.backward()
            optimizer.step()
    for a, b in zip(*(m.state_dict().values() for m in models), strict=True):
        torch.testing.assert_close(a, b)


# --- lambda
# ----------------------------------------------------------------------------------------------------------------


def test_predictors_are_not_scaled_and_adversaries_reversed_by_their_lambda(device):
    heads = make(lambda_={"domain": 0.5, "speaker": 2.0}, device=device, dtype=torch.float64)
    assert reversal_by_name(heads) == {"digit": 1.0, "colour": 1.0, "domain": -0.5, "speaker": -2.0}


@pytest.mark.parametrize(
    "value, expected",
    [
        (0.25, [0.25, 0.25]),
        (0, [0.0, 0.0]),
        ({"domain": 0.25}, [0.25, 0.75]),
        ({"speaker": 2, "domain": -1.0}, [-1.0, 2.0]),
        ({}, [0.75, 0.75]),
        (torch.tensor(0.5), [0.5, 0.5]),
        ({"domain": torch.tensor(0.5)}, [0.5, 0.75]),
        ({"speaker": torch.tensor(0.5), "domain": 1}, [1.0, 0.5]),
    ],
    ids=str,
)
def test_assignment_sets_lambda_in_place(device, value, expected):
    heads = make(device=device, dtype=torch.float64)
    buffers = heads.lambda_
    heads.lambda_ = value
    assert list(lambdas_of(heads).values()) == expected
    for name, buffer in buffers.items():
        assert heads.lambda_[name] is heads.reversals[name].lambda_ is buffer
    assert reversal_by_name(heads)["speaker"] == pytest.approx(-expected[1], abs=1e-5)


def test_lambda_may_be_a_tensor_from_the_start():
    assert lambdas_of(make(lambda_=torch.tensor(0.5))) == {"domain": 0.5, "speaker": 0.5}
    assert lambdas_of(make(lambda_={"domain": torch.tensor(0.5), "speaker": 2})) == {"domain": 0.5, "speaker": 2.0}


@pytest.mark.parametrize(
    "value, expected, text",
    [
        (math.nan, ValueError, "lambda_ must be finite, got nan"),
        ("0.5", TypeError, "lambda_ must be a real number or a real tensor, got str"),
        ({"domain": math.inf}, ValueError, "lambda_['domain'] must be finite, got inf"),
        (
            {"speaker": 0.5, "domain": "1"},
            TypeError,
            "lambda_['domain'] must be a real number or a real tensor, got str",
        ),
        (torch.ones(2), ValueError, "lambda_ must be a number or a 0-d tensor, got shape [2]"),
        (torch.tensor(math.inf), ValueError, "lambda_ must be finite, got inf"),
        ({"domain": torch.ones(2)}, ValueError, "lambda_['domain'] must be a number or a 0-d tensor, got shape [2]"),
        ({"domain": torch.tensor(math.nan)}, ValueError, "lambda_['domain'] must be finite, got nan"),
        (
            {"domain": 0.5, "digit": 0.5},
            ValueError,
            "lambda_ names ['digit'], but the adversaries are ['domain', 'speaker']",
        ),
    ],
    ids=str,
)
def test_a_refused_lambda_leaves_the_old_one(value, expected, text):
    heads = make()
    with pytest.raises(expected) as caught:
        heads.lambda_ = value
    assert str(caught.value) == text and lambdas_of(heads) == {"domain": 0.75, "speaker": 0.75}
    with pytest.raises(expected) as caught:
        make(lambda_=value)
    assert str(caught.value) == text


def test_functional_call_replaces_lambdas_for_one_call(device):
    heads, (x, targets) = make(device=device), batch(device)
    other = make(lambda_={"domain": 0.5, "speaker": 2.0}, device=device)
    other.load_state_dict({**heads.state_dict(), **{f"reversals.{n}.lambda_": v for n, v in other.lambda_.items()}})
    state = {name: value for name, value in other.state_dict().items() if "lambda_" in name}
    ours = torch.autograd.grad(torch.func.functional_call(heads, state, (x, targets)).loss, x)[0]
    assert_same(ours, torch.autograd.grad(other(x, targets).loss, x)[0])
    assert lambdas_of(heads) == {"domain": 0.75, "speaker": 0.75}


def test_a_change_between_forward_and_backward_concerns_the_next_forward(device):
    heads, (x, targets) = make(device=device), batch(device)

    def loss():
        out = heads(x, targets)
        return out.loss + out.head_losses["domain"] + heads(x)["domain"].sum()

    expected = torch.autograd.grad(loss(), x)[0]
    value = loss()
    heads.lambda_ = 5.0
    assert_same(torch.autograd.grad(value, x)[0], expected)


# --- tracing
# ---------------------------------------------------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """The names of the operators that a dispatch mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_changes_nothing(device):
    heads, (x, targets) = make(device=device), batch(device)
    expected = heads(x, targets).loss
    with Recorded() as recorded:
        loss = heads(x, targets).loss
    assert_same(loss, expected)
    assert recorded.names


def test_fake_tensors_go_through_real_heads(device):
    heads, (x, targets) = make(device=device), batch(device)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        assert heads(fake)["speaker"].shape == (6, 4)
        assert heads(fake, {name: mode.from_tensor(t) for name, t in targets.items()}).loss.shape == ()


# --- a model's life
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert",
    [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)],
    ids=["half", "bfloat16", "double", "to(float16)"],
)
def test_a_conversion_leaves_lambda_alone(convert):
    heads = convert(nn.Sequential(make(lambda_=1 / 3)))[0]
    assert {own.dtype for own in heads.lambda_.values()} == {torch.float64}
    assert lambdas_of(heads) == {"domain": 1 / 3, "speaker": 1 / 3}
    weight = heads.adversaries["domain"].weight
    assert weight.dtype != torch.float32
    x, targets = batch(dtype=weight.dtype)
    loss = heads(x, targets).loss
    loss.backward()
    assert x.grad.dtype == weight.dtype and loss.dtype == torch.promote_types(x.dtype, torch.float32)
    assert {p.grad.dtype for p in heads.parameters()} == {weight.dtype}


def test_the_state_dict_holds_all_under_the_modules_names_and_restores_all(device):
    heads = make(lambda_={"domain": 0.1, "speaker": 0.3}, device=device)
    assert list(heads.state_dict()) == [
        "predictors.digit.weight",
        "predictors.digit.bias",
        "predictors.colour.weight",
        "predictors.colour.bias",
        "reversals.domain.lambda_",
        "reversals.speaker.lambda_",
        "adversaries.domain.weight",
        "adversaries.domain.bias",
        "adversaries.speaker.0.weight",
        "adversaries.speaker.0.bias",
        "adversaries.speaker.2.weight",
        "adversaries.speaker.2.bias",
    ]
    other = make(device=device)
    other.load_state_dict(heads.state_dict())
    assert lambdas_of(other) == {"domain": 0.1, "speaker": 0.3}
    for a, b in zip(other.parameters(), heads.parameters(), strict=True):
        assert_same(a, b)


def test_checkpoints_of_plain_layers_load_by_name():
    heads = make(lambda_=0.3)
    plain = nn.ModuleDict({"predictors": nn.ModuleDict({"digit": nn.Linear(7, 3), "colour": nn.Linear(7, 1)})})
    speaker = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4))
    plain["adversaries"] = nn.ModuleDict({"domain": nn.Linear(7, 2), "speaker": speaker})
    heads.load_state_dict(plain.state_dict())  # strictly: lambda is not missed
    heads.adversaries["domain"].load_state_dict(nn.Linear(7, 2).state_dict())
    assert lambdas_of(heads) == {"domain": 0.3, "speaker": 0.3}
    assert_same(heads.predictors["digit"].weight, plain["predictors"]["digit"].weight)
    assert_same(heads.adversaries["speaker"][2].weight, speaker[2].weight)
    with pytest.raises(RuntimeError, match="Missing key"):
        heads.load_state_dict({})


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda heads: pickle.loads(pickle.dumps(heads)),
    "state_dict, assigned to meta": lambda heads: _assigned(heads),
}


def _assigned(heads):
    other = make(device="meta")
    other.load_state_dict(copy.deepcopy(heads.state_dict()), assign=True)
    return other


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_independent(how):
    heads = make(lambda_={"domain": 0.1, "speaker": 0.3})
    other = COPIES[how](heads)
    x, targets = batch()
    assert_same(other(x, targets).loss, heads(x, targets).loss)
    assert_same(torch.autograd.grad(other(x, targets).loss, x)[0], torch.autograd.grad(heads(x, targets).loss, x)[0])
    other.lambda_ = {"domain": 2.0}
    with torch.no_grad():
        other.adversaries["domain"].weight.zero_()
    assert lambdas_of(heads) == {"domain": 0.1, "speaker": 0.3} and heads.adversaries["domain"].weight.any()


def test_an_average_of_the_weights_follows_training(device):
    heads = make(device=device)
    average = torch.optim.swa_utils.AveragedModel(heads, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(heads)
    with torch.no_grad():
        for p in heads.parameters():
            p.add_(2)
    average.update_parameters(heads)
    for mine, p in zip(average.module.parameters(), heads.parameters(), strict=True):
        torch.testing.assert_close(mine, p - 1)
    x, targets = batch(device)
    check(average.module, x, targets, average(x, targets), layer_by_layer(average.module, x, targets))


def test_heads_on_meta_show_themselves_trace_and_are_materialised(device):
    heads = make(device="meta")
    assert lambdas_of(heads) == {"domain": 0.75, "speaker": 0.75} and "(domain): GRL(lambda_=0.75)" in repr(heads)
    assert heads(torch.randn(5, 7, device="meta"))["speaker"].shape == (5, 4)
    targets = {"domain": torch.zeros(5, dtype=torch.int64, device="meta")}
    assert heads(torch.randn(5, 7, device="meta"), targets).loss.shape == ()
    heads = heads.to_empty(device=device)
    for module in heads.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    assert lambdas_of(heads) == {"domain": 0.75, "speaker": 0.75}
    x, targets = batch(device)
    check(heads, x, targets, heads(x, targets), layer_by_layer(heads, x, targets))


def test_device_and_dtype_are_those_asked_for(device):
    heads = make(device=device, dtype=torch.bfloat16)
    assert {p.dtype for p in heads.parameters()} == {torch.bfloat16}
    assert {t.device.type for t in heads.state_dict().values()} == {device.type}
