"""`heads_loss`: losses, logits and gradients of a network with a reversal, its layers and a loss for each head.

The options of the loss are in test_heads_loss_options.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from head_samples import (
    DEEP,
    DTYPES,
    HEAD_SIZES,
    LAYOUTS,
    SHAPES,
    SWITCH,
    WIDE,
    assert_near,
    check_loss,
    check_network,
    gradients,
    naive_loss,
    our_loss,
    sample_heads,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import assert_same, case
from torch.profiler import ProfilerActivity, profile

from grl_ext import _paths

pytestmark = [pytest.mark.sanitized, pytest.mark.usefixtures("path")]

KINDS = ("classes", "soft", "mse")


@pytest.mark.parametrize("head_sizes", HEAD_SIZES, ids=str)
def test_equals_the_layers_in_every_shape(device, head_sizes):
    for i, (rows, features) in enumerate(SHAPES):
        with case(rows, features):
            kinds = [("classes",), KINDS, ("mse", "soft")][i % 3]
            check_loss(sample_heads(device, leading=(rows,), features=features, head_sizes=head_sizes, kinds=kinds))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_sizes", [(10, 2), (1,), (SWITCH - 1, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_layers_in_every_dtype(device, dtype, head_sizes, kind):
    for rows, bias in [(5, False), (130, "mixed")]:
        with case(rows, bias):
            check_loss(sample_heads(device, dtype, (rows,), 129, head_sizes, bias, (kind,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_sizes", [DEEP, ((4,), (3, 2)), ((8, SWITCH + 1), (SWITCH + 1, 1))], ids=str)
def test_heads_of_several_layers_equal_the_layers(device, dtype, head_sizes):
    half = dtype in (torch.bfloat16, torch.float16)
    for rows, bias in [(5, "mixed"), (70, True), (0, True)]:
        sample = sample_heads(device, dtype, (rows,), 9, head_sizes, bias, KINDS)
        if half:  # numbers that no rounding carries across the corner of a ReLU
            sample = sample.map(lambda t: (t * 2).round() / 2)
        with case(rows, bias):
            check_loss(sample, outputs="loss" if half else "all")


@pytest.mark.parametrize("frozen", [None, 0, 1, 2, "x"], ids=str)
def test_hidden_layers_over_many_rows_equal_the_layers(device, frozen):
    # Their gradients are written over the layers' outputs, some rows at a time.
    sample = sample_heads(
        device, torch.float64, leading=(1030,), features=5, head_sizes=((7, 6, 3), (4, 2)), kinds=("classes",)
    )
    if frozen is not None:
        (sample.x if frozen == "x" else sample.weight[0][frozen]).requires_grad_(False)
    check_loss(sample)
    check_loss(sample, outputs="all")


@pytest.mark.parametrize("head_sizes", [(3, 2, 1), (SWITCH, 1, 4), DEEP], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_losses_and_logits_have_the_gradients_of_the_layers_together(device, head_sizes, dtype):
    sample = sample_heads(device, dtype, (70,), 9, head_sizes, kinds=KINDS)
    if dtype == torch.float16:
        sample = sample.map(lambda t: (t * 2).round() / 2)
    check_loss(sample, outputs="all")


@settings(max_examples=150)
@given(data=st.data())
def test_equals_the_layers_and_the_reference_for_any_configuration(device, data):
    """Compiled or not, against plain PyTorch, and against the reference in float64."""
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    size = st.sampled_from([1, 2, 3, 7, 30])
    half = dtype in (torch.float16, torch.bfloat16)
    sizes = draw(
        st.lists(size if half else st.one_of(size, st.lists(size, min_size=1, max_size=3)), min_size=1, max_size=5)
    )
    leading = draw(st.sampled_from([(), (0,), (1,), (6,), (70,), (2, 3), (131,)]))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
    bias = draw(st.sampled_from([True, False, "mixed"]))
    sample = sample_heads(device, dtype, leading, draw(st.integers(1, 20)), sizes, bias, kinds)
    sample = sample._replace(lambda_=[draw(st.sampled_from([None, 0.0, 0.3, -1.5])) for _ in sizes])
    heads = range(len(sizes))
    losses = sample.losses or ["cross_entropy"] * len(sizes)
    columns = [layers[-1].shape[0] for layers in sample.weight]
    options = {"reduction": draw(st.sampled_from(["mean", "sum"]))}
    share = draw(st.sampled_from([0.0, 0.3, 1.0]))
    for target in sample.targets:
        if target.dtype == torch.int64:
            target[torch.rand(target.shape, device=device) < share] = -7
    options["ignore_index"] = -7

    def rows_weight():
        return torch.rand(leading, device=device) * (torch.rand(leading, device=device) > 0.3)

    form = draw(st.sampled_from(["none", "one", "each"]))
    if form != "none":
        options["sample_weight"] = rows_weight() if form == "one" else [rows_weight() if h % 2 else None for h in heads]
    if draw(st.booleans()):
        options["class_weight"] = [
            None if losses[h] == "mse" or draw(st.booleans()) else torch.rand(max(2, columns[h]), device=device) + 0.1
            for h in heads
        ]
    if draw(st.booleans()):
        options["loss_weight"] = [draw(st.sampled_from([1.0, 0.5, 0.0, 2.0])) for _ in heads]
    form = draw(st.sampled_from(["none", "one", "each"]))
    if form == "one":
        options["label_smoothing"] = 0.1
    elif form == "each":
        options["label_smoothing"] = [
            0.0 if losses[h] == "mse" else draw(st.sampled_from([0.0, 0.2, 1.0])) for h in heads
        ]
    check_loss(sample, outputs=draw(st.sampled_from(["loss", "all"])), **options)

    exact_inputs = [t.detach().double().requires_grad_() for t in sample.inputs]
    exact = _by_reference(sample.of(exact_inputs), options)
    naive = naive_loss(sample.of(exact_inputs), **options)
    torch.testing.assert_close(exact.loss, naive.loss)
    for a, b in zip(gradients(exact.loss, exact_inputs), gradients(naive.loss, exact_inputs), strict=True):
        torch.testing.assert_close(a, b)


def _by_reference(sample, options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_paths, "of_heads", lambda *_: _paths.Path.PLAIN)
        return our_loss(sample, **options)


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (2, 0, 3), (2, 1, 3, 4)], ids=str)
@pytest.mark.parametrize("features", [7, 0])
@pytest.mark.parametrize("head_sizes", [(3, 1, 2), ((4, 2), 1)], ids=str)
def test_x_may_have_any_leading_sizes_and_no_features(device, leading, features, head_sizes):
    check_loss(sample_heads(device, leading=leading, features=features, head_sizes=head_sizes, kinds=KINDS))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_sizes", [(3, 2), WIDE, ((4, 3), 2)], ids=str)
@pytest.mark.parametrize("kind", ["classes", "soft"])
def test_arguments_may_lie_in_memory_in_any_way(device, layout, head_sizes, kind):
    sample = sample_heads(device, leading=(70,), features=9, head_sizes=head_sizes, kinds=(kind,))
    lay = LAYOUTS[layout]
    moved = [lay(t.detach()) if t.dim() == 2 else t.detach().repeat_interleave(2)[::2] for t in sample.inputs]
    targets = [lay(t) if t.dim() == 2 else lay(torch.stack([t, t], 1))[:, 0] for t in sample.targets]
    sample = sample.of([t.requires_grad_() for t in moved])._replace(targets=targets)
    class_weight = [None, torch.rand(4, device=device)[::2]]
    check_loss(sample, sample_weight=torch.rand(140, device=device)[::2], class_weight=class_weight)


def test_one_matrix_may_serve_several_heads(device):
    for head_sizes in ((3, 2), ((4, 3), (4, 3))):
        sample = sample_heads(device, torch.float64, head_sizes=head_sizes)._replace(lambda_=[None, 0.5])
        layers = len(sample.weight[0])
        shared = [sample.x, *sample.weight[0], *sample.bias[0]]

        def of(x, *parameters, sample=sample, layers=layers):
            weight, bias = list(parameters[:layers]), list(parameters[layers:])
            other = [sample.targets[0], sample.targets[0].flip(0)]
            return sample._replace(x=x, weight=[weight] * 2, bias=[bias] * 2, targets=other)

        check_network(lambda *t, of=of: our_loss(of(*t)).loss, lambda *t, of=of: naive_loss(of(*t)).loss, *shared)


def test_no_rows_give_a_loss_of_zero_and_gradients_of_zero(device):
    for head_sizes in ((3, 2), WIDE, DEEP):
        sample = sample_heads(device, leading=(0,), head_sizes=head_sizes)
        output = our_loss(sample)
        assert_same(output.loss.detach(), torch.zeros((), device=device))
        for t, gradient in zip(sample.inputs, torch.autograd.grad(output.loss, sample.inputs), strict=True):
            assert_same(gradient, torch.zeros_like(t))


# --- lambda zero
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_sizes", [(3, 2), WIDE, (3, SWITCH + 1), (3, (4, 2)), ((4, 3), (SWITCH + 2, 2))], ids=str)
@pytest.mark.parametrize("bad", [math.inf, math.nan], ids=str)
@pytest.mark.parametrize("asked", ["loss", "head losses", "logits", "twice"])
def test_a_head_of_lambda_zero_gives_the_features_nothing_whatever_it_holds(device, dtype, head_sizes, bad, asked):
    if asked == "twice" and dtype != torch.float32:
        pytest.skip("one dtype will do: the operators of gradients of gradients do not depend on it")
    sample = sample_heads(device, dtype, (6,), 7, head_sizes)._replace(lambda_=[0.5, 0.0])
    sample.weight[1][0].data[0, 0] = bad

    def dx(sample):
        result = our_loss(sample)
        value = {
            "head losses": lambda: 0.5 * sum(result.head_losses),
            "logits": lambda: result.loss + sum(z.float().sum() for z in result.logits),
        }.get(asked, lambda: result.loss)()
        return torch.autograd.grad(value, sample.x, create_graph=asked == "twice")[0].detach()

    assert_near(dx(sample), dx(sample.head(0)).double(), dtype)


# --- numbers out of the ordinary
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_sizes", [(3, 1), (SWITCH, 1)], ids=str)
@pytest.mark.parametrize("kind", ["classes", "soft"])
def test_large_logits_are_as_stable_as_pytorchs(device, size, dtype, head_sizes, kind):
    # Logits of exact integers, so that all precisions see the same ones.
    sample = sample_heads(device, dtype, (70,), 1, head_sizes, bias=False, kinds=(kind,))
    sample.x.data.copy_(torch.randn(70, 1).sign())
    for (weight,) in sample.weight:
        weight.data.copy_((weight * size).bfloat16().round())
    check_loss(sample)


@pytest.mark.parametrize("classes", [3, SWITCH + 1, 300, 70000])
def test_uniform_logits_of_many_classes_cost_the_logarithm_of_their_number(device, classes):
    sample = sample_heads(device, leading=(64,), features=1, head_sizes=(classes,), bias=False)
    sample.weight[0][0].data.zero_()
    assert our_loss(sample).loss.item() == pytest.approx(math.log(classes), rel=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "head_sizes, bad",
    [((3, 2), math.nan), ((3, 2), math.inf), (WIDE, math.nan), (WIDE, math.inf), (((4, 3), 2), math.nan)],
    ids=str,
)
def test_a_nan_or_infinity_in_the_features_shows_in_the_loss(device, bad, head_sizes, label_smoothing):
    sample = sample_heads(device, leading=(70,), head_sizes=head_sizes)
    sample.x.data[3, 2] = bad
    result = our_loss(sample, label_smoothing=label_smoothing)
    assert not result.loss.isfinite() and not any(loss.isfinite() for loss in result.head_losses)
    assert not torch.autograd.grad(result.loss, sample.x)[0][3].isfinite().all()


@pytest.mark.parametrize("head_sizes", [(3, 2), WIDE], ids=str)
def test_a_class_masked_by_minus_infinity_is_a_class_that_cannot_be(device, head_sizes):
    # A bias of -inf switches a class off: F.cross_entropy gives the loss of the others, and so do we.
    sample = sample_heads(device, leading=(70,), head_sizes=head_sizes)
    sample.bias[0][0].data[1] = -math.inf
    sample.targets[0].masked_fill_(sample.targets[0] == 1, 0)
    exact_inputs = [t.detach().double().requires_grad_() for t in sample.inputs]
    z = [F.linear(exact_inputs[0], exact_inputs[1 + h], exact_inputs[3 + h]) for h in range(2)]
    exact = sum(F.cross_entropy(own, target) for own, target in zip(z, sample.targets, strict=True))
    loss = our_loss(sample._replace(lambda_=[None, None])).loss
    assert_near(loss.detach(), exact.detach(), torch.float32)
    for ours, expected in zip(gradients(loss, sample.inputs[1:]), gradients(exact, exact_inputs[1:]), strict=True):
        assert_near(ours, expected, torch.float32)


def test_a_class_of_probability_zero_may_have_a_logit_of_minus_infinity(device):
    sample = sample_heads(device, head_sizes=(3,), kinds=("soft",))
    sample.bias[0][0].data[1] = -math.inf
    target = sample.targets[0].clone()
    target[:, 1] = 0
    target /= target.sum(1, keepdim=True)
    sample = sample._replace(targets=[target])
    z = F.linear(sample.x, sample.weight[0][0], sample.bias[0][0]).detach().double()
    expected = -(target.double()[:, ::2] * z.log_softmax(1)[:, ::2]).sum(1).mean()
    assert_near(our_loss(sample).loss.detach(), expected, torch.float32)


# --- what needs no gradient, and what gets none
# ----------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (1, 2), (0, 3), (1, 3), (1, 2, 3, 4), (0, 1, 3)], ids=str)
@pytest.mark.parametrize("head_sizes", [(3, 2), WIDE, ((4, 3), 2)], ids=str)
def test_any_subset_of_inputs_may_be_frozen(device, frozen, head_sizes):
    sample = sample_heads(device, leading=(70,), head_sizes=head_sizes)
    for i in frozen:
        sample.inputs[i].requires_grad_(False)
    check_loss(sample, outputs="all")


@pytest.mark.parametrize("head_sizes", [(3, 2, 4), (SWITCH, 2, 4), ((4, 3), 2, (5, 4)), (3, 2, SWITCH + 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("of", ["head loss", "logits"])
def test_a_head_that_is_not_asked_takes_no_part(device, head_sizes, dtype, of):
    """The gradient of one head's loss or logits: the others' numbers do not matter, and they get no gradient."""
    sample = sample_heads(device, dtype, head_sizes=head_sizes)
    for h in (0, 2):
        sample.weight[h][0].data[0, 0] = math.nan  # would show
    result = our_loss(sample)
    (result.head_losses[1] if of == "head loss" else result.logits[1].float().square().sum()).backward()
    assert sample.x.grad.isfinite().all() and sample.x.grad.any()
    for h in range(3):
        for t in (*sample.weight[h], *sample.bias[h]):
            assert (t.grad is None) == (h != 1)


def test_no_graph_is_built_where_nothing_needs_a_gradient(device):
    for head_sizes in ((3, 2), DEEP):
        sample = sample_heads(device, head_sizes=head_sizes)
        expected = our_loss(sample).loss.detach()
        with torch.no_grad():
            quiet = our_loss(sample)
        with torch.inference_mode():
            inference = our_loss(sample)
        for result in (quiet, inference, our_loss(sample.of([t.detach() for t in sample.inputs]))):
            assert all(t.grad_fn is None for t in (result.loss, *result.head_losses, *result.logits))
            assert_same(result.loss, expected)


def allocated(step) -> int:
    """Bytes that the CPU allocator handed out during a step."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    return sum(
        max(0, event.nbytes()) for event in record.profiler.kineto_results.events() if event.name() == "[memory]"
    )


@pytest.mark.parametrize(
    "frozen, limit",
    [((), 1.3), ((0,), 0.3), ((1, 2), 1.3), ((0, 1, 2), 0.3)],
    ids=["nothing", "features", "weights", "both"],
)
@pytest.mark.parametrize("weights", [False, True], ids=["plain", "weights"])
@pytest.mark.parametrize("path", ["compiled"], indirect=True)  # plain PyTorch holds what its own operators hold
def test_a_step_allocates_no_more_than_its_gradients(path, device, frozen, limit, weights):
    # In units of the features. All else, N K for the logits and threads K D for the weights' gradients, is small beside
    # them here.
    if device.type != "cpu":
        pytest.skip("reads the CPU allocator's record")
    sample = sample_heads(device, leading=(512,), features=512, head_sizes=(3, 2))
    for i in frozen:
        sample.inputs[i].requires_grad_(False)
    options = {"sample_weight": torch.rand(512), "class_weight": [torch.rand(3), torch.rand(2)]} if weights else {}
    assert (
        allocated(lambda: torch.autograd.grad(our_loss(sample, **options).loss, sample.wanted))
        < limit * sample.x.nbytes
    )


@pytest.mark.parametrize("path", ["compiled"], indirect=True)  # plain PyTorch leaves it to autograd
def test_a_frozen_head_has_no_gradient_computed(path, device, threads):
    """Half the threads' sums for the weights are not even allocated."""
    if device.type != "cpu":
        pytest.skip("reads the CPU allocator's record")
    threads(2)
    for head_sizes, layer in (((SWITCH + 1,), 0), ((64, 2), 0)):
        sample = sample_heads(
            device, leading=(64,), features=2048, head_sizes=(head_sizes,) if len(head_sizes) > 1 else head_sizes
        )
        sample.x.requires_grad_(False)
        weight = sample.weight[0][layer]
        with_weight = allocated(lambda: torch.autograd.grad(our_loss(sample).loss, sample.wanted))  # noqa: B023
        weight.requires_grad_(False)
        without = allocated(lambda: torch.autograd.grad(our_loss(sample).loss, sample.wanted))  # noqa: B023
        assert with_weight - without >= weight.nbytes


@pytest.mark.parametrize("head_sizes", [(10, 2), (3, 1, 5)], ids=str)
@pytest.mark.parametrize("path", ["compiled"], indirect=True)
def test_a_step_is_one_kernel_and_one_scaling_whatever_the_number_of_heads(path, head_sizes):
    """On a GPU every other operator would be a launch more."""
    sample = sample_heads(torch.device("cpu"), leading=(8,), features=16, head_sizes=head_sizes)
    half = torch.tensor(0.5)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        torch.autograd.grad(our_loss(sample).loss, sample.wanted, half)
    names = [event.name for event in record.events() if event.name.startswith(("aten::", "grl_ext::_"))]
    reading = ("aten::item", "aten::_local_scalar_dense")  # of the number, which is on the CPU here
    begin = names.index("grl_ext::_heads_loss")  # before are our_loss's own lists and numbers
    assert [name for name in names[begin:] if name not in reading] == [
        "grl_ext::_heads_loss",
        "grl_ext::_scale_list_",
    ]


@pytest.mark.parametrize("path", ["compiled"], indirect=True)
def test_the_float16_backward_makes_no_logits_again(path):
    """Its gradients wait for the loss scale. Those of the logits are kept until then, as layers keep logits."""
    sample = sample_heads(torch.device("cpu"), torch.float16, (64,), 16, ((SWITCH + 1,), (2,)))
    loss = our_loss(sample).loss
    with profile(activities=[ProfilerActivity.CPU]) as record:
        torch.autograd.grad(loss, sample.wanted)
    names = [event.name for event in record.events()]
    assert "grl_ext::_heads_gradients" in names
    assert "grl_ext::_heads_loss" not in names
    assert "aten::linear" not in names
