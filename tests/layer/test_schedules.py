"""Lambda schedules, and the scheduler that applies them to the layers."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

from grl_ext import GRL, AdversarialHeads, GRLLinear, LambdaScheduler, schedules

PROGRESS = [i / 16 for i in range(17)]

# The published formulas, as their authors wrote them.
FORMULAS = {
    "dann": (schedules.dann(), lambda p: 2 / (1 + math.exp(-10 * p)) - 1),
    "dann, gamma 5": (schedules.dann(gamma=5.0), lambda p: 2 / (1 + math.exp(-5 * p)) - 1),
    "warm start": (schedules.warm_start(), lambda p: 2.0 / (1.0 + math.exp(-p)) - 1.0),
    "warm start with all": (
        schedules.warm_start(alpha=3.0, lo=0.1, hi=0.7),
        lambda p: 2.0 * (0.7 - 0.1) / (1.0 + math.exp(-3.0 * p)) - (0.7 - 0.1) + 0.1,
    ),
    "linear": (schedules.linear(0.5, -1.5), lambda p: 0.5 - 2 * p),
    "constant": (schedules.constant(0.3), lambda p: 0.3),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_schedule_is_its_published_formula(name):
    schedule, formula = FORMULAS[name]
    for p in PROGRESS:
        assert schedule(p) == pytest.approx(formula(p), abs=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
def test_progress_is_clamped_to_its_range(name):
    schedule, _ = FORMULAS[name]
    assert schedule(-0.5) == schedule(0.0)
    assert schedule(1.5) == schedule(1.0)


def test_tllibs_warm_start_goes_on_past_its_max_iters():
    """As docs/layer.md says to write it. tllib counts its own calls, and max_iters only scales the curve."""
    alpha, lo, hi, max_iters, total_steps = 1.0, 0.0, 1.0, 1000, 10000
    layer = GRL()
    schedule = schedules.warm_start(alpha * total_steps / max_iters, lo, hi)
    scheduler = LambdaScheduler(layer, schedule, total_steps)
    seen = {}
    for call in range(total_steps + 1):
        theirs = 2.0 * (hi - lo) / (1.0 + math.exp(-alpha * call / max_iters)) - (hi - lo) + lo
        assert layer.lambda_.item() == pytest.approx(theirs, abs=1e-12)
        seen[call] = round(theirs, 3)
        scheduler.step()
    assert [seen[call] for call in (1000, 2000, 10000)] == [0.462, 0.762, 1.0]


def test_the_ends_are_exact():
    assert schedules.dann()(0.0) == 0.0
    assert schedules.warm_start(lo=0.2, hi=0.9)(0.0) == 0.2
    assert schedules.linear(0.1, 0.7)(0.0) == 0.1
    assert schedules.dann(gamma=1e6)(1.0) == 1.0  # exp of so much would overflow


class Model(nn.Module):
    """All layers that have a lambda, some deep inside."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [nn.Sequential(GRL(), nn.Linear(4, 2)), nn.Sequential(nn.ReLU(), GRLLinear(4, 2))]
        )
        self.heads = AdversarialHeads(4, {"digit": 3}, {"domain": 2, "speaker": 5})


def lambdas(model: nn.Module) -> list[float]:
    return [
        value
        for name, buffer in model.named_buffers()
        if name.endswith("lambda_")
        for value in buffer.flatten().tolist()
    ]


def test_every_layer_is_set_from_the_start_and_at_every_step():
    model = Model()
    scheduler = LambdaScheduler(model, schedules.linear(0.25, 1.0), total_steps=3)
    for expected in (0.25, 0.5, 0.75, 1.0, 1.0):
        assert lambdas(model) == [expected] * 4
        assert scheduler.last_factor == expected
        scheduler.step()


def test_the_schedule_multiplies_the_constructors_lambda():
    heads = AdversarialHeads(4, {"digit": 3}, {"domain": 2, "speaker": 5}, lambda_={"domain": 0.5, "speaker": -0.25})
    model = nn.Sequential(GRL(0.1), GRLLinear(4, 4, lambda_=2.0), heads)
    model[0].lambda_ = 7.0  # what a layer has been set to since does not matter
    scheduler = LambdaScheduler(model, schedules.linear(0.0, 1.0), total_steps=4)
    for factor in (0.0, 0.25, 0.5, 0.75, 1.0):
        assert lambdas(model) == [0.1 * factor, 2.0 * factor, 0.5 * factor, -0.25 * factor]
        scheduler.step()


def test_several_modules_may_be_given_and_share_layers():
    layer, heads = GRL(), AdversarialHeads(4, adversaries={"domain": 2})
    scheduler = LambdaScheduler([nn.Sequential(layer), layer, heads], schedules.constant(0.3), total_steps=1)
    assert scheduler.layers == [layer, heads.reversals["domain"]]
    assert layer.lambda_.item() == heads.lambda_["domain"].item() == 0.3


def test_lambda_is_written_in_place_and_a_forward_never_advances_it():
    model = Model()
    buffers = dict(model.named_buffers())
    scheduler = LambdaScheduler(model, schedules.dann(), total_steps=10)
    for _ in range(3):
        model.branches[0](torch.ones(1, 4))
    assert scheduler.last_step == 0
    scheduler.step()
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name]


def test_a_compiled_model_keeps_its_one_graph_over_all_steps():
    model = nn.Sequential(nn.Linear(4, 4), GRL(), GRLLinear(4, 2))
    scheduler = LambdaScheduler(model, schedules.dann(), total_steps=5)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(5):
            compiled(torch.ones(3, 4)).sum().backward()
            scheduler.step()
    torch._dynamo.reset()


def test_a_resumed_run_continues_the_very_same_curve():
    def fresh(total_steps: int = 7) -> LambdaScheduler:
        return LambdaScheduler(GRL(), schedules.dann(), total_steps)

    whole = fresh()
    curve = []
    for _ in range(9):
        whole.step()
        curve.append(whole.last_factor)
    first = fresh()
    for _ in range(4):
        first.step()
    resumed = fresh(total_steps=1000)  # the saved length of the training counts
    resumed.load_state_dict(first.state_dict())
    assert resumed.layers[0].lambda_.item() == resumed.last_factor == curve[3]
    for expected in curve[4:]:
        resumed.step()
        assert resumed.last_factor == expected


def test_the_state_survives_a_checkpoint_file(tmp_path):
    scheduler = LambdaScheduler(GRL(), schedules.dann(), total_steps=7)
    scheduler.step()
    torch.save(scheduler.state_dict(), tmp_path / "scheduler.pt")
    other = LambdaScheduler(GRL(), schedules.dann(), total_steps=7)
    other.load_state_dict(torch.load(tmp_path / "scheduler.pt", weights_only=True))
    assert (other.last_step, other.last_factor) == (1, scheduler.last_factor)


# --- resuming
# --------------------------------------------------------------------------------------------------------------


def training(lambda_: float = 0.5) -> tuple[nn.Module, LambdaScheduler]:
    model = nn.Sequential(nn.Linear(2, 2), GRL(lambda_))
    return model, LambdaScheduler(model, schedules.dann(), total_steps=10)


def checkpoint() -> tuple[dict, dict]:
    model, scheduler = training()
    for _ in range(4):
        scheduler.step()
    return model.state_dict(), scheduler.state_dict()


@pytest.mark.parametrize("order", ["model first", "scheduler first", "model before the scheduler is made"])
def test_a_run_that_is_resumed_whole_goes_on_without_a_warning(order):
    model_state, scheduler_state = checkpoint()
    model, scheduler = training()
    if order == "model before the scheduler is made":
        model = nn.Sequential(nn.Linear(2, 2), GRL(0.5))
        model.load_state_dict(model_state)
        scheduler = LambdaScheduler(model, schedules.dann(), total_steps=10)
    for load in (lambda: model.load_state_dict(model_state), lambda: scheduler.load_state_dict(scheduler_state))[
        :: -1 if order == "scheduler first" else 1
    ]:
        load()
    assert model[1].lambda_.item() == model_state["1.lambda_"].item()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
    assert model[1].lambda_.item() == 0.5 * schedules.dann()(0.5)


@pytest.mark.parametrize("order", ["loaded after", "loaded before"])
def test_a_run_whose_scheduler_was_not_loaded_says_that_lambda_is_lost(order):
    model_state, _ = checkpoint()
    model, scheduler = training()
    model.load_state_dict(model_state)
    if order == "loaded before":
        scheduler = LambdaScheduler(model, schedules.dann(), total_steps=10)
    loaded = model_state["1.lambda_"].item()
    with pytest.warns(UserWarning) as caught:
        scheduler.step()
    assert len(caught) == 1 and caught[0].filename == __file__
    assert str(caught[0].message) == (
        f"the lambda_ {loaded} of a GRL came from a checkpoint and is overwritten: this LambdaScheduler is at step 1. "
        "To resume, load its state too: scheduler.load_state_dict(...)"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


def test_a_checkpoint_without_lambda_gives_no_warning():
    model, scheduler = training()
    model.load_state_dict({name: value for name, value in model.state_dict().items() if "lambda_" not in name})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


@pytest.mark.parametrize("name", FORMULAS)
def test_a_schedule_and_its_scheduler_can_be_pickled_and_copied(name):
    schedule, formula = FORMULAS[name]
    model = nn.Sequential(GRL(0.5))
    scheduler = LambdaScheduler(model, schedule, total_steps=4)
    scheduler.step()
    for copies in (pickle.loads(pickle.dumps((model, scheduler))), copy.deepcopy((model, scheduler))):
        other_model, other = copies
        assert other.layers == [other_model[0]] and other.layers != scheduler.layers
        assert pickle.loads(pickle.dumps(schedule))(0.3) == schedule(0.3)
        other.step()
        assert other_model[0].lambda_.item() == pytest.approx(0.5 * formula(0.5), abs=1e-12)
    assert scheduler.last_step == 1


# --- frameworks
# ------------------------------------------------------------------------------------------------------------


def test_an_optimizers_hook_advances_the_scheduler_beside_those_of_pytorch():
    model, scheduler = training()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.register_step_post_hook(scheduler.step)
    rates = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.ConstantLR(optimizer), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)],
        milestones=[2],
    )
    for k in range(1, 5):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        rates.step()
        assert scheduler.last_step == k
        assert model[1].lambda_.item() == 0.5 * schedules.dann()(k / 10)


def test_a_step_that_the_gradient_scaler_leaves_out_does_not_count():
    model, scheduler = training()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(scheduler.step)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for factor, expected in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scheduler.last_step == expected


def test_lambda_in_the_layer_leaves_the_adversarys_own_gradient_alone_and_on_the_loss_it_does_not():
    x = torch.randn(5, 4)
    for where, factor in (("layer", 1.0), ("loss", 0.25)):
        layer = GRLLinear(4, 2, lambda_=0.25 if where == "layer" else 1.0)
        with torch.no_grad():
            layer.weight.fill_(0.5)
        features = x.clone().requires_grad_()
        loss = layer(features).square().sum() * (0.25 if where == "loss" else 1.0)
        loss.backward()
        plain = nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer.weight.grad, factor * 2 * plain.detach().T @ x)
        torch.testing.assert_close(features.grad, -0.25 * 2 * plain.detach() @ layer.weight.detach())


@pytest.mark.parametrize(
    "layers, total_steps, message",
    [
        (nn.Linear(2, 2), 5, "layers must hold a GRL, a GRLLinear or an AdversarialHeads; found none in Linear"),
        ([], 5, "layers must hold a GRL, a GRLLinear or an AdversarialHeads; found none in an empty list"),
        (GRL(), 0, "total_steps must be at least 1, got 0"),
        (
            GRL(0.0),
            5,
            "the GRL was made with lambda_=0, which no schedule can multiply: give it the lambda that a factor of 1 "
            "stands for",
        ),
        (
            AdversarialHeads(2, adversaries={"a": 1, "b": 1}, lambda_=0.0),
            5,
            "the AdversarialHeads was made with lambda_=0, which no schedule can multiply: "
            "give it the lambda that a factor of 1 stands for",
        ),
    ],
)
def test_bad_arguments_are_named(layers, total_steps, message):
    with pytest.raises(ValueError) as caught:
        LambdaScheduler(layers, schedules.dann(), total_steps)
    assert str(caught.value) == message


def test_some_adversaries_may_be_off_and_heads_may_have_none():
    heads = AdversarialHeads(2, adversaries={"a": 1, "b": 1}, lambda_={"a": 0.0, "b": 0.5})
    scheduler = LambdaScheduler(
        nn.ModuleList([heads, AdversarialHeads(2, predictors={"y": 1})]), schedules.constant(0.5), 5
    )
    scheduler.step()
    assert {name: value.item() for name, value in heads.lambda_.items()} == {"a": 0.0, "b": 0.25}


def test_a_schedule_that_gives_no_number_is_refused():
    layer = GRL(0.5)
    with pytest.raises(ValueError, match="the schedule's factor must be finite, got nan"):
        LambdaScheduler(layer, lambda p: math.nan, total_steps=5)
    assert layer.lambda_.item() == 0.5
