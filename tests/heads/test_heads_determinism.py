"""The heads' results depend on their arguments and the number of threads, bit by bit, and on nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from head_samples import SWITCH, gradients, our_logits, our_loss, sample_heads
from samples import assert_same

import grl_ext
from grl_ext import grl_linear

pytestmark = pytest.mark.sanitized


def results(sample, rows):
    """All that the three operations compute."""
    loss, head_losses, logits = our_loss(sample, label_smoothing=0.1, sample_weight=rows)
    outputs = [loss, sum(head_losses), *logits]
    if all(len(layers) == 1 for layers in sample.weight):
        weight, bias = sample.linear
        outputs += [*our_logits(sample), grl_linear(sample.x, weight[0], bias[0], 0.3)]
    found = [t for y in outputs for t in gradients(y.square().sum(), sample.inputs, retain_graph=True)]
    return [t.detach() for t in (*outputs, *head_losses, *found)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_sizes", [(10, 2), (SWITCH, 1), ((20, 3), 2)], ids=str)
def test_the_same_bits_in_every_run(path, device, threads, dtype, head_sizes):
    # Rows enough for several threads: 515 * 300 * 12 multiply-adds are seven times what a thread is worth.
    sample, rows = sample_heads(device, dtype, (515,), 300, head_sizes), torch.rand(515, device=device)
    for count in (1, 2, 3):
        threads(count)
        first = results(sample, rows)
        for _ in range(2):
            for a, b in zip(results(sample, rows), first, strict=True):
                assert_same(a, b)


def test_the_number_of_threads_changes_the_rounding_only(path, device, threads):
    sample, rows = sample_heads(device, torch.float64, (515,), 300, (10, 2)), torch.rand(515, device=device)
    threads(1)
    one = results(sample, rows)
    for count in (2, 5):
        threads(count)
        for a, b in zip(results(sample, rows), one, strict=True):
            torch.testing.assert_close(a, b)


def test_results_do_not_depend_on_where_the_inputs_lie(path, device):
    sample, rows = sample_heads(device, leading=(70,), features=33), torch.rand(70, device=device)
    shifted = sample.map(lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape))
    for a, b in zip(results(sample, rows), results(shifted, rows), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_equals_the_layers(compiled, isa):
    """The comparisons with the layers, in a process that runs the other instruction set."""
    if isa == compiled.build_info()["cpu_isa"]:
        pytest.skip(f"{isa} is what all other tests run")
    here = Path(__file__).parent
    parts = (
        "every_shape",
        "every_dtype",
        "any_sizes",
        "any_configuration",
        "label_smoothing",
        "class_weights",
        "nan",
        "masked",
    )
    chosen = f"compiled and cpu and ({' or '.join(parts)})"
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen),
            *(here / name for name in ("test_linear_heads.py", "test_heads_loss.py", "test_heads_loss_options.py")),
        ],
        env={
            **os.environ,
            "GRL_EXT_CPU_ISA": isa,
            "PYTHONPATH": str(Path(grl_ext.__file__).parents[1]),
        },  # the very same package
        cwd=here,
        capture_output=True,
        text=True,
    )
    if "this machine runs: " in result.stdout + result.stderr:
        pytest.skip(f"this machine does not run {isa}")
    assert result.returncode == 0, result.stdout[-5000:]
