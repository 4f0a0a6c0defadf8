"""Rows: precision, optimizers, what wraps or copies modules, and what saves them."""

import copy
import functools
import io
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from matrix.networks import COLUMNS, Network, batch, eager, step
from matrix.rows import row
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

PRECISION, TRAINING, MODULES, COPIES = (
    "Precision",
    "Optimizers",
    "What changes a module's weight or call",
    "Copies and checkpoints",
)


# --- precision
# -------------------------------------------------------------------------------------------------------------


@row(PRECISION, "autocast to bfloat16", rtol=0.03, atol=0.02)
def _(network: Network) -> list[Tensor]:
    def call(x: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return network(x, labels)

    return step(call, network.parameters())


def scaled(network: Network, dtype: torch.dtype) -> list[Tensor]:
    """A training step with a scaler, at a scale that is far from 1."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, labels = batch()
    with torch.autocast("cpu", dtype):
        loss = network(x, labels)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    gradients = [p.grad.clone() for p in network.parameters()]
    scaler.step(optimizer)
    scaler.update()
    return [*gradients, *network.parameters()]


def stepped(plain: Network) -> list[Tensor]:
    gradients = eager(plain)[2:]
    return [*gradients, *(p - 0.5 * g for p, g in zip(plain.parameters(), gradients, strict=True))]


@row(PRECISION, "autocast to float16 with `GradScaler`", expected=stepped, rtol=0.01, atol=0.005)
def _(network: Network) -> list[Tensor]:
    return scaled(network, torch.float16)


@row(PRECISION, "`GradScaler` that skips a step with infinities", expected=lambda plain: list(plain.parameters()))
def _(network: Network) -> list[Tensor]:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    scaler.scale(1e6 * network(*batch())).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 1e38
    return list(network.parameters())


def in_dtype(network: Network, dtype: torch.dtype) -> list[Tensor]:
    network.to(dtype)
    return step(network, network.parameters(), batch()[0].to(dtype))


@row(PRECISION, "`module.bfloat16()`", rtol=0.03, atol=0.02)
def _(network: Network) -> list[Tensor]:
    return in_dtype(network, torch.bfloat16)


@row(PRECISION, "`module.half()`", rtol=0.01, atol=0.005)
def _(network: Network) -> list[Tensor]:
    return in_dtype(network, torch.float16)


@row(PRECISION, "`module.double()`", expected=lambda plain: in_dtype(plain, torch.float64))
def _(network: Network) -> list[Tensor]:
    return in_dtype(network, torch.float64)


@row(PRECISION, "λ = 0 with an infinite gradient: zeros", expected=lambda plain: [torch.zeros(2, 5)])
def _(network: Network) -> list[Tensor]:
    for module in network.modules():
        for name in ("lambda_", "coeff", "number"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    features = torch.randn(2, 5, requires_grad=True)
    _, domain = network.logits(features)
    return list(torch.autograd.grad(domain, features, torch.full_like(domain, torch.inf)))


# --- optimizers
# ------------------------------------------------------------------------------------------------------------


def trained(network: Network, make) -> list[Tensor]:
    optimizer = make(network.parameters())
    for seed in range(3):
        optimizer.zero_grad()
        x, labels = batch(seed=seed)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = network(x, labels)  # noqa: B023
            loss.backward()
            return loss

        closure()
        optimizer.step(closure) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()
    return [p.detach() for p in network.parameters()]


def optimizer_row(name: str, make) -> None:
    row(TRAINING, name, expected=lambda plain: trained(plain, make), rtol=1e-4, atol=1e-4)(
        lambda network: trained(network, make)
    )


optimizer_row("foreach", lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True))
optimizer_row("fused", lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True))
optimizer_row("`LBFGS` with a closure", lambda parameters: torch.optim.LBFGS(parameters, max_iter=3))


@row(TRAINING, "EMA copies (`AveragedModel`)", expected=lambda plain: averaged(plain))
def averaged(network: Network) -> list[Tensor]:
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=False)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):
        eager(network)
        optimizer.step()
        average.update_parameters(network)
    return step(average, average.module.parameters())


# --- modules
# ---------------------------------------------------------------------------------------------------------------


def changed(make):
    """A row that changes both linear heads, in ours and in plain PyTorch."""

    def run(network: Network) -> list[Tensor]:
        torch.manual_seed(0)
        for linear in network.linears:
            make(linear)
        network.eval()  # spectral norm moves its vectors in training
        return eager(network)

    return run


def old_weight_norm(linear: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(linear)


for name, make in {
    "`parametrizations.weight_norm`": parametrizations.weight_norm,
    "`parametrizations.spectral_norm`": parametrizations.spectral_norm,
    "`parametrizations.orthogonal`": parametrizations.orthogonal,
    "the old `weight_norm` (a hook)": old_weight_norm,
    "the old `spectral_norm` (a hook)": torch.nn.utils.spectral_norm,
    "`prune`": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    "a forward hook that changes a head's logits": lambda linear: linear.register_forward_hook(
        lambda module, args, y: 2 * y
    ),
}.items():
    row(MODULES, name, expected=changed(make))(changed(make))


# --- copies
# ----------------------------------------------------------------------------------------------------------------


@row(COPIES, "`deepcopy`")
def _(network: Network) -> list[Tensor]:
    return eager(copy.deepcopy(network))


@row(COPIES, "`pickle`")
def _(network: Network) -> list[Tensor]:
    return eager(pickle.loads(pickle.dumps(network)))


def loaded(network: Network, **options) -> list[Tensor]:
    """Into a network made anew with another lambda, as from a checkpoint."""
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    other = COLUMNS[network.column]()
    for module in other.modules():
        for name in ("lambda_", "coeff"):
            if hasattr(module, name):
                setattr(module, name, 9.0)
    other.load_state_dict(torch.load(file, weights_only=True), **options)
    return eager(other)


@row(COPIES, "`torch.load(weights_only=True)`: λ is in the checkpoint")
def _(network: Network) -> list[Tensor]:
    return loaded(network)


@row(COPIES, "`load_state_dict(assign=True)`")
def _(network: Network) -> list[Tensor]:
    return loaded(network, assign=True)


@row(COPIES, "made on `meta`, `to_empty`, `load_state_dict`")
def _(network: Network) -> list[Tensor]:
    state = network.state_dict()
    with torch.device("meta"):
        other = COLUMNS[network.column]()
    other.to_empty(device="cpu")
    other.load_state_dict(state)
    return eager(other)


@row(COPIES, "shared between two networks, each trained", expected=lambda plain: twice(plain))
def twice(network: Network) -> list[Tensor]:
    other = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
    return step(
        lambda x, labels: network(x, labels) + network(other(x), labels), [*network.parameters(), *other.parameters()]
    )


# --- Hogwild
# ---------------------------------------------------------------------------------------------------------------


def sgd_step(network: Network) -> list[Tensor]:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    eager(network)
    optimizer.step()
    return [p.detach() for p in network.parameters()]


@functools.cache
def hogwild(method: str) -> dict[str, list[Tensor]]:
    script = Path(__file__).with_name("hogwild.py")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "parameters"
        command = [sys.executable, str(script), method, str(file)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }  # the package of this process
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return torch.load(file)


@row(TRAINING, "Hogwild: a forked process trains shared parameters", expected=sgd_step, heavy=["fallback"])
def _(network: Network) -> list[Tensor]:
    return hogwild("fork")[network.column]


@row(TRAINING, "Hogwild: a spawned process trains shared parameters", expected=sgd_step, heavy=["fallback"])
def _(network: Network) -> list[Tensor]:
    return hogwild("spawn")[network.column]
