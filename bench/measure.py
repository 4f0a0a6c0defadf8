"""Times callables side by side and counts the memory they need.

Everything here serves one rule: a number is only ever compared with numbers of the same run. The callables take turns
in rounds, in random order, so that whatever drifts (clock rate, other processes, caches) hits all of them; differences
and ratios are taken within a round, and the spread that is reported is that of these paired values.
"""

import gc
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# The profiler's library announces every start and stop on stderr, into the progress bar, unless told so before its
# first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

Step = Callable[[], object]
Timer = Callable[[Step, int], float]  # (step, repeats) -> seconds that all repeats took together
Progress = Callable[[Iterable[int]], Iterable[int]]

# Long beside the timer's own cost (below 1 us for the clock, about 10 us for device events); no longer than a
# scheduler's time slice, so that on a busy machine many samples run undisturbed and the median is one of them.
SAMPLE_SECONDS = 2e-3


def wall_timer(clock: Callable[[], float] = time.perf_counter, wait: Callable[[], object] = lambda: None) -> Timer:
    """`wait` returns when what was queued on a device is done."""

    def timer(step: Step, repeats: int) -> float:
        wait()
        start = clock()
        for _ in range(repeats):
            step()
        wait()
        return clock() - start

    return timer


def device_timer() -> Timer:
    """CUDA events: device time where the device is the bottleneck, dispatch time where the launches are."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timer(step: Step, repeats: int) -> float:
        torch.cuda.synchronize()  # nobody else's work in our sample
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return timer


def interleave(
    steps: Mapping[str, Step],
    timer: Timer,
    *,
    seconds: float,
    min_rounds: int,
    progress: Progress = iter,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Seconds per call of each step, one value per round; index i of every list belongs to the same round."""
    order, shuffle = list(steps), random.Random(seed).shuffle
    samples: dict[str, list[float]] = {name: [] for name in steps}
    with _no_garbage_collection():
        repeats, round_seconds = {}, 0.0
        for name, step in steps.items():
            repeats[name], sample_seconds = _calibrate(step, timer)
            round_seconds += sample_seconds
        for _ in progress(range(max(min_rounds, int(seconds / round_seconds)))):
            shuffle(order)
            for name in order:
                if repeats[name] > 1:
                    steps[name]()  # the previous row's leftovers in the caches are not this row's cost
                samples[name].append(timer(steps[name], repeats[name]) / repeats[name])
    return samples


def _calibrate(step: Step, timer: Timer) -> tuple[int, float]:
    """How often to call the step in one sample, and how long the sample will take."""
    step()  # first calls allocate, compile and pick algorithms
    repeats, elapsed = 1, timer(step, 1)
    while elapsed < SAMPLE_SECONDS / 2:
        repeats *= 2
        elapsed = timer(step, repeats)
    per_call = elapsed / repeats
    repeats = max(1, math.ceil(SAMPLE_SECONDS / per_call))
    return repeats, repeats * per_call


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def launches(step: Step) -> int:
    """How much one call starts on the GPU, by the profiler: kernels, and copies and fills of memory."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def peak_memory(step: Step, device: str) -> int:
    """The most bytes of tensors that one call holds at a time beyond those that existed before it.

    On CUDA the caching allocator keeps this number. On the CPU nobody does; the profiler records every tensor
    allocation with the running total, and its exported trace is the documented way to read it. That is exact and
    repeatable, which the process's
    resident size is not: it grows by pages, keeps what was freed, and cannot be reset. Scratch memory that a library
    takes straight from malloc is not seen; element-wise chains have none.
    """
    step()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event["args"] for event in sorted(events, key=lambda e: e.get("ts", 0)) if event["name"] == "[memory]"]
    before = changes[0]["Total Allocated"] - changes[0]["Bytes"]
    return max(change["Total Allocated"] for change in changes) - before


@dataclass(frozen=True)
class Spread:
    """Where the samples lie: the middle, the middle half, the middle nine tenths."""

    p5: float
    q1: float
    median: float
    q3: float
    p95: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(*(float(q) for q in np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))), len(values))


def paired_difference(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> Spread | None:
    """The spread of a / b over the rounds; None where b cannot be told from zero, so that the ratio would be noise.

    b may be a difference: the few rounds in which noise turned its sign say nothing about the ratio and are left out.
    """
    if Spread.of(b).q1 <= 0:
        return None
    return Spread.of([x / y for x, y in zip(a, b, strict=True) if y > 0])


def is_above(a: Sequence[float], b: Sequence[float], margin: float) -> bool:
    """Whether a exceeds b beyond the noise: by more than `margin` in the middle, and in more rounds than chance allows.

    The second is a sign test at three standard deviations, so that among the hundred pairs of a run none is expected by
    chance.
    """
    differences = paired_difference(a, b)
    n = len(differences)
    rounds_above = sum(d > 0 for d in differences)
    by_chance = n / 2 + 1.5 * math.sqrt(n) if n > 1 else 0.0  # counted once means exact
    return Spread.of(differences).median > margin and rounds_above > by_chance
