"""The backward overwrites the incoming gradient only where nobody else can see it, now or later.

The first half lets others keep that gradient, or the memory under it, in every way there is: what they hold must not
change, and the layer's own result must be right. The second half proves that the gradient *is* overwritten where nobody
does: on the CPU. On CUDA a kernel queued on another stream may still read it, of which nothing on the host knows
    (csrc/autograd/scale.h).
"""

import mmap
import re
import threading
from typing import NamedTuple

import numpy as np
import pytest
import torch
from samples import DTYPES, LAMBDAS, LAYOUTS, SHAPE, Emit, assert_same, deliver, expected_gradient
from torch import Tensor

from grl_ext import GRL, gradient_reversal

pytestmark = [pytest.mark.core, pytest.mark.sanitized]

LAMBDA = 0.75


@pytest.fixture
def x(device):
    return torch.randn(3, 4, device=device, requires_grad=True)


@pytest.fixture
def grad(device):
    """The gradient that arrives: `deliver` hands copies of it to the layer."""
    return torch.randn(3, 4, device=device)


def check(x: Tensor, grad: Tensor) -> None:
    assert_same(x.grad, expected_gradient(grad, LAMBDA))


# --- somebody keeps the gradient
# -------------------------------------------------------------------------------------------

# name: (what is kept of the gradient, how to look at it afterwards)
KEEPERS = {
    "the tensor": (lambda g: g, lambda kept: kept),
    "a detached alias": (lambda g: g.detach(), lambda kept: kept),
    "its data": (lambda g: g.data, lambda kept: kept),
    "a view": (lambda g: g.view(-1), lambda kept: kept.view(3, 4)),
    "an expanded view": (lambda g: g.expand(2, 3, 4), lambda kept: kept[1]),
    "rows": (lambda g: g.unbind(), torch.stack),
    "its storage": (
        lambda g: g.untyped_storage(),
        lambda kept: torch.empty(0, device=kept.device).set_(kept).view(3, 4),
    ),
    "a lazy clone": (lambda g: torch._lazy_clone(g), lambda kept: kept),
    "a DLPack capsule": (lambda g: g.__dlpack__(), lambda kept: torch.from_dlpack(kept)),
    "a NumPy array": (lambda g: g.numpy(), torch.from_numpy),
    "a NumPy array's buffer": (
        lambda g: memoryview(g.numpy()),
        lambda kept: torch.frombuffer(kept, dtype=torch.float32).view(3, 4),
    ),
    "an iterator": (lambda g: iter(g), lambda kept: torch.stack(list(kept))),
    "a closure": (lambda g: lambda: g, lambda kept: kept()),
}


@pytest.mark.parametrize("keeper", KEEPERS)
@pytest.mark.parametrize(
    "where", ["hook on the output", "hook before the node", "Function that returns the same buffer"]
)
def test_whoever_keeps_the_incoming_gradient_finds_it_unchanged(path, x, grad, where, keeper):
    keep, look = KEEPERS[keeper]
    if "NumPy" in keeper and x.is_cuda:
        pytest.skip("NumPy has no view of CUDA memory")
    kept = []
    y = gradient_reversal(x, LAMBDA)
    if where == "hook on the output":
        y.register_hook(lambda g: kept.append(keep(g)))
    elif where == "hook before the node":
        y.grad_fn.register_prehook(lambda grads: kept.append(keep(grads[0])))
    else:
        y = _Keep.apply(y, kept, keep)
    deliver(y, grad).backward()
    check(x, grad)
    assert_same(look(kept[0]), grad)


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kept, keep):
        ctx.kept, ctx.keep = kept, keep
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.kept.append(ctx.keep(grad))
        return grad, None, None


def test_a_hook_after_the_node_sees_both_gradients(path, x, grad):
    seen = []
    y = gradient_reversal(x, LAMBDA)
    y.grad_fn.register_hook(lambda outgoing, incoming: seen.extend([outgoing[0], incoming[0]]))
    deliver(y, grad).backward()
    check(x, grad)
    assert_same(seen[0], x.grad)
    assert_same(seen[1], grad)


def test_a_full_backward_hook_sees_both_gradients(path, x, grad):
    seen = []
    layer = GRL(LAMBDA)
    layer.register_full_backward_hook(lambda module, outgoing, incoming: seen.extend([outgoing[0], incoming[0]]))
    deliver(layer(x * 1), grad).backward()
    check(x, grad)
    assert_same(seen[0], x.grad)
    assert_same(seen[1], grad)


def test_a_hook_may_replace_the_gradient_and_keep_both(path, x, grad):
    kept = []

    def double(g):
        kept.extend([g, g * 2])
        return kept[1]

    y = gradient_reversal(x, LAMBDA)
    y.register_hook(double)
    deliver(y, grad).backward()
    check(x, grad * 2)
    assert_same(kept[0], grad)
    assert_same(kept[1], grad * 2)


def test_retain_grad(path, x, grad):
    y = gradient_reversal(x, LAMBDA)
    y.retain_grad()
    deliver(y, grad).backward()
    check(x, grad)
    assert_same(y.grad, grad)


def test_a_captured_gradient_of_the_output(path, x, grad):
    y = gradient_reversal(x, LAMBDA)
    below, above = torch.autograd.grad(deliver(y, grad), [x, y])
    assert_same(below, expected_gradient(grad, LAMBDA))
    assert_same(above, grad)


@pytest.mark.parametrize(
    "as_given",
    [lambda g: g, lambda g: g.view(-1).view(3, 4), lambda g: g[0].expand(3, 4)],
    ids=["itself", "a view", "expanded"],
)
def test_the_callers_gradient_is_left_alone(path, x, grad, as_given):
    given = grad.clone()
    gradient_reversal(x, LAMBDA).backward(gradient=as_given(given))
    check(x, as_given(grad))
    assert_same(given, grad)


# --- the gradient flows elsewhere too
# --------------------------------------------------------------------------------------


def test_two_consumers_of_one_gradient(path, x, grad):
    # An addition hands one and the same tensor to both of its inputs.
    other = torch.zeros_like(x, requires_grad=True)
    deliver(gradient_reversal(x, LAMBDA) + other, grad).backward()
    check(x, grad)
    assert_same(other.grad, grad)


def test_two_layers_under_one_gradient(path, x, grad):
    other = torch.zeros_like(x, requires_grad=True)
    deliver(gradient_reversal(x, LAMBDA) + gradient_reversal(other, -2.0), grad).backward()
    check(x, grad)
    assert_same(other.grad, 2 * grad)


def test_one_output_used_twice(path, x, grad):
    y = gradient_reversal(x, LAMBDA)
    deliver(y + y, grad).backward()
    check(x, 2 * grad)


def test_layers_in_a_row(path, x, grad):
    kept = []
    inner = gradient_reversal(x, LAMBDA)
    inner.register_hook(kept.append)
    deliver(gradient_reversal(inner, 0.5), grad).backward()
    assert_same(x.grad, LAMBDA * 0.5 * grad)
    assert_same(kept[0], -0.5 * grad)


@pytest.mark.parametrize(
    "join",
    [
        lambda y, other: torch.cat([y, other]),
        lambda y, other: torch.stack([y, other]),
        lambda y, other: torch.cat([y, other], dim=1),
    ],
    ids=["cat", "stack", "cat of columns"],
)
def test_neighbours_in_one_buffer_are_left_alone(path, x, device, join):
    # The gradients of cat's inputs are views into one buffer.
    other = torch.zeros_like(x, requires_grad=True)
    joined = join(gradient_reversal(x, LAMBDA), other)
    grad, kept = torch.randn_like(joined), []
    joined.register_hook(kept.append)
    deliver(joined, grad).backward()
    assert_same(kept[0], grad)
    parts = [torch.zeros_like(x, requires_grad=True) for _ in range(2)]
    of_y, of_other = torch.autograd.grad(join(*parts), parts, grad)
    check(x, of_y)
    assert_same(other.grad, of_other)


@pytest.mark.parametrize(
    "view",
    [
        lambda y: y.t(),
        lambda y: y.view(-1),
        lambda y: y[1],
        lambda y: y.expand(5, 3, 4),
        lambda y: y.unbind()[2],
        lambda y: y[:, ::2],
        lambda y: y.diagonal(),
    ],
    ids=["transpose", "view", "row", "expand", "unbind", "strided", "diagonal"],
)
def test_gradients_that_arrive_through_views(path, x, view):
    viewed = view(gradient_reversal(x, LAMBDA))
    grad, kept = torch.randn_like(viewed), []
    viewed.register_hook(kept.append)
    deliver(viewed, grad).backward()
    plain = torch.zeros_like(x, requires_grad=True)
    check(x, torch.autograd.grad(view(plain), plain, grad)[0])
    assert_same(kept[0], grad)


def test_an_expanded_gradient(path, x):
    gradient_reversal(x, LAMBDA).sum().backward()  # one element in memory for all
    check(x, torch.ones_like(x))


@pytest.mark.parametrize("bit", ["conj", "neg"])
def test_lazily_conjugated_and_negated_gradients(path, device, bit):
    x = torch.randn(3, 4, dtype=torch.complex64, device=device, requires_grad=True)
    memory = torch.randn(3, 4, dtype=torch.complex64, device=device)
    lazy = {"conj": torch.conj, "neg": torch._neg_view}[bit]
    Emit.apply(gradient_reversal(x, LAMBDA), lambda: lazy(memory.clone())).backward()
    check(x, lazy(memory).resolve_conj().resolve_neg())


# --- several backwards
# -----------------------------------------------------------------------------------------------------


def test_repeated_backward_through_a_function_that_keeps_its_gradient(path, x, grad):
    constant = grad.clone()
    loss = Emit.apply(gradient_reversal(x, LAMBDA), lambda: constant)
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        assert_same(x.grad, times * expected_gradient(grad, LAMBDA))
    assert_same(constant, grad)


def test_a_saved_tensor_returned_as_the_gradient(path, x, grad):
    class Constant(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, constant):
            ctx.save_for_backward(constant)
            return y.sum()

        @staticmethod
        def backward(ctx, _):
            return ctx.saved_tensors[0], None

    constant = grad.clone()
    loss = Constant.apply(gradient_reversal(x, LAMBDA), constant)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same(x.grad, 2 * expected_gradient(grad, LAMBDA))
    assert_same(constant, grad)


def test_accumulation_leaves_earlier_gradients_to_their_holders(path, x, grad):
    kept = []
    x.register_post_accumulate_grad_hook(lambda leaf: kept.append(leaf.grad.clone()))
    for times in (1, 2, 3):
        deliver(gradient_reversal(x, LAMBDA), grad).backward()
        assert_same(kept[-1], times * expected_gradient(grad, LAMBDA))
    x.grad, first = None, x.grad
    deliver(gradient_reversal(x, LAMBDA), grad * 2).backward()
    check(x, grad * 2)
    assert_same(first, 3 * expected_gradient(grad, LAMBDA))


def test_backward_from_several_threads_over_one_graph(path, x, device):
    w = torch.randn(3, 4, device=device)
    lambda_ = torch.full((3, 1), LAMBDA, device=device)
    loss = (gradient_reversal(x, lambda_) * w).sum()
    results = {}

    def work(thread):
        results[thread] = [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(50)]

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in [r for t in range(4) for r in results[t]]:
        assert_same(result, expected_gradient(w, LAMBDA))


# --- the memory belongs to somebody else
# -----------------------------------------------------------------------------------


def _file(tmp_path, values: np.ndarray):
    file = tmp_path / "gradient"
    file.write_bytes(values.tobytes())
    return file


def _mapped_file(tmp_path, values):
    file = _file(tmp_path, values)
    make = lambda: torch.from_file(str(file), shared=True, size=values.size).view(values.shape)  # noqa: E731
    return make, lambda: np.fromfile(file, dtype=values.dtype).reshape(values.shape)


def _mapped_by_python(tmp_path, values):
    with _file(tmp_path, values).open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    make = lambda: torch.frombuffer(memory, dtype=torch.float32).view(values.shape)  # noqa: E731
    return make, lambda: np.frombuffer(bytes(memory), dtype=values.dtype).reshape(values.shape)


def _mapped_checkpoint(tmp_path, values):
    file = tmp_path / "checkpoint"
    torch.save(torch.from_numpy(values), file)
    loaded = torch.load(file, mmap=True)
    return lambda: loaded, loaded.numpy


def _shared_memory(tmp_path, values):
    owner = torch.from_numpy(values).clone().share_memory_()
    *handle, size = owner.untyped_storage()._share_filename_cpu_()
    # A second mapping of the same memory, as another process has it.
    make = lambda: torch.empty(0).set_(torch.UntypedStorage._new_shared_filename_cpu(*handle, size)).view(values.shape)  # noqa: E731
    return make, owner.numpy


def _storage_slice(tmp_path, values):
    owner = torch.from_numpy(values).clone()
    make = lambda: torch.empty(0).set_(owner.untyped_storage()[: values.nbytes]).view(values.shape)  # noqa: E731
    return make, owner.numpy


# name: from values, (a function that wraps the owner's memory in a tensor, a function that reads what the owner sees)
OWNERS = {
    "NumPy": lambda tmp_path, values: (lambda: torch.from_numpy(values), lambda: values),
    "NumPy, through as_tensor": lambda tmp_path, values: (lambda: torch.as_tensor(values), lambda: values),
    "NumPy, transposed": lambda tmp_path, values: (
        lambda: torch.from_numpy(np.asfortranarray(values).T).t(),
        lambda: values,
    ),
    "DLPack": lambda tmp_path, values: (lambda: torch.from_dlpack(values), lambda: values),
    "a Python buffer": lambda tmp_path, values: (
        lambda: torch.frombuffer(values, dtype=torch.float32).view(values.shape),
        lambda: values,
    ),
    "a file mapped by PyTorch": _mapped_file,
    "a file mapped by Python": _mapped_by_python,
    "a mapped checkpoint": _mapped_checkpoint,
    "shared memory": _shared_memory,
    "a slice of a storage": _storage_slice,
}


@pytest.mark.parametrize("owner", OWNERS)
def test_memory_that_pytorch_does_not_own_is_left_alone(path, tmp_path, owner):
    grad = torch.randn(3, 4)
    make, read = OWNERS[owner](tmp_path, grad.numpy().copy())
    x = torch.randn(3, 4, requires_grad=True)
    Emit.apply(gradient_reversal(x, LAMBDA), make).backward()
    check(x, grad)
    assert_same(torch.from_numpy(read().copy()), grad)


def test_a_lazy_clone_of_somebodys_tensor_is_not_written_through(path, x, grad):
    held = grad.clone()
    Emit.apply(gradient_reversal(x, LAMBDA), lambda: torch._lazy_clone(held)).backward()
    check(x, grad)
    assert_same(held, grad)


# --- subclasses
# ------------------------------------------------------------------------------------------------------------


class Named(Tensor):
    """A subclass by __torch_function__ alone: an ordinary tensor below it."""


class Wrapped(Tensor):
    """A subclass by __torch_dispatch__: it has no memory of its own, all of it is in `inner`."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        unwrap = lambda v: v.inner if isinstance(v, Wrapped) else v  # noqa: E731
        out = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
        return torch.utils._pytree.tree_map(
            lambda v: Wrapped(v) if isinstance(v, Tensor) else v, func(*out[0], **out[1])
        )


@pytest.mark.parametrize("lambda_", [LAMBDA, torch.full((3, 1), LAMBDA)], ids=["float", "per sample"])
@pytest.mark.parametrize("subclass", [Named, Wrapped])
def test_a_gradient_of_a_subclass(path, subclass, lambda_):
    x, grad = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    wrap = Wrapped if subclass is Wrapped else lambda t: t.as_subclass(Named)
    held = grad.clone()
    Emit.apply(gradient_reversal(x, lambda_), lambda: wrap(held)).backward()
    result = x.grad.inner if isinstance(x.grad, Wrapped) else x.grad.as_subclass(Tensor)
    assert_same(result, expected_gradient(grad, LAMBDA))
    assert_same(held, grad)


@pytest.mark.parametrize(
    "lambda_", [LAMBDA, torch.tensor(LAMBDA), torch.full((3, 1), LAMBDA)], ids=["float", "0-d", "per sample"]
)
@pytest.mark.parametrize("subclass", [Named, Wrapped])
def test_features_of_a_subclass(path, subclass, lambda_):
    memory = torch.randn(3, 4)
    x = (Wrapped(memory) if subclass is Wrapped else memory.as_subclass(Named)).requires_grad_()
    y = gradient_reversal(x, lambda_)
    assert type(y) is subclass and y.requires_grad
    (y * 3).sum().backward()
    result = x.grad.inner if isinstance(x.grad, Wrapped) else x.grad.as_subclass(Tensor)
    assert_same(result, torch.full((3, 4), -LAMBDA * 3))


# --- kernels that are still queued
# ------------------------------------------------------------------------------------------


def test_a_gradient_that_two_branches_share_reaches_both(path, x, grad):
    # The other branch's node runs first and lets go of the gradient: by then the layer's node is its only owner.
    other = torch.randn_like(x).requires_grad_()
    deliver(gradient_reversal(x, LAMBDA) + other * 3, grad).backward()
    check(x, grad)
    assert_same(other.grad, grad * 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: streams")
def test_a_gradient_that_another_stream_has_still_to_read_is_left_alone(path):
    device = torch.device("cuda")
    x, other, grad = (torch.randn(1 << 20, device=device) for _ in range(3))
    x.requires_grad_(), other.requires_grad_()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for layer_on, other_on in [streams, streams[::-1], (torch.cuda.default_stream(), streams[0])]:
        x.grad = other.grad = None
        for stream in streams:
            stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(layer_on):
            b = gradient_reversal(x * 1, LAMBDA)
        with torch.cuda.stream(other_on):  # the later node runs first in the backward
            a = _SpinBackward.apply(other * 3)
        torch.cuda.synchronize()
        with torch.cuda.stream(layer_on):
            deliver(a + b, grad).backward()
        torch.cuda.synchronize()
        assert_same(other.grad, grad * 3)
        check(x, grad)


class _SpinBackward(torch.autograd.Function):
    """The identity, whose backward keeps its stream busy before it reads the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        torch.cuda._sleep(100_000_000)
        return grad.clone()


# --- nobody else can see it
# ------------------------------------------------------------------------------------------------


class LayerBackward(NamedTuple):
    overwrites: bool
    allocated: int  # bytes


def profile_backward(loss: Tensor) -> LayerBackward:
    """What the layer's node does in loss.backward(), from PyTorch's profiler: the gradient itself never reaches
    Python."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        loss.backward()
    (node,) = [event for event in profile.function_events if re.fullmatch("autograd::.*Reversal.*Backward", event.name)]
    below, events = [node], []
    while below:
        events.append(below.pop())
        below.extend(events[-1].cpu_children)
    allocated = sum(max(0, event.self_cpu_memory_usage) + max(0, event.self_device_memory_usage) for event in events)
    return LayerBackward("grl_ext::_scale_" in [event.name for event in events], allocated)


def overwritten(x: Tensor) -> LayerBackward:
    """What is expected where nobody on the host sees the gradient: on CUDA there may be kernels that do, and it is left
    alone."""
    return LayerBackward(True, 0) if x.device.type == "cpu" else LayerBackward(False, allocation(x))


def allocation(x: Tensor) -> int:
    """What the allocator gives for such a tensor, in bytes."""
    return x.nbytes if x.device.type == "cpu" else -(-x.nbytes // 512) * 512


@pytest.fixture
def kernels(compiled, device):
    if device.type == "cuda" and not compiled.build_info()["cuda_archs"]:
        pytest.skip("the compiled extension has no CUDA kernels")


@pytest.mark.parametrize("lambda_form", LAMBDAS)
def test_a_gradient_that_nobody_sees_is_overwritten(kernels, device, lambda_form):
    x, grad = torch.randn(SHAPE, device=device, requires_grad=True), torch.randn(SHAPE, device=device)
    backward = profile_backward(deliver(gradient_reversal(x, LAMBDAS[lambda_form](device)), grad))
    # No kernel reads a lambda along dimensions that are not neighbours without expanding it.
    assert backward.overwrites == (device.type == "cpu" and "not neighbours" not in lambda_form)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed"])
def test_every_dtype_and_dense_layout_is_overwritten(kernels, device, dtype, layout):
    x = LAYOUTS[layout](torch.randn(SHAPE, dtype=dtype, device=device)).requires_grad_()
    assert profile_backward(deliver(gradient_reversal(x, LAMBDA), torch.randn_like(x))) == overwritten(x)


def test_a_gradient_out_of_an_ordinary_network_is_overwritten(kernels, device):
    features = torch.nn.Linear(8, 8, device=device)(torch.randn(16, 8, device=device))
    loss = torch.nn.Linear(8, 2, device=device)(gradient_reversal(features, LAMBDA)).square().sum()
    assert profile_backward(loss) == overwritten(features)


def test_a_gradient_that_somebody_holds_is_not_overwritten(path, x, grad):
    backward = profile_backward(Emit.apply(gradient_reversal(x, LAMBDA), lambda: grad))
    assert backward == LayerBackward(overwrites=False, allocated=allocation(grad))
