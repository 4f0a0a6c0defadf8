"""What `heads_loss` is told of each head: targets, weights, smoothing, ignored rows, squared errors, sums."""

import pytest
import torch
import torch.nn.functional as F
from head_samples import SWITCH, WIDE, assert_near, check_loss, gradients, our_loss, sample_heads, sample_targets
from samples import assert_same

from grl_ext import heads_loss

pytestmark = [pytest.mark.core, pytest.mark.sanitized, pytest.mark.usefixtures("path")]

SIZES = [(3, 1, 2), (SWITCH, 1, 2), ((4, 3), 1, (5, 2))]
on_sizes = pytest.mark.parametrize("head_sizes", SIZES, ids=str)


def sample_of(device, head_sizes, kinds=("classes",), dtype=torch.float32):
    return sample_heads(device, dtype, (70,), 7, head_sizes, kinds=kinds)


def classes(sample, h):
    return max(2, sample.weight[h][-1].shape[0])


# --- against PyTorch's own functions, one call each
# ------------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["no class weight", "class weight"])
def test_the_loss_of_classes_is_f_cross_entropy(device, label_smoothing, reduction, weighted):
    sample = sample_heads(device, torch.float64, (70,), head_sizes=(4,))
    sample.targets[0][::5] = -1
    weight = torch.rand(4, dtype=torch.float64, device=device) if weighted else None
    z = F.linear(sample.x, sample.weight[0][0], sample.bias[0][0])
    options = {"label_smoothing": label_smoothing, "reduction": reduction, "ignore_index": -1}
    expected = F.cross_entropy(z, sample.targets[0], weight, **options)
    torch.testing.assert_close(our_loss(sample, class_weight=[weight], **options).loss, expected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True], ids=["no class weight", "class weight"])
def test_the_loss_of_probabilities_is_f_cross_entropy(device, label_smoothing, weighted):
    sample = sample_heads(device, torch.float64, (70,), head_sizes=(4,), kinds=("soft",))
    weight = torch.rand(4, dtype=torch.float64, device=device) if weighted else None
    z = F.linear(sample.x, sample.weight[0][0], sample.bias[0][0])
    target = sample.targets[0].double()
    for reduction in ("mean", "sum"):
        expected = F.cross_entropy(z, target, weight, label_smoothing=label_smoothing, reduction=reduction)
        ours = our_loss(sample, class_weight=[weight], label_smoothing=label_smoothing, reduction=reduction)
        torch.testing.assert_close(ours.loss, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_of_one_logit_is_the_binary_cross_entropy(device, reduction):
    sample = sample_heads(device, torch.float64, (70,), head_sizes=(1,), kinds=("soft",))
    z = F.linear(sample.x, sample.weight[0][0], sample.bias[0][0])
    expected = F.binary_cross_entropy_with_logits(z, sample.targets[0].double(), reduction=reduction)
    torch.testing.assert_close(our_loss(sample, reduction=reduction).loss, expected)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_squared_error_is_f_mse_loss(device, size, reduction):
    sample = sample_heads(device, torch.float64, (70,), head_sizes=(size,), kinds=("mse",))
    z = F.linear(sample.x, sample.weight[0][0], sample.bias[0][0])
    expected = F.mse_loss(z, sample.targets[0].double(), reduction=reduction)
    torch.testing.assert_close(our_loss(sample, reduction=reduction).loss, expected)


def test_one_binary_logit_is_the_softmax_over_zero_and_it(device):
    sample = sample_heads(device, torch.float64, (70,), head_sizes=(1,))
    z = F.linear(sample.x, sample.weight[0][0], sample.bias[0][0])
    weight = torch.tensor([0.5, 2.0], dtype=torch.float64, device=device)
    expected = F.cross_entropy(torch.cat([torch.zeros_like(z), z], 1), sample.targets[0], weight, label_smoothing=0.2)
    torch.testing.assert_close(our_loss(sample, class_weight=[weight], label_smoothing=0.2).loss, expected)


# --- targets
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(6,), (2, 3), (), (0,)], ids=str)
@pytest.mark.parametrize("kind", ["classes", "soft", "mse"])
def test_a_head_of_size_one_takes_targets_with_and_without_its_dimension(device, leading, kind):
    for head_sizes in ((1,), ((4, 1),)):
        sample = sample_heads(device, leading=leading, head_sizes=head_sizes, kinds=(kind,))
        target = sample.targets[0] if kind == "classes" else sample.targets[0][..., 0]
        results = [our_loss(sample._replace(targets=[t])) for t in (target, target[..., None])]
        assert_same(results[0].loss, results[1].loss)
        for a, b in zip(*(gradients(result.loss, sample.inputs) for result in results), strict=True):
            assert_same(a, b)


def test_classes_as_certain_probabilities_are_the_classes(device):
    for size in (1, 3, SWITCH + 1):
        sample = sample_heads(device, leading=(70,), head_sizes=(size,))
        target = sample.targets[0]
        certain = target.float() if size == 1 else F.one_hot(target, size).float()
        for options in ({}, {"label_smoothing": 0.2}, {"sample_weight": torch.rand(70, device=device)}):
            a, b = our_loss(sample, **options), our_loss(sample._replace(targets=[certain]), **options)
            torch.testing.assert_close(a.loss, b.loss)
            for p, q in zip(gradients(a.loss, sample.inputs), gradients(b.loss, sample.inputs), strict=True):
                torch.testing.assert_close(p, q)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["soft", "mse"])
@pytest.mark.parametrize("head_sizes", [(3, 1), ((4, 3), 1)], ids=str)
def test_targets_and_weights_may_have_any_floating_dtype(device, dtype, kind, head_sizes):
    sample = sample_of(device, head_sizes, (kind,))
    rounded = [t.to(dtype) for t in sample.targets]
    rows = torch.rand(70, device=device).to(dtype)
    weight = None if kind == "mse" else [torch.rand(3, device=device).to(dtype), None]
    check_loss(sample._replace(targets=rounded), sample_weight=rows, class_weight=weight)
    double = sample.map(torch.Tensor.double)._replace(targets=rounded)
    check_loss(double, sample_weight=rows, class_weight=weight)


def test_uniform_probabilities_pull_towards_a_head_that_cannot_tell(device):
    sample = sample_heads(device, torch.float64, (70,), head_sizes=(4,))
    sample = sample._replace(targets=[torch.full((70, 4), 0.25, device=device)], lambda_=[None])
    result = our_loss(sample)
    dz = torch.autograd.grad(
        F.cross_entropy(result.logits[0], torch.full((70, 4), 0.25, dtype=torch.float64, device=device)),
        result.logits[0],
    )[0]
    torch.testing.assert_close(torch.autograd.grad(our_loss(sample).loss, sample.bias[0][0])[0], dz.sum(0))
    torch.testing.assert_close(dz, (result.logits[0].detach().softmax(1) - 0.25) / 70)


# --- rows without a label, and weights of rows
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 255])
@on_sizes
def test_an_ignored_row_counts_in_no_head_but_where_it_has_a_label(device, ignore_index, head_sizes):
    sample = sample_of(device, head_sizes)
    ignored = torch.rand(70, 3) < 0.4
    ignored[5] = True
    for h, target in enumerate(sample.targets):
        target[ignored[:, h].to(device)] = ignore_index
    check_loss(sample, ignore_index=ignore_index)
    dx = torch.autograd.grad(our_loss(sample, ignore_index=ignore_index).loss, sample.x)[0]
    assert_same(dx[5], torch.zeros(7, device=device))


@on_sizes
def test_the_ignored_index_may_be_each_heads_own(device, head_sizes):
    sample = sample_of(device, head_sizes)
    for target, ignored in zip(sample.targets, (-1, 1, 0), strict=True):
        target[::3] = ignored
    check_loss(sample, ignore_index=[-1, 1, 0])


@on_sizes
@pytest.mark.parametrize("kinds", [("classes",), ("soft",), ("mse",), ("mse", "soft", "classes")], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sample_weights_weigh_the_rows(device, head_sizes, kinds, reduction):
    sample = sample_of(device, head_sizes, kinds)
    rows = torch.rand(70, device=device) * 3
    rows[::4] = 0
    check_loss(sample, sample_weight=rows, reduction=reduction)
    check_loss(sample, sample_weight=[rows, None, rows.flip(0)], reduction=reduction)


@on_sizes
@pytest.mark.parametrize("kinds", [("classes",), ("soft",), ("mse",)], ids=str)
def test_a_weight_of_zero_is_a_row_without_a_label(device, head_sizes, kinds):
    sample = sample_of(device, head_sizes, kinds)
    rows = (torch.rand(70, device=device) > 0.4).float()
    keep = rows.bool()
    weighted = our_loss(sample, sample_weight=rows)
    fewer = sample._replace(x=sample.x[keep], targets=[t[keep] for t in sample.targets])
    torch.testing.assert_close(weighted.loss, our_loss(fewer).loss)
    dx = torch.autograd.grad(weighted.loss, sample.x)[0]
    assert not dx[~keep].any() and dx[keep].any()
    if kinds == ("classes",):
        ignored = sample._replace(targets=[t.masked_fill(~keep, -100) for t in sample.targets])
        assert_near(our_loss(ignored).loss.detach(), weighted.loss.detach().double(), torch.float32)


def test_weights_that_count_rows_are_rows_given_several_times(device):
    # The definition of the weighted mean: a weight of 3 is the row three times.
    sample = sample_heads(device, torch.float64, (20,), head_sizes=(3, 1, 2), kinds=("classes", "soft", "mse"))
    times = torch.randint(0, 4, (20,), device=device)
    for reduction in ("mean", "sum"):
        targets = [t.repeat_interleave(times, 0) for t in sample.targets]
        repeated = sample._replace(x=sample.x.repeat_interleave(times, 0), targets=targets)
        a, b = (
            our_loss(sample, sample_weight=times.double(), reduction=reduction),
            our_loss(repeated, reduction=reduction),
        )
        torch.testing.assert_close(a.head_losses, b.head_losses)
        for p, q in zip(gradients(a.loss, sample.inputs), gradients(b.loss, sample.inputs), strict=True):
            torch.testing.assert_close(p, q)


@on_sizes
@pytest.mark.parametrize("kinds", [("classes",), ("soft",), ("mse",)], ids=str)
@pytest.mark.parametrize("how", ["sample_weight", "sample_weight, sum", "ignored", "class_weight"])
def test_a_head_without_a_weight_has_no_loss_and_no_gradient(device, head_sizes, kinds, how):
    if how in ("ignored", "class_weight") and kinds != ("classes",):
        pytest.skip("a rule for classes")
    sample = sample_of(device, head_sizes, kinds)
    for h in range(3):
        options = {"reduction": "sum"} if "sum" in how else {}
        own = sample
        if how == "ignored":
            own = sample._replace(
                targets=[t.clone().fill_(-100) if i == h else t for i, t in enumerate(sample.targets)]
            )
        elif how == "class_weight":
            options["class_weight"] = [
                torch.zeros(classes(sample, h), device=device) if i == h else None for i in range(3)
            ]
        else:
            options["sample_weight"] = [torch.zeros(70, device=device) if i == h else None for i in range(3)]
        result = our_loss(own, **options)
        assert result.head_losses[h] == 0
        parameters = [*own.weight[h], *own.bias[h]]
        for t, gradient in zip(
            parameters, torch.autograd.grad(result.loss, parameters, retain_graph=True), strict=True
        ):
            assert_same(gradient, torch.zeros_like(t))
        check_loss(own, **options)


def test_nothing_that_counts_at_all_gives_zeros(device):
    for options in ({"sample_weight": torch.zeros(70, device=device)}, {"ignore_index": 0}):
        sample = sample_of(device, (3, 2))
        for target in sample.targets:
            target.zero_()
        result = our_loss(sample, **options)
        assert result.loss == 0
        for t, gradient in zip(sample.inputs, torch.autograd.grad(result.loss, sample.inputs), strict=True):
            assert_same(gradient, torch.zeros_like(t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("head_sizes", [(3, 1), WIDE], ids=str)  # an infinite hidden layer gives NaN in every network
@pytest.mark.parametrize("kind", ["classes", "soft", "mse"])
@pytest.mark.parametrize("asked", ["loss", "all", "twice"])
def test_a_row_of_weight_zero_takes_no_part_though_its_logits_and_targets_are_nan(
    device, dtype, head_sizes, kind, asked
):
    sample = sample_of(device, head_sizes, (kind,), dtype)
    weight = torch.ones(70, device=device)
    weight[3] = 0
    sample.x.data[3] = torch.finfo(dtype).max  # finite, with logits that are not
    targets = [t if kind == "classes" else t.clone() for t in sample.targets]
    for h, t in enumerate(targets):
        if kind != "classes":
            t[3] = float("nan")
        for w in sample.weight[h]:
            w.data[:, 0], w.data[:, 1] = 2, -2
    sample = sample._replace(targets=targets)
    clean = our_loss(
        sample._replace(x=sample.x[torch.arange(70) != 3], targets=[t[torch.arange(70) != 3] for t in targets])
    )
    result = our_loss(sample, sample_weight=weight)
    assert not all(z[3].isfinite().all() for z in result.logits), "or the test tests nothing"
    torch.testing.assert_close(result.loss, clean.loss)
    if asked == "loss":
        ours = gradients(result.loss, sample.inputs)
    elif asked == "all":
        ours = gradients(result.loss * 0.5 + 0.5 * sum(result.head_losses), sample.inputs)
    else:
        ours = [g.detach() for g in torch.autograd.grad(result.loss, sample.inputs, create_graph=True)]
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 5e-2}.get(
        dtype, 1e-4
    )  # rounded at other places where asked otherwise
    for a, b in zip(ours, gradients(clean.loss, sample.inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1e-3, b.abs().max().item()))


def test_an_ignored_row_takes_no_part_though_its_logits_are_nan(device):
    for head_sizes in ((3, 2), WIDE):
        sample = sample_of(device, head_sizes)
        sample.x.data[3, 2] = float("nan")
        sample.targets[1][3] = -100
        first, second = our_loss(sample).head_losses
        assert first.isnan() and second.isfinite()


# --- weights of classes, of heads; smoothing
# -------------------------------------------------------------------------------


@on_sizes
@pytest.mark.parametrize("kinds", [("classes",), ("soft",), ("classes", "mse", "soft")], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_class_weights_weigh_the_classes(device, head_sizes, kinds, label_smoothing, reduction):
    sample = sample_of(device, head_sizes, kinds)
    soft = sample.targets[0]
    sample.targets[0][::3] = -100 if kinds[0] == "classes" else 0.3 if soft.shape[-1] == 1 else 1 / soft.shape[-1]
    weights = [
        None if kinds[h % len(kinds)] == "mse" else torch.rand(classes(sample, h), device=device) for h in range(3)
    ]
    rows = torch.rand(70, device=device)
    for options in ({}, {"sample_weight": rows}, {"sample_weight": [None, rows, None]}):
        check_loss(sample, class_weight=weights, label_smoothing=label_smoothing, reduction=reduction, **options)


NOT_FINITE = pytest.mark.parametrize("odd", [float("inf"), float("-inf"), float("nan")], ids=str)
ASKED = pytest.mark.parametrize("asked", ["loss", "all", "twice"])


def gradients_of(result, inputs, asked):
    """By the forward's gradients, by the kernel in the backward, and by differentiable operators."""
    if asked == "loss":
        return gradients(result.loss, inputs)
    if asked == "all":
        return gradients(result.loss * 0.5 + 0.5 * sum(result.head_losses), inputs)
    return [g.detach() for g in torch.autograd.grad(result.loss, inputs, create_graph=True)]


def assert_the_same_loss(ours, expected, inputs, asked):
    torch.testing.assert_close(ours.loss, expected.loss)
    assert expected.loss.isfinite(), "or the test tests nothing"
    a, b = (gradients_of(result, inputs, asked) for result in (ours, expected))
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q)


@NOT_FINITE
@ASKED
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("head_sizes", [(3, 1), (SWITCH + 1, 1), ((4, 3), 1)], ids=str)
def test_the_weight_of_a_class_that_no_row_has_does_not_count(device, head_sizes, odd, asked, reduction):
    sample = sample_of(device, head_sizes)
    for target in sample.targets:
        target.copy_(torch.where(target == 0, 1, target))
        target[::7] = -100
    plain = [torch.rand(classes(sample, h), device=device) + 0.5 for h in range(2)]
    unread = [torch.cat([torch.full_like(weight[:1], odd), weight[1:]]) for weight in plain]
    rows = torch.rand(70, device=device)
    rows[::4] = 0
    for options in ({}, {"sample_weight": rows}):
        ours, expected = (our_loss(sample, class_weight=w, reduction=reduction, **options) for w in (unread, plain))
        assert_the_same_loss(ours, expected, sample.inputs, asked)


@NOT_FINITE
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_weight_of_a_class_that_no_row_has_is_as_in_f_cross_entropy(device, odd, reduction):
    sample = sample_heads(device, torch.float64, (70,), head_sizes=(4,))
    sample.targets[0].clamp_(min=1)
    weight = torch.tensor([odd, 0.5, 2.0, 1.0], dtype=torch.float64, device=device)
    inputs = [sample.x, sample.weight[0][0], sample.bias[0][0]]
    expected = F.cross_entropy(F.linear(*inputs), sample.targets[0], weight, reduction=reduction)
    ours = our_loss(sample._replace(lambda_=[None]), class_weight=[weight], reduction=reduction).loss
    torch.testing.assert_close(ours, expected)
    for a, b in zip(*(torch.autograd.grad(loss, inputs) for loss in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b)


@NOT_FINITE
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_the_weight_of_a_class_that_is_wanted_counts_as_in_f_cross_entropy(device, odd, reduction, label_smoothing):
    """Smoothing wants every class: the loss of F.cross_entropy is not finite then, and neither is ours."""
    sample = sample_heads(device, torch.float64, (70,), head_sizes=(4,))
    sample.targets[0].clamp_(min=0 if label_smoothing == 0 else 1)
    assert label_smoothing or (sample.targets[0] == 0).any()
    weight = torch.tensor([odd, 0.5, 2.0, 1.0], dtype=torch.float64, device=device)
    z = F.linear(sample.x, sample.weight[0][0], sample.bias[0][0])
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    expected = F.cross_entropy(z, sample.targets[0], weight, **options)
    ours = our_loss(sample, class_weight=[weight], **options).loss
    assert not expected.isfinite()
    torch.testing.assert_close(ours, expected, equal_nan=True)


@NOT_FINITE
@ASKED
@pytest.mark.parametrize("head_sizes", [(3, 1), (SWITCH + 1, 1), ((4, 3), 1)], ids=str)
def test_the_weight_of_a_class_of_probability_zero_does_not_count(device, head_sizes, odd, asked):
    sample = sample_of(device, head_sizes, ("soft",))
    for h, target in enumerate(sample.targets):
        if classes(sample, h) > 2:
            target[:, 0] = 0
            target /= target.sum(1, keepdim=True)
        else:
            target.fill_(1)  # of class 1: class 0 has none
    plain = [torch.rand(classes(sample, h), device=device) + 0.5 for h in range(2)]
    unread = [torch.cat([torch.full_like(weight[:1], odd), weight[1:]]) for weight in plain]
    ours, expected = (our_loss(sample, class_weight=w) for w in (unread, plain))
    assert_the_same_loss(ours, expected, sample.inputs, asked)


@NOT_FINITE
@ASKED
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("how", ["ignored", "sample_weight"])
def test_the_weight_of_a_class_that_only_rows_without_weight_have_does_not_count(
    device, odd, asked, label_smoothing, how
):
    """Whether it is the class of the ignored row, or the class that stands in for its label."""
    sample = sample_of(device, (3, 1))
    rows = torch.ones(70, device=device)
    rows[3] = 0
    for target in sample.targets:
        target.copy_(torch.where(target == 0, 1, target))
        target[3] = -100 if how == "ignored" else 0
    given = {"label_smoothing": label_smoothing} | ({"sample_weight": rows} if how == "sample_weight" else {})
    plain = [torch.rand(classes(sample, h), device=device) + 0.5 for h in range(2)]
    unread = [torch.cat([torch.full_like(weight[:1], odd), weight[1:]]) for weight in plain]
    if label_smoothing == 0:
        ours, expected = (our_loss(sample, class_weight=w, **given) for w in (unread, plain))
        assert_the_same_loss(ours, expected, sample.inputs, asked)
    else:  # every row that counts wants the class; the row without weight still has no gradient
        dx = gradients_of(our_loss(sample, class_weight=unread, **given), sample.inputs, asked)[0]
        assert not dx[3].any() and not dx[4].isfinite().all()


@ASKED
@pytest.mark.parametrize("head_sizes", [(3, 1), WIDE], ids=str)
def test_a_head_whose_weights_sum_to_zero_has_no_loss_though_its_logits_are_nan(device, head_sizes, asked):
    sample = sample_of(device, head_sizes)
    for h in range(2):
        weight = [torch.zeros(classes(sample, i), device=device) if i == h else None for i in range(2)]
        sample.weight[h][-1].data[0] = float("nan")
        result = our_loss(sample._replace(lambda_=[None, None]), class_weight=weight)
        assert result.logits[h].isnan().any(), "or the test tests nothing"
        assert result.head_losses[h] == 0
        parameters = [*sample.weight[h], *sample.bias[h]]
        for t, gradient in zip(parameters, gradients_of(result, parameters, asked), strict=True):
            assert_same(gradient, torch.zeros_like(t))
        sample.weight[h][-1].data[0] = 0


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5, 1.0, [0.0, 0.3, 1.0]], ids=str)
@on_sizes
@pytest.mark.parametrize("kind", ["classes", "soft"])
def test_label_smoothing_is_that_of_f_cross_entropy(device, label_smoothing, head_sizes, kind):
    sample = sample_of(device, head_sizes, (kind,))
    if kind == "classes":
        sample.targets[0][::3] = -100
    check_loss(sample, label_smoothing=label_smoothing)


def test_label_smoothing_for_all_is_for_all_that_have_one(device):
    sample = sample_of(device, (3, 2), ("classes", "mse"))
    smoothed, plain = our_loss(sample, label_smoothing=0.2), our_loss(sample)
    assert_same(smoothed.head_losses[1], plain.head_losses[1])
    assert smoothed.head_losses[0] != plain.head_losses[0]


FORMS = {
    "list": lambda v: v,
    "tuple": tuple,
    "float32": torch.tensor,
    "float64": lambda v: torch.tensor(v, dtype=torch.float64),
    "0-d tensors": lambda v: [torch.tensor(value) for value in v],
}


@pytest.mark.parametrize("form", FORMS)
@on_sizes
def test_loss_weights_weigh_the_heads(device, form, head_sizes):
    sample = sample_of(device, head_sizes, ("classes", "soft", "mse"))
    check_loss(sample, loss_weight=FORMS[form]([0.5, 0.0, 2.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool], ids=str)
@on_sizes
def test_loss_weights_may_be_a_tensor_of_any_real_dtype(device, dtype, head_sizes):
    weights = torch.tensor([1, 0, 1], dtype=dtype, device=device)
    check_loss(sample_of(device, head_sizes), loss_weight=weights)


def test_one_loss_weight_is_for_all_heads(device):
    sample = sample_of(device, (3, 2))
    for value in (0.5, 0, 2):
        weighed, plain = our_loss(sample, loss_weight=value), our_loss(sample)
        torch.testing.assert_close(weighed.loss, value * plain.loss)
        torch.testing.assert_close(weighed.head_losses, plain.head_losses)


def test_head_losses_are_those_before_their_weight(device):
    sample = sample_of(device, (3, 2))
    torch.testing.assert_close(our_loss(sample, loss_weight=[0.25, 4.0]).head_losses, our_loss(sample).head_losses)


@on_sizes
def test_the_sum_is_the_mean_without_its_divisor(device, head_sizes):
    sample = sample_of(device, head_sizes, ("classes", "soft", "mse"))
    rows = torch.rand(70, device=device)
    check_loss(sample, reduction="sum", sample_weight=rows, loss_weight=[0.5, 1.0, 2.0])
    mean, total = our_loss(sample, sample_weight=rows), our_loss(sample, sample_weight=rows, reduction="sum")
    last = sample.weight[2][-1].shape[0]
    for h, size in enumerate((1, 1, last)):
        torch.testing.assert_close(total.head_losses[h], mean.head_losses[h] * rows.sum() * size)


def test_every_option_for_all_is_the_option_for_each(device):
    sample = sample_of(device, (3, 1, 2))
    rows = torch.rand(70, device=device)
    one = our_loss(sample, sample_weight=rows, label_smoothing=0.1, ignore_index=1, loss_weight=2)
    each = our_loss(
        sample, sample_weight=[rows] * 3, label_smoothing=[0.1] * 3, ignore_index=(1, 1, 1), loss_weight=[2, 2, 2]
    )
    assert_same(one.loss, each.loss)


def test_targets_of_one_kind_do_not_change_with_the_others(device):
    """Heads that stand side by side in one pass do not see each other's description."""
    sample = sample_of(device, (3, 2, 4), ("classes", "soft", "mse"))
    rows = torch.rand(70, device=device)
    options = {
        "sample_weight": [rows, None, None],
        "class_weight": [None, torch.rand(2, device=device), None],
        "label_smoothing": [0, 0.2, 0],
    }
    together = our_loss(sample, **options)
    for h in range(3):
        own = {name: [values[h]] for name, values in options.items()}
        torch.testing.assert_close(our_loss(sample.head(h), **own).loss, together.head_losses[h])


def test_sample_targets_have_the_shapes_that_are_promised(device):
    assert sample_targets("soft", (4,), 3, device).sum(1).allclose(torch.ones(4, device=device))


def test_weights_of_a_subclass_count_as_plain_ones(path):
    class Rows(torch.Tensor):
        pass

    x, weight = torch.randn(4, 3, requires_grad=True), [torch.randn(2, 3), torch.randn(2, 3)]
    targets, rows, classes = [torch.tensor([0, 1, 0, 1])] * 2, torch.rand(4), torch.rand(2)
    found = []
    for kind in (torch.Tensor, Rows):
        weights = {"sample_weight": rows.as_subclass(kind), "class_weight": [classes.as_subclass(kind), None]}
        loss = heads_loss(x, weight, None, targets, lambda_=[None, 0.3], **weights).loss
        found.append([torch.Tensor(t.detach()) for t in (loss, *torch.autograd.grad(loss, x))])
    torch.testing.assert_close(*found)
