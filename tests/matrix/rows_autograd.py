"""Rows: eager autograd, its hooks and modes, and `torch.func`."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from matrix.networks import COMMON, FEATURES, HEADS, IN_MODULES, LAYER, LINEAR, ROWS, Network, batch, eager, step
from matrix.rows import Refusal, row
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.masked import masked_tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

EAGER, CHECKPOINT, FUNC, SUBCLASSES = (
    "Eager autograd",
    "Checkpointing",
    "`torch.func` and forward mode",
    "Tensor subclasses",
)


@row(EAGER, "forward and backward")
def _(network: Network) -> list[Tensor]:
    return eager(network)


@row(EAGER, "`autograd.grad` of some parameters, `retain_graph`", expected=lambda plain: eager(plain)[2:] * 2)
def _(network: Network) -> list[Tensor]:
    loss = network(*batch())
    parameters = list(network.parameters())
    first = torch.autograd.grad(loss, parameters[:2], retain_graph=True)
    second = torch.autograd.grad(loss, parameters[2:], retain_graph=True)
    return [*first, *second, *torch.autograd.grad(loss, parameters)]


@row(EAGER, "accumulation over micro-batches")
def _(network: Network) -> list[Tensor]:
    x, labels = batch()
    x.requires_grad_()
    total = 0.0
    for rows, own in zip(x.chunk(2), labels.chunk(2), strict=True):
        loss = network(rows, own) / 2
        loss.backward()
        total += loss.detach()
    return [total, x.grad, *(p.grad for p in network.parameters())]


def loss_only(plain: Network) -> list[Tensor]:
    return eager(plain)[:1]


@row(EAGER, "`no_grad`", expected=loss_only)
def _(network: Network) -> list[Tensor]:
    with torch.no_grad():
        return [network(*batch())]


@row(EAGER, "`inference_mode`", expected=loss_only)
def _(network: Network) -> list[Tensor]:
    with torch.inference_mode():
        return [network(*batch())]


@row(EAGER, "double backward (gradient penalty)", expected=lambda plain: gradient_penalty(plain))
def gradient_penalty(network: Network) -> list[Tensor]:
    x, labels = batch()
    x.requires_grad_()
    inputs = [x, *network.parameters()]
    first = torch.autograd.grad(network(x, labels), inputs, create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)]


@row(EAGER, "anomaly mode")
def _(network: Network) -> list[Tensor]:
    with torch.autograd.detect_anomaly(check_nan=True):
        return eager(network)


@row(EAGER, "saved-tensor hooks (`save_on_cpu`, pack and unpack)")
def _(network: Network) -> list[Tensor]:
    with (
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()),
    ):
        return eager(network)


def with_hooks(network: Network) -> list[Tensor]:
    def watch(module, args, y) -> None:
        y.register_hook(lambda g: seen.update(features=g.clone()))

    seen = {}  # by name: the order of the parameters' own is not defined
    features = network.encoder.register_forward_hook(watch)
    digit = network.linears[0].register_full_backward_hook(
        lambda module, before, after: seen.update(digit=after[0].clone())
    )
    handles = [features, digit]
    for i, parameter in enumerate(network.parameters()):
        handles.append(parameter.register_hook(lambda g: 2 * g))
        handles.append(
            parameter.register_post_accumulate_grad_hook(lambda p, i=i: seen.update({str(i): p.grad.clone()}))
        )
    result = eager(network)
    for handle in handles:
        handle.remove()
    return [*result, *(seen[name] for name in sorted(seen))]


row(EAGER, "hooks of tensors, modules and parameters", expected=with_hooks)(with_hooks)


class Embedded(nn.Module):
    """A network whose inputs are rows of a table."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.table, self.network = nn.Embedding.from_pretrained(batch(9)[0], freeze=False, sparse=True), network

    def forward(self) -> Tensor:
        return self.network(self.table(torch.tensor([5, 1, 1, 8])), torch.tensor([0, 2, 1, 1]))


@row(EAGER, "sparse gradients of an embedding below", expected=lambda plain: embedded(plain))
def embedded(network: Network) -> list[Tensor]:
    model = Embedded(network)
    model().backward()
    assert model.table.weight.grad.is_sparse
    return [p.grad.to_dense() for p in model.parameters()]


# A linear layer of PyTorch takes no sparse gradient from above, nor do those here.
@row(
    EAGER,
    "a sparse gradient that arrives at the layer",
    expected=lambda plain: looked_up(plain),
    columns=(LAYER, COMMON),
)
def looked_up(network: Network) -> list[Tensor]:
    features = batch()[0].requires_grad_()
    rows = F.embedding(torch.tensor([3, 1, 3]), network.reversal(features), sparse=True)
    rows.square().sum().backward()
    assert features.grad.is_sparse
    return [features.grad.to_dense()]


@row(EAGER, "several threads, forward and backward", expected=lambda plain: eager(plain)[:2] * 4)
def _(network: Network) -> list[Tensor]:
    def work(_) -> list[Tensor]:
        barrier.wait(30)
        x, labels = batch()
        x.requires_grad_()
        loss = network(x, labels)
        return [loss.detach(), *torch.autograd.grad(loss, x)]

    barrier = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        return [t for result in pool.map(work, range(4)) for t in result]


@row(EAGER, "`FlopCounterMode`: the counts of the products", expected=lambda plain: count(plain))
def count(network: Network) -> list[Tensor]:
    with FlopCounterMode(display=False) as counter:
        result = eager(network)
    return [*result, torch.tensor(counter.get_total_flops())]


# --- checkpointing
# ---------------------------------------------------------------------------------------------------------


@row(CHECKPOINT, "reentrant")
def _(network: Network) -> list[Tensor]:
    return step(lambda x, labels: checkpoint(network, x, labels, use_reentrant=True), network.parameters())


@row(CHECKPOINT, "not reentrant")
def _(network: Network) -> list[Tensor]:
    return step(lambda x, labels: checkpoint(network, x, labels, use_reentrant=False), network.parameters())


@row(CHECKPOINT, "selective")
def _(network: Network) -> list[Tensor]:
    def policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
        return (
            CheckpointPolicy.MUST_SAVE
            if operator == torch.ops.aten.addmm.default
            else CheckpointPolicy.PREFER_RECOMPUTE
        )

    def call(x: Tensor, labels: Tensor) -> Tensor:
        return checkpoint(
            network, x, labels, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
        )

    return step(call, network.parameters())


# --- torch.func
# ------------------------------------------------------------------------------------------------------------


def of_x(network: Network):
    _, labels = batch()
    return lambda x: network(x, labels)


def of_parameters(network: Network):
    named = dict(network.named_parameters())
    buffers = dict(network.named_buffers())

    def loss(parameters: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
        return torch.func.functional_call(network, (parameters, buffers), (x, labels))

    return loss, named


@row(FUNC, "`grad`, `functional_call`", expected=lambda plain: eager(plain)[2:])
def _(network: Network) -> list[Tensor]:
    loss, parameters = of_parameters(network)
    return list(torch.func.grad(loss)(parameters, *batch()).values())


@row(FUNC, "`vjp`", expected=lambda plain: eager(plain)[:2])
def _(network: Network) -> list[Tensor]:
    value, pull = torch.func.vjp(of_x(network), batch()[0])
    return [value, *pull(torch.ones(()))]


def tangent() -> Tensor:
    return batch(seed=3)[0]


@row(FUNC, "`jvp` (the tangent times -λ)", expected=lambda plain: jvp(plain))
def jvp(network: Network) -> list[Tensor]:
    return list(torch.func.jvp(of_x(network), (batch()[0],), (tangent(),)))


@row(FUNC, "dual numbers (`forward_ad`)", expected=lambda plain: jvp(plain))
def _(network: Network) -> list[Tensor]:
    with forward_ad.dual_level():
        result = of_x(network)(forward_ad.make_dual(batch()[0], tangent()))
        return [t.clone() for t in forward_ad.unpack_dual(result)]


@row(FUNC, "`linearize`", expected=lambda plain: jvp(plain))
def _(network: Network) -> list[Tensor]:
    value, push = torch.func.linearize(of_x(network), batch()[0])
    return [value, push(tangent())]


@row(FUNC, "`jacrev`", expected=lambda plain: eager(plain)[1:2])
def _(network: Network) -> list[Tensor]:
    return [torch.func.jacrev(of_x(network))(batch()[0])]


@row(FUNC, "`jacfwd`", expected=lambda plain: eager(plain)[1:2])
def _(network: Network) -> list[Tensor]:
    return [torch.func.jacfwd(of_x(network))(batch()[0])]


@row(FUNC, "`hessian`", expected=lambda plain: hessian(plain))
def hessian(network: Network) -> list[Tensor]:
    return [torch.func.hessian(of_x(network))(batch()[0])]


def by_sample(network: Network) -> list[Tensor]:
    """One backward for each row."""
    x, labels = batch()
    parameters = list(network.parameters())
    rows = [torch.autograd.grad(network(x[i : i + 1], labels[i : i + 1]), parameters) for i in range(len(x))]
    return [torch.stack(own) for own in zip(*rows, strict=True)]


@row(FUNC, "`vmap` of `grad`: gradients per sample", expected=by_sample)
def _(network: Network) -> list[Tensor]:
    loss, parameters = of_parameters(network)
    x, labels = batch()
    one = torch.func.grad(lambda p, x, label: loss(p, x[None], label[None]))
    return list(torch.func.vmap(one, (None, 0, 0))(parameters, x, labels).values())


@row(
    FUNC, "`vmap` over an ensemble of networks", expected=lambda plain: [torch.stack([g, g]) for g in eager(plain)[2:]]
)
def _(network: Network) -> list[Tensor]:
    loss, parameters = of_parameters(network)
    stacked = {name: torch.stack([p, p]) for name, p in parameters.items()}
    return list(torch.func.vmap(torch.func.grad(loss), (0, None, None))(stacked, *batch()).values())


# --- tensor subclasses
# -----------------------------------------------------------------------------------------------------


class Tagged(torch.Tensor):
    """A subclass of the kind that libraries make: PyTorch's own `__torch_function__`, which keeps the type."""


@row(SUBCLASSES, "features of a subclass with `__torch_function__`")
def _(network: Network) -> list[Tensor]:
    return [
        t.as_subclass(Tensor)
        for t in step(lambda x, labels: network(x.as_subclass(Tagged), labels), network.parameters())
    ]


@row(SUBCLASSES, "parameters of a subclass with `__torch_function__`")
def _(network: Network) -> list[Tensor]:
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().as_subclass(Tagged)))
    return [t.as_subclass(Tensor) for t in eager(network)]


@row(SUBCLASSES, "jagged nested tensors", expected=lambda plain: eager(plain)[2:])
def _(network: Network) -> list[Tensor]:
    x, labels = batch()
    offsets = torch.tensor([0, 2, len(x)])
    jagged, of_jagged = (torch.nested.nested_tensor_from_jagged(t, offsets) for t in (x, labels))
    features = network.encoder(jagged).tanh()
    if hasattr(network, "heads") and network.column != "heads' logits":
        loss = network.loss_of(features, of_jagged)
    else:
        digit, domain = (z.values() for z in network.logits(features))
        loss = F.cross_entropy(digit, labels) + F.cross_entropy(domain, labels.clamp(max=1))
    loss.backward()
    return [p.grad for p in network.parameters()]


def with_holes(network: Network, make, to_tensor=lambda x: x) -> list[Tensor]:
    """The gradients of features of which some are masked, and of the layers that have zeros in their place."""
    torch.manual_seed(0)
    values, labels = torch.randn(ROWS, FEATURES), batch()[1]
    features = make(values, values.abs() > 0.4)
    if hasattr(network, "reversal"):
        digit, domain = network.digit(to_tensor(features)), network.domain(to_tensor(network.reversal(features)))
        loss = F.cross_entropy(digit, labels) + F.cross_entropy(domain, labels.clamp(max=1))
    elif network.column == LINEAR:
        loss = network.domain(features).sum()
    else:
        loss = network.loss_of(features, labels)
    loss.backward()
    return [to_tensor(features.grad), *(p.grad for part in network.parts for p in part.parameters())]


def zeros_for_holes(values: Tensor, seen: Tensor) -> Tensor:
    features = (values * seen).requires_grad_()
    features.register_hook(lambda grad: grad * seen)
    return features


@row(
    SUBCLASSES,
    "`MaskedTensor` features",
    Refusal(
        (LINEAR, *HEADS),
        "^(x|features) must not be a MaskedTensor",
        "refused: linear layers of PyTorch take none; pass `features.to_tensor(0)`",
    ),
    expected=lambda plain: with_holes(plain, zeros_for_holes),
    columns=IN_MODULES,
)
def _(network: Network) -> list[Tensor]:
    return with_holes(
        network, lambda values, seen: masked_tensor(values, seen, requires_grad=True), lambda t: t.to_tensor(0)
    )
