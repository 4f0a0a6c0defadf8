"""The heads in PyTorch's autograd: derivatives of every order, retained graphs, scaled losses, forward mode, changed
inputs.

Where no head is reversed (lambda -1 is a predictor) they are plain layers, and PyTorch's numerical checks hold. With
other lambdas a gradient of a gradient must cross each head's reversal where it would in the network layer by layer,
which is what these tests compare with.
"""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from head_samples import (
    DEEP,
    WIDE,
    assert_near,
    gradients,
    naive_logits,
    naive_loss,
    our_logits,
    our_loss,
    sample_heads,
    second_order,
)
from samples import assert_same, case
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

pytestmark = [
    pytest.mark.core,
    pytest.mark.sanitized,
    pytest.mark.usefixtures("path"),
    pytest.mark.filterwarnings(
        "ignore:`torch.jit.script` is deprecated"
    ),  # PyTorch's own, on loading its jvp decompositions
]

KINDS = ("classes", "soft", "mse")

# name: the operation and its head sizes
NETWORKS = {
    "linear_heads": ("linear_heads", (3, 2, 1)),
    "linear_heads, wide": ("linear_heads", WIDE),
    "heads_loss": ("heads_loss", (3, 2, 1)),
    "heads_loss, wide": ("heads_loss", WIDE),
    "heads_loss, several layers": ("heads_loss", DEEP),
}
on_networks = pytest.mark.parametrize("network", NETWORKS)
on_losses = pytest.mark.parametrize("head_sizes", [(3, 2, 1), DEEP], ids=str)


def networks(network, device, dtype=torch.float64, leading=(6,), features=7, **options):
    """A sample, and ours and the layers' as functions of its inputs that give a number."""
    operation, head_sizes = NETWORKS[network]
    sample = sample_heads(device, dtype, leading, features, head_sizes, kinds=KINDS)
    if operation == "linear_heads":
        ours, naive = our_logits, naive_logits
        return sample, *(lambda *t, f=f: sum(z.sin().sum() for z in f(sample.of(t))) for f in (ours, naive))
    if sample.targets[0].dim():
        sample.targets[0][0] = -100
    return sample, *(lambda *t, f=f: f(sample.of(t), **options).loss for f in (our_loss, naive_loss))


def everything(f, sample, **options):
    """A number that depends on all that a loss returns, each in its own way."""
    result = f(sample, **options)
    return (
        result.loss
        + sum((h + 2) * loss.square() for h, loss in enumerate(result.head_losses))
        + sum(z.sin().sum() for z in result.logits)
    )


# --- derivatives
# -----------------------------------------------------------------------------------------------------------


@on_networks
@pytest.mark.parametrize("kinds", [KINDS, ("soft",)], ids=str)
def test_predictors_are_plain_layers_for_the_numerical_checks(device, network, kinds):
    operation, head_sizes = NETWORKS[network]
    if operation == "linear_heads" and kinds != KINDS:
        pytest.skip("the logits have no targets")
    sample = sample_heads(device, torch.float64, (4,), 3, head_sizes, kinds=kinds)
    sample = sample._replace(lambda_=[None, -1.0, None][: len(head_sizes)])
    options = {"sample_weight": torch.tensor([0.5, 0.0, 2.0, 1.0], device=device)}

    def f(*t):
        if operation == "linear_heads":
            return tuple(z.sin() for z in our_logits(sample.of(t)))
        result = our_loss(sample.of(t), **options)
        return result.loss, *result.head_losses, *(z.sin() for z in result.logits)

    fast = network != "linear_heads"
    assert gradcheck(f, sample.inputs, fast_mode=fast, check_forward_ad=not fast)
    assert gradgradcheck(f, sample.inputs, fast_mode=True)


@on_networks
def test_a_gradient_penalty_has_the_gradients_of_the_layers(device, network):
    sample, *both = networks(network, device)
    ours, naive = (second_order(f, *sample.inputs) for f in both)
    for our, exact in zip(ours, naive, strict=True):
        assert_near(our, exact, torch.float64)
    assert naive[0].any()


@on_losses
def test_a_gradient_penalty_on_everything_that_is_returned(device, head_sizes):
    sample = sample_heads(device, torch.float64, (6,), 7, head_sizes, kinds=KINDS)
    ours, naive = (
        second_order(lambda *t, f=f: everything(f, sample.of(t)), *sample.inputs) for f in (our_loss, naive_loss)
    )
    for our, exact in zip(ours, naive, strict=True):
        assert_near(our, exact, torch.float64)


@on_losses
def test_a_gradient_penalty_knows_the_options_of_the_loss(device, head_sizes):
    sample = sample_heads(device, torch.float64, (6,), 7, head_sizes, kinds=("classes", "soft", "classes"))
    rows = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 0.0], device=device)
    weights = [torch.rand(3, device=device), None, torch.rand(2, device=device)]
    for options in (
        {"label_smoothing": 0.2},
        {"loss_weight": [0.5, 2.0, 0.0]},
        {"ignore_index": 0},
        {"sample_weight": rows},
        {"class_weight": weights},
        {"class_weight": weights, "sample_weight": rows, "label_smoothing": [0.0, 0.3, 0.1]},
        {"reduction": "sum"},
        {"sample_weight": torch.zeros(6, device=device)},
    ):
        with case(options):
            ours, naive = (
                second_order(lambda *t, f=f, options=options: f(sample.of(t), **options).loss, *sample.inputs)
                for f in (our_loss, naive_loss)
            )
            for our, exact in zip(ours, naive, strict=True):
                assert_near(our, exact, torch.float64)


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 2)], ids=str)
@on_networks
def test_a_gradient_penalty_on_some_of_the_inputs(device, network, wanted):
    sample, *both = networks(network, device)
    results = []
    for f in both:
        first = torch.autograd.grad(f(*sample.inputs), [sample.inputs[i] for i in wanted], create_graph=True)
        # An even power: two classes have opposite gradients, whose third powers leave roundings only.
        results.append(gradients(sum(g.square().sum() for g in first), sample.inputs))
    for our, exact in zip(*results, strict=True):
        assert_near(our, exact, torch.float64)


@on_networks
def test_third_derivatives_are_the_layers(device, network):
    sample, *both = networks(network, device)
    results = []
    for f in both:
        g = f(*sample.inputs)
        for _ in range(2):
            parts = torch.autograd.grad(g, sample.inputs, create_graph=True, allow_unused=True)
            g = sum(t.square().sum() for t in parts if t is not None)
        results.append(gradients(g, sample.inputs))
    for our, exact in zip(*results, strict=True):
        assert_near(our, exact, torch.float64)


@on_networks
def test_the_first_gradient_does_not_depend_on_whether_a_second_is_asked_for(device, network):
    sample, ours, _ = networks(network, device, leading=(70,))
    plain = torch.autograd.grad(ours(*sample.inputs), sample.inputs)
    for a, b in zip(plain, torch.autograd.grad(ours(*sample.inputs), sample.inputs, create_graph=True), strict=True):
        torch.testing.assert_close(a, b.detach())


@on_networks
def test_forward_mode_counts_each_heads_tangent_with_its_lambda(device, network):
    sample, *both = networks(network, device)
    inputs = [t.detach() for t in sample.inputs]
    tangents = [torch.randn_like(t) for t in inputs]
    for which in ((0,), (1,), (len(inputs) - 1,), range(len(inputs))):
        with fwAD.dual_level():
            duals = [
                fwAD.make_dual(t, v) if i in which else t for i, (t, v) in enumerate(zip(inputs, tangents, strict=True))
            ]
            ours, exact = (fwAD.unpack_dual(f(*duals)).tangent for f in both)
        torch.testing.assert_close(ours, exact)


def outputs(network, sample):
    if NETWORKS[network][0] == "linear_heads":
        return our_logits(sample)
    result = our_loss(sample)
    return [result.loss, *result.head_losses, *result.logits]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
@on_networks
def test_batched_gradients_are_the_gradients_one_by_one(device, network, dtype, how):
    sample, *_ = networks(network, device, dtype)
    every = outputs(network, sample)
    for chosen in ([0], [1], [len(every) - 1], range(len(every))):
        ys = [every[i] for i in chosen]
        grads = [torch.randn(3, *y.shape, device=device).to(y.dtype) for y in ys]

        def pull(*given, ys=ys):
            got = torch.autograd.grad(ys, sample.inputs, given, retain_graph=True, allow_unused=True)
            return [torch.zeros_like(t) if g is None else g for t, g in zip(sample.inputs, got, strict=True)]

        if how == "vmap":
            batched = torch.func.vmap(pull)(*grads)
        else:
            batched = torch.autograd.grad(
                ys, sample.inputs, grads, is_grads_batched=True, retain_graph=True, allow_unused=True
            )
        single = [pull(*(g[i] for g in grads)) for i in range(3)]
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.float16 else {}
        for t, a, b in zip(sample.inputs, batched, map(torch.stack, zip(*single, strict=True)), strict=True):
            torch.testing.assert_close(torch.zeros(3, *t.shape, dtype=t.dtype) if a is None else a, b, **tolerance)


@on_networks
def test_some_gradients_may_be_batched_and_others_not(device, network):
    sample, *_ = networks(network, device)
    ys = outputs(network, sample)
    grads = [torch.randn_like(y) for y in ys]
    for i in (0, 1, len(ys) - 1):
        several = torch.randn(3, *ys[i].shape, dtype=ys[i].dtype, device=device)

        def pull(grad, i=i):
            given = [grad if j == i else g for j, g in enumerate(grads)]
            return torch.autograd.grad(ys, sample.inputs, given, retain_graph=True)

        batched = torch.func.vmap(pull)(several)
        for a, b in zip(batched, map(torch.stack, zip(*map(pull, several), strict=True)), strict=True):
            torch.testing.assert_close(a, b)


# --- what is returned is differentiable, in every order
# --------------------------------------------------------------------


@on_losses
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_several_backward_passes_over_what_is_returned(device, head_sizes, dtype):
    """A gradient for each loss, an entropy penalty on the logits, then the total: each as the layers give it."""
    sample = sample_heads(device, dtype, (70,), 7, head_sizes, kinds=KINDS)
    exact = sample.map(torch.Tensor.double)

    def passes(result):
        yield from result.head_losses
        yield sum((z.softmax(-1) * z.log_softmax(-1)).sum() for z in result.logits)
        yield result.loss
        yield result.loss + 3 * result.head_losses[1]
        yield 2 * result.loss

    for ours, naive in zip(passes(our_loss(sample)), passes(naive_loss(exact)), strict=True):
        of_ours, of_naive = (
            gradients(ours, sample.inputs, retain_graph=True),
            gradients(naive, exact.inputs, retain_graph=True),
        )
        for a, b in zip(of_ours, of_naive, strict=True):
            assert_near(a, b, dtype, max(0.1, b.abs().max().item()))


@on_losses
def test_the_total_is_the_same_before_and_after_its_parts(device, head_sizes):
    sample = sample_heads(device, head_sizes=head_sizes)
    result = our_loss(sample)
    first = torch.autograd.grad(result.loss, sample.inputs, retain_graph=True)
    parts = gradients(sum(result.head_losses), sample.inputs, retain_graph=True)
    for a, b, c in zip(first, parts, torch.autograd.grad(result.loss, sample.inputs), strict=True):
        torch.testing.assert_close(a, b)
        assert_same(a, c)


@on_losses
def test_the_logits_are_the_layers_outputs_to_whoever_asks(device, head_sizes):
    # A hook sees the gradient, retain_grad keeps it, and a detached copy may be written into.
    sample = sample_heads(device, torch.float64, head_sizes=head_sizes)
    result = our_loss(sample)
    seen = []
    result.logits[0].register_hook(seen.append)
    result.logits[1].retain_grad()
    weight = [torch.randn_like(z) for z in result.logits]
    result.logits[0].detach().clone().zero_()
    sum((z * w).sum() for z, w in zip(result.logits, weight, strict=True)).backward()
    assert_same(seen[0], weight[0])
    assert_same(result.logits[1].grad, weight[1])


@on_losses
def test_each_heads_gradient_reaches_its_own_parameters_only(device, head_sizes):
    sample = sample_heads(device, head_sizes=head_sizes)
    result = our_loss(sample)
    for h, loss in enumerate(result.head_losses):
        given = torch.autograd.grad(loss, sample.inputs[1:], retain_graph=True, allow_unused=True)
        own = {id(t) for t in (*sample.weight[h], *sample.bias[h])}
        for t, gradient in zip(sample.inputs[1:], given, strict=True):
            assert (gradient is not None) == (id(t) in own)


# --- graphs
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 3.0])
@on_networks
def test_a_retained_graph_gives_the_same_gradient_again(device, network, factor):
    sample, ours, _ = networks(network, device, torch.float32)
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


@on_networks
def test_gradients_accumulate_over_steps(device, network):
    sample, ours, _ = networks(network, device, torch.float32)
    once = torch.autograd.grad(ours(*sample.inputs), sample.inputs)
    for _ in range(3):
        ours(*sample.inputs).backward()
    for t, g in zip(sample.inputs, once, strict=True):
        torch.testing.assert_close(t.grad, 3 * g)


def test_a_loss_that_is_used_twice_counts_twice(device):
    sample = sample_heads(device)
    once = torch.autograd.grad(our_loss(sample).loss, sample.inputs)
    loss = our_loss(sample).loss
    for a, b in zip(torch.autograd.grad(loss * 2 + loss, sample.inputs), once, strict=True):
        torch.testing.assert_close(a, 3 * b)


@on_networks
@pytest.mark.parametrize("wanted", [0, 1, -1])
def test_a_single_gradient_may_be_asked_for(device, network, wanted):
    sample, ours, _ = networks(network, device, torch.float32)
    every = torch.autograd.grad(ours(*sample.inputs), sample.inputs)
    assert_same(torch.autograd.grad(ours(*sample.inputs), sample.inputs[wanted])[0], every[wanted])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@on_losses
def test_a_backward_that_failed_on_the_way_may_be_repeated(device, dtype, head_sizes):
    sample = sample_heads(device, dtype, head_sizes=head_sizes)
    expected = torch.autograd.grad(our_loss(sample).loss, sample.inputs)
    loss = our_loss(sample).loss

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


@pytest.mark.parametrize("changed", [0, 1, -1], ids=["x", "weight", "bias"])
@on_networks
def test_inputs_that_change_before_the_backward_are_an_error_or_make_no_difference(device, network, changed):
    sample, ours, _ = networks(network, device, torch.float32)
    expected = torch.autograd.grad(ours(*sample.inputs), sample.inputs)
    inputs = [t * 1 for t in sample.inputs]
    loss = ours(*inputs)
    inputs[changed].add_(1)
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace" in str(error) or "modified inplace" in str(error)
    else:
        for t, g in zip(sample.inputs, expected, strict=True):
            assert_same(t.grad, g)


@pytest.mark.parametrize("changed", ["x", "weight", "target", "sample_weight"])
@pytest.mark.parametrize("asked", ["head losses", "logits", "loss, twice"])
@on_losses
def test_what_changes_before_a_later_pass_is_an_error_or_makes_no_difference(device, changed, asked, head_sizes):
    """The parts of the loss are differentiated after the forward, from what it was given."""
    sample = sample_heads(device, head_sizes=head_sizes, kinds=("soft",))
    rows = torch.rand(5, device=device)

    def step(change):
        x, weight = sample.x * 1, [[w * 1 for w in layers] for layers in sample.weight]
        own = sample._replace(x=x, weight=weight, targets=[t.clone() for t in sample.targets])
        given = rows.clone()
        result = our_loss(own, sample_weight=given)
        value = {
            "head losses": sum(result.head_losses),
            "logits": result.loss + sum(z.square().sum() for z in result.logits),
        }.get(asked, result.loss)
        if change:
            {"x": x, "weight": weight[0][0], "target": own.targets[0], "sample_weight": given}[changed].mul_(2)
        return torch.autograd.grad(value, sample.x, create_graph=asked == "loss, twice")[0].detach()

    expected = step(change=False)
    try:
        dx = step(change=True)
    except RuntimeError as error:
        assert "modified by an inplace" in str(error) or "modified inplace" in str(error)
    else:
        torch.testing.assert_close(dx, expected)


@on_networks
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_activation_checkpointing(device, network, use_reentrant):
    sample, ours, _ = networks(network, device, torch.float32)
    expected = torch.autograd.grad(ours(*sample.inputs), sample.inputs)
    checkpoint(ours, *sample.inputs, use_reentrant=use_reentrant).backward()
    for t, g in zip(sample.inputs, expected, strict=True):
        assert_same(t.grad, g)


def test_saved_tensor_hooks_see_what_is_kept(device):
    for head_sizes in ((3, 2), DEEP):
        sample = sample_heads(device, head_sizes=head_sizes)
        expected = gradients(everything(our_loss, sample), sample.inputs)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t.clone(), lambda t: t):  # noqa: B023
            value = everything(our_loss, sample)
        assert kept
        for a, b in zip(gradients(value, sample.inputs), expected, strict=True):
            torch.testing.assert_close(a, b)


# --- scaled losses
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scale",
    [1024.0, torch.tensor(1024.0), torch.tensor(1024.0, dtype=torch.float64), 0.0],
    ids=["number", "float32", "float64", "zero"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("retain", [False, True], ids=["once", "retained"])
@on_losses
def test_a_scaled_loss_gives_scaled_gradients(device, dtype, scale, retain, head_sizes):
    # A power of two: exact.
    sample = sample_heads(device, dtype, head_sizes=head_sizes)
    scale = scale.to(device) if isinstance(scale, torch.Tensor) else scale
    plain = torch.autograd.grad(our_loss(sample).loss, sample.inputs)
    scaled = torch.autograd.grad(our_loss(sample).loss * scale, sample.inputs, retain_graph=retain)
    for a, b in zip(scaled, plain, strict=True):
        assert_same(a, (b * scale).to(dtype))


@pytest.mark.parametrize("under_autocast", [False, True], ids=["float16 features", "autocast"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weights"])
def test_a_scaled_loss_saves_gradients_that_float16_alone_would_lose(device, under_autocast, weighted):
    # What torch.amp.GradScaler is for. Sure heads over many rows: unscaled, most of dx is below float16's smallest
    # number, 6e-8.
    dtype = torch.float32 if under_autocast else torch.float16
    sample = sample_heads(device, dtype, (4096,), 16, (2, 2))._replace(lambda_=[None, 1.0])
    for (weight,) in sample.weight:
        weight.data.mul_(8)
    with torch.no_grad():
        sample = sample._replace(targets=[z.argmax(1) for z in our_logits(sample)])
    options = {"sample_weight": torch.rand(4096, device=device) + 0.5} if weighted else {}
    with torch.autocast(device.type, torch.float16, enabled=under_autocast):
        loss = our_loss(sample, **options).loss
    ours = torch.autograd.grad(loss * 2.0**16, sample.x)[0].double()
    exact_inputs = [t.detach().half().double().requires_grad_() for t in sample.inputs]
    exact = torch.autograd.grad(naive_loss(sample.of(exact_inputs), **options).loss * 2.0**16, exact_inputs[0])[0]
    # Of the elements that float16 holds to full precision once scaled, float16 arithmetic all along loses none;
    # rounding two logits of up to 40 to float16 may change a sure head's gradient by 3 %, and where two heads' parts
    # cancel their sum by more.
    held = exact.abs() > 2**-14
    assert held.sum() > 10000
    worst = ((ours - exact).abs() / exact.abs().amax(1, keepdim=True))[held].max().item()
    assert worst < 0.1, worst


@on_losses
def test_a_gradient_of_a_gradient_knows_the_loss_scale_before_it_rounds_to_float16(device, head_sizes):
    sample = sample_heads(device, torch.float16, (64,), 8, head_sizes)
    loss = our_loss(sample, loss_weight=1e-6).loss * 1e6
    once = torch.autograd.grad(loss, sample.x, retain_graph=True)[0]
    twice = torch.autograd.grad(loss, sample.x, create_graph=True)[0].detach()
    assert once.any()
    torch.testing.assert_close(twice, once, rtol=2e-2, atol=1e-3)


def test_the_grad_scaler_trains_float16_heads(device):
    x = torch.randn(64, 8, device=device)
    parameters = [
        torch.randn(3, 8, device=device, requires_grad=True),
        torch.zeros(3, device=device, requires_grad=True),
    ]
    target = x[:, :3].argmax(1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    sample = sample_heads(device, head_sizes=(3,))._replace(targets=[target], lambda_=[None])
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            loss = our_loss(sample.of([x, *parameters])).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- what has no derivative
# ------------------------------------------------------------------------------------------------


def test_lambda_keeps_its_gradient_to_itself_or_is_refused(path, device):
    lambda_ = torch.tensor(0.5, device=device, requires_grad=True)
    sample = sample_heads(device)._replace(lambda_=[None, lambda_])
    for f in (our_logits, our_loss):
        with pytest.raises(ValueError) as caught:
            f(sample)
        assert str(caught.value) == (
            "lambda_[1] requires a gradient, which the heads do not give: pass lambda_[1].detach()"
        )
        f(sample._replace(lambda_=[None, lambda_.detach()]))


@pytest.mark.parametrize("argument", ["targets", "sample_weight", "class_weight", "loss_weight", "one loss_weight"])
@on_losses
def test_what_the_loss_has_no_derivative_for_is_refused(path, device, argument, head_sizes):
    sample = sample_heads(device, head_sizes=head_sizes, kinds=("soft",))
    options = {
        "targets": dict,
        "sample_weight": lambda: {"sample_weight": torch.rand(5, device=device, requires_grad=True)},
        "class_weight": lambda: {
            "class_weight": [None] * (len(head_sizes) - 2) + [torch.rand(2, device=device, requires_grad=True), None]
        },
        "loss_weight": lambda: {"loss_weight": torch.rand(len(head_sizes), device=device, requires_grad=True)},
        "one loss_weight": lambda: {
            "loss_weight": [1.0] * (len(head_sizes) - 2) + [torch.rand((), device=device, requires_grad=True), 1.0]
        },
    }[argument]()
    if argument == "targets":
        sample.targets[1].requires_grad_()
    first_linear = next(h for h, size in enumerate(head_sizes) if isinstance(size, int))
    name = {
        "targets": "targets[1]",
        "sample_weight": f"sample_weight[{first_linear}]",  # these are run before those with hidden layers
        "class_weight": "class_weight[1]",
        "loss_weight": "loss_weight",
        "one loss_weight": "loss_weight[1]",
    }[argument]
    with pytest.raises(ValueError) as caught:
        our_loss(sample, **options)
    assert str(caught.value) == (
        f"{name} requires a gradient, which the heads' loss does not give: pass {name}.detach(), "
        "or compute this head's loss from heads(features)"
    )
