"""A 0-d lambda on the CPU is read by the host, whatever its dtype and also where it requires grad.

A copy of it to a GPU would wait for everything queued there, and fails while a CUDA graph is captured.
"""

import pytest
import torch
from samples import assert_same

from grl_ext import GRLLinear, gradient_reversal, grl_linear

pytestmark = pytest.mark.core

HOST_LAMBDAS = {
    "float64": lambda: torch.tensor(0.75, dtype=torch.float64),
    "bfloat16": lambda: torch.tensor(0.75, dtype=torch.bfloat16),
    "int64": lambda: torch.tensor(2),
    "float32 that requires grad": lambda: torch.tensor(0.75, requires_grad=True),
    "zero that requires grad": lambda: torch.tensor(0.0, requires_grad=True),
}


@pytest.fixture(params=HOST_LAMBDAS)
def lambda_(request):
    return HOST_LAMBDAS[request.param]()


def reversed_by(lambda_, grad):
    return torch.zeros_like(grad) if lambda_ == 0 else -float(lambda_) * grad


def test_the_backward_copies_no_lambda(compiled, device, lambda_):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    weight = torch.randn(3, 4, device=device)
    loss = (gradient_reversal(x, lambda_) * weight).sum()
    with torch.autograd.profiler.profile() as profile:
        loss.backward()
    assert not {"aten::to", "aten::_to_copy", "aten::copy_"} & {event.name for event in profile.function_events}
    assert_same(x.grad, reversed_by(lambda_, weight))


def test_gradients_of_gradients_reach_a_lambda_that_requires_grad(path, device, lambda_):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    weight = torch.randn(3, 4, device=device)
    (dx,) = torch.autograd.grad((gradient_reversal(x, lambda_) * x * weight).sum(), x, create_graph=True)
    assert_same(dx.detach(), x.detach() * weight + reversed_by(lambda_, x.detach() * weight))
    if lambda_.requires_grad:
        (found,) = torch.autograd.grad(dx.sum(), lambda_)
        # Where lambda is 0 the gradient is cut off, and so is that of lambda.
        assert_same(found, torch.zeros(()) if lambda_ == 0 else -(x * weight).sum().detach().cpu())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
def test_forward_and_backward_can_be_captured(path, lambda_):
    x = torch.randn(8, 4, device="cuda", requires_grad=True)
    layer = GRLLinear(4, 3, device="cuda")

    def step():
        loss = gradient_reversal(x, lambda_).sum() + grl_linear(x, layer.weight, layer.bias, lambda_).square().sum()
        return torch.autograd.grad(loss, x)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    graph.replay()
    assert_same(result, expected)
