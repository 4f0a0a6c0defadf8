"""`GRL`: what holds lambda, and what becomes of it on the way through a model's life."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from samples import assert_same
from torch import nn
from torch.func import functional_call

from grl_ext import GRL, AdversarialHeads, GRLLinear, heads_loss, linear_heads

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("path")]


def reversal_of(layer: nn.Module, *args) -> float:
    """The factor by which the layer multiplies a gradient."""
    x = torch.ones(2, 3, device=layer.lambda_.device, requires_grad=True)
    layer(x, *args).sum().backward()
    assert (x.grad == x.grad[0, 0]).all()
    return x.grad[0, 0].item()


def test_the_layer_is_the_identity_and_reverses_by_its_lambda(device):
    layer = GRL(0.75).to(device)
    x = torch.randn(2, 3, device=device, requires_grad=True)
    y = layer(x)
    assert_same(y, x)
    assert y.data_ptr() == x.data_ptr()
    assert reversal_of(layer) == -0.75
    assert reversal_of(GRL().to(device)) == -1.0


def test_the_layer_has_no_parameters_and_one_buffer():
    layer = GRL(0.75)
    assert not list(layer.parameters())
    assert {name: value.item() for name, value in layer.named_buffers()} == {"lambda_": 0.75}
    assert layer.lambda_.shape == () and not layer.lambda_.requires_grad


@pytest.mark.parametrize("mode", [nn.Module.train, nn.Module.eval], ids=["train", "eval"])
def test_the_mode_makes_no_difference(mode):
    assert reversal_of(mode(GRL(0.75))) == -0.75


# --- setting lambda
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        0.25,
        0,
        -2,
        True,
        np.float32(0.5),
        np.float64(0.1),
        np.array(0.25),
        np.array(3),
        torch.tensor(0.25),
        torch.tensor([0.25]),
        torch.tensor(3),
        torch.tensor(0.5, requires_grad=True),
        nn.Parameter(torch.tensor(0.5)),
    ],
    ids=[
        "float",
        "zero",
        "negative int",
        "bool",
        "numpy float32",
        "numpy float64",
        "numpy array",
        "numpy array of integers",
        "tensor",
        "tensor of shape [1]",
        "int tensor",
        "requires grad",
        "Parameter",
    ],
)
def test_assignment_sets_lambda_in_place(device, value):
    layer = GRL(0.75).to(device)
    buffer = layer.lambda_
    layer.lambda_ = value
    assert layer.lambda_ is buffer and list(layer._buffers) == ["lambda_"] and not list(layer.parameters())
    assert not buffer.requires_grad
    assert reversal_of(layer) == -torch.tensor(float(value)).item()


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        "0.5",
        None,
        1j,
        [0.5],
        np.zeros(2),
        torch.zeros(2),
        torch.zeros(2, 1),
        np.array(1j),
        np.zeros(1),
        torch.tensor(1j),
    ],
    ids=repr,
)
def test_a_refused_assignment_leaves_lambda_as_it_was(value):
    layer = GRL(0.75)
    buffer = layer.lambda_
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        layer.lambda_ = value
    assert layer.lambda_ is buffer and layer.lambda_.item() == 0.75 and layer.lambda_.dtype == torch.float64


def test_a_change_between_forward_and_backward_concerns_the_next_forward():
    layer = GRL(0.75)
    x = torch.ones(3, requires_grad=True)
    y = layer(x)
    layer.lambda_ = 0.25
    y.sum().backward()
    assert_same(x.grad, torch.full_like(x, -0.75))
    assert reversal_of(layer) == -0.25


def test_a_coefficient_given_to_the_call_overrides_lambda(device):
    layer = GRL(0.75).to(device)
    for coeff in (0.25, torch.tensor(0.25), torch.tensor(0.25, device=device), torch.full((2, 1), 0.25, device=device)):
        assert reversal_of(layer, coeff) == -0.25
    assert reversal_of(layer, 0.0) == 0.0
    assert reversal_of(layer) == -0.75


def test_functional_call_replaces_lambda_for_one_call():
    layer = GRL(0.75)
    x = torch.ones(3, requires_grad=True)
    functional_call(layer, {"lambda_": torch.tensor(0.25)}, (x,)).sum().backward()
    assert_same(x.grad, torch.full_like(x, -0.25))
    assert layer.lambda_.item() == 0.75


def test_lambda_keeps_the_precision_of_a_python_float():
    layer = GRL(0.1)
    assert layer.lambda_.item() == 0.1
    layer.lambda_ = 0.3
    assert layer.lambda_.item() == 0.3


# --- checkpoints
# -----------------------------------------------------------------------------------------------------------


def network(lambda_: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(GRL(lambda_), nn.Linear(3, 2)))


def test_the_state_dict_holds_lambda():
    assert list(network(0.75).state_dict()) == ["0.weight", "0.bias", "1.0.lambda_", "1.1.weight", "1.1.bias"]


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_checkpoint_restores_lambda(tmp_path, assign):
    torch.save(network(0.1).state_dict(), tmp_path / "checkpoint.pt")
    net = network(1.0)
    net.load_state_dict(torch.load(tmp_path / "checkpoint.pt"), strict=True, assign=assign)
    assert net[1][0].lambda_.item() == 0.1 and net[1][0].lambda_.dtype == torch.float64


def test_a_checkpoint_of_half_precision_or_of_one_element_restores_lambda():
    layer = GRL(1.0)
    for stored in (torch.tensor(0.75, dtype=torch.float16), torch.tensor([0.75])):
        layer.lambda_ = 1.0
        layer.load_state_dict({"lambda_": stored})
        assert layer.lambda_.item() == 0.75 and layer.lambda_.shape == () and layer.lambda_.dtype == torch.float64


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
def test_a_checkpoint_without_lambda_loads_strictly_and_keeps_it(nested):
    net = network(0.75) if nested else GRL(0.75)
    state = (
        {name: value for name, value in network(1.0).state_dict().items() if "lambda_" not in name} if nested else {}
    )
    keys = net.load_state_dict(state, strict=True)
    assert not keys.missing_keys and not keys.unexpected_keys
    assert (net[1][0] if nested else net).lambda_.item() == 0.75


def test_what_else_is_missing_is_still_reported():
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "1.1.weight"\.'):
        network(0.75).load_state_dict(
            {n: v for n, v in network(0.75).state_dict().items() if n not in ("1.0.lambda_", "1.1.weight")}
        )
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "coeff"\.'):
        GRL().load_state_dict({"coeff": torch.tensor(1.0)})


# --- copies
# ----------------------------------------------------------------------------------------------------------------


def _saved_and_loaded(layer, tmp_path):
    torch.save(layer, tmp_path / "layer.pt")
    return torch.load(tmp_path / "layer.pt", weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "copy and deepcopy of the state", "pickle", "torch.save"])
def test_a_copy_has_its_own_lambda(tmp_path, how):
    layer = GRL(0.75)
    other = {
        "deepcopy": lambda: copy.deepcopy(layer),
        "copy and deepcopy of the state": lambda: _with_state(GRL(), copy.deepcopy(layer.state_dict())),
        "pickle": lambda: pickle.loads(pickle.dumps(layer)),
        "torch.save": lambda: _saved_and_loaded(layer, tmp_path),
    }[how]()
    assert reversal_of(other) == -0.75
    other.lambda_ = 0.25
    assert reversal_of(other) == -0.25 and reversal_of(layer) == -0.75


def _with_state(layer, state):
    layer.load_state_dict(state)
    return layer


# --- conversions
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert",
    [
        nn.Module.half,
        nn.Module.bfloat16,
        nn.Module.float,
        nn.Module.double,
        lambda m: m.to(torch.float16),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.type(torch.float16),
        lambda m: m.to(torch.complex64),
    ],
    ids=["half", "bfloat16", "float", "double", "to(float16)", "to(bfloat16)", "type(float16)", "to(complex64)"],
)
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_a_conversion_of_the_model_leaves_lambda_alone(convert):
    # 1/3 in float64 is in no narrower type.
    net = network(1 / 3)
    buffer = net[1][0].lambda_
    net = convert(net)
    layer = net[1][0]
    assert layer.lambda_ is buffer and layer.lambda_.dtype == torch.float64 and layer.lambda_.item() == 1 / 3


def test_lambda_moves_with_the_model(device):
    layer = network(0.75).to(device)[1][0]
    assert layer.lambda_.device.type == device.type and layer.lambda_.dtype == torch.float64
    assert reversal_of(layer) == -0.75
    assert layer.to("cpu").lambda_.device.type == "cpu"


def test_a_half_precision_layer_reverses_half_precision_features(device):
    layer = GRL(0.75).to(device).half()
    x = torch.ones(3, dtype=torch.float16, device=device, requires_grad=True)
    layer(x).sum().backward()
    assert_same(x.grad, torch.full_like(x, -0.75))


def test_shared_memory_is_shared():
    layer = GRL(0.75).share_memory()
    assert layer.lambda_.is_shared()


# --- the meta device
# -------------------------------------------------------------------------------------------------------


def in_meta_context(make):
    with torch.device("meta"):
        return make()


def forced_to_meta(make):
    """As accelerate's init_empty_weights(include_buffers=True) does to every buffer that is registered."""
    module = make().to("meta")
    for m in module.modules():
        m._buffers.update({name: buffer.to("meta") for name, buffer in m._buffers.items()})
    return module


TO_META = {"context": in_meta_context, "to": lambda make: make().to("meta"), "forced": forced_to_meta}


@pytest.fixture(params=TO_META)
def to_meta(request):
    return TO_META[request.param]


@pytest.mark.parametrize("make", [lambda: GRL(0.75), lambda: GRLLinear(3, 3, lambda_=0.75)], ids=["GRL", "GRLLinear"])
def test_a_layer_from_meta_has_the_constructors_lambda(device, make, to_meta):
    layer = to_meta(make)
    assert repr(layer).startswith(type(layer).__name__)
    layer = layer.to_empty(device=device)
    assert (
        layer.lambda_.device.type == device.type
        and layer.lambda_.dtype == torch.float64
        and layer.lambda_.item() == 0.75
    )
    layer.lambda_ = 0.25
    assert layer.lambda_.item() == 0.25


def test_a_lambda_set_on_meta_is_not_lost(device, to_meta):
    layer = to_meta(lambda: GRL(0.75))
    layer.lambda_ = 0.25
    assert reversal_of(layer.to_empty(device=device)) == -0.25


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("present", [False, True], ids=["without lambda", "with lambda"])
@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")  # PyTorch's own, of the weights
def test_a_layer_on_meta_loads_a_checkpoint(to_meta, present, assign):
    state = {name: value for name, value in network(0.5).state_dict().items() if present or "lambda_" not in name}
    net = to_meta(lambda: network(0.75))
    net.load_state_dict(state, strict=True, assign=assign)
    lambda_ = net[1][0].lambda_
    assert (
        lambda_.device.type == "cpu" and lambda_.dtype == torch.float64 and lambda_.item() == (0.5 if present else 0.75)
    )


def test_a_checkpoint_on_meta_is_refused():
    with torch.device("meta"):
        state = {"lambda_": torch.empty(())}
    for assign in (False, True):
        layer = GRL(0.75)
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            layer.load_state_dict(state, assign=assign)
        assert layer.lambda_.item() == 0.75


def test_skip_init_keeps_lambda():
    layer = nn.utils.skip_init(GRLLinear, 3, 2, lambda_=0.75)
    assert layer.lambda_.item() == 0.75


def test_the_default_device_is_where_lambda_is_made(device):
    with torch.device(device):
        assert GRL().lambda_.device.type == device.type


@pytest.mark.parametrize("make", [GRL, lambda: GRLLinear(3, 2)], ids=["GRL", "GRLLinear"])
def test_a_replica_of_data_parallel_takes_the_copy_on_its_device(make):
    # What nn.parallel.replicate() does for each GPU.
    layer = make()
    replica, there = layer._replicate_for_data_parallel(), torch.full_like(layer.lambda_, 0.25)
    replica.lambda_ = there
    assert replica.lambda_ is there
    assert layer.lambda_ is not there and layer.lambda_.item() == 1.0


# --- the constructor's value
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [GRL, lambda value: GRLLinear(3, 2, lambda_=value)], ids=["GRL", "GRLLinear"])
def test_reset_parameters_restores_the_constructors_lambda(make):
    layer = make(0.75)
    layer.lambda_ = 0.25
    assert layer.initial_lambda == 0.75 and type(layer.initial_lambda) is float
    layer.reset_parameters()
    assert layer.lambda_.item() == 0.75


@pytest.mark.parametrize("value", [torch.tensor(0.75), torch.tensor(3), np.float32(0.5), 2], ids=repr)
def test_the_constructor_takes_what_an_assignment_takes(value):
    layer = GRL(value)
    assert layer.lambda_.item() == layer.initial_lambda == float(value)
    assert GRLLinear(3, 2, lambda_=value).lambda_.item() == float(value)


def test_a_conversion_that_fails_leaves_lambda_as_it_was():
    layer = GRL(0.75)
    buffer = layer.lambda_
    with pytest.raises(ZeroDivisionError):
        layer._apply(lambda t: 1 / 0)
    assert layer.lambda_ is buffer


def test_repr_shows_lambda():
    assert repr(GRL(0.75)) == "GRL(lambda_=0.75)"
    layer = GRL()
    layer.lambda_ = 0.1
    assert repr(nn.Sequential(layer)) == "Sequential(\n  (0): GRL(lambda_=0.1)\n)"


# --- other layers' habits
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: GRL(0.75), lambda: GRLLinear(3, 2, lambda_=0.75)], ids=["GRL", "GRLLinear"])
@pytest.mark.parametrize("name", ["alpha", "coeff", "lambd", "lambda", "_lambda", "lmbda", "lamda"])
def test_another_name_for_lambda_is_refused(make, name):
    layer = make()
    with pytest.raises(AttributeError) as caught:
        setattr(layer, name, 0.9)
    assert str(caught.value) == (
        f"{type(layer).__name__} has no {name}, which would change nothing: assign lambda_, as in layer.lambda_ = 0.3"
    )
    assert layer.lambda_.item() == 0.75 and not hasattr(layer, name)


def test_weight_is_another_name_for_lambda_only_where_there_is_no_weight():
    with pytest.raises(AttributeError, match="^GRL has no weight"):
        GRL().weight = 0.9
    layer = GRLLinear(3, 2)
    layer.weight = nn.Parameter(torch.zeros(2, 3))
    assert not layer.weight.any()


def test_a_subclass_may_have_such_an_attribute_and_any_layer_others():
    class Weighted(GRL):
        def __init__(self, weight):
            super().__init__(weight)
            self.weight = weight

    assert Weighted(0.3).weight == 0.3
    layer = GRL()
    layer.note = "first"
    assert layer.note == "first"


@pytest.mark.parametrize("value", [np.array(0.3), np.float32(0.3), np.array([0.3])[0], torch.tensor([0.3])], ids=repr)
def test_what_other_layers_keep_lambda_in_is_taken_everywhere(value):
    number, x = float(value), torch.randn(4, 3, requires_grad=True)
    targets = {"a": torch.tensor([0, 1, 1, 0])}
    for layer in (GRL(value), GRL(), GRLLinear(3, 2, lambda_=value)):
        layer.lambda_ = value
        assert layer.lambda_.shape == () and layer.lambda_.item() == number
    assert reversal_of(GRL(), value) == pytest.approx(-number)
    given = AdversarialHeads(3, adversaries={"a": 2}, lambda_=value)
    by_name = AdversarialHeads(3, adversaries={"a": 2}, lambda_={"a": value})
    added = AdversarialHeads(3, {"b": 2})
    added.add_adversary("a", 2, lambda_=value)
    later = AdversarialHeads(3, adversaries={"a": 2})
    later.lambda_ = {"a": value}
    for heads in (given, by_name, added, later):
        assert heads.lambda_["a"].item() == number
    weight = [torch.randn(2, 3)]
    for call in (
        lambda lambda_: linear_heads(x, weight, lambda_=[lambda_])[0].sum(),
        lambda lambda_: heads_loss(x, weight, None, list(targets.values()), lambda_=[lambda_]).loss,
    ):
        assert_same(torch.autograd.grad(call(value), x)[0], torch.autograd.grad(call(number), x)[0])


@pytest.mark.parametrize("kind", [np.array, np.float32, np.float64], ids=lambda kind: kind.__name__)
def test_numpys_numbers_are_options_of_the_heads(kind):
    x, targets = torch.randn(4, 3, requires_grad=True), {"a": torch.tensor([0, 1, 1, 0])}
    heads = AdversarialHeads(3, adversaries={"a": 2}, lambda_=0.3)
    for option, number in (("loss_weight", 0.5), ("label_smoothing", 0.25)):
        expected = heads(x, targets, **{option: number}).loss
        for given in (kind(number), {"a": kind(number)}):
            assert_same(heads(x, targets, **{option: given}).loss, expected)
        module = heads.adversaries["a"]
        for given in (kind(number), [kind(number)]):
            ours = heads_loss(
                x, [module.weight], [module.bias], list(targets.values()), lambda_=[0.3], **{option: given}
            )
            assert_same(ours.loss, expected)
    index = np.array(1) if kind is np.array else np.int64(1)
    expected = heads(x, targets, ignore_index=1).loss
    assert_same(heads(x, targets, ignore_index=index).loss, expected)
    assert_same(heads(x, targets, ignore_index={"a": index}).loss, expected)


# --- a buffer that something else has cast
# ---------------------------------------------------------------------------------


def cast_buffer(layer: nn.Module, dtype=torch.bfloat16) -> nn.Module:
    """As FSDP1's buffer_dtype does, which no method of the module sees."""
    buffer = layer.lambda_
    buffer.data = buffer.to(dtype)
    return layer


def test_a_cast_buffer_does_not_round_the_number(device):
    layer = cast_buffer(GRL(0.1).to(device))
    assert layer.lambda_.dtype == torch.bfloat16 and layer.lambda_.item() != 0.1
    assert reversal_of(layer) == -torch.tensor(0.1).item()
    assert repr(layer) == "GRL(lambda_=0.1)"
    layer.lambda_ = 0.3
    assert reversal_of(layer) == -torch.tensor(0.3).item()
    assert layer.state_dict()["lambda_"].item() == 0.3
    assert reversal_of(copy.deepcopy(layer)) == reversal_of(pickle.loads(pickle.dumps(layer))) == reversal_of(layer)


def test_casting_the_module_makes_the_buffer_exact_again(device):
    layer = cast_buffer(GRL(0.1).to(device)).double()
    assert layer.lambda_.dtype == torch.float64 and layer.lambda_.item() == 0.1


@pytest.mark.parametrize("change", ["fill_", "load_state_dict", "tensor"])
def test_a_cast_buffer_that_was_changed_is_what_counts(change):
    layer = cast_buffer(GRL(0.1))
    if change == "fill_":  # by somebody else, as DDP's broadcast of buffers
        layer.lambda_.fill_(0.25)
    elif change == "tensor":
        layer.lambda_ = torch.tensor(0.25)
    else:
        layer.load_state_dict({"lambda_": torch.tensor(0.25, dtype=torch.float64)})
    assert reversal_of(layer) == -0.25


def test_a_checkpoint_loads_exactly_into_a_cast_buffer():
    layer = cast_buffer(GRL(0.5))
    layer.load_state_dict({"lambda_": torch.tensor(0.1, dtype=torch.float64)})
    assert reversal_of(layer) == -torch.tensor(0.1).item()


def test_the_linear_layer_and_the_heads_use_the_number_too(device):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    linear = GRLLinear(4, 2, lambda_=0.1, device=device)
    heads = AdversarialHeads(4, adversaries={"a": 2, "b": [3, 2], "c": nn.Sequential(nn.Tanh(), nn.Linear(4, 2))})
    heads.to(device).lambda_ = 0.1
    targets = dict.fromkeys("abc", torch.zeros(3, dtype=torch.int64, device=device))

    def gradients():
        return [torch.autograd.grad(y, x)[0] for y in (linear(x).sum(), heads(x, targets).loss, heads(x)["a"].sum())]

    before = gradients()
    for layer in (linear, *heads.reversals.values()):
        cast_buffer(layer)
    for ours, theirs in zip(gradients(), before, strict=True):
        assert_same(ours, theirs)


def test_a_compiled_layer_uses_the_number_of_a_cast_buffer():
    torch._dynamo.reset()
    layer = cast_buffer(GRL(0.1))
    x = torch.ones(3, requires_grad=True)
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert_same(x.grad, torch.full_like(x, -0.1))
