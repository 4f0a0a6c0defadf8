"""`AdversarialHeads`: predictors and adversaries by name, their lambdas, and the way to and from stock layers."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from samples import assert_same
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from grl_ext import GRL, AdversarialHeads

pytestmark = pytest.mark.usefixtures("path")

SIZES = {"digit": 3, "colour": 1, "domain": 2, "speaker": 4}


def make(lambda_=0.75, **options) -> AdversarialHeads:
    return AdversarialHeads(7, {"digit": 3, "colour": 1}, {"domain": 2, "speaker": 4}, lambda_=lambda_, **options)


def batch(device="cpu", dtype=torch.float32, rows=6):
    """Features that require grad and targets by name, one of them without a label."""
    targets = {name: torch.randint(max(2, size), (rows,), device=device) for name, size in SIZES.items()}
    targets["digit"][0] = -100
    return torch.randn(rows, 7, device=device, dtype=dtype, requires_grad=True), targets


class Stock(nn.Module):
    """The same network, layer by layer."""

    def __init__(self, heads: AdversarialHeads) -> None:
        super().__init__()
        predictors, adversaries = heads.to_linears()
        self.predictors = nn.ModuleDict(predictors)
        self.adversaries = nn.ModuleDict({n: nn.Sequential(GRL(1.0).to(m.weight.device), m) for n, m in adversaries.items()})

    def set_lambda(self, heads: AdversarialHeads) -> None:
        for value, branch in zip(heads.lambda_.tolist(), self.adversaries.values(), strict=True):
            branch[0].lambda_ = value

    def forward(self, x):
        return {name: head(x) for name, head in [*self.predictors.items(), *self.adversaries.items()]}

    def loss(self, x, targets, loss_weight=None, **options):
        logits = self(x)
        losses = {}
        for name, target in targets.items():
            z = logits[name]
            if z.shape[1] == 1:
                losses[name] = F.binary_cross_entropy_with_logits(z[:, 0], target.to(z))
            else:
                losses[name] = F.cross_entropy(z, target, **options)
        return sum((loss_weight or {}).get(name, 1.0) * loss for name, loss in losses.items()), losses


def reversal_by_name(heads: AdversarialHeads) -> dict[str, float]:
    """The factor with which each head's gradient reaches the features."""
    factors = {}
    for name, rows in zip(SIZES, heads.weight.detach().split(heads.head_sizes), strict=True):
        x = torch.ones(1, 7, device=heads.weight.device, dtype=heads.weight.dtype, requires_grad=True)
        heads(x)[name].sum().backward()
        factors[name] = round((x.grad @ rows.sum(0) / rows.sum(0).square().sum()).item(), 6)
    return factors


# --- forward and loss ------------------------------------------------------------------------------------------------------


def test_forward_gives_each_heads_logits_by_name(device):
    heads = make(device=device)
    x, _ = batch(device)
    for features in (x, x.view(2, 3, 7), x[0], x[:0]):
        logits = heads(features)
        assert list(logits) == list(SIZES)
        for (name, z), expected in zip(logits.items(), Stock(heads)(features).values(), strict=True):
            assert z.shape == (*features.shape[:-1], SIZES[name])
            torch.testing.assert_close(z, expected)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_loss_and_its_gradients_are_the_stock_networks(device, bias):
    heads = make(bias=bias, device=device, dtype=torch.float64, lambda_={"domain": 0.5, "speaker": 2.0})
    stock = Stock(heads)
    stock.set_lambda(heads)
    x, targets = batch(device, torch.float64)
    output = heads.loss(x, targets)
    total, losses = stock.loss(x, targets)
    torch.testing.assert_close(output.loss, total)
    assert list(output.head_losses) == list(output.logits) == list(SIZES)
    for name, z in stock(x).items():
        torch.testing.assert_close(output.head_losses[name], losses[name].detach())
        torch.testing.assert_close(output.logits[name], z.detach())
    stock_x = torch.autograd.grad(total, x, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(output.loss, x, retain_graph=True)[0], stock_x)
    layers = [m for m in stock.modules() if isinstance(m, nn.Linear)]
    for ours, theirs in zip(heads.parameters(), ([m.weight for m in layers], [m.bias for m in layers]), strict=False):
        expected = torch.cat(torch.autograd.grad(total, theirs, retain_graph=True))
        torch.testing.assert_close(torch.autograd.grad(output.loss, ours, retain_graph=True)[0], expected)


def test_the_options_of_the_loss_are_those_of_f_cross_entropy(device):
    heads = AdversarialHeads(7, {"digit": 3}, {"domain": 2}, lambda_=0.75, device=device)
    stock = Stock(heads)
    x, targets = batch(device)
    targets = {"digit": targets["digit"].clamp(min=0), "domain": targets["domain"]}
    for options in ({"label_smoothing": 0.2}, {"ignore_index": 1}, {"loss_weight": {"domain": 0.5}}, {"loss_weight": {"digit": 2, "domain": 0}}):
        torch.testing.assert_close(heads.loss(x, targets, **options).loss, stock.loss(x, targets, **options)[0])


def test_no_loss_weight_by_name_is_no_loss_weight(device):
    heads, (x, targets) = make(device=device), batch(device)
    assert_same(heads.loss(x, targets, loss_weight={}).loss, heads.loss(x, targets).loss)


def test_targets_may_be_laid_out_in_any_way(device):
    heads, (x, targets) = make(device=device), batch(device)
    expected = heads.loss(x, targets)
    table = torch.stack(list(targets.values()), 1)
    for columns in (table, table.repeat_interleave(2, 0)[::2], table.flip(0).T.flip(1).T):
        assert_same(heads.loss(x, dict(zip(SIZES, columns.unbind(1), strict=True))).loss, expected.loss)
    cubes = {name: target.view(2, 3) for name, target in targets.items()}
    output = heads.loss(x.view(2, 3, 7), cubes)
    assert_same(output.loss, expected.loss)
    assert_same(output.logits["speaker"], expected.logits["speaker"].view(2, 3, 4))
    one = {name: target[:1].expand(6) for name, target in targets.items() if name != "digit"}
    assert_same(heads.loss(x, one).loss, heads.loss(x, {name: target.contiguous() for name, target in one.items()}).loss)


@pytest.mark.parametrize("given", [["digit"], ["domain"], ["speaker", "digit"], ["domain", "speaker"]], ids=str)
def test_a_head_left_out_takes_no_part(device, given):
    heads = make(device=device)
    stock = Stock(heads)
    stock.set_lambda(heads)
    x, targets = batch(device)
    targets = {name: targets[name] for name in given}
    output = heads.loss(x, targets)
    total, losses = stock.loss(x, targets)
    assert list(output.head_losses) == list(output.logits) == [name for name in SIZES if name in given]
    torch.testing.assert_close(output.loss, total)
    torch.testing.assert_close(torch.autograd.grad(output.loss, x, retain_graph=True), torch.autograd.grad(total, x))
    dw = torch.autograd.grad(output.loss, heads.weight)[0]
    for name, rows in zip(SIZES, dw.split(heads.head_sizes), strict=True):
        assert rows.any() == (name in given)


def test_a_head_may_be_left_out_whatever_the_ignored_index(device):
    heads, (x, targets) = make(device=device), batch(device)
    output = heads.loss(x, {"domain": targets["domain"]}, ignore_index=0)
    torch.testing.assert_close(output.loss, F.cross_entropy(heads(x)["domain"], targets["domain"], ignore_index=0))


def test_features_of_any_leading_sizes_have_targets_of_the_same(device):
    heads, (x, targets) = make(device=device), batch(device)
    flat = heads.loss(x, targets)
    stacked = heads.loss(x.view(2, 3, 7), {name: t.view(2, 3) for name, t in targets.items()})
    assert_same(stacked.loss, flat.loss)
    assert stacked.logits["digit"].shape == (2, 3, 3)


@pytest.mark.parametrize("predictors, adversaries", [({"digit": 3}, None), (None, {"domain": 2}), ({}, {"domain": 2})])
def test_predictors_alone_and_adversaries_alone(device, predictors, adversaries):
    heads = AdversarialHeads(7, predictors, adversaries, lambda_=0.5, device=device)
    name, sign = ("digit", 1.0) if predictors else ("domain", -0.5)
    x, targets = batch(device)
    targets[name].clamp_(min=0)
    dx = torch.autograd.grad(heads.loss(x, {name: targets[name]}).loss, x)[0]
    stock = torch.autograd.grad(F.cross_entropy(F.linear(x, heads.weight, heads.bias), targets[name]), x)[0]
    torch.testing.assert_close(dx, sign * stock)


def test_training_equals_the_stock_network_step_by_step(device):
    body = nn.Linear(5, 7, device=device, dtype=torch.float64)
    heads = make(device=device, dtype=torch.float64)
    stock = Stock(heads)
    bodies = [body, copy.deepcopy(body)]
    optimizers = [torch.optim.SGD([*b.parameters(), *h.parameters()], lr=0.2, momentum=0.9) for b, h in zip(bodies, (heads, stock), strict=True)]
    for step in range(5):
        heads.lambda_ = {"domain": 0.2 * step, "speaker": 0.5}
        stock.set_lambda(heads)
        batch_x, targets = torch.randn(8, 5, device=device, dtype=torch.float64), batch(device, rows=8)[1]
        losses = [heads.loss(bodies[0](batch_x), targets).loss, stock.loss(bodies[1](batch_x), targets)[0]]
        torch.testing.assert_close(losses[0], losses[1])
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(bodies[0].weight, bodies[1].weight)
    torch.testing.assert_close(heads.weight, torch.cat([m.weight for m in stock.modules() if isinstance(m, nn.Linear)]))


# --- lambda ----------------------------------------------------------------------------------------------------------------


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
        (torch.tensor([0.5, 0.25]), [0.5, 0.25]),
        ({"domain": torch.tensor(0.5).item()}, [0.5, 0.75]),
    ],
    ids=str,
)
def test_assignment_sets_lambda_in_place(device, value, expected):
    heads = make(device=device)
    buffer = heads.lambda_
    heads.lambda_ = value
    assert heads.lambda_ is buffer and buffer.tolist() == expected
    assert reversal_by_name(heads)["speaker"] == pytest.approx(-expected[1], abs=1e-5)


@pytest.mark.parametrize(
    "value, expected, text",
    [
        (math.nan, ValueError, "lambda_ must be finite, got nan"),
        ("0.5", TypeError, "lambda_ must be a real number or a real tensor, got str"),
        ({"domain": math.inf}, ValueError, "lambda_['domain'] must be finite, got inf"),
        ({"speaker": 0.5, "domain": "1"}, TypeError, "lambda_['domain'] must be a real number or a real tensor, got str"),
        ({"domain": 0.5, "digit": 0.5}, ValueError, "lambda_ names ['digit'], but the adversaries are ['domain', 'speaker']"),
    ],
    ids=str,
)
def test_a_refused_lambda_leaves_the_old_one(value, expected, text):
    heads = make()
    with pytest.raises(expected) as caught:
        heads.lambda_ = value
    assert str(caught.value) == text and heads.lambda_.tolist() == [0.75, 0.75]
    with pytest.raises(expected) as caught:
        make(lambda_=value)
    assert str(caught.value) == text


def test_a_lambda_tensor_of_another_length_is_refused():
    heads = make()
    with pytest.raises(RuntimeError):
        heads.lambda_ = torch.ones(3)
    assert heads.lambda_.tolist() == [0.75, 0.75]
    on_meta = make(device="meta")
    with pytest.raises(RuntimeError):
        on_meta.lambda_ = torch.ones(3)
    on_meta.lambda_ = torch.ones(2)


@pytest.mark.parametrize("length", [0, 1, 3, 4, 200])
def test_a_lambda_of_another_length_that_takes_the_buffers_place_is_refused(device, length):
    heads, (x, targets) = make(device=device), batch(device)
    state = {"lambda_": torch.ones(length, dtype=torch.float64, device=device)}
    text = rf"^grad_scale must hold one number for each of the 4 heads, got shape \[{2 + length}\]$"
    with pytest.raises(ValueError, match=text):
        torch.func.functional_call(heads, state, (x,))
    heads._buffers["lambda_"] = state["lambda_"]
    with pytest.raises(ValueError, match=text):
        heads.loss(x, targets)


class Recorded(TorchDispatchMode):
    """The names of the operators that a dispatch mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_what_makes_each_number(device):
    heads, (x, targets) = make(device=device), batch(device)
    with Recorded() as recorded:
        heads.loss(x, targets)
    assert "stack" in recorded.names or "cat" in recorded.names
    assert "constant_pad_nd" in recorded.names


def test_fake_tensors_go_through_real_heads(device):
    heads, (x, targets) = make(device=device), batch(device)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        assert heads(fake)["speaker"].shape == (6, 4)
        assert heads.loss(fake, {name: mode.from_tensor(t) for name, t in targets.items()}).loss.shape == ()


def test_a_change_between_forward_and_backward_concerns_the_next_forward(device):
    heads, (x, targets) = make(device=device), batch(device)
    expected = torch.autograd.grad(heads.loss(x, targets).loss + heads(x)["domain"].sum(), x)[0]
    loss = heads.loss(x, targets).loss + heads(x)["domain"].sum()
    heads.lambda_ = 5.0
    assert_same(torch.autograd.grad(loss, x)[0], expected)


# --- a model's life --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)], ids=["half", "bfloat16", "double", "to(float16)"])
def test_a_conversion_leaves_lambda_alone(convert):
    heads = convert(nn.Sequential(make(lambda_=1 / 3)))[0]
    assert heads.lambda_.dtype == torch.float64 and heads.lambda_.tolist() == [1 / 3, 1 / 3]
    assert heads.weight.dtype != torch.float32
    x = torch.randn(5, 7, dtype=heads.weight.dtype, requires_grad=True)
    loss = heads.loss(x, {"domain": torch.tensor([0, 1, 0, 1, 1])}).loss
    loss.backward()
    assert x.grad.dtype == heads.weight.dtype and loss.dtype == torch.promote_types(x.dtype, torch.float32)


def test_the_state_dict_holds_all_and_restores_all(device):
    heads = make(lambda_={"domain": 0.1, "speaker": 0.3}, device=device)
    assert list(heads.state_dict()) == ["weight", "bias", "lambda_"]
    other = make(device=device)
    other.load_state_dict(heads.state_dict())
    assert other.lambda_.tolist() == [0.1, 0.3]
    assert_same(other.weight, heads.weight)


def test_a_checkpoint_without_lambda_loads_strictly_and_keeps_it():
    heads = make(lambda_=0.3)
    keys = heads.load_state_dict({"weight": torch.zeros(10, 7), "bias": torch.zeros(10)}, strict=True)
    assert not keys.missing_keys and not keys.unexpected_keys
    assert heads.lambda_.tolist() == [0.3, 0.3] and not heads.weight.any()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bias"\.'):
        heads.load_state_dict({"weight": torch.zeros(10, 7)})


@pytest.mark.parametrize("how", [copy.deepcopy, lambda heads: pickle.loads(pickle.dumps(heads))], ids=["deepcopy", "pickle"])
def test_a_copy_is_its_own(how):
    heads = make(lambda_={"domain": 0.1, "speaker": 0.3})
    other = how(heads)
    x, targets = batch()
    assert_same(other.loss(x, targets).loss, heads.loss(x, targets).loss)
    other.lambda_ = {"domain": 2.0}
    other.weight.data.zero_()
    assert heads.lambda_.tolist() == [0.1, 0.3] and heads.weight.any()


def test_repr_shows_heads_and_lambdas():
    heads = AdversarialHeads(7, {"digit": 3}, {"domain": 2}, bias=False, lambda_=0.5)
    assert repr(heads) == "AdversarialHeads(in_features=7, predictors={'digit': 3}, adversaries={'domain': 2}, bias=False, lambda_={'domain': 0.5})"


def test_heads_on_meta_show_themselves_trace_and_are_materialised(device):
    heads = make(device="meta")
    assert heads.weight.is_meta and heads.lambda_.tolist() == [0.75, 0.75] and repr(heads).startswith("AdversarialHeads(in_features=7")
    assert heads(torch.randn(5, 7, device="meta"))["speaker"].shape == (5, 4)
    targets = {"domain": torch.zeros(5, dtype=torch.int64, device="meta")}
    assert heads.loss(torch.randn(5, 7, device="meta"), targets).loss.shape == ()
    heads = heads.to_empty(device=device)
    heads.reset_parameters()
    heads.lambda_ = 0.5
    assert heads.lambda_.tolist() == [0.5, 0.5] and heads.weight.isfinite().all()


def test_device_and_dtype_are_those_asked_for(device):
    heads = make(device=device, dtype=torch.bfloat16)
    assert {p.dtype for p in heads.parameters()} == {torch.bfloat16}
    assert {t.device.type for t in heads.state_dict().values()} == {device.type}


def test_reset_parameters_draws_each_head_as_nn_linear_does():
    # Uniform within +-1/sqrt(D), whatever the sizes of the heads: bound, variance bound^2 / 3, and new numbers each time.
    heads = AdversarialHeads(400, {"a": 300}, {"b": 100})
    before = heads.weight.detach().clone()
    heads.reset_parameters()
    assert (before != heads.weight).any()
    linear = nn.Linear(400, 100)
    for ours, theirs in ((heads.weight, linear.weight), (heads.bias, linear.bias)):
        assert ours.abs().max() <= 400**-0.5 and ours.abs().max() > 0.95 * 400**-0.5
        assert theirs.abs().max() <= 400**-0.5
    assert heads.weight.var().item() == pytest.approx(1 / 1200, rel=0.02)  # 160 000 draws: some standard errors of 0.2 %
    assert heads.weight.mean().item() == pytest.approx(0, abs=5e-4)


# --- to and from stock layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_from_linears_and_to_linears_are_inverse(device, bias):
    linears = {name: nn.Linear(7, size, bias, device=device, dtype=torch.float64) for name, size in SIZES.items()}
    predictors, adversaries = {n: linears[n] for n in ("digit", "colour")}, {n: linears[n] for n in ("domain", "speaker")}
    heads = AdversarialHeads.from_linears(predictors, adversaries, lambda_={"speaker": 0.25})
    assert heads.lambda_.tolist() == [1.0, 0.25] and heads.weight.dtype == torch.float64
    assert (heads.predictors, heads.adversaries) == ({"digit": 3, "colour": 1}, {"domain": 2, "speaker": 4})
    x = torch.randn(5, 7, device=device, dtype=torch.float64)
    for name, z in heads(x).items():
        torch.testing.assert_close(z, linears[name](x))
    for given, returned in zip((predictors, adversaries), heads.to_linears(), strict=True):
        assert list(given) == list(returned)
        for name, linear in returned.items():
            assert repr(linear) == repr(given[name])
            for key, value in linear.state_dict().items():
                assert_same(value, given[name].state_dict()[key])


def test_from_linears_and_to_linears_copy():
    linear = nn.Linear(7, 2)
    heads = AdversarialHeads.from_linears(adversaries={"domain": linear})
    back = heads.to_linears()[1]["domain"]
    before = linear.weight.detach().clone()
    with torch.no_grad():
        heads.weight.zero_()
    assert_same(linear.weight.detach(), before)
    assert_same(back.weight.detach(), before)
    assert all(p.requires_grad for p in back.parameters())


@pytest.mark.parametrize("other", [nn.Linear(8, 2), nn.Linear(7, 2, bias=False), nn.Linear(7, 2, dtype=torch.float64), nn.Linear(7, 2, device="meta")], ids=["in_features", "bias", "dtype", "device"])
def test_linear_layers_that_do_not_agree_are_refused(other):
    with pytest.raises(ValueError, match=r"^the linear layers must agree in \(in_features, bias, device, dtype\), got \["):
        AdversarialHeads.from_linears({"digit": nn.Linear(7, 3)}, {"domain": other})


# --- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "predictors, adversaries, text",
    [
        (None, None, "predictors and adversaries are both empty: at least one head is needed"),
        ({}, {}, "predictors and adversaries are both empty: at least one head is needed"),
        ({"a": 2, "b": 2}, {"b": 2, "a": 3}, "head names must differ, got ['a', 'b'] among both predictors and adversaries"),
        ({"a": 0}, None, "head 'a' must have a size of at least 1, got 0"),
        (None, {"a": 2, "b": -1}, "head 'b' must have a size of at least 1, got -1"),
        ({"a": 2.0}, None, "head 'a' must have a size of at least 1, got 2.0"),
    ],
    ids=str,
)
def test_heads_that_make_no_sense_are_refused(predictors, adversaries, text):
    with pytest.raises(ValueError) as caught:
        AdversarialHeads(7, predictors, adversaries)
    assert str(caught.value) == text


def test_from_linears_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one head is needed"):
        AdversarialHeads.from_linears()


def test_unknown_names_and_no_names_are_refused():
    heads, (x, targets) = make(), batch()
    for call, text in (
        (lambda: heads.loss(x, targets | {"age": targets["domain"]}), f"targets names ['age'], but the heads are {list(SIZES)}"),
        (lambda: heads.loss(x, targets, loss_weight={"age": 1.0}), f"loss_weight names ['age'], but the heads are {list(SIZES)}"),
        (lambda: heads.loss(x, {}), f"targets is empty; the heads are {list(SIZES)}"),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == text


def test_targets_are_checked_as_by_the_function(device):
    heads, (x, targets) = make(device=device), batch(device)
    with pytest.raises(TypeError, match=r"^targets\['speaker'\] must be a tensor, got list$"):
        heads.loss(x, {**targets, "speaker": [0] * 6})
    with pytest.raises(TypeError, match=r"^targets must be torch.int64, got torch.float32$"):
        heads.loss(x, {"domain": targets["domain"].float()})
    if device.type == "cpu":
        with pytest.raises(IndexError, match=r"^targets of head 2 must be in \[0, 2\) or ignore_index \(-100\), got 2$"):
            heads.loss(x, {"domain": torch.full((6,), 2)})
