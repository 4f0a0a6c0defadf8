"""PyTorch's own checks of a custom operator (schema, autograd registration, fake tensors, AOT dispatch) for every one of ours."""

import pytest
import torch
from head_samples import SWITCH, sample_heads
from samples import DTYPES, sample_inputs
from torch.library import opcheck

pytestmark = pytest.mark.usefixtures("compiled")


def gradient_reversal(device):
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        for name, x, lambda_ in sample_inputs(device, dtype):
            # A lambda that requires grad gets none in the first backward, as designed and tested elsewhere; to opcheck's
            # comparison with the traced graph that is a missing gradient.
            if isinstance(lambda_, torch.Tensor) and not lambda_.requires_grad:
                if dtype == torch.float32 or name in ("0-d float32", "per sample", "full shape"):
                    yield x, lambda_


def scale_negate(device):
    for dtype in DTYPES:
        grad = torch.randn(2, 3, 4, dtype=dtype, device=device)
        wide = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
        yield grad, 0.3, None
        yield grad.transpose(0, 2).contiguous().transpose(0, 2), 0.0, None
        yield grad, 1.0, torch.tensor(0.3, dtype=wide, device=device)
        for shape in [(2, 1, 1), (3, 1), (4,), (2, 3, 4)]:
            yield grad, 1.0, torch.randn(shape, dtype=wide, device=device)
    yield torch.empty(0, 3, device=device), 0.3, None


def heads(device, requires_grad, flat=False):
    """Samples on both sides of the switch to matrix products, with and without bias and rows; `flat`: x (N, D) only."""
    forms = [(torch.float32, (5,), (3, 2), True), (torch.bfloat16, (5,), (3, 2), False), (torch.float32, (0,), (3, 2), True)]
    forms += [(torch.float32, (5,), (SWITCH, 1), True), (torch.float16, (70,), (SWITCH, 1), False)]
    forms += [(torch.float64, (2, 3), (1, 4), True), (torch.float32, (), (1, 4), True)] * (not flat)
    for dtype, leading, head_sizes, bias in forms:
        sample = sample_heads(device, dtype, leading, 4, head_sizes, bias)
        sample.targets[:1].fill_(-100)
        for t in sample.inputs:
            if t is not None:
                t.requires_grad_(requires_grad)
        yield sample._replace(grad_scale=torch.tensor([1.0, -0.3], device=device))


def grl_linear(device):
    for sample in heads(device, requires_grad=True):
        yield *sample.inputs, torch.tensor(0.3, device=device)
        yield *sample.inputs, torch.rand(*sample.x.shape[:-1], 1, device=device)


def linear_heads(device):
    for x, weight, bias, _, head_sizes, grad_scale in heads(device, requires_grad=True):
        yield x, weight, bias, head_sizes, grad_scale


def heads_cross_entropy(device):
    for sample in heads(device, requires_grad=True):
        yield tuple(sample)
        yield *sample._replace(targets=sample.targets.clamp(min=0)), torch.tensor([0.5, 2.0]), 0, 0.1


def _heads_logits(device):
    for sample in heads(device, requires_grad=False, flat=True):
        yield sample.inputs


NEEDS = [[True, True, True], [True, False, False], [False, True, True], [False, False, True]]


def _heads_gradients(device):
    for x, weight, _, _, head_sizes, grad_scale in heads(device, requires_grad=False, flat=True):
        for needs in NEEDS:
            yield x.new_ones(len(x), len(weight)), x, weight, head_sizes, grad_scale, needs


def _heads_cross_entropy(device):
    for sample in heads(device, requires_grad=False, flat=True):
        for needs in [*NEEDS, [False, False, False]]:
            yield *sample, None, -100, 0.1, needs


SAMPLES = {
    "gradient_reversal": gradient_reversal,
    "grl_linear": grl_linear,
    "linear_heads": linear_heads,
    "heads_cross_entropy": heads_cross_entropy,
    "_scale_negate": scale_negate,
    "_scale_negate_": scale_negate,
    "_heads_logits": _heads_logits,
    "_heads_gradients": _heads_gradients,
    "_heads_cross_entropy": _heads_cross_entropy,
}


def test_every_registered_operator_has_samples():
    registered = {name.removeprefix("grl_ext::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("grl_ext::")}
    assert registered == set(SAMPLES)


@pytest.mark.parametrize("op", SAMPLES)
def test_opcheck(device, op):
    for index, args in enumerate(SAMPLES[op](device)):
        # Tracing through AOT dispatch takes most of the time; the samples differ in what the cheap checks see.
        checks = ["test_schema", "test_faketensor"] + ["test_autograd_registration", "test_aot_dispatch_dynamic"] * (index == 0)
        opcheck(getattr(torch.ops.grl_ext, op).default, args, test_utils=checks)
