"""Heads of several layers: the first layers of all heads together, each last one with its loss, whatever lies between.

Compared with the modules one by one: values, gradients of the loss and of the logits, and those of a gradient penalty.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from head_samples import DTYPES, SWITCH, check_heads, logits_of_modules, losses_of_modules
from samples import assert_same
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from grl_ext import AdversarialHeads, gradient_reversal

pytestmark = [
    pytest.mark.sanitized,
    pytest.mark.usefixtures("path"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # PyTorch's own, in gradients of gradients
]


class Discriminator(nn.Sequential):
    """As libraries of domain adaptation write theirs: layers of its own, the forward of nn.Sequential."""

    def __init__(self, in_feature: int = 7, hidden_size: int = 5) -> None:
        super().__init__(
            nn.Linear(in_feature, hidden_size),
            nn.BatchNorm1d(hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.BatchNorm1d(hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, 1),
        )

    def get_parameters(self):
        return [{"params": self.parameters(), "lr": 1.0}]


class Named(nn.Sequential):
    """With names in place of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Linear(5, 4)
        self.act_too = nn.ReLU()
        self.last = nn.Linear(4, 2)


def between(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 6), *modules, nn.Linear(6, 2))


BOTH = "first and last layer fused: begins and ends with a linear layer"
FUSED = "fused: linear layers with ReLU"

# name: a head over 7 features, and how it is run
HEADS = {
    "ReLU": (lambda: between(nn.ReLU()), FUSED),
    "ReLU in place": (lambda: between(nn.ReLU(inplace=True)), FUSED),
    "two hidden layers": (lambda: between(nn.ReLU(), nn.Linear(6, 6), nn.ReLU()), FUSED),
    "three hidden layers": (
        lambda: between(nn.ReLU(), nn.Linear(6, 9, bias=False), nn.ReLU(), nn.Linear(9, 6), nn.ReLU()),
        FUSED,
    ),
    "wide": (lambda: nn.Sequential(nn.Linear(7, 2 * SWITCH), nn.ReLU(), nn.Linear(2 * SWITCH, SWITCH + 2)), FUSED),
    "a named Sequential": (Named, FUSED),
    "nothing between": (lambda: between(), "fused: linear layers"),
    "linear layers between": (lambda: between(nn.Linear(6, 6), nn.Linear(6, 6)), BOTH),
    "a discriminator": (Discriminator, BOTH),
    "Tanh": (lambda: between(nn.Tanh()), BOTH),
    "Tanh between linear layers": (lambda: between(nn.Tanh(), nn.Linear(6, 6), nn.Tanh()), BOTH),
    "GELU": (lambda: between(nn.GELU()), BOTH),
    "LeakyReLU": (lambda: between(nn.LeakyReLU(0.2)), BOTH),
    "LeakyReLU in place": (lambda: between(nn.LeakyReLU(0.2, inplace=True)), BOTH),
    "SiLU": (lambda: between(nn.SiLU()), BOTH),
    "ELU in place": (lambda: between(nn.ELU(inplace=True)), BOTH),
    "dropout": (lambda: between(nn.Dropout(0.4)), BOTH),
    "dropout in place": (lambda: between(nn.Dropout(0.4, inplace=True)), BOTH),
    "ReLU and dropout": (lambda: between(nn.ReLU(), nn.Dropout(0.4)), BOTH),
    "dropout in place behind hidden layers": (
        lambda: between(nn.ReLU(), nn.Linear(6, 6), nn.Dropout(0.4, inplace=True)),
        BOTH,
    ),
    "dropout between hidden layers": (
        lambda: between(nn.ReLU(), nn.Dropout(0.4), nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.4)),
        BOTH,
    ),
    "BatchNorm": (lambda: between(nn.BatchNorm1d(6), nn.ReLU()), BOTH),
    "BatchNorm behind ReLU": (lambda: between(nn.ReLU(), nn.BatchNorm1d(6)), BOTH),
    "LayerNorm": (lambda: between(nn.LayerNorm(6), nn.GELU()), BOTH),
    "Softmax in front of the last": (lambda: between(nn.Softmax(-1)), BOTH),
    "Hardtanh in place": (lambda: between(nn.Hardtanh(-0.1, 0.5, inplace=True)), BOTH),
    "Identity": (lambda: between(nn.Identity()), BOTH),
    "Identity behind ReLU": (lambda: between(nn.ReLU(), nn.Identity()), BOTH),
    "a Sequential inside": (lambda: between(nn.Sequential(nn.Tanh(), nn.Linear(6, 6))), BOTH),
    "the first alone": (
        lambda: nn.Sequential(nn.Linear(7, 2), nn.Tanh()),
        "first layer fused: begins with a linear layer",
    ),
    "the first alone, hidden": (
        lambda: nn.Sequential(nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU()),
        "first layer fused: begins with a linear layer",
    ),
    "the last alone": (
        lambda: nn.Sequential(nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 2)),
        "last layer fused: its first layer: LayerNorm is not nn.Linear",
    ),
    "dropout first": (
        lambda: nn.Sequential(nn.Dropout(0.4), nn.Linear(7, 2)),
        "last layer fused: its first layer: Dropout is not nn.Linear",
    ),
    "ReLU first": (
        lambda: nn.Sequential(nn.ReLU(), nn.Linear(7, 2)),
        "last layer fused: its first layer: ReLU is not nn.Linear",
    ),
}


def make(*kinds: str, dtype=torch.float64, lambda_=0.6, as_predictors=True, **options) -> AdversarialHeads:
    """Each of the kinds as a predictor and as an adversary."""
    made = {name: HEADS[kind][0]() for name, kind in zip("abcdefgh", kinds, strict=False)}
    adversaries = {name: HEADS[kind][0]() for name, kind in zip("pqrstuvw", kinds, strict=False)}
    return AdversarialHeads(7, made if as_predictors else None, adversaries, lambda_=lambda_, **options).to(dtype)


def sizes(heads) -> dict[str, int]:
    layers = {name: [m for m in module.modules() if isinstance(m, nn.Linear)] for name, module in both(heads).items()}
    return {name: own[-1].out_features for name, own in layers.items()}


def both(heads) -> dict[str, nn.Module]:
    return {**heads.predictors, **heads.adversaries}


def batch(heads, leading=(6,), dtype=torch.float64):
    x = torch.randn(*leading, 7, dtype=dtype, requires_grad=True)
    return x, {name: torch.randint(max(2, size), leading) for name, size in sizes(heads).items()}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", HEADS)
def test_each_kind_equals_its_modules_with_gradient_penalties(kind, training):
    heads = make(kind).train(training)
    assert f"(a) {HEADS[kind][1]}\n" in repr(heads) and f"(p) {HEADS[kind][1]}\n" in repr(heads)
    x, targets = batch(heads)
    for statistics in (m for m in heads.modules() if isinstance(m, nn.BatchNorm1d)):
        statistics.momentum = 0.0  # so that two runs are alike
    check_heads(heads, x, targets)
    check_heads(heads, x, {"p": targets["p"]})


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_all_kinds_stand_beside_each_other(training):
    """Their random numbers come in the order of the heads, as from the modules."""
    some = ["dropout", "dropout in place behind hidden layers", "ReLU", "Tanh", "dropout first", "wide", "BatchNorm"]
    heads = make(*some).train(training)
    heads.add_adversary("linear", 2, 0.3, dtype=torch.float64)
    heads.predictors["linear too"] = nn.Linear(7, 3).double()
    for statistics in (m for m in heads.modules() if isinstance(m, nn.BatchNorm1d)):
        statistics.momentum = 0.0
    x, targets = batch(heads)
    check_heads(heads, x, targets)


@pytest.mark.parametrize("kind", ["BatchNorm", "a discriminator"])
def test_statistics_are_learnt_as_by_the_modules(kind):
    heads = make(kind)
    other = copy.deepcopy(heads)
    x, targets = batch(heads)
    heads(x, targets).loss.backward()
    logits_of_modules(other, x)
    for (name, ours), theirs in zip(heads.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    assert any("num_batches" in name and buffer == 1 for name, buffer in heads.named_buffers())


@pytest.mark.parametrize("kind", ["ReLU", "two hidden layers", "Tanh", "dropout first", "dropout in place"])
@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (2, 0, 3), (2, 1, 3, 2), (130,)], ids=str)
def test_the_features_may_have_any_leading_sizes(kind, leading):
    heads = make(kind)
    x, targets = batch(heads, leading)
    if x.numel():
        check_heads(heads, x, targets)
        return
    logits, out = heads(x), heads(x, targets)
    for name, z in logits.items():
        assert z.shape == out.logits[name].shape == (*leading, sizes(heads)[name])
        assert out.head_losses[name].item() == 0
    gradients = torch.autograd.grad(out.loss + sum(z.sum() for z in logits.values()), [x, *heads.parameters()])
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["ReLU", "three hidden layers", "Tanh", "LayerNorm", "wide", "the last alone"])
def test_every_dtype_is_that_of_the_modules(kind, dtype):
    heads = make(kind, dtype=dtype)
    x, targets = batch(heads, (33,), dtype)
    out = heads(x, targets)
    assert {z.dtype for z in [*out.logits.values(), *heads(x).values()]} == {dtype}
    assert out.loss.dtype == torch.promote_types(dtype, torch.float32)
    out.loss.backward()
    assert {t.grad.dtype for t in (x, *heads.parameters())} == {dtype}
    exact = copy.deepcopy(heads).double()
    exact.zero_grad()
    wide = x.detach().double().requires_grad_()
    logits = logits_of_modules(exact, wide)
    losses = losses_of_modules(exact, logits, targets)
    sum(losses.values()).backward()
    # Some ten roundings to the type itself, each of them of a number of the largest one's size.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    pairs = [(out.logits[name], z) for name, z in logits.items()]
    pairs += [(a.grad, b.grad) for a, b in zip((x, *heads.parameters()), (wide, *exact.parameters()), strict=True)]
    for ours, theirs in pairs:
        # The terms of a sum over the rows, which may cancel, are of the size 1 / 33.
        assert (ours.double() - theirs).abs().max() <= tolerance * max(theirs.abs().max(), 1 / 33)


@pytest.mark.parametrize("kind", ["ReLU", "three hidden layers", "Tanh", "the last alone"])
def test_heads_run_under_autocast_as_their_modules(kind):
    heads = make(kind, dtype=torch.float32)
    x, targets = batch(heads, (33,), torch.float32)
    inputs = [x, *heads.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        out, logits = heads(x, targets), heads(x)
        exact = logits_of_modules(heads, x)
        loss = sum(losses_of_modules(heads, {n: z.float() for n, z in exact.items()}, targets).values())
    assert {z.dtype for z in (*out.logits.values(), *logits.values())} == {torch.bfloat16}
    assert out.loss.dtype == torch.float32
    for name, z in exact.items():
        torch.testing.assert_close(out.logits[name], z)
        torch.testing.assert_close(logits[name], z)
    for ours, theirs in zip(torch.autograd.grad(out.loss, inputs), torch.autograd.grad(loss, inputs), strict=True):
        assert ours.dtype == torch.float32
        # Of a bias they are sums over rows whose terms cancel.
        assert (ours - theirs).abs().max() <= 0.05 * max(theirs.abs().max().item(), 0.01)


FROZEN = {
    "the features": lambda heads, x: x.requires_grad_(False),
    "the first layers": lambda heads, x: [m[0].requires_grad_(False) for m in both(heads).values()],
    "the last layers": lambda heads, x: [m[-1].requires_grad_(False) for m in both(heads).values()],
    "all weights": lambda heads, x: [p.requires_grad_(False) for n, p in heads.named_parameters() if "weight" in n],
    "all biases": lambda heads, x: [p.requires_grad_(False) for n, p in heads.named_parameters() if "bias" in n],
    "all but the last bias": lambda heads, x: [
        p.requires_grad_(m[-1].bias is p) for m in both(heads).values() for p in m.parameters()
    ],
    "all parameters": lambda heads, x: heads.requires_grad_(False),
    "the predictors": lambda heads, x: heads.predictors.requires_grad_(False),
}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("kind", ["ReLU", "two hidden layers", "three hidden layers", "Tanh", "nothing between"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(kind, frozen):
    heads = make(kind)
    x, targets = batch(heads)
    FROZEN[frozen](heads, x)
    wanted = [t for t in (x, *heads.parameters()) if t.requires_grad]
    results = []
    for loss in (
        heads(x, targets).loss + heads(x)["p"].sin().sum(),
        sum(losses_of_modules(heads, logits_of_modules(heads, x), targets).values())
        + logits_of_modules(heads, x)["p"].sin().sum(),
    ):
        results.append(torch.autograd.grad(loss, wanted, allow_unused=True))
        heads.zero_grad()
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)
    heads(x, targets).loss.backward()
    assert all((t.grad is not None) == t.requires_grad for t in (x, *heads.parameters()))


@pytest.mark.parametrize("kind", ["three hidden layers", "two hidden layers"])
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_any_one_layer_may_be_frozen(kind, layer):
    heads = make(kind)
    for module in both(heads).values():
        module[layer].requires_grad_(False)
    check_heads(heads, *batch(heads))


# --- hidden layers, which are a node of their own
# ---------------------------------------------------------------------------------


HIDDEN = ["ReLU", "two hidden layers", "three hidden layers", "the first alone, hidden"]
on_hidden = pytest.mark.parametrize("kind", HIDDEN)


def gradients(output, inputs, **options):
    given = torch.autograd.grad(output, inputs, allow_unused=True, **options)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, given, strict=True)]


@on_hidden
@pytest.mark.parametrize("rows", [6, 2048])  # from 1024 rows on a gradient is written over the layer's output
def test_a_retained_graph_gives_the_same_gradients_again(kind, rows):
    heads = make(kind)
    x, targets = batch(heads, (rows,))
    inputs = [x, *heads.parameters()]
    for output in (heads(x, targets).loss, sum(z.sin().sum() for z in heads(x).values())):
        first = gradients(output, inputs, retain_graph=True)
        kept = [g.clone() for g in first]
        second = gradients(output, inputs, retain_graph=True)
        for g in first:
            g.zero_()  # whoever got a gradient may write into it
        for a, b, c in zip(second, gradients(output, inputs), kept, strict=True):
            assert_same(a, c)
            assert_same(b, c)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            output.backward()


@on_hidden
@pytest.mark.parametrize("rows", [6, 2048])
def test_a_gradient_of_a_gradient_does_not_depend_on_what_came_before(kind, rows):
    heads = make(kind)
    x, targets = batch(heads, (rows,))
    inputs = [x, *heads.parameters()]

    def second(loss):
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        return gradients(sum(g.square().sum() for g in first), inputs)

    expected = second(heads(x, targets).loss)
    loss = heads(x, targets).loss
    gradients(loss, inputs, retain_graph=True)
    for a, b in zip(second(loss), expected, strict=True):
        torch.testing.assert_close(a, b)


@on_hidden
@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
def test_batched_gradients_are_the_gradients_one_by_one(kind, how):
    heads = make(kind)
    x, targets = batch(heads)
    inputs = [x, *heads.parameters()]
    for outputs in ([heads(x, targets).loss], list(heads(x, targets).logits.values()), list(heads(x).values())):
        grads = [torch.randn(3, *y.shape, dtype=y.dtype) for y in outputs]

        def pull(*given, outputs=outputs):
            return torch.autograd.grad(outputs, inputs, given, retain_graph=True, materialize_grads=True)

        if how == "vmap":
            batched = torch.func.vmap(pull)(*grads)
        else:
            batched = torch.autograd.grad(
                outputs, inputs, grads, is_grads_batched=True, retain_graph=True, allow_unused=True
            )
        single = [pull(*(g[i] for g in grads)) for i in range(3)]
        for a, b in zip(batched, map(torch.stack, zip(*single, strict=True)), strict=True):
            torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)


@on_hidden
def test_saved_tensors_may_be_kept_elsewhere(kind):
    heads = make(kind)
    x, targets = batch(heads, (2048,))
    inputs = [x, *heads.parameters()]

    def value():
        return heads(x, targets).loss + sum(z.sin().sum() for z in heads(x).values())

    expected = gradients(value(), inputs)
    kept = []
    for hooks in (
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t.clone(), lambda t: t),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy),
    ):
        with hooks:
            output = value()
        for retain in (True, False):
            for a, b in zip(gradients(output, inputs, retain_graph=retain), expected, strict=True):
                torch.testing.assert_close(a, b)
    assert kept


@on_hidden
def test_whoever_keeps_what_a_hook_unpacks_finds_it_unchanged(kind):
    """The backward may write over what it saved, but not over what somebody else can see."""
    heads = make(kind, as_predictors=False)
    x, targets = batch(heads, (2048,))
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append((t, t.clone())) or t, lambda t: t):
        loss = heads(x, targets).loss
    loss.backward()
    assert packed
    for kept, before in packed:
        assert_same(kept.detach(), before.detach())


@on_hidden
@pytest.mark.parametrize("rows", [6, 2048])
def test_whoever_keeps_the_hidden_layers_output_or_its_gradient_finds_it_unchanged(kind, rows):
    class Keep(nn.Module):
        def forward(self, x):
            outputs.append((x, x.detach().clone()))
            x.register_hook(lambda g: grads.append((g, g.clone())))
            return x.view_as(x)

    heads = make(kind)
    for module in both(heads).values():
        module.insert(len(module) - isinstance(module[-1], nn.Linear), Keep())
    outputs, grads = [], []
    x, targets = batch(heads, (rows,))
    heads(x, targets).loss.backward()
    sum(z.sin().sum() for z in heads(x).values()).backward()
    assert len(outputs) == len(grads) == 4
    for kept, before in (*outputs, *grads):
        assert_same(kept.detach(), before)


@on_hidden
@pytest.mark.parametrize(
    "changed", [0, 1, 2, -1], ids=["the features", "a first weight", "a first bias", "the last parameter"]
)
def test_what_changes_before_the_backward_is_an_error_or_makes_no_difference(kind, changed):
    heads = make(kind)
    x, targets = batch(heads)
    expected = gradients(heads(x, targets).loss, [x, *heads.parameters()])
    features = x * 1
    loss = heads(features, targets).loss
    with torch.no_grad():
        ([features, *heads.parameters()][changed]).add_(1)
    try:
        found = gradients(loss, [x, *heads.parameters()])
    except RuntimeError as error:
        assert "modified by an inplace" in str(error) or "modified inplace" in str(error)
    else:
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


class Double(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        return x.mul_(2).add_(1) if self.inplace else 2 * x + 1


WRITERS = {
    "dropout": lambda inplace: nn.Dropout(0.4, inplace),
    "LeakyReLU": lambda inplace: nn.LeakyReLU(0.2, inplace),
    "hardtanh": lambda inplace: nn.Hardtanh(0.1, 0.5, inplace),
    "ELU": lambda inplace: nn.ELU(inplace=inplace),
    "another": Double,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("rows", [6, 2048])
@on_hidden
def test_what_writes_over_the_hidden_layers_output_is_an_error_or_right(kind, writer, rows):
    """An error as behind nn.ReLU, whose gradient needs its output. What is returned is right."""
    heads = make(kind, as_predictors=False)
    module = heads.adversaries["p"]
    place = len(module) - isinstance(module[-1], nn.Linear)
    module.insert(place, WRITERS[writer](False))
    exact = copy.deepcopy(heads)
    module[place] = WRITERS[writer](True)
    x, targets = batch(heads, (rows,))
    for f in (lambda own: own(x, targets).loss, lambda own: own(x)["p"].sin().sum()):
        torch.manual_seed(0)
        ours = f(heads)
        torch.manual_seed(0)
        theirs = f(exact)
        torch.testing.assert_close(ours, theirs)
        try:
            found = torch.autograd.grad(ours, [x, *heads.parameters()])
        except RuntimeError as error:
            assert "modified by an inplace" in str(error)
        else:
            for a, b in zip(found, torch.autograd.grad(theirs, [x, *exact.parameters()]), strict=True):
                torch.testing.assert_close(a, b)


# --- compiled, and recomputed
# --------------------------------------------------------------------------------------------------


def test_compiled_autograd_takes_hidden_layers():
    heads = make("three hidden layers", "the first alone, hidden", as_predictors=False)
    x, targets = batch(heads)
    inputs = [x, *heads.parameters()]

    def value():
        return heads(x, targets).loss + sum(z.sin().sum() for z in heads(x).values())

    expected = gradients(value(), inputs)
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        value().backward()
    torch._dynamo.reset()
    for t, g in zip(inputs, expected, strict=True):
        torch.testing.assert_close(t.grad, g)


def test_compiled_heads_are_one_graph():
    heads = make("three hidden layers", "the first alone, hidden", "Tanh", "the last alone", as_predictors=False)
    x, targets = batch(heads)
    inputs = [x, *heads.parameters()]

    def step(x):
        return heads(x, targets).loss + sum(z.sin().sum() for z in heads(x).values())

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x))
    for a, b in zip(gradients(compiled(x), inputs), gradients(step(x), inputs), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


SAVED = {
    "all but PyTorch's own": lambda op: op.namespace == "grl_ext",
    "the loss": lambda op: op.name() == "grl_ext::_heads_loss",
    "the logits": lambda op: op.name() == "grl_ext::_heads_logits",
    "the losses' and PyTorch's products": lambda op: op.name() in ("grl_ext::_heads_loss", "aten::mm", "aten::addmm"),
    "everything": lambda op: True,
    "nothing": lambda op: False,
}


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("how", ["loss", "head losses", "logits"])
def test_a_selective_checkpoint_gives_the_gradients_whatever_it_keeps(saved, how):
    """No operator writes into what another returned, which the checkpoint may have kept."""
    given = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    heads = AdversarialHeads(7, {"a": 5}, {"b": [6, 2], "c": [6, 5, 2], "d": given, "e": 2}, lambda_=0.5).double()
    x, targets = batch(heads)
    inputs = [x, *heads.parameters()]

    def f(x):
        z = x.tanh()
        if how == "logits":
            return sum(own.sin().sum() for own in heads(z).values())
        out = heads(z, targets)
        return 3 * out.loss if how == "loss" else out.loss + out.head_losses["b"] + 2 * out.head_losses["a"]

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if SAVED[saved](op) else CheckpointPolicy.PREFER_RECOMPUTE

    expected = gradients(f(x), inputs)
    loss = checkpoint(f, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
    for a, b in zip(gradients(loss, inputs), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_heads_run_where_saved_tensors_may_be_written_over():
    heads = make("ReLU", "three hidden layers", "Tanh", "dropout first", "the first alone, hidden").eval()
    heads.add_adversary("linear", 2, 0.5, dtype=torch.float64)
    x, targets = batch(heads)
    inputs = [x, *heads.parameters()]

    def values():
        return heads(x, targets).loss, sum(z.sin().sum() for z in heads(x).values())

    expected = [gradients(value, inputs) for value in values()]
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        for value, exact in zip(values(), expected, strict=True):
            for retain in (True, False):
                for a, b in zip(gradients(value, inputs, retain_graph=retain), exact, strict=True):
                    torch.testing.assert_close(a, b)
        features = x * 1
        value = heads(features, targets).loss + sum(z.sin().sum() for z in heads(features).values())
        with torch.no_grad():
            features.zero_()  # what the mode is for
        for a, *b in zip(gradients(value, inputs), *expected, strict=True):
            torch.testing.assert_close(a, sum(b))


# --- memory
# --------------------------------------------------------------------------------------------------------------------


def peak(step) -> int:
    """The most bytes that a step holds at once beyond what was there."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    now = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("path", ["compiled"], indirect=True)
@pytest.mark.parametrize("sizes", [(64, 2), (64, 64, 2), (64, 64, 64, 2)], ids=str)
def test_a_step_over_hidden_layers_holds_one_output_for_each_and_one_gradient(path, sizes):
    """PyTorch's modules hold one more: the input of a ReLU, or its gradient beside that of the layer."""
    rows = 4096
    heads = AdversarialHeads(16, None, {"domain": list(sizes)})
    module = heads.adversaries["domain"]
    x, target = torch.randn(rows, 16, requires_grad=True), torch.randint(2, (rows,))

    def step(loss):
        heads.zero_grad()
        x.grad = None
        loss().backward()

    one = rows * 64 * 4
    ours = peak(lambda: step(lambda: heads(x, {"domain": target}).loss))
    theirs = peak(lambda: step(lambda: F.cross_entropy(module(gradient_reversal(x)), target)))
    hidden = len(sizes) - 1
    assert ours <= (hidden + 1.3) * one and ours <= theirs


# --- the same module more than once, and numbers that are not finite
# -------------------------------------------------------------------


def test_one_layer_may_serve_in_several_places():
    shared = nn.Linear(7, 7)
    relu = nn.ReLU()
    module = nn.Sequential(shared, relu, shared, relu, shared, relu, nn.Linear(7, 2))
    other = nn.Sequential(shared, relu, shared)
    heads = AdversarialHeads(7, {"a": module, "c": other}, {"p": module}, lambda_=0.6).double()
    x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(2, (6,))
    check_heads(heads, x, {"a": labels, "p": labels, "c": labels})


def test_infinite_features_give_what_the_modules_give():
    heads = make("two hidden layers")
    x, targets = batch(heads)
    with torch.no_grad():
        x[1, 2] = float("inf")
        x[3] = float("nan")
    ours, theirs = heads(x), {name: module(x) for name, module in both(heads).items()}
    for name, z in theirs.items():
        torch.testing.assert_close(ours[name], z, equal_nan=True)
    keep = torch.tensor([True, False, True, False, True, True])
    weights = keep.double()
    out = heads(x, targets, sample_weight=weights)
    for name, z in theirs.items():
        torch.testing.assert_close(out.head_losses[name], F.cross_entropy(z[keep], targets[name][keep]))
