"""What only a GPU can show: captured graphs that follow lambda, sizes past 2^31, and the same bits every time."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from samples import assert_same

from grl_ext import GRL, AdversarialHeads, GRLLinear, grl_linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def captured(step):
    """step as a graph, warmed up as torch.cuda.graphs asks."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


@pytest.mark.parametrize("layer", ["GRL", "GRLLinear"])
def test_a_replayed_graph_follows_the_layers_lambda(compiled, layer):
    module = (GRL(0.5) if layer == "GRL" else GRLLinear(64, 32, lambda_=0.5)).cuda()
    x = torch.randn(128, 64, device="cuda", requires_grad=True)
    graph, dx = captured(lambda: torch.autograd.grad(module(x).square().sum(), x)[0])
    graph.replay()
    first = dx.clone()
    for factor in (2.0, 0.0, -1.0):
        module.lambda_ = 0.5 * factor
        graph.replay()
        torch.testing.assert_close(dx, first * factor)


def test_a_replayed_graph_of_the_heads_follows_lambda(compiled):
    heads = AdversarialHeads(64, predictors={"class": 10}, adversaries={"domain": 2}, lambda_=0.5).cuda()
    x = torch.randn(128, 64, device="cuda", requires_grad=True)
    targets = {"class": torch.randint(10, (128,), device="cuda"), "domain": torch.randint(2, (128,), device="cuda")}
    graph, dx = captured(lambda: torch.autograd.grad(heads(x, targets).loss, x)[0])
    found = {}
    for lambda_ in (0.5, 0.0, 1.0):
        heads.lambda_ = lambda_
        graph.replay()
        found[lambda_] = dx.clone()
    torch.testing.assert_close(found[1.0] - found[0.0], 2 * (found[0.5] - found[0.0]))
    expected = torch.autograd.grad(F.cross_entropy(heads.predictors["class"](x), targets["class"]), x)[0]
    torch.testing.assert_close(found[0.0], expected)


def test_the_same_bits_every_time(compiled):
    heads = AdversarialHeads(1000, predictors={"class": 10}, adversaries={"domain": 2}).cuda()
    x = torch.randn(20000, 1000, device="cuda", requires_grad=True)
    targets = {"class": torch.randint(10, (20000,), device="cuda"), "domain": torch.randint(2, (20000,), device="cuda")}
    inputs = [x, *heads.parameters()]
    first = torch.autograd.grad(heads(x, targets).loss, inputs)
    for _ in range(20):
        for again, expected in zip(torch.autograd.grad(heads(x, targets).loss, inputs), first, strict=True):
            assert_same(again, expected)


@pytest.mark.parametrize("lambda_form", ["number", "on the device"])
@pytest.mark.parametrize("size", [64, 2048], ids=["less than the features", "more than the features"])
@pytest.mark.parametrize("value", [0.5, 0.0])
def test_a_wide_layer_scales_what_is_less_to_move(compiled, lambda_form, size, value):
    """All ways in which lambda gets into the features' gradient; at 0 there is none, though the weight be infinite."""
    x = torch.randn(4096, 256, device="cuda", dtype=torch.float64, requires_grad=True)
    weight = torch.randn(size, 256, device="cuda", dtype=torch.float64, requires_grad=True)
    bias = torch.randn(size, device="cuda", dtype=torch.float64, requires_grad=True)
    grad = torch.randn(4096, size, device="cuda", dtype=torch.float64)
    if value == 0:
        weight.data[0, 0] = torch.inf
    lambda_ = value if lambda_form == "number" else torch.tensor(value, device="cuda")
    y = grl_linear(x, weight, bias, lambda_)
    torch.testing.assert_close(y, F.linear(x, weight, bias))
    dx, dw, db = torch.autograd.grad(y, [x, weight, bias], grad)
    torch.testing.assert_close(dx, torch.zeros_like(x) if value == 0 else grad @ weight * -value)
    torch.testing.assert_close(dw, grad.T @ x)
    torch.testing.assert_close(db, grad.sum(0))


def test_wide_heads_allocate_the_features_gradient_once(compiled):
    heads = AdversarialHeads(2048, predictors={"class": 40}, adversaries={"domain": 2}).cuda()
    x = torch.randn(16384, 2048, device="cuda", requires_grad=True)
    targets = {"class": torch.randint(40, (16384,), device="cuda"), "domain": torch.randint(2, (16384,), device="cuda")}
    torch.autograd.grad(heads(x, targets).loss, x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(heads(x, targets).loss, x)
    assert torch.cuda.max_memory_allocated() - before < 1.5 * x.nbytes


@pytest.mark.parametrize("dtype, most", [(torch.float32, 4), (torch.bfloat16, 4), (torch.float16, 5)])
def test_a_small_step_is_four_launches(compiled, dtype, most):
    heads = AdversarialHeads(256, predictors={"class": 10}, adversaries={"domain": 2}).cuda().to(dtype)
    x = torch.randn(128, 256, device="cuda", dtype=dtype, requires_grad=True)
    targets = {"class": torch.randint(10, (128,), device="cuda"), "domain": torch.randint(2, (128,), device="cuda")}

    def step():
        torch.autograd.grad(heads(x, targets).loss, [x, *heads.parameters()])
        torch.cuda.synchronize()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(names) <= most, names


def test_a_list_of_gradients_is_scaled_as_each_alone(compiled):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for factor in (-0.5, 0.0, 1.0):
            grads = [torch.randn(n, device="cuda", dtype=dtype)[n % 3 :] for n in (70001, 3, 0, 256, *range(1, 200))]
            expected = [torch.ops.grl_ext._scale(grad, factor, None) for grad in grads]
            torch.ops.grl_ext._scale_list_(grads, -1.0, torch.tensor(-factor, device="cuda"))
            for found, alone in zip(grads, expected, strict=True):
                assert_same(found, alone)


def needs_memory(bytes_: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < bytes_:
        pytest.skip(f"needs {bytes_ >> 30} GB of free GPU memory, {free >> 30} are there")


@pytest.mark.parametrize("form", ["one number", "a number for each row"])
def test_more_than_two_to_the_31_elements(compiled, form):
    rows, columns = 2**16, 2**15 + 17
    needs_memory(3 * 2 * rows * columns)
    grad = torch.ones(rows, columns, device="cuda", dtype=torch.float16)
    grad[-1, -1] = 3
    tensor = torch.tensor(0.5, device="cuda") if form == "one number" else torch.full((rows, 1), 0.5, device="cuda")
    out = torch.ops.grl_ext._scale(grad, -1.0, tensor)
    assert (
        out[0, 0] == -0.5
        and out[-1, 0] == -0.5
        and out[-1, -1] == -1.5
        and out.sum(dtype=torch.float64) == -0.5 * (grad.numel() + 2)
    )


def test_heads_over_more_than_two_to_the_31_features(compiled):
    rows, features = 2**21 + 5, 1030
    needs_memory(3 * 2 * rows * features)
    heads = AdversarialHeads(features, predictors={"class": 2}, adversaries={}).cuda().to(torch.bfloat16)
    x = torch.zeros(rows, features, device="cuda", dtype=torch.bfloat16)
    x[-1] = 1
    logits = heads(x)["class"]
    torch.testing.assert_close(logits[-1:], heads(x[-1:])["class"])
    torch.testing.assert_close(logits[:1], heads(x[:1])["class"])


BAD_TARGET = """
import torch, grl_ext
heads = grl_ext.AdversarialHeads(8, predictors={"class": 3}, adversaries={}).cuda()
heads(torch.randn(4, 8, device="cuda"), {"class": torch.tensor([0, 1, 3, 2], device="cuda")})
torch.cuda.synchronize()
"""


def test_a_target_that_is_no_class_stops_the_program(compiled):
    result = subprocess.run([sys.executable, "-c", BAD_TARGET], capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    assert "a target is neither a class of its head nor ignore_index" in result.stdout + result.stderr
