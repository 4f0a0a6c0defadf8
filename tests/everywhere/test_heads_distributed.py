"""`AdversarialHeads` in two processes, beyond the rows of `tests/matrix`: heads of every path at once, all that a loss
returns, heads left out, options of the wrappers and of the loss, layouts of distributed features.

Each process takes half of the rows. The gradients must be those of one process that has all rows and runs the heads'
own modules layer by layer, with a reversal of plain PyTorch in front of the adversaries.
"""

import copy
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from head_samples import reversal
from samples import case
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from two_processes import TwoProcesses

from grl_ext import GRL, AdversarialHeads, GRLLinear, gradient_reversal, linear_heads
from grl_ext._backend import release

pytestmark = [
    pytest.mark.core,
    pytest.mark.sanitized,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no torch.distributed with gloo"
    ),
]

BEFORE_2_9 = release(torch.__version__) < (2, 9)
needs_averages = pytest.mark.skipif(
    BEFORE_2_9, reason="FSDP2 of torch 2.8 sums where gloo is to average, also for a plain nn.Linear"
)
needs_elements = pytest.mark.skipif(
    BEFORE_2_9, reason="torch 2.8 gives one element of a distributed vector, and an error for the next"
)

ROWS = 8  # of both processes together
LAMBDAS = {"domain": 0.5, "speaker": 0.25, "room": 2.0}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The processes, started again after a test that failed."""
    running: list[TwoProcesses] = []

    def processes() -> TwoProcesses:
        if not running or not running[-1].alive:
            running.append(TwoProcesses(tmp_path_factory.mktemp("store")))
        return running[-1]

    yield processes
    if running and running[-1].alive:
        assert running[-1].close() == [0, 0]


@pytest.fixture
def in_two_processes(started, path):
    return lambda function, *arguments: started().run(path, function, *arguments)


# --- the network, and the same layer by layer in one process
# -----------------------------------------------------------------


class OwnModule(nn.Module):
    """A head that is no linear layer, so that it runs as given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 7))
        self.linear = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.scale)


class Network(nn.Module):
    """Heads of every path: fused linear, fused layers, first layer fused, as given."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 7), nn.Tanh())
        self.heads = AdversarialHeads(
            7,
            predictors={"digit": 3, "age": [6, 1]},
            adversaries={
                "domain": 2,
                "speaker": nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4)),
                "room": OwnModule(),
            },
            lambda_=LAMBDAS,
            losses={"age": "mse"},
        )

    def forward(self, x: Tensor, targets: dict[str, Tensor] | None = None, detach: bool = False, **options):
        features = self.encoder(x)
        return self.heads(features.detach() if detach else features, targets, **options)


def network() -> Network:
    """The same in both processes."""
    torch.manual_seed(1)
    return Network()


def batch() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Inputs, features and targets of all rows; in each half of them one has no digit."""
    torch.manual_seed(2)
    sizes = {"digit": 3, "domain": 2, "speaker": 4, "room": 2}
    targets: dict[str, Tensor] = {name: torch.randint(size, (ROWS,)) for name, size in sizes.items()}
    targets["digit"][:: ROWS // 2] = -100
    targets["age"] = torch.randn(ROWS)
    return torch.randn(ROWS, 5), torch.randn(ROWS, 7), targets


def part(rank: int, of):
    """This process's rows."""
    if isinstance(of, dict):
        return {name: part(rank, tensor) for name, tensor in of.items()}
    return of.chunk(2)[rank]


def stock_logits(heads: AdversarialHeads, features: Tensor) -> dict[str, Tensor]:
    seen = {name: module(features) for name, module in heads.predictors.items()}
    return seen | {name: module(reversal(features, LAMBDAS[name])) for name, module in heads.adversaries.items()}


def stock_losses(logits: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: F.mse_loss(logits[name].float(), target[:, None].float())
        if name == "age"
        else F.cross_entropy(logits[name].float(), target)
        for name, target in targets.items()
    }


def penalty(out) -> Tensor:
    """Uses all that the heads return: the loss, a single head's loss, some logits."""
    return (
        out.loss
        + 0.5 * out.head_losses["domain"]
        + out.logits["digit"].square().mean()
        + out.logits["speaker"].square().mean()
    )


def stock_loss(logits: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    return sum(stock_losses(logits, targets).values())


def stock_penalty(logits: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    losses = stock_losses(logits, targets)
    of_logits = logits["digit"].square().mean() + logits["speaker"].square().mean()
    return sum(losses.values()) + 0.5 * losses["domain"] + of_logits


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    """By name, without the wrappers' prefixes; whole tensors."""
    result = {}
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        name = name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")
        result[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return result


def assert_gradients(module: nn.Module, expected: nn.Module, **tolerance) -> None:
    ours, theirs = gradients(module), gradients(expected)
    assert ours.keys() == theirs.keys(), (ours.keys(), theirs.keys())
    for name, grad in theirs.items():
        if grad is None:
            assert ours[name] is None, f"{name} has a gradient, but took no part"
        else:
            assert ours[name] is not None, f"{name} has no gradient"
            torch.testing.assert_close(ours[name], grad, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# --- DDP
# ----------------------------------------------------------------------------------------------------------------------
# -


def train_with_ddp_around_the_model(rank: int, options: dict) -> None:
    model, stock = network(), network()
    ddp = DistributedDataParallel(model, **options)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9) for module in (model, stock)]
    x, _, targets = batch()
    for _ in range(3):
        out = ddp(part(rank, x), part(rank, targets))
        for optimizer in optimizers:
            optimizer.zero_grad()
        penalty(out).backward()
        stock_penalty(stock_logits(stock.heads, stock.encoder(x)), targets).backward()
        assert_gradients(model, stock)
        for optimizer in optimizers:
            optimizer.step()
    del ddp


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}, {"static_graph": True}],
    ids=str,
)
def test_training_with_ddp_around_the_model_is_that_of_one_process(in_two_processes, options):
    in_two_processes(train_with_ddp_around_the_model, options)


def ddp_around_the_heads(rank: int) -> None:
    heads, stock = network().heads, network().heads
    ddp = DistributedDataParallel(heads)
    _, features, targets = batch()
    ours, theirs = part(rank, features).requires_grad_(), features.requires_grad_()
    for _ in range(2):
        for tensor in (ours, theirs, *heads.parameters(), *stock.parameters()):
            tensor.grad = None
        out = ddp(ours, part(rank, targets))
        penalty(out).backward()
        stock_penalty(stock_logits(stock, theirs), targets).backward()
        assert_gradients(heads, stock)
        # DDP averages the parameters' gradients; the features' are those of the mean over this process's rows.
        torch.testing.assert_close(ours.grad, 2 * part(rank, theirs.grad))
    del ddp


def test_ddp_around_the_heads_averages_their_gradients(in_two_processes):
    in_two_processes(ddp_around_the_heads)


def ddp_with_a_head_left_out(rank: int, left_out: str) -> None:
    model, stock = network(), network()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    x, _, targets = batch()
    del targets[left_out]
    for _ in range(2):  # DDP complains of unfinished gradients in the second
        model.zero_grad()
        stock.zero_grad()
        ddp(part(rank, x), part(rank, targets)).loss.backward()
        stock_loss(stock_logits(stock.heads, stock.encoder(x)), targets).backward()
        assert_gradients(model, stock)
    del ddp


@pytest.mark.parametrize("left_out", ["digit", "age", "speaker", "room"])
def test_a_head_left_out_has_no_gradient_under_ddp(in_two_processes, left_out):
    in_two_processes(ddp_with_a_head_left_out, left_out)


def extra_steps_with_ddp(rank: int) -> None:
    model, stock = network(), network()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    x, _, targets = batch()
    of_domain = {"domain": targets["domain"]}
    for _ in range(2):
        model.zero_grad()
        stock.zero_grad()
        ddp(part(rank, x), part(rank, of_domain), detach=True).loss.backward()
        stock_loss(stock_logits(stock.heads, stock.encoder(x).detach()), of_domain).backward()
        assert_gradients(model, stock)  # None but for the adversary
        model.zero_grad()
        stock.zero_grad()
        ddp(part(rank, x), part(rank, targets)).loss.backward()
        stock_loss(stock_logits(stock.heads, stock.encoder(x)), targets).backward()
        assert_gradients(model, stock)
    del ddp


def test_extra_steps_of_an_adversary_are_averaged_under_ddp(in_two_processes):
    in_two_processes(extra_steps_with_ddp)


def ddp_with_other_counts_in_each_process(rank: int) -> None:
    model, stock = network(), network()
    ddp = DistributedDataParallel(model)
    x, _, targets = batch()
    targets["digit"][1:3] = -100  # three rows without a digit here, one there
    valid = (targets["digit"] != -100).sum()
    # sums over this process's rows, divided by the count of all; DDP's average divides by the processes once more
    weight = dict.fromkeys(targets, 2 / ROWS) | {"digit": 2 / valid.item()}
    ddp(part(rank, x), part(rank, targets), reduction="sum", loss_weight=weight).loss.backward()
    stock_loss(stock_logits(stock.heads, stock.encoder(x)), targets).backward()
    assert_gradients(model, stock)
    del ddp


def test_sums_give_the_mean_over_all_processes_where_they_have_unequal_counts(in_two_processes):
    in_two_processes(ddp_with_other_counts_in_each_process)


def ddp_keeps_one_lambda(rank: int) -> None:
    heads = network().heads
    heads.lambda_ = 0.1 + rank
    ddp = DistributedDataParallel(heads)
    assert [value.item() for value in heads.lambda_.values()] == [0.1] * 3  # that of the first process, in both
    state = {name.removeprefix("module."): value for name, value in ddp.state_dict().items()}
    other = AdversarialHeads(
        7, {"digit": 3, "age": [6, 1]}, {"domain": 2, "speaker": [6, 4], "room": OwnModule()}, losses={"age": "mse"}
    )
    other.load_state_dict(state)
    assert all(value.dtype == torch.float64 and value.item() == 0.1 for value in other.lambda_.values())
    del ddp


def test_lambda_and_the_state_dict_under_ddp(in_two_processes):
    in_two_processes(ddp_keeps_one_lambda)


def hooks_around_ddp(rank: int) -> None:
    heads, stock = network().heads, network().heads
    fired = []
    heads.register_forward_pre_hook(lambda module, args: fired.append("before"))
    heads.register_forward_hook(lambda module, args, out: fired.append(type(out).__name__))
    heads.register_full_backward_hook(lambda module, grad_in, grad_out: fired.append("backward"))
    heads.adversaries["domain"].register_forward_hook(lambda module, args, out: fired.append("domain"))
    ddp = DistributedDataParallel(heads)
    _, features, targets = batch()
    ours, theirs = part(rank, features).requires_grad_(), features.requires_grad_()
    ddp(ours, part(rank, targets)).loss.backward()
    stock_loss(stock_logits(stock, theirs), targets).backward()
    assert fired == ["before", "domain", "HeadsOutput", "backward"], fired
    assert_gradients(heads, stock)
    torch.testing.assert_close(ours.grad, 2 * part(rank, theirs.grad))
    del ddp


def test_hooks_of_the_heads_fire_within_ddp(in_two_processes):
    in_two_processes(hooks_around_ddp)


# --- FSDP
# ----------------------------------------------------------------------------------------------------------------------


def rounded_gradients(stock: nn.Module, features: Tensor, targets: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Sets the gradients as mixed precision has them: each half's in `dtype`, averaged in float32. Returns the
    features' own."""
    seen = []
    for rank in range(2):
        low = copy.deepcopy(stock).to(dtype)
        own = part(rank, features).detach().requires_grad_()
        stock_penalty(stock_logits(low, own.to(dtype)), part(rank, targets)).backward()
        for parameter, rounded in zip(stock.parameters(), low.parameters(), strict=True):
            half = rounded.grad.float() / 2
            parameter.grad = half if rank == 0 else parameter.grad + half
        seen.append(own.grad)
    return torch.cat(seen)


# Rounding differs by some units in the last place of the sums: 2^-8 in bfloat16, 2^-11 in float16.
TOLERANCE = {
    torch.bfloat16: {"rtol": 0.03, "atol": 0.01},
    torch.float16: {"rtol": 0.004, "atol": 0.002},
}


def fsdp_around_the_heads(rank: int, wrap, dtype: torch.dtype) -> None:
    heads, stock = network().heads, network().heads
    sharded = wrap(heads, dtype)
    _, features, targets = batch()
    ours = part(rank, features).requires_grad_()
    for _ in range(2):
        sharded.zero_grad()
        ours.grad = None
        out = sharded(ours, part(rank, targets))
        assert out.logits["digit"].dtype == out.logits["room"].dtype == dtype and out.loss.dtype == torch.float32
        penalty(out).backward()
        expected = rounded_gradients(stock, features, targets, dtype)
        assert_whole_gradients(sharded, stock, TOLERANCE[dtype])
        torch.testing.assert_close(ours.grad, part(rank, expected), **TOLERANCE[dtype])
    assert heads.lambda_ == {name: torch.tensor(value, dtype=torch.float64) for name, value in LAMBDAS.items()}


def assert_whole_gradients(sharded: nn.Module, stock: nn.Module, tolerance: dict) -> None:
    if isinstance(sharded, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(sharded, with_grads=True):
            assert_gradients(sharded, stock, **tolerance)
    else:
        assert_gradients(sharded, stock, **tolerance)


def fsdp1(module: nn.Module, dtype: torch.dtype, use_orig_params: bool = True) -> nn.Module:
    precision = MixedPrecision(param_dtype=dtype, reduce_dtype=torch.float32)
    return FullyShardedDataParallel(
        module, device_id=torch.device("cpu"), mixed_precision=precision, use_orig_params=use_orig_params
    )


def fsdp2(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    return fully_shard(module, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)


def fsdp2_of_each_head(heads: AdversarialHeads, dtype: torch.dtype) -> nn.Module:
    for module in [*heads.predictors.values(), *heads.adversaries.values()]:
        fsdp2(module, dtype)
    return fsdp2(heads, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "wrap",
    [fsdp1, pytest.param(fsdp2, marks=needs_averages), pytest.param(fsdp2_of_each_head, marks=needs_averages)],
    ids=lambda wrap: wrap.__name__,
)
def test_fsdp_around_the_heads_with_mixed_precision(in_two_processes, wrap, dtype):
    in_two_processes(fsdp_around_the_heads, wrap, dtype)


def fsdp1_flat(module: nn.Module) -> nn.Module:
    return fsdp1(module, torch.float32, use_orig_params=False)


def fsdp1_of_model_and_heads(model: Network) -> nn.Module:
    model.heads = fsdp1(model.heads, torch.float32)
    return fsdp1(model, torch.float32)


def fsdp2_of_model_and_heads(model: Network) -> nn.Module:
    fsdp2(model.heads, torch.float32)
    return fsdp2(model, torch.float32)


def whole_state(sharded: nn.Module) -> dict[str, Tensor]:
    """By the names that the model has without wrappers."""
    if isinstance(sharded, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(sharded):
            tensors = [*sharded.named_parameters(), *sharded.named_buffers()]
            return {name.replace("_fsdp_wrapped_module.", ""): tensor.detach().clone() for name, tensor in tensors}
    return checkpoint.get_model_state_dict(sharded, options=checkpoint.StateDictOptions(full_state_dict=True))


def train_with_fsdp_around_the_model(rank: int, wrap) -> None:
    stock, model = network(), wrap(network())
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9) for module in (model, stock)]
    x, _, targets = batch()
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        penalty(model(part(rank, x), part(rank, targets))).backward()
        stock_penalty(stock_logits(stock.heads, stock.encoder(x)), targets).backward()
        for optimizer in optimizers:
            optimizer.step()
    state = whole_state(model)
    assert state.keys() == stock.state_dict().keys()
    for name, expected in stock.state_dict().items():
        torch.testing.assert_close(state[name], expected)


@pytest.mark.parametrize(
    "wrap",
    [
        fsdp1_flat,
        fsdp1_of_model_and_heads,
        pytest.param(fsdp2_of_model_and_heads, marks=needs_averages),
    ],
    ids=lambda wrap: wrap.__name__,
)
def test_training_with_fsdp_around_the_model_is_that_of_one_process(in_two_processes, wrap):
    in_two_processes(train_with_fsdp_around_the_model, wrap)


def fsdp2_with_heads_left_out(rank: int) -> None:
    heads, stock = fsdp2(network().heads, torch.float32), network().heads
    _, features, targets = batch()
    del targets["domain"], targets["age"], targets["room"]
    heads(part(rank, features), part(rank, targets)).loss.backward()
    stock_loss(stock_logits(stock, features), targets).backward()
    assert_gradients(heads, stock)


@needs_averages
def test_heads_left_out_have_no_gradient_under_fsdp2(in_two_processes):
    in_two_processes(fsdp2_with_heads_left_out)


def fsdp2_state_and_hooks(rank: int) -> None:
    heads = network().heads
    fired = []
    heads.register_forward_pre_hook(lambda module, args: fired.append("before"))
    heads.register_forward_hook(lambda module, args, out: fired.append(type(out).__name__))
    state = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    sharded = fsdp2(heads, torch.float32)
    options = checkpoint.StateDictOptions(full_state_dict=True)
    whole = checkpoint.get_model_state_dict(sharded, options=options)
    assert whole.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(whole[name], tensor, rtol=0, atol=0)
    numbers = dict(zip(heads.lambda_, (0.1, 0.2, 0.3), strict=True))
    state.update({f"reversals.{name}.lambda_": torch.tensor(own, dtype=torch.float64) for name, own in numbers.items()})
    checkpoint.set_model_state_dict(sharded, state, options=options)
    assert {name: value.item() for name, value in heads.lambda_.items()} == numbers
    _, features, targets = batch()
    sharded(part(rank, features), part(rank, targets)).loss.backward()
    assert fired == ["before", "HeadsOutput"], fired


def test_the_state_dict_and_hooks_under_fsdp2(in_two_processes):
    in_two_processes(fsdp2_state_and_hooks)


def fsdp1_that_casts_buffers(rank: int) -> None:
    """As accelerate's plugin and Lightning's strategy do. Lambda goes on exactly, and so do checkpoints."""
    precision = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    names = ("digit", "domain")
    _, features, targets = batch()
    local, labels = part(rank, features), part(rank, {name: targets[name] for name in names})
    gradients = []
    for mixed in (MixedPrecision(param_dtype=torch.bfloat16), precision):
        heads = network().heads
        heads.lambda_ = 0.1  # which bfloat16 does not have
        sharded = FullyShardedDataParallel(
            heads, device_id=torch.device("cpu"), mixed_precision=mixed, use_orig_params=True
        )
        x = local.detach().requires_grad_()
        sharded(x, labels).loss.backward()
        gradients.append(x.grad)
    assert heads.lambda_["domain"].dtype == torch.bfloat16
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    state = sharded.state_dict()
    assert {state[f"reversals.{name}.lambda_"].item() for name in heads.lambda_} == {0.1}
    heads.lambda_ = 0.2
    sharded.load_state_dict(state)
    x = local.detach().requires_grad_()
    sharded(x, labels).loss.backward()
    torch.testing.assert_close(x.grad, gradients[0], rtol=0, atol=0)


def test_a_lambda_whose_buffer_fsdp1_has_cast_is_exact(in_two_processes):
    in_two_processes(fsdp1_that_casts_buffers)


# --- DTensor
# -------------------------------------------------------------------------------------------------------------------


def heads_of_dtensors(rank: int, weights_by_class: bool) -> None:
    heads, stock = network().heads, network().heads
    mesh = init_device_mesh("cpu", (2,))

    def shard(name: str, module: nn.Module, mesh) -> None:
        for own, parameter in module.named_parameters(recurse=False):
            placed = distribute_tensor(parameter, mesh, [Shard(0) if weights_by_class else Replicate()])
            module.register_parameter(own, nn.Parameter(placed))

    distribute_module(heads, mesh, shard)
    _, features, targets = batch()
    ours = distribute_tensor(features, mesh, [Replicate() if weights_by_class else Shard(0)]).requires_grad_()
    theirs = features.clone().requires_grad_()
    placements = ours.placements
    out = heads(ours, {name: distribute_tensor(target, mesh, placements) for name, target in targets.items()})
    penalty(out).backward()
    stock_penalty(stock_logits(stock, theirs), targets).backward()
    assert_gradients(heads, stock)
    torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)


@needs_elements
@pytest.mark.parametrize(
    "weights_by_class", [False, True], ids=["features sharded by rows", "weights sharded by classes"]
)
def test_heads_whose_weights_are_dtensors(in_two_processes, weights_by_class):
    in_two_processes(heads_of_dtensors, weights_by_class)


OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "ignored rows": {"ignore_index": 1},
    "weighted rows": {"sample_weight": True},
    "weighted classes": {"class_weight": {"digit": [0.5, 0.0, 2.0]}},
    "weighted heads": {"loss_weight": {"digit": 0.25, "speaker": 3.0}},
    "everything": {
        "sample_weight": True,
        "class_weight": {"digit": [0.5, 1.0, 2.0], "domain": [3.0, 0.25]},
        "loss_weight": {"digit": 0.25, "age": 2.0},
        "label_smoothing": 0.1,
        "ignore_index": {"digit": 2},
    },
    "everything, sum": {
        "sample_weight": True,
        "class_weight": {"digit": [0.5, 1.0, 2.0]},
        "loss_weight": 0.5,
        "label_smoothing": {"speaker": 0.1},
        "reduction": "sum",
    },
}
# The features' leading sizes, and how they are distributed over two processes.
LAYOUTS = {
    "rows": ((8,), [Shard(0)]),
    "an odd number of rows": ((7,), [Shard(0)]),
    "one row": ((1,), [Shard(0)]),
    "sequences": ((3, 4), [Shard(0)]),
    "the steps of sequences": ((2, 5), [Shard(1)]),
    "replicated": ((6,), [Replicate()]),
    "two mesh dimensions": ((6,), [Shard(0), Replicate()]),
}


def fused_heads() -> AdversarialHeads:
    torch.manual_seed(1)
    heads = AdversarialHeads(
        7,
        {"digit": 3, "age": [6, 1]},
        {"domain": 2, "speaker": [5, 4]},
        lambda_={"domain": 0.5, "speaker": 0.25},
        losses={"age": "mse"},
    )
    return heads.double()


def of_rows(leading: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    torch.manual_seed(3)
    sizes = {"digit": 3, "domain": 2, "speaker": 4}
    targets = {name: torch.randint(size, leading) for name, size in sizes.items()}
    targets["age"] = torch.randn(*leading, 1, dtype=torch.float64)
    weight = torch.rand(leading, dtype=torch.float64)
    weight.view(-1)[::3] = 0
    return torch.randn(*leading, 7, dtype=torch.float64), targets, weight


def exactly_as_in_one_process(rank: int, layout: str, option: str, fused: bool) -> None:
    leading, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", (2, 1)[: len(placements)])
    heads, whole = fused_heads(), fused_heads()
    distribute_module(heads, mesh)
    x, targets, sample_weight = of_rows(leading)

    def over_rows(tensor: Tensor) -> DTensor:
        return distribute_tensor(tensor, mesh, placements)

    def everywhere(tensor: Tensor) -> DTensor:
        return distribute_tensor(tensor, mesh, [Replicate()] * len(placements))

    ours, theirs = over_rows(x).requires_grad_(), x.clone().requires_grad_()
    options = dict(OPTIONS[option])
    own = dict(options)
    if options.get("sample_weight"):
        options["sample_weight"], own["sample_weight"] = sample_weight, over_rows(sample_weight)
    if given := options.get("class_weight"):
        options["class_weight"] = {name: torch.tensor(weights) for name, weights in given.items()}
        own["class_weight"] = {name: everywhere(torch.tensor(weights)) for name, weights in given.items()}
    with Operators() as operators:
        out = heads(ours, {name: over_rows(target) for name, target in targets.items()}, **own)
    assert (operators.seen["_heads_loss"] > 0) == fused, operators.seen
    # For all heads together one sum of the norms, and one of the loss.
    if placements == [Shard(0)]:
        assert operators.seen["all_reduce"] == (1 if options.get("reduction") == "sum" else 2), operators.seen
    expected = whole(theirs, targets, **options)
    torch.testing.assert_close(out.loss.full_tensor(), expected.loss)
    assert out.loss.placements == (Replicate(),) * len(placements)
    for name, loss in expected.head_losses.items():
        torch.testing.assert_close(out.head_losses[name].full_tensor(), loss)
        torch.testing.assert_close(out.logits[name].full_tensor(), expected.logits[name])
        assert list(out.logits[name].placements) == placements
    for total, of in ((lambda o: o.loss, "loss"), (mixed, "everything that is returned")):
        for tensor in (ours, theirs, *heads.parameters(), *whole.parameters()):
            tensor.grad = None
        total(out).backward(retain_graph=True)
        total(expected).backward(retain_graph=True)
        assert_gradients(heads, whole, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            ours.grad.full_tensor(), theirs.grad, rtol=1e-9, atol=1e-12, msg=lambda text, of=of: f"{of}: {text}"
        )
    assert list(ours.grad.placements) == placements
    summed = tuple(Partial() if placement.is_shard() else placement for placement in placements)
    assert {parameter.grad.placements for parameter in heads.parameters()} == {summed}


def mixed(out) -> Tensor:
    total = out.loss + 0.5 * out.head_losses["domain"] + 2 * out.head_losses["age"]
    return total + out.logits["digit"].square().sum() + out.logits["speaker"].exp().sum()


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[function._schema.name.partition("::")[2]] += 1
        return function(*args, **(kwargs or {}))


def sharded_by_rows(rank: int, fused: bool) -> None:
    every_option = [("rows", option) for option in OPTIONS]
    every_layout = [(layout, option) for layout in LAYOUTS for option in ("mean", "everything") if layout != "rows"]
    for layout, option in [*every_option, *every_layout]:
        with case(layout, option):
            exactly_as_in_one_process(rank, layout, option, fused)


@needs_elements
def test_features_sharded_by_rows_give_exactly_the_loss_of_one_process(in_two_processes, path):
    in_two_processes(sharded_by_rows, path == "compiled")


def gradients_of_gradients_by_rows(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    heads, whole = fused_heads(), fused_heads()
    distribute_module(heads, mesh)
    x, targets, sample_weight = of_rows((7,))

    def over_rows(tensor: Tensor) -> DTensor:
        return distribute_tensor(tensor, mesh, [Shard(0)])

    ours, theirs = over_rows(x).requires_grad_(), x.clone().requires_grad_()
    own = {name: over_rows(target) for name, target in targets.items()}
    for total in (
        lambda o: o.loss,
        lambda o: o.loss.square(),
        mixed,
        lambda o: sum(z.square().mean() for z in o.logits.values()),
    ):
        first = []
        for network, features, of, weight in (
            (heads, ours, own, over_rows(sample_weight)),
            (whole, theirs, targets, sample_weight),
        ):
            network.zero_grad()
            features.grad = None
            wanted = [features, *network.parameters()]
            given = torch.autograd.grad(total(network(features, of, sample_weight=weight)), wanted, create_graph=True)
            sum(gradient.square().sum() for gradient in given).backward()
            first.append([gradient.full_tensor() if isinstance(gradient, DTensor) else gradient for gradient in given])
        torch.testing.assert_close(*first, rtol=1e-9, atol=1e-12)
        assert_gradients(heads, whole, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=1e-9, atol=1e-12)


@needs_elements
def test_gradients_of_gradients_of_features_sharded_by_rows(in_two_processes):
    in_two_processes(gradients_of_gradients_by_rows)


def logits_by_rows(rank: int, fused: bool) -> None:
    mesh = init_device_mesh("cpu", (2,))
    heads, whole = fused_heads(), fused_heads()
    distribute_module(heads, mesh)
    x, _, _ = of_rows((7,))
    ours, theirs = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_(), x.clone().requires_grad_()
    with Operators() as operators:
        logits = heads(ours)
    assert (operators.seen["_heads_logits"] > 0) == fused and not operators.seen["all_reduce"], operators.seen
    expected = whole(theirs)
    for of in (logits, expected):
        (of["digit"].square().sum() + of["domain"].exp().sum()).backward()  # the others are ignored
    for name, z in expected.items():
        torch.testing.assert_close(logits[name].full_tensor(), z)
        assert logits[name].placements == (Shard(0),)
    assert_gradients(heads, whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=1e-9, atol=1e-12)


@needs_elements
def test_logits_of_features_sharded_by_rows(in_two_processes, path):
    in_two_processes(logits_by_rows, path == "compiled")


def refused_by_whole_shapes(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    heads = fused_heads()
    distribute_module(heads, mesh)
    x, targets, _ = of_rows((8,))
    ours = distribute_tensor(x, mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"^targets\['digit'\] must have shape \[8\], got \[6\]$"):
        heads(ours, {"digit": distribute_tensor(targets["digit"][:6], mesh, [Shard(0)])})


@needs_elements
def test_errors_name_the_shapes_of_whole_tensors(in_two_processes):
    in_two_processes(refused_by_whole_shapes)


def layers_by_rows(rank: int, placements: list) -> None:
    """The layers beside those of PyTorch that do not reverse: values, gradients and layouts are theirs, but for the
    factor."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(1)
    ours, theirs = GRLLinear(7, 3, lambda_=0.3), nn.Linear(7, 3)
    ours.load_state_dict(theirs.state_dict())
    for layer in (ours, theirs):
        distribute_module(layer, mesh)
    tail = torch.randn(8, 3)
    per_row = distribute_tensor(torch.full((8, 1), 0.3), mesh, placements)
    pairs = {
        "GRLLinear": (ours, theirs),
        "GRL": (GRL(0.3), lambda x: x.view_as(x)),
        "a number": (lambda x: gradient_reversal(x, 0.3), lambda x: x.view_as(x)),
        "a tensor": (lambda x: gradient_reversal(x, torch.tensor(0.3)), lambda x: x.view_as(x)),
        "one for each row": (lambda x: gradient_reversal(x, per_row), lambda x: x.view_as(x)),
    }
    for name, layers in pairs.items():
        found = []
        for layer in layers:
            x = distribute_tensor(torch.linspace(-1, 1, 56).view(8, 7), mesh, placements).requires_grad_()
            y = layer(x)
            factor = tail if name == "GRLLinear" else torch.linspace(0, 2, 56).view(8, 7)
            (y * distribute_tensor(factor, mesh, placements)).sum().backward()
            found.append((y, x.grad))
        (y, grad), (expected_y, expected_grad) = found
        assert y.placements == expected_y.placements and grad.placements == expected_grad.placements == tuple(
            placements
        ), name
        torch.testing.assert_close(y.full_tensor(), expected_y.full_tensor(), rtol=0, atol=0, msg=name)
        torch.testing.assert_close(grad.full_tensor(), -0.3 * expected_grad.full_tensor(), msg=name)
    assert [p.grad.placements for p in ours.parameters()] == [p.grad.placements for p in theirs.parameters()]
    assert_gradients(ours, theirs)


@pytest.mark.parametrize("placements", [[Shard(0)], [Replicate()]], ids=str)
def test_layers_keep_the_layout_of_their_features(in_two_processes, placements):
    in_two_processes(layers_by_rows, placements)


def tensor_parallel_heads(rank: int) -> None:
    heads, stock = network().heads, network().heads
    mesh = init_device_mesh("cpu", (2,))
    names = {"predictors.digit": "digit", "adversaries.domain": "domain"}
    parallelize_module(heads, mesh, {name: ColwiseParallel(output_layouts=Replicate()) for name in names})
    _, features, targets = batch()
    targets = {name: targets[name] for name in names.values()}
    ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    heads(ours, targets).loss.backward()
    stock_loss(stock_logits(stock, theirs), targets).backward()
    assert_gradients(heads, stock)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_tensor_parallel_heads(in_two_processes):
    in_two_processes(tensor_parallel_heads)


def sharded_heads_outside_their_call(rank: int) -> None:
    heads = fsdp2(network().heads, torch.float32)
    weight = heads.predictors["digit"].weight
    with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
        linear_heads(batch()[1], [weight], lambda_=[None])


def test_sharded_weights_with_plain_features_are_refused(in_two_processes):
    in_two_processes(sharded_heads_outside_their_call)
