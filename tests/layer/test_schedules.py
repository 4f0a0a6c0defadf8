"""Lambda schedules, and the scheduler that applies them to the layers."""

import copy
import gc
import itertools
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


# --- following an optimizer
# --------------------------------------------------------------------------------------------------------------


def following(
    total_steps: int = 10, schedule=None, **options
) -> tuple[nn.Module, torch.optim.Optimizer, LambdaScheduler]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), GRL(0.5), nn.Tanh())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = LambdaScheduler(model, schedule or schedules.dann(), total_steps, optimizer=optimizer, **options)
    return model, optimizer, scheduler


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()


def curve(step: int, total_steps: int = 10) -> list[float]:
    return [0.5 * schedules.dann()(step / total_steps)]


def test_it_follows_the_optimizers_steps_whoever_calls_step_too():
    model, optimizer, scheduler = following()
    optimizer.register_step_post_hook(scheduler.step)  # as it was done before there was optimizer=
    assert scheduler.get_last_lambda() == curve(0)
    for k in range(1, 13):
        train(model, optimizer)
        for _ in range(k % 3):
            scheduler.step()
        assert scheduler.last_step == k
        assert scheduler.get_last_lambda() == [model[1].lambda_.item()] == curve(min(k, 10))


def test_nobody_needs_to_keep_the_scheduler():
    model, optimizer, _ = following()
    del _
    gc.collect()
    train(model, optimizer, 3)
    assert [model[1].lambda_.item()] == curve(3)


@pytest.mark.parametrize("total_steps", [10, 1000], ids=["the same length", "the saved length counts"])
@pytest.mark.parametrize("order", [*itertools.permutations(["scheduler made", "model", "optimizer", "scheduler"])])
def test_the_optimizers_checkpoint_resumes_the_curve_exactly_in_any_order(tmp_path, order, total_steps):
    model, optimizer, scheduler = following()
    train(model, optimizer, 4)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save(saved, tmp_path / "checkpoint.pt")
    train(model, optimizer, 8)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    fresh = nn.Sequential(nn.Linear(2, 2), GRL(0.5), nn.Tanh())
    fresh_optimizer = torch.optim.Adam(fresh.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for what in order:
            if what == "scheduler made":
                resumed = LambdaScheduler(fresh, schedules.dann(), total_steps, optimizer=fresh_optimizer)
            elif what != "scheduler":  # its own state says the same, and need not be loaded
                {"model": fresh, "optimizer": fresh_optimizer}[what].load_state_dict(saved[what])
            elif order.index("scheduler made") < order.index("scheduler"):
                resumed.load_state_dict(saved[what])
        assert (resumed.last_step, resumed.get_last_lambda()) == (4, curve(4))
        train(fresh, fresh_optimizer, 8)
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


def test_a_saved_state_does_not_move_with_the_training():
    model, optimizer, scheduler = following()
    states = optimizer.state_dict(), scheduler.state_dict()
    train(model, optimizer)
    assert states[0]["param_groups"][0]["lambda_step_0"] == states[1]["last_step"] == 0


def test_an_optimizer_that_loads_without_calling_hooks_resumes_it_at_its_next_step():
    class Adam(torch.optim.Adam):
        def load_state_dict(self, state_dict):
            self.param_groups[0].update({k: v for k, v in state_dict["param_groups"][0].items() if k != "params"})

    model, optimizer, _ = following()
    train(model, optimizer, 4)
    other = nn.Sequential(nn.Linear(2, 2), GRL(0.5))
    other_optimizer = Adam(other.parameters())
    scheduler = LambdaScheduler(other, schedules.dann(), 10, optimizer=other_optimizer)
    other_optimizer.load_state_dict(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    train(other, other_optimizer)
    assert (scheduler.last_step, scheduler.get_last_lambda()) == (5, curve(5))


def test_an_optimizers_checkpoint_without_the_position_gives_a_warning():
    model, optimizer, scheduler = following()
    train(model, optimizer, 4)
    loaded = model[1].lambda_.item()
    states = model.state_dict(), torch.optim.Adam(model.parameters()).state_dict()
    model, optimizer, scheduler = following()
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    train(model, optimizer)
    with pytest.warns(UserWarning) as caught:
        train(model, optimizer)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert str(caught[0].message) == (
        f"the lambda_ {loaded} of a GRL came from a checkpoint and is overwritten: this LambdaScheduler is at step 1. "
        "To resume, load the optimizer's state too, which has the step"
    )
    assert scheduler.get_last_lambda() == curve(2)


@pytest.mark.core
@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoints_resume_the_curve_although_they_make_a_step(flat):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer, _ = following()
    train(model, optimizer, 4)
    saved = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    train(model, optimizer, 3)
    other, other_optimizer, scheduler = following()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lambda")
        set_state_dict(other, other_optimizer, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)
        assert (scheduler.last_step, scheduler.get_last_lambda()) == (4, curve(4))
        train(other, other_optimizer, 3)
    assert torch.equal(other[0].weight, model[0].weight)


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_optimizer_may_be_given_wrapped(wrapped):
    class Wrapper(torch.optim.Optimizer):
        """As accelerate's: of the class, without what its constructor makes."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            self.optimizer.step()

    model, optimizer, _ = following()
    given = Wrapper(Wrapper(optimizer)) if wrapped else optimizer
    scheduler = LambdaScheduler(model, schedules.dann(), 10, optimizer=given)
    assert scheduler.optimizer is given
    train(model, optimizer)
    assert scheduler.last_step == 1


def test_two_of_one_optimizer_keep_their_own_positions():
    def make():
        model = nn.Sequential(nn.Linear(2, 2), GRL(), GRL())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return (
            model,
            optimizer,
            [
                LambdaScheduler(layer, schedules.linear(0.0, 1.0), steps, optimizer=optimizer)
                for layer, steps in ((model[1], 10), (model[2], 20))
            ],
        )

    model, optimizer, (first, second) = make()
    train(model, optimizer, 2)
    second.load_state_dict({"last_step": 0, "total_steps": 4})
    first.load_state_dict(first.state_dict())  # which does not change their order
    train(model, optimizer)
    other, other_optimizer, made = make()
    other_optimizer.load_state_dict(optimizer.state_dict())
    assert [scheduler.state_dict() for scheduler in made] == [
        {"last_step": 3, "total_steps": 10},
        {"last_step": 1, "total_steps": 4},
    ]
    train(other, other_optimizer)
    assert [layer.lambda_.item() for layer in other[1:]] == [0.4, 0.5]


def test_a_new_phase_of_one_optimizer_takes_the_place_of_the_last_one():
    model, optimizer, first = following()
    train(model, optimizer, 4)
    second = LambdaScheduler(model, schedules.linear(1.0, 0.0), 4, optimizer=optimizer)
    assert second.last_step == 0 and second.get_last_lambda() == [0.5]
    train(model, optimizer)
    assert (first.last_step, second.last_step) == (4, 1)
    assert first.state_dict() == {"last_step": 4, "total_steps": 10}
    # The next process makes the second only.
    other, other_optimizer, scheduler = following(schedule=schedules.linear(1.0, 0.0))
    other_optimizer.load_state_dict(optimizer.state_dict())
    assert scheduler.state_dict() == second.state_dict()
    assert scheduler.get_last_lambda() == [0.375]


def test_one_for_new_adversaries_goes_on_where_the_last_one_was():
    heads = AdversarialHeads(2, adversaries={"domain": 2})
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.1)
    first = LambdaScheduler(heads, schedules.linear(0.0, 1.0), 10, optimizer=optimizer)
    for _ in range(4):
        optimizer.step()
    heads.add_adversary("site", 3, lambda_=0.5)
    second = LambdaScheduler(heads, schedules.linear(0.0, 1.0), 10, optimizer=optimizer)
    second.load_state_dict(first.state_dict())
    optimizer.step()
    assert (first.last_step, second.last_step, second.get_last_lambda()) == (4, 5, [0.5, 0.25])


def test_the_position_of_one_that_was_replaced_is_nobody_elses():
    model = nn.Sequential(nn.Linear(2, 2), GRL(), GRL(), GRL())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for layer in model[1:3]:
        LambdaScheduler(layer, schedules.linear(0.0, 1.0), 4, optimizer=optimizer)
    train(model, optimizer, 3)
    LambdaScheduler(model[1:3], schedules.linear(0.0, 1.0), 4, optimizer=optimizer)
    train(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert [name for name in optimizer.param_groups[0] if name.startswith("lambda_step_")] == ["lambda_step_0"]
    LambdaScheduler(model[3], schedules.linear(0.0, 1.0), 4, optimizer=optimizer)
    assert [layer.lambda_.item() for layer in model[1:]] == [0.25, 0.25, 0.0]


def test_of_several_made_after_the_optimizer_was_loaded_each_finds_its_position():
    model = nn.Sequential(nn.Linear(2, 2), GRL(), GRL())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0].update(
        {"lambda_step_0": 1, "lambda_total_steps_0": 4, "lambda_step_1": 3, "lambda_total_steps_1": 6}
    )
    made = [LambdaScheduler(layer, schedules.linear(0.0, 1.0), 9, optimizer=optimizer) for layer in model[1:]]
    assert [scheduler.state_dict() for scheduler in made] == [
        {"last_step": 1, "total_steps": 4},
        {"last_step": 3, "total_steps": 6},
    ]


def test_of_two_that_share_a_layer_the_later_one_sets_it():
    model = nn.Sequential(nn.Linear(2, 2), GRL(), GRL())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    LambdaScheduler(model, schedules.linear(0.0, 1.0), 4, optimizer=optimizer)
    LambdaScheduler(model[2], schedules.constant(0.1), 4, optimizer=optimizer)
    train(model, optimizer, 2)
    assert [layer.lambda_.item() for layer in model[1:]] == [0.5, 0.1]


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))])
def test_a_copy_follows_the_copied_optimizer(copies):
    model, optimizer, scheduler = following()
    train(model, optimizer, 2)
    other, other_optimizer, other_scheduler = copies((model, optimizer, scheduler))
    train(other, other_optimizer, 2)
    assert (other_scheduler.last_step, other_scheduler.get_last_lambda()) == (4, curve(4))
    assert (scheduler.last_step, scheduler.get_last_lambda()) == (2, curve(2))
    train(model, optimizer)
    assert (scheduler.last_step, other_scheduler.last_step) == (3, 4)
    assert other_optimizer.state_dict()["param_groups"][0]["lambda_step_0"] == 4


@pytest.mark.core
@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_optimizer_step_moves_lambda(whole):
    model, optimizer, scheduler = following()
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="eager")
    if whole:

        @torch.compile(backend="eager")
        def step():
            optimizer.step()

    for k in range(1, 5):
        model(torch.ones(1, 2)).sum().backward()
        step()
        assert (scheduler.last_step, scheduler.get_last_lambda()) == (k, curve(k))
    torch._dynamo.reset()


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_leaves_out_counts_only_where_the_optimizer_is_called(fused):
    model = nn.Sequential(nn.Linear(2, 2), GRL(0.5))
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    scheduler = LambdaScheduler(model, schedules.dann(), 10, optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for factor, expected in ((1.0, 1), (float("inf"), 1 + fused), (1.0, 2 + fused)):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scheduler.last_step == expected


# --- where a learning-rate scheduler is expected
# --------------------------------------------------------------------------------------------------------------


def test_it_is_a_learning_rate_scheduler_that_leaves_the_rates_alone():
    model, optimizer, scheduler = following()
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    optimizer.param_groups[0]["lr"] = 0.25
    train(model, optimizer, 3)
    assert scheduler.optimizer is optimizer and scheduler.last_epoch == 3
    assert scheduler.get_last_lr() == scheduler.get_lr() == [0.25]


def test_a_chain_moves_learning_rate_and_lambda():
    def make():
        model, optimizer, scheduler = following()
        rates = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return model, optimizer, torch.optim.lr_scheduler.ChainedScheduler([scheduler, rates])

    model, optimizer, chain = make()
    for k in range(1, 4):
        train(model, optimizer)
        chain.step()
        assert chain.get_last_lr() == [0.1 * 0.5**k] and [model[1].lambda_.item()] == curve(k)
    other, _, other_chain = make()
    other_chain.load_state_dict(chain.state_dict())
    assert [other[1].lambda_.item()] == curve(3)


def sequence():
    model, optimizer, first = following(schedule=schedules.linear(0.0, 1.0))
    second = LambdaScheduler(model, schedules.linear(1.0, 0.5), 5, optimizer=optimizer)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[3])
    return model, optimizer, both


SEQUENCE = [0.0, 0.05, 0.1, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.25]


def test_a_sequence_is_one_curve_after_the_other():
    model, optimizer, both = sequence()
    for expected in SEQUENCE:
        assert model[1].lambda_.item() == pytest.approx(expected)
        train(model, optimizer)
        both.step()


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
@pytest.mark.parametrize("done", [2, 3, 5])
def test_a_sequence_is_resumed_in_any_order_of_loading(done, order):
    first = sequence()
    for _ in range(done):
        train(*first[:2])
        first[2].step()
    saved = [copy.deepcopy(of.state_dict()) for of in first]
    model, optimizer, both = resumed = sequence()
    for of in order:
        resumed[of].load_state_dict(saved[of])
    for expected in SEQUENCE[done:]:
        assert model[1].lambda_.item() == pytest.approx(expected)
        train(model, optimizer)
        both.step()


def test_in_a_sequence_after_a_warm_up_lambda_waits_at_its_start():
    model, optimizer, scheduler = following(total_steps=2, schedule=schedules.linear(0.2, 1.0))
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, scheduler], milestones=[3])
    seen = []
    for _ in range(6):
        seen += scheduler.get_last_lambda()
        train(model, optimizer)
        both.step()
    assert seen == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.3, 0.5])


def test_without_an_optimizer_it_is_refused_where_one_is_needed():
    model, scheduler = training()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="LambdaScheduler at index 0 has None"):
        torch.optim.lr_scheduler.SequentialLR(optimizer, [scheduler], milestones=[])
    with pytest.raises(AttributeError) as caught:
        scheduler.get_last_lr()
    assert str(caught.value) == "this LambdaScheduler has no learning rates: it was made without optimizer="


@pytest.mark.parametrize("value", [0, 5])
def test_the_position_cannot_be_assigned(value):
    _, optimizer, scheduler = following(last_step=2)
    for of in (scheduler, training()[1]):
        with pytest.raises(AttributeError) as caught:
            of.last_epoch = value
        assert str(caught.value) == "last_epoch cannot be set: make the LambdaScheduler with last_step="


def test_an_optimizer_that_nobody_steps_gives_a_warning():
    model, optimizer, scheduler = following()
    scheduler.step()
    scheduler.step()
    with pytest.warns(UserWarning) as caught:
        scheduler.step()
    assert caught[0].filename == __file__
    assert str(caught[0].message) == (
        "lambda does not move: the Adam whose steps this LambdaScheduler follows has made none. "
        "Give it the optimizer that the training calls"
    )
    train(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            scheduler.step()


def test_it_says_where_it_stands():
    model, scheduler = training()
    scheduler.step()
    assert repr(scheduler) == "LambdaScheduler(1 GRL, step 1 of 10, factor 0.4621)"
    model = nn.Sequential(Model(), GRL())
    scheduler = LambdaScheduler(
        model, schedules.constant(2.0), 5, optimizer=torch.optim.SGD(model.parameters()), last_step=3
    )
    assert repr(scheduler) == "LambdaScheduler(4 GRL, 1 GRLLinear, step 3 of 5, factor 2, follows SGD)"


@pytest.mark.parametrize("follows", [False, True])
def test_a_start_step_is_taken_without_a_warning(follows):
    model, scheduler = training()
    model.load_state_dict(checkpoint()[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = LambdaScheduler(model, schedules.dann(), 10, optimizer=optimizer if follows else None, last_step=7)
    assert (scheduler.last_step, scheduler.get_last_lambda()) == (7, curve(7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            train(model, optimizer)
            scheduler.step()
    assert scheduler.get_last_lambda() == curve(9)


def test_a_start_step_goes_before_what_the_optimizer_holds():
    model, optimizer, _ = following()
    train(model, optimizer, 4)
    other, other_optimizer, _ = model, torch.optim.Adam(model.parameters()), None
    other_optimizer.load_state_dict(optimizer.state_dict())
    scheduler = LambdaScheduler(other, schedules.dann(), 10, optimizer=other_optimizer, last_step=0)
    assert scheduler.last_step == other_optimizer.param_groups[0]["lambda_step_0"] == 0


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"optimizer": "Adam"}, TypeError, "optimizer must be a torch.optim.Optimizer, got str"),
        ({"last_step": -1}, ValueError, "last_step must be at least 0, got -1"),
        ({"last_step": 0.5}, TypeError, "last_step must be an integer, got 0.5"),
    ],
)
def test_bad_options_are_named(options, error, message):
    layer = GRL(0.5)
    with pytest.raises(error) as caught:
        LambdaScheduler(layer, schedules.dann(), 5, **options)
    assert str(caught.value) == message
    assert layer.lambda_.item() == 0.5


# --- averaged weights
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_has_the_last_lambda_or_with_its_buffers_the_mean(use_buffers):
    model, optimizer, scheduler = following(schedule=schedules.linear(0.0, 1.0))
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=use_buffers)
    for _ in range(3):
        train(model, optimizer)
        averaged.update_parameters(model)
    assert averaged.module[1].lambda_.item() == pytest.approx(0.1 if use_buffers else 0.15)
    # What the page on frameworks says to load.
    state = {name: value for name, value in averaged.module.state_dict().items() if not name.endswith("lambda_")}
    model.load_state_dict(state)
    assert scheduler.get_last_lambda() == pytest.approx([0.15])


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
