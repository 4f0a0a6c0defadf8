"""The heads in PyTorch's autograd: derivatives of every order, retained graphs, scaled losses, forward mode, changed inputs.

With all scales 1 the heads are plain layers, and PyTorch's numerical checks hold. With other scales a gradient of a gradient must
cross each head's scale where it would in the network layer by layer, which is what these tests compare with.
"""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from head_samples import SWITCH, assert_near, naive_heads, naive_loss, sample_heads, second_order
from samples import assert_same
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from grl_ext import heads_cross_entropy, linear_heads

pytestmark = [
    pytest.mark.usefixtures("path"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # PyTorch's own, on loading its jvp decompositions
]

SIZES = [(3, 2), (1, 4), (SWITCH, 2)]
OPERATIONS = ["linear_heads", "heads_cross_entropy"]


def networks(operation, sample, **options):
    """Ours and the layers', as functions of x, weight and bias that give a number."""
    if operation == "linear_heads":
        return (
            lambda *t: linear_heads(*t, sample.head_sizes, sample.grad_scale).sin().sum(),
            lambda *t: naive_heads(*t, sample.head_sizes, sample.grad_scale).sin().sum(),
        )
    return (
        lambda *t: heads_cross_entropy(*t, *sample[3:], **options).loss,
        lambda *t: naive_loss(*t, *sample[3:], **options),
    )


# --- derivatives -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_sizes", [(3, 2), (1, SWITCH)], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_scales_of_one_are_plain_layers_for_the_numerical_checks(device, operation, head_sizes):
    sample = sample_heads(device, torch.float64, (4,), 3, head_sizes)._replace(grad_scale=[1.0, 1.0])
    sample.targets[0, 0] = -100
    ours, _ = networks(operation, sample)
    fast = sum(head_sizes) > 5
    assert gradcheck(ours, sample.inputs, fast_mode=fast, check_forward_ad=True)
    assert gradgradcheck(ours, sample.inputs, fast_mode=fast)


@pytest.mark.parametrize("head_sizes", SIZES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_gradient_penalty_has_the_gradients_of_the_layers(device, operation, head_sizes):
    sample = sample_heads(device, torch.float64, (6,), 7, head_sizes)
    sample.targets[0, 1] = -100
    ours, naive = (second_order(f, *sample.inputs) for f in networks(operation, sample))
    for our, exact in zip(ours, naive, strict=True):
        assert exact.any()
        assert_near(our, exact, torch.float64)


def test_a_gradient_penalty_knows_the_options_of_the_loss(device):
    sample = sample_heads(device, torch.float64, (6,), 7, (3, 1, 2))
    sample.targets[1:4, 0] = 0
    for options in ({"label_smoothing": 0.2}, {"loss_weight": [0.5, 2.0, 0.0]}, {"ignore_index": 0}):
        ours, naive = (second_order(f, *sample.inputs) for f in networks("heads_cross_entropy", sample, **options))
        for our, exact in zip(ours, naive, strict=True):
            assert_near(our, exact, torch.float64)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1)], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_gradient_penalty_on_some_of_the_inputs(device, operation, wanted):
    sample = sample_heads(device, torch.float64)
    results = []
    for f in networks(operation, sample):
        first = torch.autograd.grad(f(*sample.inputs), [sample.inputs[i] for i in wanted], create_graph=True)
        results.append(torch.autograd.grad(sum(g.pow(3).sum() for g in first), sample.inputs))
    for our, exact in zip(*results, strict=True):
        assert_near(our, exact, torch.float64)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_third_derivatives_are_the_layers(device, operation):
    sample = sample_heads(device, torch.float64)
    results = []
    for f in networks(operation, sample):
        g = f(*sample.inputs)
        for _ in range(2):
            g = sum(t.square().sum() for t in torch.autograd.grad(g, sample.inputs, create_graph=True))
        results.append(torch.autograd.grad(g, sample.inputs))
    for our, exact in zip(*results, strict=True):
        assert_near(our, exact, torch.float64)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_first_gradient_does_not_depend_on_whether_a_second_is_asked_for(device, operation):
    sample = sample_heads(device, torch.float64, (70,))
    ours, _ = networks(operation, sample)
    plain = torch.autograd.grad(ours(*sample.inputs), sample.inputs)
    for a, b in zip(plain, torch.autograd.grad(ours(*sample.inputs), sample.inputs, create_graph=True), strict=True):
        assert b.requires_grad
        torch.testing.assert_close(a, b.detach())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_forward_mode_counts_each_heads_tangent_with_its_scale(device, operation):
    sample = sample_heads(device, torch.float64)
    inputs = [t.detach() for t in sample.inputs]
    tangents = [torch.randn_like(t) for t in inputs]
    for which in ((0,), (1,), (2,), (0, 1, 2)):
        with fwAD.dual_level():
            duals = [fwAD.make_dual(t, v) if i in which else t for i, (t, v) in enumerate(zip(inputs, tangents, strict=True))]
            ours, exact = (fwAD.unpack_dual(f(*duals)).tangent for f in networks(operation, sample))
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_batched_gradients_are_the_gradients_one_by_one(device, operation):
    sample = sample_heads(device)
    y = linear_heads(*sample.inputs, *sample[4:]) if operation == "linear_heads" else heads_cross_entropy(*sample).loss
    grads = torch.randn(3, *y.shape, device=device)
    batched = torch.autograd.grad(y, sample.inputs, grads, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, sample.inputs, g, retain_graph=True) for g in grads]
    for a, b in zip(batched, map(torch.stack, zip(*single, strict=True)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_vmap_over_a_graph_gives_the_gradients_one_by_one(device, operation, dtype):
    sample = sample_heads(device, dtype)
    y = linear_heads(*sample.inputs, *sample[4:]) if operation == "linear_heads" else heads_cross_entropy(*sample).loss
    grads = torch.randn(3, *y.shape, dtype=y.dtype, device=device)
    batched = torch.func.vmap(lambda g: torch.autograd.grad(y, sample.inputs, g, retain_graph=True))(grads)
    single = [torch.autograd.grad(y, sample.inputs, g, retain_graph=True) for g in grads]
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.float16 else {}
    for a, b in zip(batched, map(torch.stack, zip(*single, strict=True)), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# --- graphs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_retained_graph_gives_the_same_gradient_again(device, operation, factor):
    sample = sample_heads(device)
    ours, _ = networks(operation, sample)
    loss = ours(*sample.inputs) * factor
    first = torch.autograd.grad(loss, sample.inputs, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, sample.inputs, retain_graph=True)
    first[0].zero_()  # whoever got a gradient may write into it
    for a, b, c in zip(second, kept, torch.autograd.grad(loss, sample.inputs), strict=True):
        assert_same(a, b)
        assert_same(c, b)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_accumulate_over_steps(device, operation):
    sample = sample_heads(device)
    ours, _ = networks(operation, sample)
    once = torch.autograd.grad(ours(*sample.inputs), sample.inputs)
    for _ in range(3):
        ours(*sample.inputs).backward()
    for t, g in zip(sample.inputs, once, strict=True):
        torch.testing.assert_close(t.grad, 3 * g)


def test_a_loss_that_is_used_twice_counts_twice(device):
    sample = sample_heads(device)
    once = torch.autograd.grad(heads_cross_entropy(*sample).loss, sample.inputs)
    loss = heads_cross_entropy(*sample).loss
    for a, b in zip(torch.autograd.grad(loss * 2 + loss, sample.inputs), once, strict=True):
        torch.testing.assert_close(a, 3 * b)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_a_single_gradient_may_be_asked_for(device, operation, wanted):
    sample = sample_heads(device)
    ours, _ = networks(operation, sample)
    every = torch.autograd.grad(ours(*sample.inputs), sample.inputs)
    assert_same(torch.autograd.grad(ours(*sample.inputs), sample.inputs[wanted])[0], every[wanted])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_backward_that_failed_on_the_way_may_be_repeated(device, dtype):
    sample = sample_heads(device, dtype)
    expected = torch.autograd.grad(heads_cross_entropy(*sample).loss, sample.inputs)
    loss = heads_cross_entropy(*sample).loss

    def fail(*_):
        raise RuntimeError("planted")

    hook = loss.grad_fn.register_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        loss.backward()
    hook.remove()
    try:
        loss.backward()
    except RuntimeError as error:  # plain PyTorch's nodes have let go of what they saved
        assert "backward through the graph a second time" in str(error)
    else:
        for t, g in zip(sample.inputs, expected, strict=True):
            assert_same(t.grad, g)


def test_head_losses_and_logits_are_detached(device):
    output = heads_cross_entropy(*sample_heads(device))
    assert output.loss.requires_grad
    assert not output.head_losses.requires_grad and not output.logits.requires_grad
    output.logits.zero_(), output.head_losses.zero_()
    output.loss.backward()


@pytest.mark.parametrize("changed", [0, 1], ids=["x", "weight"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_inputs_that_change_before_the_backward_are_an_error_or_make_no_difference(device, operation, changed):
    sample = sample_heads(device)
    ours, _ = networks(operation, sample)
    expected = torch.autograd.grad(ours(*sample.inputs), sample.inputs)
    inputs = [t * 1 for t in sample.inputs]
    loss = ours(*inputs)
    inputs[changed].add_(1)
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace" in str(error) or "modified inplace" in str(error)
    else:
        assert operation == "heads_cross_entropy", "its gradients were made in the forward; no other's were"
        for t, g in zip(sample.inputs, expected, strict=True):
            assert_same(t.grad, g)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_features_that_change_before_the_backward_are_an_error(device, operation):
    sample = sample_heads(device)
    ours, _ = networks(operation, sample)
    features = sample.x * 1
    loss = ours(features, sample.weight, sample.bias)
    features.add_(1)
    # Where a view of the features was saved, PyTorch has another text.
    with pytest.raises(RuntimeError, match="modified (by an )?inplace"):
        loss.backward()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_activation_checkpointing(device, operation, use_reentrant):
    sample = sample_heads(device)
    ours, _ = networks(operation, sample)
    expected = torch.autograd.grad(ours(*sample.inputs), sample.inputs)
    checkpoint(ours, *sample.inputs, use_reentrant=use_reentrant).backward()
    for t, g in zip(sample.inputs, expected, strict=True):
        assert_same(t.grad, g)


# --- scaled losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1024.0, torch.tensor(1024.0), torch.tensor(1024.0, dtype=torch.float64), 0.0], ids=["number", "float32", "float64", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("retain", [False, True], ids=["once", "retained"])
def test_a_scaled_loss_gives_scaled_gradients(device, dtype, scale, retain):
    # A power of two: exact.
    sample = sample_heads(device, dtype)
    scale = scale.to(device) if isinstance(scale, torch.Tensor) else scale
    plain = torch.autograd.grad(heads_cross_entropy(*sample).loss, sample.inputs)
    scaled = torch.autograd.grad(heads_cross_entropy(*sample).loss * scale, sample.inputs, retain_graph=retain)
    for a, b in zip(scaled, plain, strict=True):
        assert_same(a, (b * scale).to(dtype))


@pytest.mark.parametrize("under_autocast", [False, True], ids=["float16 features", "autocast"])
def test_a_scaled_loss_saves_gradients_that_float16_alone_would_lose(device, under_autocast):
    # What torch.amp.GradScaler is for. Sure heads over many rows: unscaled, most of dx is below float16's smallest number, 6e-8.
    dtype = torch.float32 if under_autocast else torch.float16
    sample = sample_heads(device, dtype, (4096,), 16, (2, 2))
    sample.weight.data.mul_(8)
    sample = sample._replace(grad_scale=[1.0, -1.0])
    with torch.no_grad():
        logits = linear_heads(*sample.inputs, sample.head_sizes, sample.grad_scale)
    sample.targets.copy_(torch.stack([z.argmax(1) for z in logits.split(2, 1)], 1))
    with torch.autocast(device.type, torch.float16, enabled=under_autocast):
        loss = heads_cross_entropy(*sample).loss
    ours = torch.autograd.grad(loss * 2.0**16, sample.x)[0].double()
    exact_inputs = [t.detach().half().double().requires_grad_() for t in sample.inputs]
    exact = torch.autograd.grad(naive_loss(*exact_inputs, *sample[3:]) * 2.0**16, exact_inputs[0])[0]
    # Of the elements that float16 holds to full precision once scaled, float16 arithmetic all along loses none; rounding logits of
    # up to 40 to float16 may change a sure head's gradient by 2 %.
    held = exact.abs() > 2**-14
    assert held.sum() > 10000
    worst = ((ours - exact).abs() / exact.abs().amax(1, keepdim=True))[held].max().item()
    assert worst < 0.05, worst


def test_a_gradient_of_a_gradient_knows_the_loss_scale_before_it_rounds_to_float16(device):
    sample = sample_heads(device, torch.float16, (64,), 8)
    loss = heads_cross_entropy(*sample, loss_weight=[1e-6, 1e-6]).loss * 1e6
    once = torch.autograd.grad(loss, sample.x, retain_graph=True)[0]
    twice = torch.autograd.grad(loss, sample.x, create_graph=True)[0].detach()
    assert once.any()
    torch.testing.assert_close(twice, once, rtol=1e-2, atol=1e-4)
