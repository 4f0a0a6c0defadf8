"""Rows: every kind of graph that PyTorch makes of a program."""

import functools
import io
import tempfile
from pathlib import Path

import torch
from matrix.networks import COLUMNS, HEADS, IN_MODULES, Network, batch, eager, step
from matrix.networks import network as make_network
from matrix.rows import PATHS, Refusal, row
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.export.experimental import _export_forward_backward
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

COMPILE, EXPORT, OTHER = "`torch.compile`", "`torch.export`", "TorchScript and fx"


def of(network: Network, call, **options) -> list[Tensor]:
    return step(torch.compile(call, **options), network.parameters())


class Together(nn.Module):
    """All columns in one graph, because each run of Inductor's C++ compiler takes seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList([make_network(column) for column in COLUMNS])

    def forward(self, x: list[Tensor], labels: Tensor) -> list[Tensor]:
        return [made(own, labels) for made, own in zip(self.networks, x, strict=True)]


@functools.cache
def by_inductor() -> dict[str, list[Tensor]]:
    together, (x, labels) = Together(), batch()
    inputs = [x.clone().requires_grad_() for _ in COLUMNS]
    losses = torch.compile(together)(inputs, labels)
    sum(losses).backward()
    results = zip(losses, inputs, together.networks, strict=True)
    return {made.column: [loss.detach(), x.grad, *(p.grad for p in made.parameters())] for loss, x, made in results}


@row(COMPILE, "default (Inductor)", heavy=["fallback"])
def _(network: Network) -> list[Tensor]:
    return by_inductor()[network.column]


@row(COMPILE, "`fullgraph=True`")
def _(network: Network) -> list[Tensor]:
    return of(network, network, fullgraph=True, backend="aot_eager")


def two_batches(network: Network, call) -> list[Tensor]:
    parameters = list(network.parameters())
    return [t for rows in (7, 12) for t in step(call, parameters, *batch(rows))]


@row(COMPILE, "`dynamic=True`: one graph for all batch sizes", expected=lambda plain: two_batches(plain, plain))
def _(network: Network) -> list[Tensor]:
    with torch._dynamo.config.patch(error_on_recompile=True):
        return two_batches(network, torch.compile(network, dynamic=True, fullgraph=True, backend="aot_eager"))


def trained(network: Network, compiled: bool = False) -> list[Tensor]:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

    def train(x: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = network(x, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    train = torch.compile(train, backend="aot_eager") if compiled else train
    losses = [train(*batch(seed=seed)) for seed in range(3)]
    return [*losses, *(p.detach().clone() for p in network.parameters())]


@row(COMPILE, "a whole training step", expected=trained)
def _(network: Network) -> list[Tensor]:
    return trained(network, compiled=True)


def changing(network: Network, call) -> list[Tensor]:
    result = []
    for lambda_ in (0.1, 0.3, 0.7):
        set_lambda(network, lambda_)
        result += step(call, network.parameters())
    return result


def set_lambda(network: Network, lambda_: float) -> None:
    for module in network.modules():
        if hasattr(module, "lambda_"):
            module.lambda_ = lambda_
        elif hasattr(module, "coeff"):
            module.coeff = lambda_


# A number given to the function is two graphs, of which no other number makes more: test_compile.py.
@row(
    COMPILE,
    "λ that changes every step: one graph",
    expected=lambda plain: changing(plain, plain),
    columns=IN_MODULES,
)
def _(network: Network) -> list[Tensor]:
    with torch._dynamo.config.patch(error_on_recompile=True):
        return changing(network, torch.compile(network, fullgraph=True, backend="aot_eager"))


@row(COMPILE, "around a checkpoint")
def _(network: Network) -> list[Tensor]:
    return of(network, lambda x, labels: checkpoint(network, x, labels, use_reentrant=False), backend="aot_eager")


@row(COMPILE, "compiled autograd over an eager forward")
def _(network: Network) -> list[Tensor]:
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        return eager(network)


# --- torch.export
# ----------------------------------------------------------------------------------------------------------


def exported(network: Network, **options) -> torch.export.ExportedProgram:
    return torch.export.export(network, batch(), **options)


def of_program(network: Network, program: torch.export.ExportedProgram) -> list[Tensor]:
    module = program.module()
    return step(
        module, [module.get_parameter(name) for name, _ in network.named_parameters()]
    )  # a strict graph has an order of its own


@row(EXPORT, "not strict")
def _(network: Network) -> list[Tensor]:
    return of_program(network, exported(network))


@row(EXPORT, "strict")
def _(network: Network) -> list[Tensor]:
    return of_program(network, exported(network, strict=True))


@row(EXPORT, "any batch size", expected=lambda plain: step(plain, plain.parameters(), *batch(9)))
def _(network: Network) -> list[Tensor]:
    rows = torch.export.Dim("rows", min=2)
    module = exported(network, dynamic_shapes=({0: rows}, {0: rows})).module()
    return step(module, module.parameters(), *batch(9))


@row(EXPORT, "saved and loaded")
def _(network: Network) -> list[Tensor]:
    file = io.BytesIO()
    torch.export.save(exported(network), file)
    file.seek(0)
    return of_program(network, torch.export.load(file))


@row(EXPORT, "the gradient of the exported training graph", expected=lambda plain: eager(plain)[2:])
def _(network: Network) -> list[Tensor]:
    joint = _export_forward_backward(exported(network))
    state = {**dict(network.named_parameters()), **dict(network.named_buffers()), **joint.constants}
    given = iter(batch())
    inputs = [state[spec.target] if spec.target else next(given) for spec in joint.graph_signature.input_specs]
    outputs = joint.graph_module(*inputs)
    outputs = dict(zip([spec.target for spec in joint.graph_signature.output_specs], outputs, strict=True))
    return [outputs[name] for name, _ in network.named_parameters()]


@row(EXPORT, "`run_decompositions`: PyTorch's own operators only (inference)", expected=lambda plain: eager(plain)[:1])
def _(network: Network) -> list[Tensor]:
    program = exported(network).run_decompositions()
    operators = {node.target for node in program.graph.nodes if node.op == "call_function"}
    foreign = {str(target) for target in operators if getattr(target, "namespace", "aten") != "aten"}
    assert not foreign, foreign
    return [program.module()(*batch())]


@functools.cache
def by_aot_inductor() -> dict[str, Tensor]:
    together, (x, labels) = Together(), batch()
    program = torch.export.export(together, ([x.clone() for _ in COLUMNS], labels))
    with tempfile.TemporaryDirectory() as folder:
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / "model.pt2"))
        losses = torch._inductor.aoti_load_package(package)([x.clone() for _ in COLUMNS], labels)
    return dict(zip(COLUMNS, losses, strict=True))


@row(EXPORT, "AOTInductor package (inference)", expected=lambda plain: eager(plain)[:1], heavy=PATHS)
def _(network: Network) -> list[Tensor]:
    return [by_aot_inductor()[network.column]]


# --- TorchScript and fx
# ----------------------------------------------------------------------------------------------------


@row(OTHER, "`jit.trace`")
def _(network: Network) -> list[Tensor]:
    traced = torch.jit.trace(network, batch())
    for _ in range(2):  # the executor optimises what it has seen before
        step(traced, network.parameters())
    return step(traced, network.parameters())


NO_SCRIPT = Refusal(
    HEADS,
    "keyword-only arguments",
    "refused: TorchScript has no keyword-only arguments; use `jit.trace` or `torch.export`",
)


@row(OTHER, "`jit.script`", NO_SCRIPT)
def _(network: Network) -> list[Tensor]:
    script = torch.jit.script(network)
    for _ in range(2):
        step(script, script.parameters())
    return step(script, script.parameters())


@row(OTHER, "`jit.save` and `jit.load` of a script", NO_SCRIPT)
def _(network: Network) -> list[Tensor]:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(network), file)
    file.seek(0)
    script = torch.jit.load(file)
    return step(script, script.parameters())


@row(OTHER, "`fx.symbolic_trace`")
def _(network: Network) -> list[Tensor]:
    traced = torch.fx.symbolic_trace(network)
    return step(traced, network.parameters())


def forward_graph(network: Network, **options) -> list[Tensor]:
    parameters = dict(network.named_parameters())
    graph = make_fx(lambda p, x, labels: torch.func.functional_call(network, p, (x, labels)), **options)(
        parameters, *batch()
    )
    return step(lambda x, labels: graph(parameters, x, labels), network.parameters())


@row(OTHER, "`make_fx` of the forward, the gradient of its graph")
def _(network: Network) -> list[Tensor]:
    return forward_graph(network)


@row(OTHER, "the same with `pre_dispatch=True`")
def _(network: Network) -> list[Tensor]:
    return forward_graph(network, pre_dispatch=True)


@row(OTHER, "`make_fx` of forward and backward")
def _(network: Network) -> list[Tensor]:
    def gradients(parameters: dict[str, Tensor], x: Tensor, labels: Tensor) -> list[Tensor]:
        loss = torch.func.functional_call(network, parameters, (x, labels))
        return [loss, *torch.autograd.grad(loss, [x, *parameters.values()])]

    parameters, (x, labels) = dict(network.named_parameters()), batch()
    x.requires_grad_()
    return list(make_fx(gradients)(parameters, x, labels)(parameters, x, labels))
