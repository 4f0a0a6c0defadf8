"""What users do to a layer works on each head: parameter groups, freezing, norms, pruning, wrappers, hooks, sharing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from head_samples import reversal
from samples import assert_same
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from grl_ext import AdversarialHeads

pytestmark = pytest.mark.usefixtures("path")


@pytest.fixture
def x():
    return torch.randn(6, 7, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def targets():
    return {"digit": torch.randint(3, (6,)), "domain": torch.randint(2, (6,))}


def make(adversary=2, **options) -> AdversarialHeads:
    return AdversarialHeads(7, {"digit": 3}, {"domain": adversary}, lambda_=0.5, **options).double()


def expected_loss(heads, x, targets):
    z = {"digit": heads.predictors["digit"](x), "domain": heads.adversaries["domain"](reversal(x, 0.5))}
    return sum(F.cross_entropy(z[name], target) for name, target in targets.items())


def check(heads, x, targets):
    """The loss and all gradients are those of the modules called one by one."""
    inputs = [x, *(p for p in heads.parameters() if p.requires_grad)]
    expected = expected_loss(heads, x, targets)
    loss = heads(x, targets).loss
    torch.testing.assert_close(loss, expected)
    theirs = torch.autograd.grad(expected, inputs, retain_graph=True)
    for a, b in zip(torch.autograd.grad(loss, inputs, retain_graph=True), theirs, strict=True):
        torch.testing.assert_close(a, b)
    z = heads(x)
    of_logits = sum(F.cross_entropy(z[name], target) for name, target in targets.items())
    for a, b in zip(torch.autograd.grad(of_logits, inputs), theirs, strict=True):
        torch.testing.assert_close(a, b)


ADVERSARIES = {
    "linear": lambda: 2,
    "layers": lambda: [5, 2],
    "first layer": lambda: nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2)),
    "as given": lambda: nn.Sequential(nn.Tanh(), nn.Linear(7, 2)),
}
on_adversaries = pytest.mark.parametrize("adversary", ADVERSARIES)


# --- optimizers and freezing
# -----------------------------------------------------------------------------------------------


@on_adversaries
def test_each_head_has_its_own_parameter_group(x, targets, adversary):
    heads = make(ADVERSARIES[adversary]())
    groups = [
        {"params": heads.predictors.parameters()},
        {"params": heads.adversaries["domain"].parameters(), "lr": 3.0, "weight_decay": 0.1},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    before = copy.deepcopy(heads)
    heads(x, targets).loss.backward()
    gradients = [p.grad.clone() for p in heads.parameters()]
    optimizer.step()
    for (name, p), old, g in zip(heads.named_parameters(), before.parameters(), gradients, strict=True):
        rate, decay = (3.0, 0.1) if "adversaries" in name else (0.1, 0.0)
        torch.testing.assert_close(p.detach(), old - rate * (g + decay * old.detach()))


@on_adversaries
@pytest.mark.parametrize("frozen", ["predictors", "adversaries"])
def test_a_frozen_head_gets_no_gradient_and_still_shapes_the_features(x, targets, adversary, frozen):
    heads = make(ADVERSARIES[adversary]())
    getattr(heads, frozen).requires_grad_(False)
    check(heads, x, targets)
    heads(x, targets).loss.backward()
    for name, p in heads.named_parameters():
        assert (p.grad is None) == name.startswith(frozen)
    assert x.grad.any()


def test_a_frozen_layer_inside_a_head_gets_no_gradient(x, targets):
    for layer in (0, 2):
        heads = make([5, 2])
        heads.adversaries["domain"][layer].requires_grad_(False)
        check(heads, x, targets)


def test_a_head_that_trains_over_frozen_features_leaves_them_alone(targets):
    heads = make([5, 2])
    features = torch.randn(6, 7, dtype=torch.float64)
    heads(features, targets).loss.backward()
    assert features.grad is None and all(p.grad is not None for p in heads.parameters())


def test_the_adversarys_extra_steps_touch_nothing_else(x, targets):
    heads = make()
    heads(x.detach(), {"domain": targets["domain"]}).loss.backward()
    assert heads.predictors["digit"].weight.grad is None and heads.adversaries["domain"].weight.grad is not None


# --- parametrised and changed layers
# ---------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A parametrisation as torch.nn.utils.parametrize has it, such as a low-rank update."""

    def __init__(self, rows, columns):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(rows, 2)), nn.Parameter(torch.randn(2, columns))

    def forward(self, weight):
        return weight + self.a @ self.b


class LoRA(nn.Module):
    """A wrapper as the adapters of large models have it."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def old_weight_norm(layer):
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(layer)


CHANGES = {
    "weight norm": (parametrizations.weight_norm, "fused"),
    "weight norm, old": (old_weight_norm, "as given"),
    "spectral norm": (parametrizations.spectral_norm, "fused"),
    "spectral norm, old": (nn.utils.spectral_norm, "as given"),
    "orthogonal": (parametrizations.orthogonal, "fused"),
    "parametrised": (
        lambda layer: parametrize.register_parametrization(layer, "weight", LowRank(*layer.weight.shape)) and layer,
        "fused",
    ),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", amount=0.4), "as given"),
    "pruned for good": (
        lambda layer: prune.remove(prune.l1_unstructured(layer, "weight", amount=0.4), "weight"),
        "fused",
    ),
    "LoRA": (LoRA, "as given"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("where", ["linear", "first of several", "last of several"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_changed_layer_is_the_layer_that_is_used(x, targets, change, where):
    heads = make(2 if where == "linear" else [5, 2])
    domain = heads.adversaries["domain"]
    layer = domain if where == "linear" else domain[0 if "first" in where else 2]
    changed = CHANGES[change][0](layer)
    if where == "linear":
        heads.adversaries["domain"] = changed
    else:
        domain[0 if "first" in where else 2] = changed
    heads.double().eval()  # a power iteration would move the weight between two calls
    check(heads, x, targets)
    how = CHANGES[change][1]
    if how == "as given":
        how = {"first of several": "last layer fused", "last of several": "first layer fused"}.get(where, how)
    assert f"(domain) {how}" in repr(heads)
    optimizer = torch.optim.SGD([p for p in heads.parameters() if p.requires_grad], lr=0.1)
    before = heads(x)["domain"].detach()
    heads(x, targets).loss.backward()
    optimizer.step()
    assert not torch.equal(heads(x)["domain"], before)
    check(heads, x, targets)


def test_spectral_norm_takes_its_power_iteration_in_every_training_step(x, targets):
    heads = make()
    parametrizations.spectral_norm(heads.adversaries["domain"])
    u = heads.adversaries["domain"].parametrizations.weight[0]._u
    before = u.clone()
    heads(x, targets)
    assert not torch.equal(u, before)


@pytest.mark.parametrize("what", ["swap", "wrap", "set"])
def test_a_module_may_take_a_heads_place(x, targets, what):
    heads = make()
    if what == "swap":
        heads.adversaries["domain"] = nn.Linear(7, 2, bias=False).double()
    elif what == "wrap":
        heads.adversaries["domain"] = LoRA(heads.adversaries["domain"]).double()
    else:
        setattr(heads.adversaries, "domain", nn.Sequential(nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 2)).double())  # noqa: B010
    check(heads, x, targets)


def test_weights_may_be_replaced_and_tied(x, targets):
    heads = make()
    heads.adversaries["domain"].weight = nn.Parameter(torch.randn(2, 7, dtype=torch.float64))
    heads.predictors["digit"].bias = None
    check(heads, x, targets)
    other = make([7, 2])
    other.adversaries["domain"][0].weight = nn.Parameter(torch.randn(7, 7, dtype=torch.float64))
    check(other, x, targets)


def test_heads_with_and_without_bias_stand_beside_each_other(x, targets):
    check(make(nn.Linear(7, 2, bias=False)), x, targets)
    check(make(nn.Sequential(nn.Linear(7, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))), x, targets)


# --- hooks
# -----------------------------------------------------------------------------------------------------------------


HOOKS = {
    "forward": lambda module, seen: module.register_forward_hook(
        lambda m, args, output: seen.append("called") or output * 2
    ),
    "forward, always": lambda module, seen: module.register_forward_hook(
        lambda m, args, output: seen.append("called") or None, always_call=True
    ),
    "pre-forward": lambda module, seen: module.register_forward_pre_hook(
        lambda m, args: seen.append("called") or (args[0] * 2,)
    ),
    "backward": lambda module, seen: module.register_full_backward_hook(
        lambda m, gi, go: seen.append("called") or None
    ),
    "pre-backward": lambda module, seen: module.register_full_backward_pre_hook(
        lambda m, go: seen.append("called") or (go[0] * 2,)
    ),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("where", ["linear", "several layers", "its first layer", "its relu", "its last layer"])
def test_hooks_on_a_head_and_its_layers_fire_and_change_what_they_change(x, targets, hook, where):
    heads = make(2 if where == "linear" else [5, 2])
    domain = heads.adversaries["domain"]
    module = {
        "its first layer": lambda: domain[0],
        "its relu": lambda: domain[1],
        "its last layer": lambda: domain[2],
    }.get(where, lambda: domain)()
    seen = []
    handle = HOOKS[hook](module, seen)
    check(heads, x, targets)
    assert seen
    seen.clear()
    heads(x, targets).loss.backward()
    assert len(seen) == 1
    handle.remove()
    heads(x, targets).loss.backward()
    assert len(seen) == 1 and "(domain) fused" in repr(heads)


def test_hooks_for_all_modules_see_every_layer(x, targets):
    heads = make([5, 2])
    layers = [module for module in heads.modules() if isinstance(module, nn.Linear)]
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        check(heads, x, targets)
        seen.clear()
        heads(x, targets)
        assert all(any(module is layer for module in seen) for layer in layers)
        assert "as given: there are hooks for all modules" in repr(heads)
    finally:
        handle.remove()
    assert "as given" not in repr(heads)


def test_a_forward_that_was_replaced_is_the_one_that_runs(x, targets):
    heads = make()
    layer = heads.adversaries["domain"]
    layer.forward = lambda features: 3 * F.linear(features, layer.weight, layer.bias)
    check(heads, x, targets)
    assert "its forward was replaced" in repr(heads)


@pytest.mark.parametrize("with_targets", [False, True])
def test_hooks_on_the_heads_themselves_fire_for_logits_and_for_the_loss(x, targets, with_targets):
    heads = make()
    seen = []
    heads.register_forward_pre_hook(lambda m, args: seen.append("before"))
    heads.register_forward_hook(lambda m, args, output: seen.append(type(output).__name__))
    heads(x, targets) if with_targets else heads(x)
    assert seen == ["before", "HeadsOutput" if with_targets else "dict"]


@on_adversaries
def test_a_hook_on_the_features_sees_and_may_clamp_the_reversed_gradient(x, targets, adversary):
    heads = make(ADVERSARIES[adversary]())
    features = x * 1
    seen = []
    features.register_hook(lambda g: seen.append(g) or g.clamp(-1e-3, 1e-3))
    heads(features, targets).loss.backward()
    torch.testing.assert_close(seen[0], torch.autograd.grad(expected_loss(heads, x, targets), x)[0])
    assert x.grad.abs().max() <= 1e-3


@on_adversaries
def test_hooks_on_the_parameters_see_their_gradient(x, targets, adversary):
    heads = make(ADVERSARIES[adversary]())
    expected = torch.autograd.grad(expected_loss(heads, x, targets), list(heads.parameters()))
    seen = {}
    for name, p in heads.named_parameters():
        p.register_hook(lambda g, name=name: seen.update({name: g}))
    heads(x, targets).loss.backward()
    for (name, _), g in zip(heads.named_parameters(), expected, strict=True):
        torch.testing.assert_close(seen[name], g)


# --- modes and sharing
# -----------------------------------------------------------------------------------------------------


def test_train_and_eval_reach_the_heads(x, targets):
    heads = make(nn.Sequential(nn.Linear(7, 64), nn.Dropout(0.5), nn.Linear(64, 2)))
    assert not torch.equal(heads(x)["domain"], heads(x)["domain"])
    heads.eval()
    assert_same(heads(x)["domain"], heads(x)["domain"])
    check(heads, x, targets)


def test_batch_norm_in_a_head_learns_its_statistics_once_a_step(x, targets):
    heads = make(nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)))
    heads(x, targets)
    assert heads.adversaries["domain"][1].num_batches_tracked == 1
    heads(x, {"digit": targets["digit"]})
    assert heads.adversaries["domain"][1].num_batches_tracked == 1


def test_given_modules_are_used_and_not_copied(x):
    layer, network = nn.Linear(7, 3).double(), nn.Sequential(nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    heads = AdversarialHeads(7, {"digit": layer}, {"domain": network})
    assert heads.predictors["digit"] is layer and heads.adversaries["domain"] is network
    with torch.no_grad():
        layer.weight.zero_()
    assert_same(heads(x)["digit"], layer.bias.expand(6, 3))


def test_a_lazy_layer_is_made_by_its_first_batch(x, targets):
    heads = make(nn.LazyLinear(2))
    heads(x, targets).loss.backward()
    assert heads.adversaries["domain"].weight.shape == (2, 7)
    check(heads, x, targets)
    assert "(domain) fused" in repr(heads)
