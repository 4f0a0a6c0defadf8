"""`heads_cross_entropy`: loss, head losses, logits and gradients of a network with a reversal, a layer and a loss for each head."""

import math

import pytest
import torch
import torch.nn.functional as F
from head_samples import (
    DTYPES,
    HEAD_SIZES,
    SHAPES,
    SWITCH,
    assert_near,
    check_network,
    naive_head_losses,
    naive_heads,
    naive_loss,
    sample_heads,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import assert_same, case
from torch.profiler import ProfilerActivity, profile

from grl_ext import heads_cross_entropy

pytestmark = pytest.mark.usefixtures("path")

WIDE = (SWITCH, 2)


def check(sample, **options):
    """The loss and its gradients, the head losses and the logits, against the layers in float64."""
    x, weight, bias, targets, head_sizes, grad_scale = sample
    check_network(
        lambda *t: heads_cross_entropy(*t, targets, head_sizes, grad_scale, **options).loss,
        lambda *t: naive_loss(*t, targets, head_sizes, grad_scale, **options),
        x,
        weight,
        bias,
    )
    output = heads_cross_entropy(*sample, **options)
    logits = naive_heads(*(t if t is None else t.detach().double() for t in sample.inputs), head_sizes, grad_scale)
    options.pop("loss_weight", None)
    losses = naive_head_losses(logits, targets, head_sizes, **options)
    assert output.loss.dtype == output.head_losses.dtype == torch.promote_types(x.dtype, torch.float32)
    assert output.logits.dtype == x.dtype
    assert not output.head_losses.requires_grad and not output.logits.requires_grad
    assert_near(output.logits, logits, x.dtype)
    assert_near(output.head_losses, losses, x.dtype)


@pytest.mark.parametrize("head_sizes", HEAD_SIZES, ids=str)
def test_equals_the_layers_in_every_shape(device, head_sizes):
    for rows, features in SHAPES:
        with case(rows, features):
            check(sample_heads(device, leading=(rows,), features=features, head_sizes=head_sizes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_sizes", [(10, 2), (1,), (SWITCH - 1, 2)], ids=str)
def test_equals_the_layers_in_every_dtype(device, dtype, head_sizes):
    for rows, bias in [(5, False), (130, True)]:
        with case(rows, "bias" if bias else "no bias"):
            check(sample_heads(device, dtype, (rows,), 129, head_sizes, bias))


@settings(max_examples=30)
@given(
    rows=st.integers(0, 150),
    features=st.integers(1, 40),
    head_sizes=st.lists(st.sampled_from([1, 2, 3, 7, 30]), min_size=1, max_size=6),
    dtype=st.sampled_from(DTYPES),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    ignored=st.floats(0, 1),
)
def test_equals_the_layers_for_any_sizes_and_targets(device, rows, features, head_sizes, dtype, label_smoothing, ignored):
    sample = sample_heads(device, dtype, (rows,), features, head_sizes)
    sample.targets[torch.rand(sample.targets.shape) < ignored] = -100
    check(sample, label_smoothing=label_smoothing)


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (2, 0, 3), (2, 1, 3, 4)], ids=str)
@pytest.mark.parametrize("features", [7, 0])
def test_x_may_have_any_leading_sizes_and_no_features(device, leading, features):
    check(sample_heads(device, leading=leading, features=features))


@pytest.mark.parametrize("layout", ["transposed", "strided", "rows apart", "expanded"])
@pytest.mark.parametrize("head_sizes", [(3, 2), WIDE], ids=str)
def test_inputs_may_lie_in_memory_in_any_way(device, layout, head_sizes):
    lay = {
        "transposed": lambda t: t.T.contiguous().T,
        "strided": lambda t: torch.stack([t, t], -1)[..., 0],
        "rows apart": lambda t: torch.cat([t, t], -1)[:, : t.shape[1]],
        "expanded": lambda t: t[:1].expand_as(t),
    }[layout]
    sample = sample_heads(device, leading=(70,), features=9, head_sizes=head_sizes)
    x, weight = (lay(t.detach()).requires_grad_() for t in (sample.x, sample.weight))
    bias = sample.bias.detach().repeat_interleave(2)[::2].requires_grad_()
    check(sample._replace(x=x, weight=weight, bias=bias, targets=lay(sample.targets)))


def test_no_rows_give_a_loss_of_zero_and_gradients_of_zero(device):
    for head_sizes in ((3, 2), WIDE):
        sample = sample_heads(device, leading=(0,), head_sizes=head_sizes)
        output = heads_cross_entropy(*sample)
        assert_same(output.loss.detach(), torch.zeros((), device=device))
        for t, gradient in zip(sample.inputs, torch.autograd.grad(output.loss, sample.inputs), strict=True):
            assert_same(gradient, torch.zeros_like(t))


# --- targets ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 255])
@pytest.mark.parametrize("head_sizes", [(3, 1, 2), (SWITCH, 1, 2)], ids=str)
def test_an_ignored_entry_counts_in_no_head_but_its_own_is_spared(device, ignore_index, head_sizes):
    sample = sample_heads(device, leading=(70,), head_sizes=head_sizes)
    ignored = torch.rand(70, 3) < 0.4
    ignored[5] = True
    sample.targets[ignored] = ignore_index
    check(sample, ignore_index=ignore_index)
    output = heads_cross_entropy(*sample, ignore_index=ignore_index)
    assert_same(torch.autograd.grad(output.loss, sample.x)[0][5], torch.zeros(7, device=device))


@pytest.mark.parametrize("head_sizes", [(3, 1, 2), (SWITCH, 1, 2)], ids=str)
@pytest.mark.parametrize("head", [0, 1, 2])
def test_a_head_without_a_valid_row_has_no_loss_and_no_gradient(device, head_sizes, head):
    sample = sample_heads(device, leading=(70,), head_sizes=head_sizes)
    sample.targets[:, head] = -100
    check(sample, label_smoothing=0.1)
    output = heads_cross_entropy(*sample)
    assert output.head_losses[head] == 0
    for gradient in torch.autograd.grad(output.loss, [sample.weight, sample.bias]):
        assert not gradient.split(head_sizes)[head].any()


def test_all_heads_without_a_valid_row_give_zeros(device):
    sample = sample_heads(device)
    sample.targets.fill_(-100)
    output = heads_cross_entropy(*sample)
    assert output.loss == 0
    for t, gradient in zip(sample.inputs, torch.autograd.grad(output.loss, sample.inputs), strict=True):
        assert_same(gradient, torch.zeros_like(t))


@pytest.mark.parametrize("head_sizes", [(3, 1), (SWITCH, 1)], ids=str)
@pytest.mark.parametrize("head, target, classes", [(0, None, None), (0, -1, None), (1, 2, 2), (1, -1, 2), (1, 2**40, 2)])
def test_a_target_that_is_no_class_is_refused(path, device, head_sizes, head, target, classes):
    if device.type != "cpu":
        pytest.skip("looking at the targets would be a synchronisation")
    sample = sample_heads(device, head_sizes=head_sizes)
    target, classes = head_sizes[0] if target is None else target, classes or head_sizes[0]
    sample.targets[3, head] = target
    with pytest.raises(IndexError) as caught:
        heads_cross_entropy(*sample)
    assert str(caught.value) == f"targets of head {head} must be in [0, {classes}) or ignore_index (-100), got {target}"


def test_of_several_wrong_targets_the_first_row_is_reported(path, device):
    if device.type != "cpu":
        pytest.skip("looking at the targets would be a synchronisation")
    sample = sample_heads(device)
    sample.targets[3, 0], sample.targets[1, 1] = 7, 9
    with pytest.raises(IndexError, match=r"head 1 .* got 9"):
        heads_cross_entropy(*sample)


# --- options ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("head_sizes", [(3,), (1,), (2, 10, 1), (SWITCH, 1)], ids=str)
def test_label_smoothing_is_that_of_f_cross_entropy(device, label_smoothing, head_sizes):
    sample = sample_heads(device, leading=(70,), head_sizes=head_sizes)
    sample.targets[::3] = -100
    check(sample, label_smoothing=label_smoothing)


def test_label_smoothing_of_a_binary_head_is_that_of_its_two_classes(device):
    sample = sample_heads(device, torch.float64, head_sizes=(1,))
    z = F.linear(*sample.inputs).detach()
    two = F.cross_entropy(torch.cat([torch.zeros_like(z), z], 1), sample.targets[:, 0], label_smoothing=0.2)
    torch.testing.assert_close(heads_cross_entropy(*sample, label_smoothing=0.2).loss.detach(), two)


@pytest.mark.parametrize("form", [list, tuple, torch.tensor, lambda v: torch.tensor(v, dtype=torch.float64)], ids=["list", "tuple", "float32", "float64"])
@pytest.mark.parametrize("head_sizes", [(3, 2, 1), (SWITCH, 2, 1)], ids=str)
def test_loss_weights_weigh_the_heads(device, form, head_sizes):
    sample = sample_heads(device, leading=(70,), head_sizes=head_sizes)
    check(sample, loss_weight=form([0.5, 0.0, 2.0]))
    on_device = torch.tensor([0.5, 0.0, 2.0], device=device)
    check(sample, loss_weight=on_device)


def test_no_gradient_reaches_scales_and_loss_weights(device):
    sample = sample_heads(device)
    scale, loss_weight = (torch.tensor([1.0, 0.5], device=device, requires_grad=True) for _ in range(2))
    heads_cross_entropy(*sample.inputs, sample.targets, sample.head_sizes, scale, loss_weight=loss_weight).loss.backward()
    assert scale.grad is None and loss_weight.grad is None
    frozen = [t.detach() for t in sample.inputs]
    assert not heads_cross_entropy(*frozen, sample.targets, sample.head_sizes, scale, loss_weight=loss_weight).loss.requires_grad


@pytest.mark.parametrize("head_sizes", [(3, 2), WIDE], ids=str)
def test_a_head_of_scale_zero_gives_the_features_nothing_even_of_infinite_logits(device, head_sizes):
    sample = sample_heads(device, head_sizes=head_sizes)._replace(grad_scale=[1.0, 0.0])
    sample.bias.data[-1] = math.inf
    dx, db = torch.autograd.grad(heads_cross_entropy(*sample).loss, [sample.x, sample.bias])
    alone = sample_heads(device, head_sizes=head_sizes[:1])._replace(
        x=sample.x, weight=sample.weight[:-2], bias=sample.bias[:-2], targets=sample.targets[:, :1]
    )
    torch.testing.assert_close(dx, torch.autograd.grad(heads_cross_entropy(*alone).loss, sample.x)[0])
    assert db[-1].isnan(), "the head's own gradient is not scaled"


# --- numbers out of the ordinary -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_sizes", [(3, 1), (SWITCH, 1)], ids=str)
def test_large_logits_are_as_stable_as_pytorchs(device, size, dtype, head_sizes):
    # Logits of exact integers, so that all precisions see the same ones.
    sample = sample_heads(device, dtype, (70,), 1, head_sizes)
    sample.x.data.copy_(torch.randn(70, 1).sign())
    sample.weight.data.copy_((sample.weight * size).bfloat16().round())
    sample.bias.data.zero_()
    check(sample)


@pytest.mark.parametrize("classes", [3, SWITCH + 1, 300, 70000])
def test_uniform_logits_of_many_classes_cost_the_logarithm_of_their_number(device, classes):
    targets = torch.zeros(64, 1, dtype=torch.int64, device=device)
    x, weight = torch.randn(64, 1, device=device), torch.zeros(classes, 1, device=device)
    assert heads_cross_entropy(x, weight, None, targets, [classes], [1.0]).loss.item() == pytest.approx(math.log(classes), rel=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("head_sizes", [(3, 2), WIDE], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_nan_or_infinity_in_the_features_shows_in_the_loss(device, bad, head_sizes, label_smoothing):
    sample = sample_heads(device, leading=(70,), head_sizes=head_sizes)
    sample.x.data[3, 2] = bad
    loss, head_losses, _ = heads_cross_entropy(*sample, label_smoothing=label_smoothing)
    assert not loss.isfinite() and not head_losses.isfinite().any()
    assert not torch.autograd.grad(loss, sample.x)[0][3].isfinite().all()


@pytest.mark.parametrize("head_sizes", [(3, 2), WIDE], ids=str)
def test_a_nan_in_a_row_that_is_ignored_by_a_head_stays_out_of_its_loss(device, head_sizes):
    sample = sample_heads(device, leading=(70,), head_sizes=head_sizes)
    sample.x.data[3, 2] = math.nan
    sample.targets[3, 1] = -100
    head_losses = heads_cross_entropy(*sample).head_losses
    assert head_losses[0].isnan() and head_losses[1].isfinite()


@pytest.mark.parametrize("head_sizes", [(3, 2), WIDE], ids=str)
def test_a_class_masked_by_minus_infinity_is_a_class_that_cannot_be(device, head_sizes):
    # A bias of -inf switches a class off: F.cross_entropy gives the loss of the others, and so do we.
    sample = sample_heads(device, leading=(70,), head_sizes=head_sizes)
    sample.bias.data[1] = -math.inf
    sample.targets[:, 0].masked_fill_(sample.targets[:, 0] == 1, 0)
    exact_inputs = [t.detach().double().requires_grad_() for t in sample.inputs]
    exact = naive_loss(*exact_inputs, *sample[3:])
    loss = heads_cross_entropy(*sample).loss
    assert_near(loss.detach(), exact.detach(), torch.float32)
    wanted = (0, 2)  # dx holds 0 * w of the masked class, like the rest finite
    gradients = zip(torch.autograd.grad(loss, sample.inputs), torch.autograd.grad(exact, exact_inputs), strict=True)
    for i, (ours, expected) in enumerate(gradients):
        if i in wanted:
            assert_near(ours, expected, torch.float32)


# --- what needs no gradient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("head_sizes", [(3, 2), WIDE], ids=str)
def test_any_subset_of_inputs_may_be_frozen(device, frozen, head_sizes):
    sample = sample_heads(device, leading=(70,), head_sizes=head_sizes)
    for i in frozen:
        sample.inputs[i].requires_grad_(False)
    check(sample)


def test_no_graph_is_built_where_nothing_needs_a_gradient(device):
    sample = sample_heads(device)
    expected = heads_cross_entropy(*sample).loss.detach()
    with torch.no_grad():
        quiet = heads_cross_entropy(*sample).loss
    with torch.inference_mode():
        inference = heads_cross_entropy(*sample).loss
    for loss in (quiet, inference, heads_cross_entropy(*(t.detach() for t in sample.inputs), *sample[3:]).loss):
        assert loss.grad_fn is None
        assert_same(loss, expected)


def allocated(step) -> int:
    """Bytes that the CPU allocator handed out during a step."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    return sum(max(0, event.nbytes()) for event in record.profiler.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize("frozen, limit", [((), 1.3), ((0,), 0.3), ((1,), 1.3), ((0, 1), 0.3)], ids=["nothing", "features", "weight", "both"])
@pytest.mark.parametrize("path", ["compiled"], indirect=True)  # plain PyTorch holds what its own operators hold
def test_a_step_allocates_no_more_than_its_gradients(path, device, frozen, limit):
    # In units of the features. All else, N K for the logits and threads K D for the weight's gradient, is small beside them here.
    if device.type != "cpu":
        pytest.skip("reads the CPU allocator's record")
    sample = sample_heads(device, leading=(512,), features=512, head_sizes=(3, 2))
    for i in frozen:
        sample.inputs[i].requires_grad_(False)
    wanted = [t for t in sample.inputs if t.requires_grad]
    assert allocated(lambda: torch.autograd.grad(heads_cross_entropy(*sample).loss, wanted)) < limit * sample.x.nbytes
