"""`linear_heads`: logits and gradients of a network with one reversal and one linear layer for each head."""

import math

import pytest
import torch
from head_samples import DTYPES, HEAD_SIZES, SHAPES, SWITCH, assert_near, check_network, naive_heads, sample_heads
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import case

from grl_ext import linear_heads

pytestmark = pytest.mark.usefixtures("path")


def check(sample, grad_scale=None):
    scale = sample.grad_scale if grad_scale is None else grad_scale
    numbers = scale.tolist() if isinstance(scale, torch.Tensor) else scale
    check_network(
        lambda *t: linear_heads(*t, sample.head_sizes, scale), lambda *t: naive_heads(*t, sample.head_sizes, numbers), *sample.inputs
    )


@pytest.mark.parametrize("head_sizes", HEAD_SIZES, ids=str)
def test_equals_the_layers_in_every_shape(device, head_sizes):
    for rows, features in SHAPES:
        with case(rows, features):
            check(sample_heads(device, leading=(rows,), features=features, head_sizes=head_sizes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_sizes", [(10, 2), (SWITCH - 1, 2)], ids=str)
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
    bias=st.booleans(),
)
def test_equals_the_layers_for_any_sizes(device, rows, features, head_sizes, dtype, bias):
    check(sample_heads(device, dtype, (rows,), features, head_sizes, bias))


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (2, 0, 3), (2, 1, 3, 4)], ids=str)
@pytest.mark.parametrize("features", [7, 0])
def test_x_may_have_any_leading_sizes_and_no_features(device, leading, features):
    check(sample_heads(device, leading=leading, features=features))


LAYOUTS = {
    "transposed": lambda t: t.T.contiguous().T,
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "rows apart": lambda t: torch.cat([t, t], -1)[:, : t.shape[1]],
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_sizes", [(3, 2), (SWITCH, 2)], ids=str)
def test_inputs_may_lie_in_memory_in_any_way(device, layout, dtype, head_sizes):
    sample = sample_heads(device, dtype, (70,), 9, head_sizes)
    x, weight = (LAYOUTS[layout](t.detach()).requires_grad_() for t in (sample.x, sample.weight))
    bias = sample.bias.detach().repeat_interleave(2)[::2].requires_grad_()
    check(sample._replace(x=x, weight=weight, bias=bias))


@pytest.mark.parametrize("head_sizes", [(3, 2), (SWITCH, 2)], ids=str)
def test_the_incoming_gradient_may_lie_in_memory_in_any_way(device, head_sizes):
    sample = sample_heads(device, leading=(70,), head_sizes=head_sizes)
    logits = linear_heads(*sample.inputs, sample.head_sizes, sample.grad_scale)
    for name, layout in LAYOUTS.items():
        grad = layout(torch.randn_like(logits))
        ours = torch.autograd.grad(logits, sample.inputs, grad, retain_graph=True)
        with case(name):
            for our, same in zip(ours, torch.autograd.grad(logits, sample.inputs, grad.contiguous(), retain_graph=True), strict=True):
                torch.testing.assert_close(our, same)


# --- grad_scale ------------------------------------------------------------------------------------------------------------

SCALES = {
    "list": lambda device: [1.0, -0.3],
    "tuple of int": lambda device: (1, -2),
    "float32": lambda device: torch.tensor([1.0, -0.5], device=device),
    "float64 on the CPU": lambda device: torch.tensor([1.0, -0.3], dtype=torch.float64),
    "int64": lambda device: torch.tensor([1, -2], device=device),
    "bfloat16": lambda device: torch.tensor([1.0, -0.5], dtype=torch.bfloat16, device=device),
    "strided": lambda device: torch.tensor([1.0, 9.0, -0.5, 9.0], device=device)[::2],
    "zeros": lambda device: [0.0, 0.0],
}


@pytest.mark.parametrize("form", SCALES)
@pytest.mark.parametrize("head_sizes", [(3, 2), (SWITCH, 2)], ids=str)
def test_the_scales_may_come_in_any_form(device, form, head_sizes):
    check(sample_heads(device, head_sizes=head_sizes), SCALES[form](device))


def test_no_gradient_reaches_the_scales(device):
    sample = sample_heads(device)
    scale = torch.tensor([1.0, -0.5], device=device, requires_grad=True)
    linear_heads(*sample.inputs, sample.head_sizes, scale).square().sum().backward()
    assert scale.grad is None
    assert not linear_heads(*(t.detach() for t in sample.inputs), sample.head_sizes, scale).requires_grad


@pytest.mark.parametrize("head_sizes", [(3, 2), (SWITCH, 2)], ids=str)
def test_a_head_of_scale_zero_gives_the_features_nothing_whatever_its_gradient_holds(device, head_sizes):
    sample = sample_heads(device, head_sizes=head_sizes)
    grad = torch.randn(5, sum(head_sizes), device=device)
    grad[0, : head_sizes[0]], grad[1, : head_sizes[0]] = math.inf, math.nan
    logits = linear_heads(*sample.inputs, sample.head_sizes, [0.0, -0.3])
    dx, dw = torch.autograd.grad(logits, sample.inputs[:2], grad)
    exact = -0.3 * grad[:, head_sizes[0] :].double() @ sample.weight.detach()[head_sizes[0] :].double()
    assert_near(dx, exact, torch.float32)
    assert not dw[: head_sizes[0]].isfinite().any(), "the head's own gradient is not scaled"


def test_the_scales_between_forward_and_backward_are_the_forwards_or_an_error(device):
    # Where they are read on the device they cannot be told apart from a live setting.
    if device.type != "cpu":
        pytest.skip("read by the backward")
    sample = sample_heads(device, head_sizes=(5,))
    scale = torch.tensor([1.0])
    logits = linear_heads(*sample.inputs, sample.head_sizes, scale)
    scale.fill_(5.0)
    try:
        dx = torch.autograd.grad(logits.sum(), sample.x)[0]
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(dx, sample.weight.detach().sum(0).expand_as(dx))


# --- what needs no gradient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("head_sizes", [(3, 2), (SWITCH, 2)], ids=str)
def test_any_subset_of_inputs_may_be_frozen(device, frozen, head_sizes):
    sample = sample_heads(device, leading=(70,), head_sizes=head_sizes)
    for i in frozen:
        sample.inputs[i].requires_grad_(False)
    check(sample)


def test_no_graph_is_built_where_nothing_needs_a_gradient(device):
    sample = sample_heads(device)
    with torch.no_grad():
        assert linear_heads(*sample.inputs, sample.head_sizes, sample.grad_scale).grad_fn is None
    with torch.inference_mode():
        assert linear_heads(*sample.inputs, sample.head_sizes, sample.grad_scale).is_inference()
    assert linear_heads(*(t.detach() for t in sample.inputs), sample.head_sizes, sample.grad_scale).grad_fn is None


@pytest.mark.parametrize("path", ["compiled"], indirect=True)  # plain PyTorch holds what its own operators hold
def test_features_are_not_held_for_frozen_weights(path, device):
    # As for F.linear: an activation after the heads may then work in place.
    sample = sample_heads(device)
    features = sample.x * 1
    logits = linear_heads(features, sample.weight.detach(), sample.bias, sample.head_sizes, sample.grad_scale)
    features.relu_()
    logits.sum().backward()
