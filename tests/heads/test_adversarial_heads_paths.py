"""How `AdversarialHeads` runs each head: fused, its first and its last layer fused, one of the two, or as given; mixed
freely, with the numbers of layer by layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from head_samples import SWITCH, logits_of_modules, reversal
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import assert_same
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from grl_ext import AdversarialHeads

pytestmark = pytest.mark.usefixtures("path")

# name: a head over 7 features with 2 outputs, and how it is run
HEADS = {
    "linear": (lambda: nn.Linear(7, 2), "fused: linear"),
    "no bias": (lambda: nn.Linear(7, 2, bias=False), "fused: linear"),
    "layers": (
        lambda: nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)),
        "fused: linear layers with ReLU",
    ),
    "wide layers": (
        lambda: nn.Sequential(nn.Linear(7, SWITCH + 1), nn.ReLU(), nn.Linear(SWITCH + 1, 2)),
        "fused: linear layers with ReLU",
    ),
    "one in a row": (lambda: nn.Sequential(nn.Linear(7, 2)), "fused: linear"),
    "no relu": (lambda: nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 2)), "fused: linear layers"),
    "tanh": (
        lambda: nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2)),
        "first and last layer fused: begins and ends with a linear layer",
    ),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Dropout(0.0), nn.Linear(5, 2)),
        "first and last layer fused: begins and ends with a linear layer",
    ),
    "relu at the end": (
        lambda: nn.Sequential(nn.Linear(7, 2), nn.ReLU()),
        "first layer fused: begins with a linear layer",
    ),
    "relu6": (
        lambda: nn.Sequential(nn.Linear(7, 5), nn.ReLU6(), nn.Linear(5, 2)),
        "first and last layer fused: begins and ends with a linear layer",
    ),
    "norm": (
        lambda: nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 2)),
        "first and last layer fused: begins and ends with a linear layer",
    ),
    "norm first": (
        lambda: nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 2)),
        "last layer fused: its first layer: LayerNorm is not nn.Linear",
    ),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(7, 5), nn.ReLU()), nn.Linear(5, 2)),
        "last layer fused: its first layer: Sequential is not nn.Linear",
    ),
    "module": (lambda: Custom(), "as given: Custom is not nn.Linear"),
    "subclass": (lambda: Doubled(7, 2), "as given: Doubled is not nn.Linear"),
    "sequential subclass": (lambda: Twice(nn.Linear(7, 2)), "as given: Twice is not nn.Sequential"),
    "sequential subclass without a forward": (
        lambda: Discriminator(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2)),
        "fused: linear layers with ReLU",
    ),
    "identity": (
        lambda: nn.Sequential(nn.Identity(), nn.Linear(7, 2)),
        "last layer fused: its first layer: Identity is not nn.Linear",
    ),
    "tanh at both ends": (
        lambda: nn.Sequential(nn.Tanh(), nn.Linear(7, 2), nn.Tanh()),
        "as given: its first layer: Tanh is not nn.Linear",
    ),
}


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(7, 2)

    def forward(self, x):
        return self.inner(x).sin()


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Discriminator(nn.Sequential):
    """As libraries of domain adaptation write theirs."""


class Twice(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + super().forward(x)


def build(predictors, adversaries, dtype=torch.float64, **options) -> AdversarialHeads:
    def made(kinds):
        return {f"{i} {kind}": HEADS[kind][0]() for i, kind in enumerate(kinds)}

    adversaries = {name.replace(" ", "-", 1): head for name, head in made(adversaries).items()}
    return AdversarialHeads(7, made(predictors), adversaries, **options).to(dtype)


def all_gradients(value, x, heads, **options):
    return torch.autograd.grad(value, [x, *heads.parameters()], allow_unused=True, **options)


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def check_like_the_layers(heads, x, target, names, **options):
    """Logits and loss, then several gradients of what is returned."""
    targets = dict.fromkeys(names, target)
    assert_equal(list(heads(x).values()), list(logits_of_modules(heads, x).values()))
    out = heads(x, targets, **options)
    z = logits_of_modules(heads, x, names)
    rows = options.get("sample_weight")
    losses = {name: F.cross_entropy(own, target, reduction="none") for name, own in z.items()}
    losses = {name: loss.mean() if rows is None else (loss * rows).sum() / rows.sum() for name, loss in losses.items()}
    assert list(out.logits) == list(out.head_losses) == list(z)
    torch.testing.assert_close(out.head_losses, losses)
    torch.testing.assert_close(out.logits, z)
    for f in (
        lambda total, losses, z: total,
        lambda total, losses, z: sum((i + 1) * loss for i, loss in enumerate(losses)),
        lambda total, losses, z: total + sum((own.softmax(-1) * own.log_softmax(-1)).sum() for own in z),
    ):
        ours = all_gradients(f(out.loss, out.head_losses.values(), out.logits.values()), x, heads, retain_graph=True)
        theirs = all_gradients(f(sum(losses.values()), losses.values(), z.values()), x, heads, retain_graph=True)
        assert_equal(ours, theirs)


@pytest.mark.parametrize("kind", HEADS)
def test_the_repr_says_how_each_head_is_run_and_why(kind):
    heads = build([kind], ["linear"])
    assert f"(0 {kind}) {HEADS[kind][1]}\n" in repr(heads)


@pytest.mark.parametrize("kind", HEADS)
def test_each_kind_equals_its_layers_as_predictor_and_as_adversary(kind):
    heads = build([kind], [kind, "linear"], lambda_=0.6)
    x, target = torch.randn(6, 7, dtype=torch.float64, requires_grad=True), torch.randint(2, (6,))
    check_like_the_layers(heads, x, target, heads.head_names)
    check_like_the_layers(heads, x, target, heads.head_names[1:2])


@settings(max_examples=50)
@given(data=st.data())
def test_any_mixture_of_heads_equals_the_layers(data):
    kinds = st.lists(st.sampled_from(list(HEADS)), max_size=4)
    predictors, adversaries = data.draw(kinds), data.draw(kinds)
    if not predictors and not adversaries:
        predictors = ["linear"]
    heads = build(predictors, adversaries)
    heads.lambda_ = {name: data.draw(st.sampled_from([0.0, 0.3, -1.5])) for name in heads.adversaries}
    names = [name for name in heads.head_names if data.draw(st.booleans())] or list(heads.head_names)
    leading = data.draw(st.sampled_from([(6,), (2, 3), (70,)]))
    x = torch.randn(*leading, 7, dtype=torch.float64, requires_grad=True)
    options = {"sample_weight": torch.rand(leading)} if data.draw(st.booleans()) else {}
    flat = {n: v.flatten() for n, v in options.items()}
    target = torch.randint(2, leading)
    check_like_the_layers(heads, x.flatten(0, -2) if len(leading) > 1 else x, target.flatten(), names, **flat)
    shaped = heads(x, dict.fromkeys(names, target), **options)
    torch.testing.assert_close(
        shaped.loss, heads(x.view(-1, 7), {name: target.flatten() for name in names}, **flat).loss
    )
    for name, z in shaped.logits.items():
        assert z.shape == (*leading, 2), name


def test_a_gradient_penalty_crosses_every_path_like_the_layers():
    heads = build(["linear", "tanh"], ["layers", "norm first", "no bias"], lambda_=0.6)
    x, target = torch.randn(6, 7, dtype=torch.float64, requires_grad=True), torch.randint(2, (6,))
    results = []
    for loss in (
        heads(x, dict.fromkeys(heads.head_names, target)).loss,
        sum(F.cross_entropy(z, target) for z in logits_of_modules(heads, x).values()),
    ):
        first = torch.autograd.grad(loss, [x, *heads.parameters()], create_graph=True)
        results.append(all_gradients(sum(g.square().sum() for g in first), x, heads))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(
            torch.zeros(()) if a is None else a.sum(), torch.zeros(()) if b is None else b.sum(), check_dtype=False
        )


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_of_lambda_zero_gives_the_features_nothing_whatever_it_holds(kind):
    heads = build(["linear"], [kind], lambda_=0.0)
    x, target = torch.randn(6, 7, dtype=torch.float64, requires_grad=True), torch.randint(2, (6,))
    alone = torch.autograd.grad(heads(x, {"0 linear": target}).loss, x)[0]
    with torch.no_grad():
        next(p for p in heads.adversaries.parameters() if p.dim() == 2)[0, 0] = float("inf")
    targets = dict.fromkeys(heads.head_names, target)
    torch.testing.assert_close(torch.autograd.grad(heads(x, targets).loss, x)[0], alone)
    of_logits = sum(z.sum() for z in heads(x).values())
    torch.testing.assert_close(
        torch.autograd.grad(of_logits, x)[0], heads.predictors["0 linear"].weight.sum(0).expand(6, 7).detach()
    )


def test_a_module_may_serve_as_predictor_and_as_adversary():
    shared = nn.Linear(7, 2, dtype=torch.float64)
    deep = nn.Sequential(shared, nn.ReLU(), nn.Linear(2, 2, dtype=torch.float64))
    for predictor, adversary in ((shared, shared), (shared, deep), (deep, deep)):
        heads = AdversarialHeads(7, {"a": predictor}, {"b": adversary}, lambda_=0.5)
        assert heads.predictors["a"] is predictor and heads.adversaries["b"] is adversary
        x, target = torch.randn(6, 7, dtype=torch.float64, requires_grad=True), torch.randint(2, (6,))
        check_like_the_layers(heads, x, target, ["a", "b"])


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_activation_checkpointing_of_the_heads(use_reentrant):
    heads = build(["linear"], ["layers", "tanh"], lambda_=0.5)
    x, target = torch.randn(6, 7, dtype=torch.float64, requires_grad=True), torch.randint(2, (6,))
    targets = dict.fromkeys(heads.head_names, target)
    expected = all_gradients(heads(x, targets).loss, x, heads)
    checkpoint(lambda x: heads(x, targets).loss, x, use_reentrant=use_reentrant).backward()
    assert_equal([x.grad, *(p.grad for p in heads.parameters())], expected)


# --- dim
# -------------------------------------------------------------------------------------------------------------------


class Pixels(nn.Module):
    """A head of 1x1 convolutions: it takes maps as they are."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(7, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1))

    def forward(self, x):
        return self.layers(x)


class Pooled(nn.Module):
    """One answer for each image."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(7, 2)

    def forward(self, x):
        return self.last(x.mean((2, 3)))


def maps(memory_format, n=2, height=3, width=4):
    x = torch.randn(n, 7, height, width, dtype=torch.float64).contiguous(memory_format=memory_format)
    return x.requires_grad_()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("dim", [1, -3])
def test_maps_keep_their_features_where_they_are(memory_format, dim):
    x, target = maps(memory_format), torch.randint(2, (2, 3, 4))
    modules = {"linear": 2, "layers": [5, 2], "tanh": HEADS["tanh"][0](), "pixels": Pixels()}
    heads = AdversarialHeads(7, {"digit": 2}, modules, lambda_=0.5, dim=dim).double()
    logits = heads(x)
    out = heads(x, dict.fromkeys(heads.head_names, target))
    assert list(out.logits) == list(heads.head_names)
    rows = x.movedim(1, -1)
    total = 0
    for name, z in logits.items():
        assert z.shape == out.logits[name].shape == (2, 2, 3, 4)
        module = {**heads.predictors, **heads.adversaries}[name]
        seen = x if name == "digit" else reversal(x, 0.5)
        expected = module(seen) if name == "pixels" else module(seen.movedim(1, -1)).movedim(-1, 1)
        torch.testing.assert_close(z, expected)
        torch.testing.assert_close(out.logits[name], expected)
        loss = F.cross_entropy(expected, target)
        torch.testing.assert_close(out.head_losses[name], loss)
        total = total + loss
    assert_equal(all_gradients(out.loss, x, heads, retain_graph=True), all_gradients(total, x, heads))
    assert f"dim={dim}" in repr(heads) and rows.shape[-1] == 7


@pytest.mark.parametrize("head", [1, [5, 1], "tanh", "pixels"], ids=str)
def test_maps_have_targets_of_every_form_in_the_same_place(head):
    x = maps(torch.contiguous_format)
    if isinstance(head, str):
        module = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1)) if head == "tanh" else nn.Conv2d(7, 1, 1)
        heads = AdversarialHeads(7, {"a": module}, dim=1).double()
    else:
        heads = AdversarialHeads(7, {"a": head}, dim=1).double()
    target = torch.randint(2, (2, 3, 4))
    z = heads(x)["a"]
    expected = F.binary_cross_entropy_with_logits(z[:, 0], target.double())
    for form in (target, target.double(), target[:, None], target.double()[:, None]):
        torch.testing.assert_close(heads(x, {"a": form}).loss, expected)
    weight = torch.rand(2, 3, 4)
    rows = F.binary_cross_entropy_with_logits(z[:, 0], target.double(), reduction="none")
    torch.testing.assert_close(heads(x, {"a": target}, sample_weight=weight).loss, (rows * weight).sum() / weight.sum())


def test_maps_have_probabilities_and_values_in_the_features_place():
    x = maps(torch.channels_last)
    heads = AdversarialHeads(7, {"a": 3, "b": [5, 3]}, {"c": nn.Conv2d(7, 3, 1)}, dim=1, losses={"b": "mse"}).double()
    soft, values = torch.randn(2, 3, 3, 4).softmax(1), torch.randn(2, 3, 3, 4)
    out = heads(x, {"a": soft, "b": values, "c": soft})
    z = heads(x)
    torch.testing.assert_close(out.head_losses["a"], F.cross_entropy(z["a"], soft.double()))
    torch.testing.assert_close(out.head_losses["b"], F.mse_loss(z["b"], values.double()))
    torch.testing.assert_close(out.head_losses["c"], F.cross_entropy(z["c"], soft.double()))


def test_a_head_may_answer_for_the_whole_map():
    x = maps(torch.contiguous_format)
    heads = AdversarialHeads(7, {"pixel": 3}, {"image": Pooled()}, dim=1, lambda_=0.5).double()
    pixel, image = torch.randint(3, (2, 3, 4)), torch.randint(2, (2,))
    out = heads(x, {"pixel": pixel, "image": image})
    torch.testing.assert_close(out.head_losses["image"], F.cross_entropy(heads.adversaries["image"](x), image))
    soft = torch.rand(2, 2).softmax(1)
    torch.testing.assert_close(
        heads(x, {"image": soft}).loss, F.cross_entropy(heads.adversaries["image"](x), soft.double())
    )


@pytest.mark.parametrize("how", ["hook", "subclass"])
@pytest.mark.parametrize("width", [4, 7], ids=["other width", "as wide as the features"])
def test_a_linear_layer_takes_the_features_however_it_is_run(how, width):
    # Where the maps are as wide as they have features, the wrong dimension would fit as well.
    x = maps(torch.contiguous_format, width=width)
    layer = nn.Linear(7, 2) if how == "hook" else Doubled(7, 2)
    deep = nn.Sequential(copy.deepcopy(layer), nn.Tanh())
    heads = AdversarialHeads(7, {"a": layer}, {"b": deep}, dim=1, lambda_=0.5).double()
    expected = {
        name: module(x.movedim(1, -1)).movedim(-1, 1)
        for name, module in {**heads.predictors, **heads.adversaries}.items()
    }
    seen = []
    if how == "hook":
        for module in (layer, deep[0]):
            module.register_forward_hook(lambda *_: seen.append(True))
    assert_equal(list(heads(x).values()), list(expected.values()))
    target = torch.randint(2, (2, 3, width))
    out = heads(x, {"a": target, "b": target})
    torch.testing.assert_close(out.logits, expected)
    assert len(seen) == (4 if how == "hook" else 0)


class Wrapper(nn.Module):
    """As peft, torch.compile, FSDP1 and checkpoint_wrapper make them."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, module)

    def forward(self, x):
        return getattr(self, self.name)(x)


@pytest.mark.parametrize(
    "name", ["base_layer", "original_module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
)
def test_a_wrapper_around_a_linear_layer_takes_the_features_as_the_layer_does(name):
    x = maps(torch.contiguous_format, width=7)
    heads = AdversarialHeads(7, {"a": 2}, {"b": [5, 2], "c": [5, 2]}, dim=1, lambda_=0.5).double()
    expected = heads(x)
    heads.predictors["a"] = Wrapper(name, heads.predictors["a"])
    heads.adversaries["b"] = Wrapper(name, heads.adversaries["b"])
    heads.adversaries["c"][0] = Wrapper(name, heads.adversaries["c"][0])
    assert [line for line in repr(heads).splitlines() if "fused" in line] == [
        "  (c) last layer fused: its first layer: Wrapper is not nn.Linear"
    ]
    torch.testing.assert_close(heads(x), expected)


def copies(step, size: int) -> int:
    """How often an operator inside the step got memory of this size."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    return sum(
        event.nbytes() == size for event in record.profiler.kineto_results.events() if event.name() == "[memory]"
    )


@pytest.mark.parametrize("path", ["compiled"], indirect=True)  # about the kernels' input
@pytest.mark.parametrize(
    "memory_format, expected", [(torch.channels_last, 0), (torch.contiguous_format, 1)], ids=["channels_last", "NCHW"]
)
@pytest.mark.parametrize("what", ["logits", "loss"])
def test_channels_last_maps_reach_the_kernels_without_a_copy(path, memory_format, expected, what):
    x = torch.randn(2, 64, 16, 32).contiguous(memory_format=memory_format)
    heads = AdversarialHeads(64, {"a": 3}, {"b": 2}, dim=1)
    target = torch.randint(2, (2, 16, 32))
    for p in heads.parameters():
        p.requires_grad_(False)
    step = (lambda: heads(x)) if what == "logits" else (lambda: heads(x, {"a": target, "b": target}))
    assert copies(step, x.nbytes) == expected


@pytest.mark.parametrize("path", ["compiled"], indirect=True)  # about the kernels' output
def test_the_gradient_of_channels_last_maps_is_in_channels_last(path):
    x = torch.randn(2, 64, 16, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
    heads = AdversarialHeads(64, {"a": 3}, {"b": 2}, dim=1)
    target = torch.randint(2, (2, 16, 32))
    dx = torch.autograd.grad(heads(x, {"a": target, "b": target}).loss, x)[0]
    assert dx.is_contiguous(memory_format=torch.channels_last)


def test_the_last_dimension_is_the_default_and_may_be_named():
    x, target = torch.randn(2, 3, 7), torch.randint(2, (2, 3))
    torch.manual_seed(0)
    heads = AdversarialHeads(7, {"a": 2})
    named = AdversarialHeads(7, {"a": 2}, dim=2)
    named.load_state_dict(heads.state_dict())
    assert_same(named(x)["a"], heads(x)["a"])
    assert_same(named(x, {"a": target}).loss, heads(x, {"a": target}).loss)
