"""The heads' results depend on their arguments and the number of threads, bit by bit, and on nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from head_samples import SWITCH, sample_heads
from samples import assert_same

import grl_ext
from grl_ext import grl_linear, heads_cross_entropy, linear_heads


@pytest.fixture
def threads():
    """Sets the number of threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def results(sample):
    """All that the three operations compute."""
    loss, head_losses, logits = heads_cross_entropy(*sample, label_smoothing=0.1)
    z = linear_heads(*sample.inputs, sample.head_sizes, sample.grad_scale)
    y = grl_linear(*sample.inputs, 0.3)
    gradients = (torch.autograd.grad(t.square().sum(), sample.inputs) for t in (loss, z, y))
    return [t.detach() for t in (loss, head_losses, logits, z, y, *(g for gs in gradients for g in gs))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_sizes", [(10, 2), (SWITCH, 1)], ids=str)
def test_the_same_bits_in_every_run(path, device, threads, dtype, head_sizes):
    # Rows enough for several threads: 515 * 300 * 12 multiply-adds are seven times what a thread is worth.
    sample = sample_heads(device, dtype, (515,), 300, head_sizes)
    for count in (1, 2, 3):
        threads(count)
        first = results(sample)
        for _ in range(3):
            for a, b in zip(results(sample), first, strict=True):
                assert_same(a, b)


def test_the_number_of_threads_changes_the_rounding_only(path, device, threads):
    sample = sample_heads(device, torch.float64, (515,), 300, (10, 2))
    threads(1)
    one = results(sample)
    for count in (2, 5):
        threads(count)
        for a, b in zip(results(sample), one, strict=True):
            torch.testing.assert_close(a, b)


def test_results_do_not_depend_on_where_the_inputs_lie(path, device):
    sample = sample_heads(device, leading=(70,), features=33)
    shifted = [torch.cat([t.new_zeros(1), t.detach().flatten()])[1:].view(t.shape).requires_grad_() for t in sample.inputs]
    for a, b in zip(results(sample), results(sample._replace(x=shifted[0], weight=shifted[1], bias=shifted[2])), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_equals_the_layers(compiled, isa):
    """The comparisons with the layers, in a process that runs the other instruction set."""
    if isa == compiled.build_info()["cpu_isa"]:
        pytest.skip(f"{isa} is what all other tests run")
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "compiled and cpu and (equals or classes or masked)"]
    result = subprocess.run(
        [*command, here / "test_linear_heads.py", here / "test_heads_cross_entropy.py"],
        env={**os.environ, "GRL_EXT_CPU_ISA": isa, "PYTHONPATH": str(Path(grl_ext.__file__).parents[1])},  # the very same package
        cwd=here,
        capture_output=True,
        text=True,
    )
    if "this machine runs: " in result.stdout + result.stderr:
        pytest.skip(f"this machine does not run {isa}")
    assert result.returncode == 0, result.stdout[-5000:]
