"""Memory stays flat over training steps. A short run; `make steps COUNT=100000` is the long one."""

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import steps
import torch

KEPT = []

needs_statm = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="there is no /proc/self/statm to read resident memory from"
)


@needs_statm
def test_memory_stays_flat(path):
    # In a process of its own: here the other tests' memory would count too.
    command = [sys.executable, steps.__file__, "--count", "1500", "--path", path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


def leak_tensors(i: int) -> None:
    KEPT.append(torch.ones(()))


def leak_bytes(i: int) -> None:
    # Mapped, not allocated: an allocator would first give out again what earlier tests have left in this process.
    pages = mmap.mmap(-1, 16 * mmap.PAGESIZE)
    pages.write(b"x" * len(pages))
    KEPT.append(pages)


def leak_cycles(i: int) -> None:
    cycle = []
    cycle.append(cycle)


@needs_statm
@pytest.mark.parametrize(
    "step, found",
    [
        (leak_tensors, "more tensors are alive"),
        (leak_bytes, "more bytes are resident"),
        (leak_cycles, "by the garbage collector only"),
    ],
)
def test_what_every_step_leaves_behind_is_found(step, found):
    assert found in steps.complaint(steps.run(1000, step))
    KEPT.clear()
