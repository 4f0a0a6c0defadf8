"""Compares grl_ext's gradient reversal and fused heads with what people use, side by side in one run.

python bench/compare.py                       # all cases, on CUDA where there is one
python bench/compare.py --quick --cases tax   # a few seconds
"""

import argparse
import datetime
import functools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tqdm import tqdm

import bandwidth
import baselines
import cases
import founding
import heads
import linear
import maps
import measure
import report
from grl_ext import _backend

DEFAULT_GROUPS = cases.GROUPS | founding.GROUPS | heads.GROUPS | linear.GROUPS | maps.GROUPS | bandwidth.GROUPS
GROUPS = DEFAULT_GROUPS | linear.BY_NAME_ONLY
DTYPES = ("float32", "bfloat16", "float16", "float64")
BUSY = 0.5  # of the cores, by the load of the last minute
LONGEST_WAIT = 60  # seconds: most of what a build left of the load has gone by then


def backend() -> dict:
    """What grl_ext runs on: the compiled extension with its build's facts, or plain PyTorch with the reason."""
    if _backend.C is None:
        return {"compiled": False, "why": _backend.why_not}
    return {"compiled": True, **_backend.C.build_info()}


def commit() -> str | None:
    """The checkout this file lies in; None where it lies in none, as in an unpacked source distribution."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def load() -> float | None:
    """How many processes wanted a core, on average over the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def is_busy() -> bool:
    return (load() or 0) > BUSY * (os.cpu_count() or 1)


def wait_until_idle(seconds: float = LONGEST_WAIT) -> None:
    """Returns when the machine is no longer busy, or after so many seconds."""
    end = time.monotonic() + seconds
    if is_busy():
        print(
            f"the machine is busy (load {load()} on {os.cpu_count()} cores): waiting for at most {seconds:.0f} s "
            "(--no-wait skips this)",
            flush=True,
        )
    while is_busy() and time.monotonic() < end:
        time.sleep(1)


def environment(settings: cases.Settings) -> dict:
    cuda = settings.device == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": settings.device,
        "device_name": torch.cuda.get_device_name() if cuda else processor(),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": load(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda if cuda else None,
        "grl_ext": backend(),
        "peers": {name: installed(name) for name in ("pytorch-revgrad", "pytorch-adapt")},
        "quick": settings.quick,
    }


def headline(facts: dict) -> str:
    path = facts["grl_ext"]
    compiled = "compiled" if path["compiled"] else f"pure PyTorch: {path['why']}"
    details = ", ".join(f"{key} {value}" for key, value in path.items() if key not in ("compiled", "why"))
    parts = [
        f"{facts['device']} ({facts['device_name']})",
        facts["dtype"],
        f"CPU threads {facts['threads']}",
        f"torch {facts['torch']} ({facts['torch_isa']})",
        f"commit {facts['commit'] or 'unknown'}",
        facts["date"],
        f"grl_ext {compiled}" + (f" ({details})" if details else ""),
    ]
    return " | ".join(parts)


def select(wanted: Sequence[str], settings: cases.Settings) -> list[cases.Case]:
    """Cases by name or by group, in the order in which they are defined."""
    available = [case for group in GROUPS.values() for case in group(settings)]
    unknown = set(wanted) - {case.name for case in available} - set(GROUPS)
    if unknown:
        names = ", ".join([*GROUPS, *(case.name for case in available if case.name not in GROUPS)])
        raise SystemExit(f"unknown case {', '.join(sorted(unknown))}; there are {names}")
    return [case for case in available if {case.name, case.name.split("/")[0]} & set(wanted or DEFAULT_GROUPS)]


def run(case: cases.Case, settings: cases.Settings) -> report.CaseResult:
    work = case.build()
    remarks = work.check()
    if case.measures == "memory":
        counted = {row: [measure.peak_memory(row.step, settings.device)] for row in work.rows}
        return report.summarise(case, work, counted, remarks)
    if case.measures == "launches":
        counted = {row: [measure.launches(row.step)] for row in work.rows}
        return report.summarise(case, work, counted, remarks)
    if settings.device == "cpu":
        timer = measure.wall_timer()
    else:
        timer = measure.device_timer() if case.clock == "device" else measure.wall_timer(wait=torch.cuda.synchronize)
    rounds = functools.partial(tqdm, desc=f"{case.name} rounds", leave=False, disable=None)
    steps = {row: row.step for row in work.rows}
    samples = measure.interleave(steps, timer, seconds=case.seconds, min_rounds=case.min_rounds, progress=rounds)
    return report.summarise(case, work, samples, remarks)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--cases", nargs="+", default=[], metavar="NAME", help=f"groups ({', '.join(GROUPS)}) or cases (tax/64)"
    )
    parser.add_argument("--list", action="store_true", help="name the cases that would run, and stop")
    parser.add_argument("--quick", action="store_true", help="smaller work, fewer rounds, no torch.compile")
    parser.add_argument(
        "--threads", type=int, help="CPU threads (default: PyTorch's own choice, which is what users get)"
    )
    parser.add_argument("--no-wait", action="store_true", help="begin at once, also on a busy machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the layer's overhead by size (PNG, SVG, ...)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = cases.Settings(options.device, getattr(torch, options.dtype), options.quick)
    selected = select(options.cases, settings)
    if options.list:
        print("\n".join(case.name for case in selected))
        return 0
    if settings.device == "cpu" and not (settings.quick or options.no_wait):  # `make bench` builds before
        wait_until_idle()
    facts = environment(settings)
    print(headline(facts))
    if is_busy():
        # Not a matter of width only: each parallel loop then waits a whole time slice for the thread that was
        # descheduled.
        print(
            f"the machine is busy (load {facts['load']} on {facts['cores']} cores): repeat when it is not, or with "
            "--threads 1"
        )
    for reason in baselines.layers()[1]:
        print(reason)
    if not settings.quick and (problem := baselines.compile_problem(settings.device)):
        print(problem)

    results, failures = [], 0
    bar = tqdm(selected, unit="case", disable=None)
    for case in bar:
        bar.set_description(case.name)
        torch.compiler.reset()  # the last case's graphs must not count against this one's recompile limit
        try:
            result = run(case, settings)
        except (cases.WrongResult, RuntimeError) as error:  # of the latter, too little memory; the other cases may do
            what = "wrong result" if isinstance(error, cases.WrongResult) else type(error).__name__
            tqdm.write(f"{what} in {case.name}: {error}", file=sys.stderr)
            failures += 1
            continue
        tqdm.write(f"\n{report.table(result)}", file=sys.stdout)
        results.append(report.as_json(result))
        if options.json:  # after each case: whoever stops this has what was done
            options.json.write_text(json.dumps({"environment": facts, "cases": results}, indent=1) + "\n")

    if options.plot:
        import plot  # matplotlib is needed here only

        plot.draw({"environment": facts, "cases": results}, options.plot)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
