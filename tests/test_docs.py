"""The examples in the docstrings and the README run, and what they print is what they say."""

import doctest
import re
from pathlib import Path

import pytest
import torch

import grl_ext
from grl_ext import functional, modules, schedules

README = Path(__file__).parents[1] / "README.md"

pytestmark = pytest.mark.usefixtures("path")


@pytest.mark.parametrize("module", [functional, modules, schedules], ids=lambda module: module.__name__)
def test_the_examples_in_the_docstrings_run(module):
    # `torch` and `grl_ext` are what a reader has imported.
    failed, tried = doctest.testmod(module, extraglobs={"torch": torch, "grl_ext": grl_ext})
    assert failed == 0 and tried > 0


def test_every_public_name_has_an_example():
    without = {"HeadsOutput", "schedules"}  # a result, and a module whose functions have their own
    for name in set(grl_ext.__all__) - without:
        assert "Example:" in getattr(grl_ext, name).__doc__, name
    for name in ("dann", "warm_start", "linear", "constant"):
        assert "Example:" in getattr(schedules, name).__doc__, name


def test_the_readmes_equivalent_is_equivalent():
    (code,) = re.findall(r"```python\n(class GradientReversal.*?)```", README.read_text(), re.DOTALL)
    names = {"torch": torch}
    exec(code, names)
    gradients = []
    for reverse in (names["GradientReversal"].apply, grl_ext.gradient_reversal):
        x = torch.linspace(-1, 1, 5).requires_grad_()
        y = reverse(x, 0.3)
        assert y.data_ptr() == x.data_ptr()
        y.sin().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
