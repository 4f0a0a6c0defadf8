"""Large gradients on the CPU are asked for in huge pages, those that share their pages with others are not."""

import sys
from pathlib import Path

import pytest
import torch

from grl_ext import gradient_reversal, heads_loss, linear_heads

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = [
    pytest.mark.usefixtures("compiled"),
    pytest.mark.skipif(sys.platform != "linux" or not SETTING.exists(), reason="needs a Linux kernel with transparent huge pages"),
]

LARGE, SMALL = (1030, 8192), (500, 8192)  # above and below the 32 MB from which a block has pages of its own


def is_advised(tensor):
    """Whether the mapping in the middle of the tensor has the flag that madvise(MADV_HUGEPAGE) sets."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= middle < end
        elif inside and first == "VmFlags:":
            return "hg" in rest
    raise AssertionError("no mapping holds the tensor")


def of_loss(x, weight, target):
    return heads_loss(x, [weight], None, [target], lambda_=[0.5]).loss


def of_logits(x, weight, target):
    return linear_heads(x, [weight], lambda_=[0.5])[0].sum()


@pytest.mark.parametrize("shape, expected", [(LARGE, True), (SMALL, False)], ids=["large", "small"])
@pytest.mark.parametrize("loss", [of_loss, of_logits])
def test_the_features_gradient_of_heads(loss, shape, expected):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(2, shape[1])
    loss(x, weight, torch.zeros(shape[0], dtype=torch.int64)).backward()
    assert is_advised(x.grad) == expected
    few = x[:3].detach().requires_grad_()
    loss(few, weight, torch.zeros(3, dtype=torch.int64)).backward()
    share = 3 / shape[0] if loss is of_loss else 1  # of the rows in the mean
    torch.testing.assert_close(x.grad[:3], share * few.grad)


@pytest.mark.parametrize("shape, expected", [(LARGE, True), (SMALL, False)], ids=["large", "small"])
def test_the_layers_gradient_where_it_is_a_new_tensor(shape, expected):
    x, incoming = torch.randn(shape, requires_grad=True), torch.randn(shape)  # the caller keeps it: not in place
    gradient_reversal(x, 0.5).backward(incoming)
    assert is_advised(x.grad) == expected
    torch.testing.assert_close(x.grad, -0.5 * incoming)
