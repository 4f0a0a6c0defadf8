"""What the C library's memory allocator costs a step with large tensors on the CPU, and what else can be set.

    python bench/allocators.py

An allocator that returns a large block to the system with its tensor gets fresh pages for the next one: each is a page
fault, and the system fills it with zeros. Each setting is a process of its own, the lowest processor time of several
steps counts.
"""

import ctypes.util
import os
import resource
import subprocess
import sys
from pathlib import Path

CASE = "heads/16384x2048_31+2"
ROWS = ("pasted", "heads(features, targets)", "yardstick: one copy")
STEPS = 8


def settings() -> dict[str, dict[str, str]]:
    """Environment variables by name; the allocators that are not installed are left out."""
    found = {
        "as it is": {},
        "glibc, nothing returned": {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"},
        "PyTorch's large pages": {"THP_MEM_ALLOC_ENABLE": "1"},
    }
    guide = (
        "oversize_threshold:1,background_thread:true,metadata_thp:auto,dirty_decay_ms:9000000000,"
        "muzzy_decay_ms:9000000000"
    )
    never = "oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1"
    for name, library, extra in (
        ("tcmalloc", "tcmalloc", {}),
        ("jemalloc", "jemalloc", {}),
        ("jemalloc, as in PyTorch's tuning guide", "jemalloc", {"MALLOC_CONF": guide}),
        ("jemalloc, nothing returned", "jemalloc", {"MALLOC_CONF": never}),
    ):
        if file := ctypes.util.find_library(library):
            found[name] = {"LD_PRELOAD": file, **extra}
    return found


def measure_here() -> None:
    import torch

    import cases
    import compare

    (case,) = compare.select([CASE], cases.Settings("cpu", torch.float32, quick=False))
    for row in case.build().rows:
        if row.name not in ROWS:
            continue
        lowest, faults = float("inf"), 0
        for _ in range(STEPS):
            before = resource.getrusage(resource.RUSAGE_SELF)
            row.step()
            after = resource.getrusage(resource.RUSAGE_SELF)
            lowest = min(lowest, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
            faults = after.ru_minflt - before.ru_minflt
        print(f"  {row.name} {1e3 * lowest:.0f} ms, {faults} page faults", end=";")
    print(f"  peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


def main() -> None:
    import torch

    import compare

    print(compare.headline(compare.environment(compare.cases.Settings("cpu", torch.float32, quick=False))))
    print(f"{CASE}, one thread: processor time and page faults of a step")
    for name, variables in settings().items():
        # One thread: the time that threads spend waiting for each other is not the allocator's.
        environment = {"PYTHONPATH": str(Path(__file__).parents[1]), **os.environ, "OMP_NUM_THREADS": "1", **variables}
        result = subprocess.run(
            [sys.executable, __file__, "here"], env=environment, capture_output=True, text=True, check=True
        )
        print(name + ":" + result.stdout.rstrip(), flush=True)


if __name__ == "__main__":
    measure_here() if sys.argv[1:] == ["here"] else main()
