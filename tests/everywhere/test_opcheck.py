"""PyTorch's own checks of a custom operator (schema, autograd registration, fake tensors, AOT dispatch) for every one
of ours."""

import pytest
import torch
from head_samples import SWITCH, sample_heads
from samples import DTYPES, sample_inputs
from torch.library import opcheck

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("compiled")]


def gradient_reversal(device):
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        for name, x, lambda_ in sample_inputs(device, dtype):
            # A lambda that requires grad gets none in the first backward, as designed and tested elsewhere; to
            # opcheck's comparison with the traced graph that is a missing gradient.
            if isinstance(lambda_, torch.Tensor) and not lambda_.requires_grad:
                if dtype == torch.float32 or name in ("0-d float32", "per sample", "full shape"):
                    yield x, lambda_


def scale(device):
    for dtype in DTYPES:
        grad = torch.randn(2, 3, 4, dtype=dtype, device=device)
        wide = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
        yield grad, -0.3, None
        yield grad.transpose(0, 2).contiguous().transpose(0, 2), 0.0, None
        yield grad, -1.0, torch.tensor(0.3, dtype=wide, device=device)
        for shape in [(2, 1, 1), (3, 1), (4,), (2, 3, 4)]:
            yield grad, -1.0, torch.randn(shape, dtype=wide, device=device)
    yield torch.empty(0, 3, device=device), 0.3, None


def scale_list(device):
    for dtype in DTYPES:
        grads = [torch.randn(shape, dtype=dtype, device=device) for shape in [(5, 4), (3, 4), (3,), (0,)]]
        yield grads, -0.3, None
        yield grads, -1.0, torch.tensor(0.3, device=device)


def heads(device, requires_grad, flat=False):
    """Samples on both sides of the switch to matrix products, with and without bias and rows; `flat`: x (N, D) only."""
    forms = [
        (torch.float32, (5,), (3, 2), True),
        (torch.bfloat16, (5,), (3, 2), "mixed"),
        (torch.float32, (0,), (3, 2), True),
    ]
    forms += [(torch.float32, (5,), (SWITCH, 1), True), (torch.float16, (70,), (SWITCH, 1), False)]
    forms += [(torch.float64, (2, 3), (1, 4), True), (torch.float32, (), (1, 4), True)] * (not flat)
    for dtype, leading, head_sizes, bias in forms:
        sample = sample_heads(device, dtype, leading, 4, head_sizes, bias, kinds=("classes", "soft"))
        for target in sample.targets[::2]:
            if leading:
                target[:1] = -100
        yield sample.of([t.requires_grad_(requires_grad) for t in sample.inputs])


def lambdas(device):
    """Of two heads, as the public operators take them."""
    yield [None, torch.tensor(0.3, device=device)]
    yield [torch.tensor(-2.0, dtype=torch.float64), torch.tensor(0.3)]
    yield [None, None]


def factors(device):
    """factor and lambda_ for two heads, as the kernels take them."""
    yield [1.0, -1.0], [None, torch.tensor(0.3, device=device)]
    yield [2.0, -1.0], [None, torch.tensor(0.3, dtype=torch.float64, device=device)]
    yield [1.0, 0.0], [None, None]


def grl_linear(device):
    for sample in heads(device, requires_grad=True):
        (weight, _), (bias, _) = sample.linear
        yield sample.x, weight, bias, torch.tensor(0.3, device=device)
        yield sample.x, weight, bias, torch.rand(*sample.x.shape[:-1], 1, device=device)


def linear_heads(device):
    for sample in heads(device, requires_grad=True):
        for lambda_ in lambdas(device):
            yield sample.x, *sample.linear, lambda_


def heads_loss(device):
    no = [None, None]
    for sample in heads(device, requires_grad=True):
        first, second, _ = lambdas(device)
        rows = torch.rand(sample.x.shape[:-1], device=device)
        of_classes = torch.rand(max(2, sample.weight[0][0].shape[0]), device=device)
        given = (sample.x, *sample.linear, sample.targets)
        yield (*given, first, no, no, None, [0, 0], [0.0, 0.0], [-100, -100], True)
        weights = [rows, None], [of_classes, None], torch.tensor([0.5, 2.0])
        yield (*given, second, *weights, [0, 0], [0.1, 0.2], [-100, 0], False)
    sample = sample_heads(device, head_sizes=(3, 2), kinds=("classes", "mse"))
    yield sample.x, *sample.linear, sample.targets, first, no, no, None, [0, 1], [0.1, 0.0], [-100, -100], True


def _heads_logits(device):
    for sample in heads(device, requires_grad=False, flat=True):
        yield sample.x, *sample.linear


NEEDS = [[True] * 5, [True, *[False] * 4], [False, True, False, True, True], [False, False, False, True, False]]
NO_NEEDS = [False] * 5
KEPT = "the gradients of the logits"


def _heads_gradients(device):
    for sample in heads(device, requires_grad=False, flat=True):
        weight, _ = sample.linear
        grads = [sample.x.new_ones(len(sample.x), len(w)) for w in weight]
        for factor, lambda_ in factors(device):
            for needs in NEEDS:
                yield grads, sample.x, weight, factor, lambda_, needs
        yield grads, None, weight, factor, lambda_, NEEDS[1]
        yield grads, sample.x, [], factor, lambda_, NEEDS[2]


def _heads_loss(device):
    no = [None, None]
    for sample in heads(device, requires_grad=False, flat=True):
        wide = torch.promote_types(sample.x.dtype, torch.float32)
        targets = [t if t.dtype == torch.int64 else t.to(wide) for t in sample.targets]
        rows = torch.rand(len(sample.x), dtype=wide, device=device)
        for factor, lambda_ in factors(device):
            for needs in [*NEEDS, NO_NEEDS, KEPT]:
                yield (
                    sample.x,
                    *sample.linear,
                    targets,
                    [None, rows],
                    no,
                    factor,
                    lambda_,
                    None,
                    [0, 0],
                    [0.1, 0.0],
                    [-100, -100],
                    True,
                    needs is KEPT,
                    NO_NEEDS if needs is KEPT else needs,
                )


SAMPLES = {
    "gradient_reversal": gradient_reversal,
    "grl_linear": grl_linear,
    "linear_heads": linear_heads,
    "heads_loss": heads_loss,
    "_scale": scale,
    "_scale_": scale,
    "_scale_list_": scale_list,
    "_heads_logits": _heads_logits,
    "_heads_gradients": _heads_gradients,
    "_heads_loss": _heads_loss,
}


def test_every_registered_operator_has_samples():
    registered = {
        name.removeprefix("grl_ext::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("grl_ext::")
    }
    assert registered == set(SAMPLES)


@pytest.mark.parametrize("op", SAMPLES)
def test_opcheck(device, op):
    for index, args in enumerate(SAMPLES[op](device)):
        # Tracing through AOT dispatch takes most of the time; the samples differ in what the cheap checks see.
        checks = ["test_schema", "test_faketensor"] + ["test_autograd_registration", "test_aot_dispatch_dynamic"] * (
            index == 0
        )
        opcheck(getattr(torch.ops.grl_ext, op).default, args, test_utils=checks)
