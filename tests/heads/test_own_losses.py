"""Losses of one's own, the losses of single rows, and what is given for one call: lambda, further inputs."""

import pytest
import torch
import torch.nn.functional as F
from head_samples import WIDE, check_loss, reversal, sample_heads
from samples import assert_same
from torch import nn

from grl_ext import GRL, AdversarialHeads, heads_loss

pytestmark = [pytest.mark.core, pytest.mark.sanitized, pytest.mark.usefixtures("path")]


def hinge(logits, targets):
    """Of a critic with one output: classes 0 and 1."""
    return F.relu(1 - logits[:, 0] * (2 * targets - 1))


def focal(logits, targets):
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (1 - (-losses).exp()) ** 2 * losses


# --- losses of one's own
# ---------------------------------------------------------------------------------------------------------------------


def test_the_functions_of_pytorch_give_their_own_losses(device):
    def own(logits, targets):
        return F.cross_entropy(logits, targets, reduction="none")

    sample = sample_heads(device, torch.float64, (70,), 7, (3, 2, 4))
    sample.targets[0][::5] = -100
    rows = torch.rand(70) * (torch.rand(70) > 0.3)
    results = []
    for losses in (None, [own, "cross_entropy", own]):
        copy = sample.map(torch.clone)._replace(losses=losses)
        out = heads_loss(
            copy.x, *copy.linear, copy.targets, lambda_=copy.lambda_, losses=losses, sample_weight=rows,
            loss_weight=[0.5, 1.0, 2.0],
        )  # fmt: skip
        results.append([out.loss, *out.head_losses, *out.logits, *torch.autograd.grad(out.loss, copy.wanted)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("head_sizes", [(3, 1, 2), WIDE, ((4, 3), 1, (5, 2))], ids=str)
def test_equals_the_layers(device, head_sizes, reduction):
    losses = [focal if h % 2 == 0 else "cross_entropy" for h in range(len(head_sizes))]
    sample = sample_heads(device, torch.float64, (70,), 7, head_sizes)._replace(losses=losses)
    sample.targets[0][::5] = -1
    rows = torch.rand(70) * (torch.rand(70) > 0.3)
    check_loss(sample, outputs="all", sample_weight=rows, ignore_index=-1, reduction=reduction)


def test_of_heads_of_every_kind(device):
    """A critic, fused or not, and a gradient to the features that is reversed."""

    class Own(nn.Linear):
        pass

    x = torch.randn(6, 4, requires_grad=True)
    target = torch.randint(2, (6,))
    modules = {"linear": nn.Linear(4, 1), "layers": nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))}
    modules["own"] = Own(4, 1)
    heads = AdversarialHeads(4, adversaries=modules, lambda_=0.5, losses=dict.fromkeys(modules, hinge))
    assert "hinge=['linear', 'layers', 'own']" in repr(heads)
    out = heads(x, dict.fromkeys(modules, target))
    expected = sum(hinge(module(reversal(x, 0.5)), target).mean() for module in modules.values())
    torch.testing.assert_close(out.loss, expected)
    inputs = [x, *heads.parameters()]
    torch.testing.assert_close(torch.autograd.grad(out.loss, inputs), torch.autograd.grad(expected, inputs))


def test_rows_that_do_not_count_come_as_zeros(device):
    seen = []

    def own(logits, targets):
        seen.append((logits.detach(), targets))
        return logits.square().sum(1) / targets  # infinite where nothing counts

    x = torch.randn(4, 3, requires_grad=True)
    heads = AdversarialHeads(3, {"age": 2}, losses={"age": own})
    target = torch.tensor([1.0, torch.nan, 2.0, torch.nan])
    out = heads(x, {"age": target}, sample_weight=torch.tensor([1.0, 0.0, 2.0, 0.0]))
    logits, targets = seen[0]
    assert torch.equal(targets, torch.tensor([1.0, 0.0, 2.0, 0.0]))
    assert torch.equal(logits[1::2], torch.zeros(2, 2))
    z = heads.predictors["age"](x)
    expected = (z[0].square().sum() / 1 + 2 * z[2].square().sum() / 2) / 3
    torch.testing.assert_close(out.loss, expected)
    # Nor is there a gradient of the infinite ones.
    torch.testing.assert_close(torch.autograd.grad(out.loss, x), torch.autograd.grad(expected, x))


def test_targets_of_any_shape_and_dtype(device):
    x = torch.randn(2, 3, 4)
    target = torch.randint(5, (2, 3, 2, 7), dtype=torch.int32)
    shapes = []

    def own(logits, targets):
        shapes.append((logits.shape, targets.shape, targets.dtype))
        return logits.sum(1)

    heads = AdversarialHeads(4, {"pair": 2}, losses={"pair": own})
    heads(x, {"pair": target})
    assert shapes == [((6, 2), (6, 2, 7), torch.int32)]


def test_targets_may_have_a_gradient(device):
    """As of a second network, from which the first one is to differ."""
    x, target = torch.randn(5, 4), torch.randn(5, 2, requires_grad=True)
    heads = AdversarialHeads(4, {"margin": 2}, losses={"margin": lambda z, t: (z - t).square().sum(1)})
    heads(x, {"margin": target}).loss.backward()
    torch.testing.assert_close(target.grad, -2 * (heads(x)["margin"] - target).detach() / 5)


def test_halves_come_widened(device):
    dtypes = []

    def own(logits, targets):
        dtypes.append(logits.dtype)
        return logits.sum(1)

    heads = AdversarialHeads(4, {"critic": 1}, losses={"critic": own}, dtype=torch.bfloat16)
    out = heads(torch.randn(5, 4, dtype=torch.bfloat16), {"critic": torch.zeros(5)})
    assert dtypes == [torch.float32]
    assert out.loss.dtype == torch.float32 and out.logits["critic"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "loss, message",
    [
        (lambda z, t: z.mean(), r"a loss function must return a loss for each row, of shape \[5\], got shape \[\]"),
        (lambda z, t: z, r"a loss function must return a loss for each row, of shape \[5\], got shape \[5, 2\]"),
        (lambda z, t: None, "a loss function must return a tensor with a loss for each row, got NoneType"),
    ],
)
def test_what_a_function_must_return(device, loss, message):
    heads = AdversarialHeads(4, {"critic": 2}, losses={"critic": loss})
    with pytest.raises((ValueError, TypeError), match=message):
        heads(torch.randn(5, 4), {"critic": torch.zeros(5)})


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"class_weight": {"critic": torch.ones(2)}},
            r"class_weight\['critic'\] is for a cross entropy, this head has a",
        ),
        ({"label_smoothing": {"critic": 0.1}}, r"label_smoothing\['critic'\] is for a cross entropy, this head has a"),
        ({"sample_weight": torch.ones(5, 2)}, r"sample_weight\['critic'\] must have shape \[5\], got \[5, 2\]"),
        ({"reduction": "all"}, "reduction must be 'mean', 'sum' or 'none', got 'all'"),
    ],
)
def test_what_it_does_not_take(device, options, message):
    heads = AdversarialHeads(4, {"critic": 2}, losses={"critic": hinge})
    with pytest.raises(ValueError, match=message):
        heads(torch.randn(5, 4), {"critic": torch.zeros(5)}, **options)
    with pytest.raises(ValueError, match=r"targets\['critic'\] must have shape \[5\], or more dimensions, got \[4\]"):
        heads(torch.randn(5, 4), {"critic": torch.zeros(4)})


def test_a_loss_is_a_name_or_a_function(device):
    with pytest.raises(ValueError, match=r"losses\['a'\] must be one of .* or a function, got 3"):
        AdversarialHeads(4, {"a": 2}, losses={"a": 3})


# --- reduction="none"
# ---------------------------------------------------------------------------------------------------------------------


def test_the_losses_of_rows_add_up_to_the_sum(device):
    sample = sample_heads(device, torch.float64, (2, 5), 7, (3, 1, 2, (4, 2)), kinds=("classes", "soft", "mse"))
    sample.targets[0][0, 0] = -100
    weight = [[w.detach() for w in own] for own in sample.weight]
    arguments = (sample.x, weight, sample.bias, sample.targets)
    options = {"lambda_": sample.lambda_, "losses": sample.losses, "sample_weight": torch.rand(2, 5)}
    rows, total = (heads_loss(*arguments, **options, reduction=reduction) for reduction in ("none", "sum"))
    assert [loss.shape for loss in rows.head_losses] == [(2, 5)] * 4
    assert rows.head_losses[0][0, 0] == 0
    torch.testing.assert_close([loss.sum() for loss in rows.head_losses], list(total.head_losses))
    grads = [torch.autograd.grad(loss, sample.x)[0] for loss in (rows.loss.sum(), total.loss)]
    torch.testing.assert_close(*grads)


def test_heads_with_other_rows_have_no_common_loss_of_rows(device):
    heads = AdversarialHeads(4, {"a": 2, "b": nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 2))})
    targets = {"a": torch.zeros(3, 5).long(), "b": torch.zeros(15).long()}
    heads(torch.randn(3, 5, 4), targets)  # their means may be added
    with pytest.raises(ValueError, match="reduction 'none' needs heads with the same rows"):
        heads(torch.randn(3, 5, 4), targets, reduction="none")


# --- for one call
# ---------------------------------------------------------------------------------------------------------------------


def features_gradient(heads, x, targets, **options):
    out = heads(x, targets, **options)
    loss = sum(z.sin().sum() for z in out.values()) if targets is None else out.loss
    return torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("with_targets", [True, False])
def test_lambda_for_one_call(device, with_targets):
    adversaries = {"a": 2, "b": [5, 2], "c": nn.Sequential(nn.Tanh(), nn.Linear(4, 2)), "d": nn.Bilinear}
    adversaries["d"] = nn.Sequential(nn.Tanh(), nn.Flatten(0, 0))
    heads = AdversarialHeads(4, {"p": 3}, adversaries, lambda_={"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4})
    x = torch.randn(6, 4, requires_grad=True)
    targets = dict.fromkeys(heads.head_names, torch.randint(2, (6,))) if with_targets else None
    before = {name: value.clone() for name, value in heads.lambda_.items()}
    for given in (0.7, torch.tensor(0.7), {"b": 2.0, "d": torch.tensor(0.0)}):
        ours = features_gradient(heads, x, targets, lambda_=given)
        assert heads.lambda_ == before
        heads.lambda_ = given
        torch.testing.assert_close(ours, features_gradient(heads, x, targets))
        heads.lambda_ = before


@pytest.mark.parametrize(
    "given, message",
    [
        ({"p": 1.0}, r"lambda_ names \['p'\], but the adversaries are \['a'\]"),
        (torch.nan, "lambda_ must be finite"),
        (torch.ones(6), r"lambda_ must be a number or a 0-d tensor, got shape \[6\]"),
        ({"a": "x"}, r"lambda_\['a'\] must be a real number"),
    ],
)
def test_a_wrong_lambda_for_one_call(device, given, message):
    heads = AdversarialHeads(4, {"p": 3}, {"a": 2})
    with pytest.raises((ValueError, TypeError), match=message):
        heads(torch.randn(6, 4), lambda_=given)


class Pooled(nn.Module):
    """The mean over a sequence's steps, as many as it has."""

    def __init__(self, features, size):
        super().__init__()
        self.linear = nn.Linear(features, size)

    def forward(self, x, lengths, condition=None):
        steps = torch.arange(x.shape[1]) < lengths[:, None]
        z = self.linear((x * steps[..., None]).sum(1) / lengths[:, None])
        return z if condition is None else z * condition["factor"]


def test_a_head_with_inputs_of_its_own(device):
    heads = AdversarialHeads(4, {"p": 3}, {"speaker": Pooled(4, 2), "domain": 2}, lambda_=0.5)
    x = torch.randn(6, 5, 4, requires_grad=True)
    lengths, factor = torch.randint(1, 6, (6,)), torch.rand(6, 1, requires_grad=True)
    inputs = {"speaker": {"lengths": lengths, "condition": {"factor": factor}}}
    logits = heads(x, inputs=inputs)
    torch.testing.assert_close(logits["speaker"], heads.adversaries["speaker"](x, **inputs["speaker"]))
    targets = {"speaker": torch.randint(2, (6,)), "domain": torch.randint(2, (6, 5))}
    out = heads(x, targets, inputs=inputs)
    seen = reversal(x, 0.5)
    speaker = heads.adversaries["speaker"](seen, lengths, {"factor": reversal(factor, 0.5)})
    expected = F.cross_entropy(speaker, targets["speaker"])
    expected = expected + F.cross_entropy(heads.adversaries["domain"](seen).flatten(0, 1), targets["domain"].flatten())
    torch.testing.assert_close(out.loss, expected)
    wanted = [x, factor, *heads.adversaries.parameters()]
    torch.testing.assert_close(torch.autograd.grad(out.loss, wanted), torch.autograd.grad(expected, wanted))


def test_the_tangents_of_inputs_are_reversed_too(device):
    heads = AdversarialHeads(4, {}, {"speaker": Pooled(4, 2)}, lambda_=0.5)
    x, lengths, factor = torch.randn(6, 5, 4), torch.randint(1, 6, (6,)), torch.rand(6, 1)

    def logits(factor):
        return heads(x, inputs={"speaker": {"lengths": lengths, "condition": {"factor": factor}}})["speaker"]

    _, tangent = torch.func.jvp(logits, (factor,), (torch.ones_like(factor),))
    torch.testing.assert_close(tangent, -0.5 * heads.adversaries["speaker"](x, lengths))


def test_inputs_go_by_name(device):
    heads = AdversarialHeads(4, {"p": 3}, {"speaker": Pooled(4, 2)})
    x = torch.randn(6, 5, 4)
    with pytest.raises(ValueError, match=r"inputs names \['domain'\], but the heads are \['p', 'speaker'\]"):
        heads(x, inputs={"domain": {"lengths": 3}})
    with pytest.raises(TypeError, match=r"inputs\['speaker'\] must be a mapping with keyword arguments"):
        heads(x, inputs={"speaker": torch.ones(6)})
    with pytest.raises(TypeError, match="inputs must be a mapping from head names to keyword arguments, got Tensor"):
        heads(x, inputs=torch.ones(6))


def test_a_reversal_of_ones_own_gets_the_lambda_of_the_call(device):
    class Watched(GRL):
        def forward(self, x, coeff=None):
            self.seen = coeff
            return super().forward(x, coeff)

    heads = AdversarialHeads(4, {}, {"a": 2})
    heads.reversals["a"] = Watched(0.3)
    heads(torch.randn(2, 4), lambda_=0.7)
    assert heads.reversals["a"].seen == 0.7


# --- one backward for each head
# ---------------------------------------------------------------------------------------------------------------------


def every_kind():
    torch.manual_seed(0)
    adversaries = {"domain": 2, "room": [5, 3], "site": nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))}
    return AdversarialHeads(4, {"digit": 3, "age": [6, 1]}, adversaries, lambda_=0.5, losses={"age": "mse"})


def batch():
    torch.manual_seed(1)
    classes = torch.randint(2, (6,))
    targets = {"digit": classes, "age": torch.randn(6), "domain": classes, "room": classes, "site": classes}
    return torch.randn(6, 4, requires_grad=True), targets


def test_each_loss_may_have_a_backward_of_its_own(device):
    heads, (x, targets) = every_kind(), batch()
    expected = torch.autograd.grad(heads(x, targets).loss, [x, *heads.parameters()])
    out = heads(x, targets)
    for loss in out.head_losses.values():
        loss.backward()
    torch.testing.assert_close([x.grad, *(p.grad for p in heads.parameters())], list(expected))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.head_losses["digit"].backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.loss.backward()


def test_each_logits_may_have_a_backward_of_its_own(device):
    heads, (x, _) = every_kind(), batch()
    expected = torch.autograd.grad(sum(z.sin().sum() for z in heads(x).values()), [x, *heads.parameters()])
    logits = heads(x)
    for z in logits.values():
        z.sin().sum().backward()
    torch.testing.assert_close([x.grad, *(p.grad for p in heads.parameters())], list(expected))


def test_a_second_backward_of_one_head_is_refused_as_of_a_layer(device):
    heads, (x, targets) = every_kind(), batch()
    out = heads(x, targets)
    out.head_losses["domain"].backward()
    for loss in (out.head_losses["domain"], out.loss, out.logits["domain"].sum()):
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
    out = heads(x, targets)
    out.head_losses["domain"].backward(retain_graph=True)
    out.head_losses["domain"].backward()
    out.head_losses["digit"].backward()


def test_gradients_for_each_task_at_shared_features(device):
    """What gradient surgery and Jacobian descent ask for: one gradient at the features for each loss."""
    heads, (x, targets) = every_kind(), batch()
    features = x.tanh()
    out = heads(features, targets)
    for name, loss in out.head_losses.items():
        (ours,) = torch.autograd.grad(loss, features)
        (expected,) = torch.autograd.grad(heads(features, {name: targets[name]}).loss, features)
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("leading", [(6,), (2, 3)], ids=str)
def test_logits_of_a_loss_may_be_changed_in_place(device, leading):
    """As those of heads(x)."""
    heads, (x, targets) = every_kind(), batch()
    x, targets = x.detach().view(*leading, 4).requires_grad_(), {k: t.view(leading) for k, t in targets.items()}
    mask = torch.rand(*leading, 1) > 0.5
    results = []
    for in_place in (True, False):
        out = heads(x, targets)
        parts = [out.loss, out.head_losses["digit"].square()]
        for z in out.logits.values():
            parts.append((z.masked_fill_(mask, -3.0) if in_place else z.masked_fill(mask, -3.0)).sin().sum())
        results.append(torch.autograd.grad(sum(parts), [x, *heads.parameters()]))
    assert_same(*results)


def test_a_gradient_penalty_on_an_adversary(device):
    """The gradient at the features is already times -lambda: the penalty is on the adversary's own."""
    heads = AdversarialHeads(4, {"digit": 3}, {"domain": [5, 2]}, lambda_=0.3)
    x, domain = torch.randn(6, 4, requires_grad=True), torch.randint(2, (6,))
    own = heads.adversaries["domain"](x)
    (expected,) = torch.autograd.grad(F.cross_entropy(own, domain), x, create_graph=True)
    loss = heads(x, {"domain": domain}, lambda_=-1.0).loss
    (ours,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(ours, expected)
    penalties = [grad.square().sum() for grad in (ours, expected)]
    wanted = list(heads.adversaries.parameters())
    grads = [torch.autograd.grad(penalty, wanted, allow_unused=True) for penalty in penalties]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a if a is not None else torch.zeros(()), b if b is not None else torch.zeros(()))
