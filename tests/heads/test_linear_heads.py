"""`linear_heads`: logits and gradients of a network with one reversal and one linear layer for each head."""

import math

import numpy as np
import pytest
import torch
from head_samples import (
    DTYPES,
    HEAD_SIZES,
    LAYOUTS,
    SHAPES,
    SWITCH,
    WIDE,
    assert_near,
    check_logits,
    check_network,
    naive_logits,
    our_logits,
    sample_heads,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import assert_same, case

from grl_ext import grl_linear, linear_heads

pytestmark = [pytest.mark.core, pytest.mark.sanitized, pytest.mark.usefixtures("path")]


@pytest.mark.parametrize("head_sizes", HEAD_SIZES, ids=str)
def test_equals_the_layers_in_every_shape(device, head_sizes):
    for rows, features in SHAPES:
        with case(rows, features):
            check_logits(sample_heads(device, leading=(rows,), features=features, head_sizes=head_sizes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_sizes", [(10, 2), (SWITCH - 1, 2)], ids=str)
def test_equals_the_layers_in_every_dtype(device, dtype, head_sizes):
    for rows, bias in [(5, False), (130, True), (65, "mixed")]:
        with case(rows, bias):
            check_logits(sample_heads(device, dtype, (rows,), 129, head_sizes, bias))


@settings(max_examples=30)
@given(
    rows=st.integers(0, 150),
    features=st.integers(1, 40),
    head_sizes=st.lists(st.sampled_from([1, 2, 3, 7, 30]), min_size=1, max_size=6),
    dtype=st.sampled_from(DTYPES),
    bias=st.sampled_from([True, False, "mixed"]),
)
def test_equals_the_layers_for_any_sizes(device, rows, features, head_sizes, dtype, bias):
    check_logits(sample_heads(device, dtype, (rows,), features, head_sizes, bias))


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (2, 0, 3), (2, 1, 3, 4)], ids=str)
@pytest.mark.parametrize("features", [7, 0])
def test_x_may_have_any_leading_sizes_and_no_features(device, leading, features):
    check_logits(sample_heads(device, leading=leading, features=features))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_sizes", [(3, 2), WIDE], ids=str)
def test_inputs_may_lie_in_memory_in_any_way(device, layout, dtype, head_sizes):
    sample = sample_heads(device, dtype, (70,), 9, head_sizes)
    lay = LAYOUTS[layout]
    moved = [lay(t.detach()) if t.dim() == 2 else t.detach().repeat_interleave(2)[::2] for t in sample.inputs]
    check_logits(sample.of([t.requires_grad_() for t in moved]))


@pytest.mark.parametrize("head_sizes", [(3, 2), WIDE], ids=str)
def test_the_incoming_gradients_may_lie_in_memory_in_any_way(device, head_sizes):
    sample = sample_heads(device, leading=(70,), head_sizes=head_sizes)
    logits = our_logits(sample)
    for name, layout in LAYOUTS.items():
        grads = [layout(torch.randn_like(z)) for z in logits]
        ours = torch.autograd.grad(logits, sample.inputs, grads, retain_graph=True)
        same = torch.autograd.grad(logits, sample.inputs, [g.contiguous() for g in grads], retain_graph=True)
        with case(name):
            for a, b in zip(ours, same, strict=True):
                torch.testing.assert_close(a, b)


def test_bias_may_be_left_out_altogether(device):
    sample = sample_heads(device, bias=False)
    weight, _ = sample.linear
    for a, b in zip(linear_heads(sample.x, weight, lambda_=sample.lambda_), our_logits(sample), strict=True):
        assert_same(a, b)


def test_one_matrix_may_serve_several_heads(device):
    # A predictor and an adversary that share their layer: both gradients reach it.
    sample = sample_heads(device, torch.float64)
    shared = sample._replace(weight=[sample.weight[0]] * 2, bias=[sample.bias[0]] * 2)
    inputs = [sample.x, sample.weight[0][0], sample.bias[0][0]]

    def of(x, w, b):
        return shared._replace(x=x, weight=[[w]] * 2, bias=[[b]] * 2)

    check_network(lambda *t: our_logits(of(*t)), lambda *t: naive_logits(of(*t)), *inputs)


# --- lambda_
# ---------------------------------------------------------------------------------------------------------------

FORMS = {
    "numbers": lambda device: [None, 0.3],
    "a tuple of int": lambda device: (-1, 2),
    "numpy": lambda device: [np.float32(0.5), None],
    "0-d float32": lambda device: [None, torch.tensor(0.5, device=device)],
    "0-d float64 on the CPU": lambda device: [torch.tensor(0.3, dtype=torch.float64), None],
    "0-d int64 and a number": lambda device: [torch.tensor(2, device=device), 0.25],
    "0-d bfloat16": lambda device: [None, torch.tensor(0.5, dtype=torch.bfloat16, device=device)],
    "zeros": lambda device: [0.0, 0.0],
    "predictors only": lambda device: [None, None],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head_sizes", [(3, 2), WIDE], ids=str)
def test_lambda_may_come_in_any_form(device, form, head_sizes):
    lambda_ = FORMS[form](device)
    sample = sample_heads(device, head_sizes=head_sizes)._replace(lambda_=lambda_)
    exact = sample._replace(lambda_=[None if value is None else float(value) for value in lambda_])
    check_network(lambda *t: our_logits(sample.of(t)), lambda *t: naive_logits(exact.of(t)), *sample.inputs)


@pytest.mark.parametrize("head_sizes", [(3, 2), WIDE, (2, SWITCH + 1)], ids=str)
def test_a_head_of_lambda_zero_gives_the_features_nothing_whatever_it_holds(device, head_sizes):
    for dtype in (torch.float32, torch.bfloat16):
        sample = sample_heads(device, dtype, head_sizes=head_sizes)._replace(lambda_=[0.5, 0.0])
        sample.weight[1][0].data[0, 0], sample.weight[1][0].data[1, 1] = math.inf, math.nan
        logits = our_logits(sample)
        grads = [torch.randn_like(z) for z in logits]
        grads[1][0], grads[1][1] = math.inf, math.nan
        dx, dw = torch.autograd.grad(logits, [sample.x, sample.weight[1][0]], grads)
        exact = -0.5 * grads[0].double() @ sample.weight[0][0].detach().double()
        assert_near(dx, exact, dtype)
        assert not dw.isfinite().all(), "the head's own gradient is not scaled"


def test_lambda_zero_alone_gives_zeros_of_infinite_weights(device):
    for size in (2, SWITCH + 1):
        sample = sample_heads(device, head_sizes=(size,))._replace(lambda_=[0.0])
        sample.weight[0][0].data.fill_(math.inf)
        assert_same(torch.autograd.grad(our_logits(sample)[0].sum(), sample.x)[0], torch.zeros_like(sample.x))


def test_a_lambda_that_changes_between_forward_and_backward_counts_as_it_was(device):
    # Where it is read on the device it cannot be told apart from a live setting.
    if device.type != "cpu":
        pytest.skip("on a device the backward reads it")
    sample = sample_heads(device, head_sizes=(5,))
    lambda_ = torch.tensor(0.5)
    logits = our_logits(sample._replace(lambda_=[lambda_]))[0]
    lambda_.fill_(5.0)
    dx = torch.autograd.grad(logits.sum(), sample.x)[0]
    torch.testing.assert_close(dx, -0.5 * sample.weight[0][0].detach().sum(0).expand_as(dx))


# --- what needs no gradient, and what gets none
# ----------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (1, 2), (0, 3), (1, 2, 3, 4), (0, 1, 3)], ids=str)
@pytest.mark.parametrize("head_sizes", [(3, 2), WIDE], ids=str)
def test_any_subset_of_inputs_may_be_frozen(device, frozen, head_sizes):
    sample = sample_heads(device, leading=(70,), head_sizes=head_sizes)
    for i in frozen:
        sample.inputs[i].requires_grad_(False)
    check_logits(sample)


@pytest.mark.parametrize("head_sizes", [(3, 2, 4), (SWITCH, 2, 4)], ids=str)
@pytest.mark.parametrize("used", [(0,), (1,), (0, 2)], ids=str)
def test_a_head_whose_logits_are_not_used_takes_no_part(device, head_sizes, used):
    sample = sample_heads(device, head_sizes=head_sizes)
    for h in set(range(3)) - set(used):
        sample.weight[h][0].data[0, 0] = math.nan  # would show
    logits = our_logits(sample)
    sum(logits[h].square().sum() for h in used).backward()
    assert sample.x.grad.isfinite().all()
    for h in range(3):
        for t in (sample.weight[h][0], sample.bias[h][0]):
            assert (t.grad is None) == (h not in used)


def test_no_graph_is_built_where_nothing_needs_a_gradient(device):
    sample = sample_heads(device)
    with torch.no_grad():
        assert our_logits(sample)[1].grad_fn is None
    with torch.inference_mode():
        assert our_logits(sample)[1].is_inference()
    assert our_logits(sample.of([t.detach() for t in sample.inputs]))[1].grad_fn is None


@pytest.mark.parametrize("path", ["compiled"], indirect=True)  # plain PyTorch holds what its own operators hold
def test_features_are_not_held_for_frozen_weights(path, device):
    # As for F.linear: an activation after the heads may then work in place.
    sample = sample_heads(device)
    features = sample.x * 1
    weight, bias = sample.linear
    logits = linear_heads(features, [w.detach() for w in weight], bias, lambda_=sample.lambda_)
    features.relu_()
    sum(z.sum() for z in logits).backward()


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)], ids=str)
def test_hooks_set_before_a_change_in_place_are_called(path, device, leading):
    # They would be lost if the result were a view of rows.
    x = torch.randn(*leading, 4, device=device, requires_grad=True)
    weight, other = torch.randn(3, 4, device=device), torch.randn(2, 4, device=device)
    for y in (grl_linear(x, weight, lambda_=0.5), *linear_heads(x, [weight, other], lambda_=[None, 0.5])):
        seen = []
        y.register_hook(seen.append)
        y.add_(1)
        y.sum().backward(retain_graph=True)
        assert not y._is_view()
        assert_same(seen[0], torch.ones_like(y))
