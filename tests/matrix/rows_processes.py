"""Rows: several processes. `run` is called in both of two gloo processes (`two_processes.py`), each of which takes half
of the rows."""

import copy

import torch
import torch.distributed as dist
from matrix.networks import FEATURES, ROWS, Network, batch, eager
from matrix.rows import IN_TWO_PROCESSES, row
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

PROCESSES = "Several processes (two, with gloo)"


def two(name: str, **options):
    return row(
        PROCESSES,
        name,
        expected=options.pop("expected", lambda plain: eager(plain)[2:]),
        where=IN_TWO_PROCESSES,
        **options,
    )


def half() -> list[Tensor]:
    return [t.chunk(2)[dist.get_rank()] for t in batch()]


def averaged(network: nn.Module, parameters) -> list[Tensor]:
    """The gradients of the parameters after a backward in both processes; those that nobody has averaged are averaged
    here."""
    network(*half()).backward()
    return [whole(p.grad) for p in parameters]


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t.detach()


@two("DDP around the model")
def _(network: Network) -> list[Tensor]:
    ddp = DistributedDataParallel(network)
    result = averaged(ddp, network.parameters())
    del ddp
    return result


@two("DDP around the model, compiled")
def _(network: Network) -> list[Tensor]:
    ddp = DistributedDataParallel(network)
    result = averaged(torch.compile(ddp, backend="aot_eager"), network.parameters())
    torch._dynamo.reset()
    del ddp
    return result


def around_the_part(network: Network, wrap) -> list[Tensor]:
    """`wrap` goes around what holds the adversary alone; what is outside of it is averaged by hand."""
    name = "heads" if hasattr(network, "heads") else "domain"
    inside = set(getattr(network, name).parameters())
    inside = [p in inside for p in network.parameters()]
    setattr(network, name, wrap(getattr(network, name)))
    network(*half()).backward()
    gradients = []
    for p, wrapped in zip(network.parameters(), inside, strict=True):
        if not wrapped:
            dist.all_reduce(p.grad)
            p.grad /= 2
        gradients.append(whole(p.grad))
    setattr(network, name, nn.Identity())
    return gradients


@two("DDP around the heads or the adversary alone")
def _(network: Network) -> list[Tensor]:
    return around_the_part(network, DistributedDataParallel)


def fsdp1(module: nn.Module, **options) -> nn.Module:
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True, **options)


def fsdp1_gradients(network: Network, **options) -> list[Tensor]:
    model = fsdp1(network, **options)
    model(*half()).backward()
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        return [p.grad.clone() for p in network.parameters()]


@two("FSDP1 around the model")
def _(network: Network) -> list[Tensor]:
    return fsdp1_gradients(network)


@two("FSDP1 around the heads or the adversary alone")
def _(network: Network) -> list[Tensor]:
    name = "heads" if hasattr(network, "heads") else "domain"
    model = fsdp1(getattr(network, name))
    setattr(network, name, model)
    network(*half()).backward()
    result = []
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        inside = set(model.parameters())
        for p in network.parameters():
            if p not in inside:
                dist.all_reduce(p.grad)
                p.grad /= 2
            result.append(p.grad.clone())
    return result


@two("FSDP1 with mixed precision (bfloat16)", rtol=0.05, atol=0.02)
def _(network: Network) -> list[Tensor]:
    precision = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return fsdp1_gradients(network, mixed_precision=precision)


@two("FSDP2 (`fully_shard`) around the model")
def _(network: Network) -> list[Tensor]:
    return averaged(fully_shard(network, mesh=init_device_mesh("cpu", (2,))), network.parameters())


@two("FSDP2 around the heads or the adversary alone")
def _(network: Network) -> list[Tensor]:
    return around_the_part(network, lambda module: fully_shard(module, mesh=init_device_mesh("cpu", (2,))))


@two("FSDP2 with mixed precision (bfloat16)", rtol=0.05, atol=0.02)
def _(network: Network) -> list[Tensor]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return averaged(fully_shard(network, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy), network.parameters())


@two("FSDP2 of a model made on `meta`")
def _(given: Network) -> list[Tensor]:
    state = given.state_dict()
    sharded = fully_shard(copy.deepcopy(given).to("meta"), mesh=init_device_mesh("cpu", (2,)))
    sharded.to_empty(device="cpu")
    checkpoint.set_model_state_dict(sharded, state, options=checkpoint.StateDictOptions(full_state_dict=True))
    return averaged(sharded, sharded.parameters())


def of_dtensors(network: Network, parameters, inputs, compiled: bool = False) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (2,))

    def place(name: str, module: nn.Module, mesh) -> None:
        for own, parameter in module.named_parameters(recurse=False):
            placed = parameters if module in network.linears else [Replicate()]
            module.register_parameter(own, nn.Parameter(distribute_tensor(parameter, mesh, placed)))

    distribute_module(network, mesh, place)
    call = torch.compile(network, backend="aot_eager", fullgraph=True) if compiled else network
    call(*(distribute_tensor(t, mesh, inputs) for t in batch())).backward()
    return [whole(p.grad) for p in network.parameters()]


@two("DTensor: features sharded by rows, weights replicated")
def _(network: Network) -> list[Tensor]:
    return of_dtensors(network, [Replicate()], [Shard(0)])


@two("DTensor: features sharded by rows, compiled")
def _(network: Network) -> list[Tensor]:
    result = of_dtensors(network, [Replicate()], [Shard(0)], compiled=True)
    torch._dynamo.reset()
    return result


@two("DTensor: everything replicated")
def _(network: Network) -> list[Tensor]:
    return of_dtensors(network, [Replicate()], [Replicate()])


@two("DTensor: the last layers' weights sharded by classes")
def _(network: Network) -> list[Tensor]:
    return of_dtensors(network, [Shard(0)], [Replicate()])


@two("`ZeroRedundancyOptimizer`", expected=lambda plain: zero_step(plain, torch.optim.SGD(plain.parameters(), lr=0.5)))
def _(network: Network) -> list[Tensor]:
    ddp = DistributedDataParallel(network)
    ddp(*half()).backward()
    ZeroRedundancyOptimizer(network.parameters(), torch.optim.SGD, lr=0.5).step()
    del ddp
    return [p.detach() for p in network.parameters()]


def zero_step(plain: Network, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    eager(plain)
    optimizer.step()
    return [p.detach() for p in plain.parameters()]


class Tail(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Tensor) -> Tensor:
        return features.tanh()


@two("pipeline: the encoder in one process, the heads in the other")
def _(network: Network) -> list[Tensor]:
    rank, (x, labels) = dist.get_rank(), batch()
    module = network.encoder if rank == 0 else Tail(network)
    example = (x[: ROWS // 2] if rank == 0 else torch.randn(ROWS // 2, FEATURES),)
    stage = PipelineStage(module, rank, 2, torch.device("cpu"), input_args=example)
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=network.loss_of)
    schedule.step(x) if rank == 0 else schedule.step(target=labels)
    gradients = []
    for p in network.parameters():
        own = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        dist.all_reduce(own)
        gradients.append(own)
    return gradients
