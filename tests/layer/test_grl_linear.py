"""`grl_linear` and `GRLLinear`: what `Sequential(GRL, Linear)` computes, in every form of its arguments."""

import copy
import math
import pickle
import threading
import time

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from head_samples import DTYPES, SHAPES, SWITCH, assert_near, check_network, naive_linear, sample_linear, second_order
from samples import assert_same, case
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import prune

from grl_ext import GRL, GRLLinear, grl_linear

pytestmark = [pytest.mark.core, pytest.mark.sanitized, pytest.mark.usefixtures("path")]

# Over x of shape (5, 7).
LAMBDAS = {
    "float": lambda device: 0.3,
    "negative float": lambda device: -0.3,
    "zero": lambda device: 0.0,
    "0-d float32 on the CPU": lambda device: torch.tensor(0.3),
    "0-d float64": lambda device: torch.tensor(0.3, dtype=torch.float64, device=device),
    "0-d that requires grad": lambda device: torch.tensor(0.3, device=device, requires_grad=True),
    "one element": lambda device: torch.tensor([0.3], device=device),
    "per row": lambda device: torch.randn(5, 1, device=device),
    "per row, with zeros": lambda device: torch.tensor([[1.0], [0.0], [0.5], [0.0], [-1.0]], device=device),
    "per feature": lambda device: torch.randn(7, device=device),
    "full shape": lambda device: torch.randn(5, 7, device=device),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", LAMBDAS)
def test_equals_the_reversal_and_the_linear_layer(device, dtype, form):
    lambda_ = LAMBDAS[form](device)
    for bias in (True, False):
        inputs = sample_linear(device, dtype, bias=bias).inputs
        with case("bias" if bias else "no bias"):
            check_network(lambda *t: grl_linear(*t, lambda_), lambda *t: naive_linear(*t, lambda_), *inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 5, SWITCH, SWITCH + 1, 3 * SWITCH])
def test_narrow_and_wide_layers_equal_the_two_layers(device, dtype, columns):
    """The narrow ones in the heads' kernel, the others by matrix products."""
    for rows, features in SHAPES:
        inputs = sample_linear(device, dtype, (rows,), features, columns).inputs
        with case(rows, features):
            check_network(lambda *t: grl_linear(*t, 0.3), lambda *t: naive_linear(*t, 0.3), *inputs)


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (2, 0, 3), (2, 1, 3, 4)], ids=str)
def test_x_may_have_any_leading_sizes(device, leading):
    inputs = sample_linear(device, leading=leading).inputs
    for name, lambda_ in {
        "float": 0.3,
        "0-d": torch.tensor(0.3),
        "per row": torch.randn(*leading, 1),
        "full": torch.randn(*leading, 7),
    }.items():
        lambda_ = lambda_.to(device) if isinstance(lambda_, torch.Tensor) else lambda_
        with case(name):
            check_network(lambda *t: grl_linear(*t, lambda_), lambda *t: naive_linear(*t, lambda_), *inputs)  # noqa: B023


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)], ids=str)
def test_x_may_have_no_features(device, leading):
    check_network(
        lambda *t: grl_linear(*t, 0.3),
        lambda *t: naive_linear(*t, 0.3),
        *sample_linear(device, leading=leading, features=0).inputs,
    )


@pytest.mark.parametrize(
    "layout",
    [lambda t: t.T.contiguous().T, lambda t: torch.stack([t, t], -1)[..., 0], lambda t: t[:1].expand_as(t)],
    ids=["transposed", "strided", "expanded"],
)
def test_x_and_weight_may_lie_in_memory_in_any_way(device, layout):
    x, weight, bias = (layout(t) if t.dim() == 2 else t for t in (t.detach() for t in sample_linear(device).inputs))
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    for lambda_ in (0.3, torch.randn(5, 1, device=device)):
        check_network(lambda *t: grl_linear(*t, lambda_), lambda *t: naive_linear(*t, lambda_), *inputs)  # noqa: B023


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("lambda_", [0.3, torch.tensor(0.3), torch.full((5, 1), 0.3)], ids=["float", "0-d", "per row"])
def test_any_subset_of_inputs_may_be_frozen(device, frozen, lambda_):
    lambda_ = lambda_.to(device) if isinstance(lambda_, torch.Tensor) and lambda_.dim() else lambda_
    inputs = sample_linear(device).inputs
    for i in frozen:
        inputs[i].requires_grad_(False)
    check_network(lambda *t: grl_linear(*t, lambda_), lambda *t: naive_linear(*t, lambda_), *inputs)


def test_what_needs_no_gradient_is_not_held(device):
    # As for F.linear: features and weight may change where no gradient needs them.
    x, weight, bias = (t.detach().requires_grad_() * 1 for t in sample_linear(device).inputs)
    y = grl_linear(x, weight.detach(), bias, 0.3)
    x.add_(1)
    y.sum().backward()
    assert not grl_linear(x.detach(), weight.detach(), None, 0.3).requires_grad


# --- lambda = 0
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["float", "0-d", "0-d that requires grad", "per row", "full shape"])
def test_lambda_zero_gives_zeros_whatever_the_gradient_holds(device, form):
    lambda_ = {
        "float": 0.0,
        "0-d": torch.tensor(0.0, device=device),
        "0-d that requires grad": torch.tensor(0.0, device=device, requires_grad=True),
        "per row": torch.zeros(5, 1, device=device),
        "full shape": torch.zeros(5, 7, device=device),
    }[form]
    x, weight, bias = sample_linear(device).inputs
    grad = torch.randn(5, 5, device=device)
    grad[0], grad[1] = math.inf, math.nan
    assert_same(torch.autograd.grad(grl_linear(x, weight, bias, lambda_), x, grad)[0], torch.zeros_like(x))


def test_lambda_zero_gives_zeros_of_an_infinite_weight(device):
    x, weight, bias = sample_linear(device).inputs
    weight.data[0, 0] = math.inf
    for lambda_ in (
        0.0,
        torch.zeros((), device=device),
        torch.zeros((), device=device, requires_grad=True),
        torch.zeros(5, 1, device=device),
    ):
        assert_same(torch.autograd.grad(grl_linear(x, weight, bias, lambda_).sum(), x)[0], torch.zeros_like(x))


# --- autograd
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", LAMBDAS)
def test_second_order_gradients_are_those_of_the_two_layers(device, form):
    lambda_ = LAMBDAS[form](device)
    inputs = sample_linear(device, torch.float64).inputs
    ours = second_order(lambda *t: grl_linear(*t, lambda_).square().sum(), *inputs)
    for our, exact in zip(
        ours, second_order(lambda *t: naive_linear(*t, lambda_).square().sum(), *inputs), strict=True
    ):
        assert_near(our, exact, torch.float64)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated"
)  # PyTorch's own, on loading its jvp decompositions
def test_lambda_minus_one_is_the_linear_layer_for_the_numerical_checks(device):
    inputs = sample_linear(device, torch.float64).inputs
    for lambda_ in (-1.0, torch.tensor(-1.0, device=device), torch.full((5, 1), -1.0, device=device)):
        assert gradcheck(lambda *t: grl_linear(*t, lambda_), inputs, check_batched_grad=True)  # noqa: B023
        assert gradgradcheck(lambda *t: grl_linear(*t, lambda_), inputs, check_batched_grad=True)  # noqa: B023


@pytest.mark.parametrize("lambda_", [0.75, torch.tensor(0.75)], ids=["float", "0-d"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_is_that_of_the_two_layers(device, lambda_):
    inputs = [t.detach() for t in sample_linear(device, torch.float64).inputs]
    tangents = [torch.randn_like(t) for t in inputs]
    for which in ((0,), (1,), (2,), (0, 1, 2)):
        with fwAD.dual_level():
            duals = [
                fwAD.make_dual(t, v) if i in which else t for i, (t, v) in enumerate(zip(inputs, tangents, strict=True))
            ]
            ours, exact = (fwAD.unpack_dual(f(*duals, lambda_)).tangent for f in (grl_linear, naive_linear))
        assert ours is not None, f"the tangents of inputs {which} were lost"
        torch.testing.assert_close(ours, exact)


def test_no_gradient_reaches_lambda(device):
    inputs = sample_linear(device).inputs
    for shape in ((), (5, 1), (5, 7)):
        lambda_ = torch.ones(shape, device=device, requires_grad=True)
        grl_linear(*inputs, lambda_).square().sum().backward()
        assert lambda_.grad is None
    assert not grl_linear(*(t.detach() for t in inputs), lambda_).requires_grad


def test_a_graph_is_used_once_unless_retained(device):
    x, weight, bias = sample_linear(device).inputs
    loss = grl_linear(x, weight, bias, 0.75).sum()
    for times in (1, 2):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(x.grad, times * -0.75 * weight.detach().sum(0).expand_as(x))
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("changed", [0, 1], ids=["x", "weight"])
def test_inputs_that_the_backward_needs_must_not_change(device, changed):
    inputs = [t * 1 for t in sample_linear(device).inputs]
    loss = grl_linear(*inputs, 0.3).sum()
    inputs[changed].add_(1)
    # The plain path saves the reversal's view of x, for which PyTorch has another text.
    with pytest.raises(RuntimeError, match="modified (by an )?inplace"):
        loss.backward()


def test_vmap_over_a_graph_never_reads_memory_that_was_not_written(device):
    x, weight, _ = sample_linear(device).inputs
    y = grl_linear(x, weight, None, 0.5)
    grads = torch.randn(3, *y.shape, device=device)
    expected = torch.stack([torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in grads])
    for _ in range(50):
        torch.full((1, 1), math.nan, device=device)  # freed at once: what the next small tensor is made of
        batched = torch.func.vmap(lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0])(grads)
        torch.testing.assert_close(batched, expected)


# --- the layer
# -------------------------------------------------------------------------------------------------------------


def stock(layer: GRLLinear) -> nn.Sequential:
    """The two layers with the same weights."""
    linear = nn.Linear(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        dtype=layer.weight.dtype,
        device=layer.weight.device,
    )
    linear.load_state_dict({name: value for name, value in layer.state_dict().items() if name != "lambda_"})
    return nn.Sequential(GRL(layer.lambda_.item()).to(layer.weight.device), linear)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_layer_trains_like_the_two_layers_step_by_step(device, bias):
    layer = GRLLinear(7, 3, bias=bias, lambda_=0.75, device=device, dtype=torch.float64)
    features = nn.Linear(7, 7, device=device, dtype=torch.float64)
    networks = [nn.Sequential(features, layer), nn.Sequential(copy.deepcopy(features), stock(layer))]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in networks]
    for step in range(4):
        batch = torch.randn(5, 7, device=device, dtype=torch.float64)
        layer.lambda_ = networks[1][1][0].lambda_ = 0.25 * step
        losses = []
        for net, optimizer in zip(networks, optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(net(batch).square().mean())
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(losses[0], losses[1])
    for ours, theirs in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_layer_is_initialised_as_nn_linear(device):
    torch.manual_seed(1)
    layer = GRLLinear(7, 3, device=device)
    torch.manual_seed(1)
    linear = nn.Linear(7, 3, device=device)
    assert_same(layer.weight, linear.weight)
    assert_same(layer.bias, linear.bias)


def test_checkpoints_of_nn_linear_load_strictly_and_keep_lambda():
    layer, linear = GRLLinear(7, 3, lambda_=0.75), nn.Linear(7, 3)
    keys = layer.load_state_dict(linear.state_dict(), strict=True)
    assert not keys.missing_keys and not keys.unexpected_keys
    assert_same(layer.weight, linear.weight)
    assert layer.lambda_.item() == 0.75
    assert set(layer.state_dict()) == {"weight", "bias", "lambda_"}
    other = GRLLinear(7, 3)
    other.load_state_dict(layer.state_dict())
    assert other.lambda_.item() == 0.75
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bias"\.'):
        layer.load_state_dict({"weight": linear.weight}, strict=True)


def test_a_conversion_of_the_layer_leaves_lambda_alone(device):
    layer = GRLLinear(7, 3, lambda_=1 / 3).to(device).half()
    assert layer.weight.dtype == torch.float16
    assert layer.lambda_.dtype == torch.float64 and layer.lambda_.item() == 1 / 3
    x = torch.randn(5, 7, dtype=torch.float16, device=device, requires_grad=True)
    layer(x).sum().backward()
    exact = -1 / 3 * layer.weight.detach().double().sum(0).expand(5, 7)
    assert_near(x.grad, exact, torch.float16)


def test_device_and_dtype_are_those_asked_for(device):
    layer = GRLLinear(7, 3, device=device, dtype=torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert {t.device.type for t in layer.state_dict().values()} == {device.type}
    assert layer.lambda_.dtype == torch.float64
    on_meta = GRLLinear(7, 3, device="meta")
    assert (
        on_meta.weight.is_meta and on_meta.lambda_.item() == 1.0 and repr(on_meta).startswith("GRLLinear(in_features=7")
    )
    assert on_meta(torch.randn(5, 7, device="meta")).shape == (5, 3)


def swapped_by_isinstance(model: nn.Module) -> nn.Module:
    """What LoRA, float8 and quantisation wrappers do: every linear layer becomes one of theirs, which calls
    F.linear."""

    class Wrapped(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return F.linear(x, self.linear.weight, self.linear.bias)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            *path, last = name.split(".")
            setattr(model.get_submodule(".".join(path)), last, Wrapped(module))
    return model


def quantisation_aware(model: nn.Module) -> nn.Module:
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig()
    return torch.ao.quantization.prepare_qat(model.train())


def converted(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("swap", [swapped_by_isinstance, quantisation_aware, converted])
@pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated", "ignore:.*reduce_range", "ignore:.*are deprecated and will be removed"
)
def test_a_library_that_swaps_linear_layers_leaves_the_reversal(swap):
    model = nn.Sequential(nn.Linear(7, 7), GRLLinear(7, 3, lambda_=0.75))
    assert not isinstance(model[1], nn.Linear)
    model = swap(model)
    layer = model[1]
    assert type(layer) is GRLLinear and type(model[0]) is not nn.Linear
    x = torch.randn(5, 7, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, -0.75 * layer.weight.detach().sum(0).expand(5, 7))


def test_the_weight_can_be_parametrised_and_pruned(device):
    norms = nn.utils.parametrizations
    for wrap in (norms.weight_norm, norms.spectral_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)):
        layer = wrap(GRLLinear(7, 3, lambda_=0.75, device=device))
        x = torch.randn(5, 7, device=device, requires_grad=True)
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, -0.75 * layer.weight.detach().sum(0).expand(5, 7))


def test_other_threads_run_during_a_long_product():
    # A thread that counts makes no progress while another holds the interpreter's lock.
    x, weight = torch.randn(4096, 2048), torch.randn(2048, 2048)
    ticks, stop = [], threading.Event()

    def count():
        while not stop.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=count)
    thread.start()
    try:
        while len(ticks) < 3:
            time.sleep(0.001)
        start = time.perf_counter()
        for lambda_ in (0.3, torch.tensor(0.3)):
            grl_linear(x, weight, None, lambda_)
        end = time.perf_counter()
    finally:
        stop.set()
        thread.join()
    during = [start, *(t for t in ticks if start < t < end), end]
    longest = max(b - a for a, b in zip(during, during[1:], strict=False))
    assert longest < 0.5 * (end - start), f"nothing ran for {longest:.3f} of {end - start:.3f} s"


def test_repr_is_nn_linears_with_lambda():
    assert repr(GRLLinear(7, 3, lambda_=0.75)) == "GRLLinear(in_features=7, out_features=3, bias=True, lambda_=0.75)"
    assert repr(GRLLinear(7, 3, bias=False)) == "GRLLinear(in_features=7, out_features=3, bias=False, lambda_=1.0)"


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_its_own_lambda(how):
    layer = GRLLinear(7, 3, lambda_=0.75)
    other = how(layer)
    assert_same(other.weight, layer.weight)
    other.lambda_ = 0.25
    assert (layer.lambda_.item(), other.lambda_.item()) == (0.75, 0.25)
