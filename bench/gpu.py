"""A day with a GPU in one command: builds for it, tests, measures, and writes what it found to bench/results/gpu-<name>/.

    make gpu             # environment, then this
    make gpu DRY=1       # no GPU: every step's command line is checked, nothing is measured

The most important parts come first. A part that fails, hangs or lacks a tool is named in the summary; the others run all the same.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import compare

ROOT = Path(__file__).parents[1]
BUDGET = 24 * 60  # seconds, for all parts together
DTYPES = ("float32", "bfloat16")
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
COUNTERS = "dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__throughput.avg.pct_of_peak_sustained_elapsed,gpu__time_duration.sum"


@dataclass(frozen=True)
class Part:
    name: str
    command: Sequence[str]
    check: Sequence[str]  # the same command line, asked only whether it makes sense: needs no GPU. Empty: bench_part has asked
    limit: int  # seconds
    needs: str = ""  # a tool on the PATH
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    part: Part
    state: str  # passed, failed, ran out of time, not run
    seconds: float = 0.0
    note: str = ""


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def pytest_part(name: str, limit: int, *arguments: str) -> Part:
    command = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
    return Part(name, command, [*command, "--collect-only"], limit, environment={"GRL_EXT_REQUIRE_COMPILED": "1"})


def kernels_part(name: str, limit: int, wrapper: Sequence[str]) -> Part:
    """tests/every_kernel.py under a tool."""
    command = python("tests/every_kernel.py")
    return Part(name, [*wrapper, *command], [*command, "--list"], limit, needs=wrapper[0])


def bench_part(group: str, dtype: str, folder: Path, limit: int) -> Part:
    arguments = ["--device", "cuda", "--dtype", dtype, "--cases", group, "--json", str(folder / f"{group}-{dtype}.json")]
    compare.parse(arguments)  # leaves with its message where it has no such option
    return Part(f"bench {group} {dtype}", python("bench/compare.py", *arguments), [], limit)


def groups() -> list[str]:
    """The benchmark's groups that have cases on CUDA, as bench/compare.py has them now; the heads and the bandwidth first."""
    settings = compare.cases.Settings("cuda", torch.float32, quick=False)
    found = [name for name, group in compare.DEFAULT_GROUPS.items() if list(group(settings))]
    return sorted(found, key=lambda name: (name != "bandwidth", not name.startswith("heads"), found.index(name)))


def parts(folder: Path, capability: str) -> list[Part]:
    build = python("setup.py", "--quiet", "build_ext", "--inplace")
    found = [
        Part(
            "build",
            build,
            python("setup.py", "--quiet", "build_ext", "--help"),
            420,
            environment={"TORCH_CUDA_ARCH_LIST": capability, "GRL_EXT_BUILD": "cuda"},
        ),
        pytest_part(
            "graphs, streams, sizes",
            180,
            "tests/test_cuda_device.py",
            "tests/test_in_place_backward.py",
            "tests/test_lambda_on_the_host.py",
        ),
    ]
    found += [bench_part(group, dtype, folder, 150) for group in groups()[:2] for dtype in DTYPES]
    found += [
        pytest_part(
            "all tests", 420, "tests", "--ignore=tests/test_cuda_on_cpu.py", "--ignore=tests/test_cuda_code.py", "--ignore-glob=*example*"
        ),
        kernels_part("sanitizer memcheck", 180, ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]),
        kernels_part("sanitizer racecheck", 180, ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9"]),
    ]
    found += [bench_part(group, dtype, folder, 120) for group in groups()[2:] for dtype in DTYPES]
    found += [
        kernels_part(f"sanitizer {tool}", 120, ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"])
        for tool in SANITIZER_TOOLS[2:]
    ]
    counted = ["ncu", "--metrics", COUNTERS, "--csv", "--log-file", str(folder / "counters.csv")]
    return [*found, kernels_part("profiler counters", 240, counted)]


def run(part: Part, folder: Path, seconds: float, dry: bool) -> Outcome:
    if part.needs and not shutil.which(part.needs) and not dry:
        return Outcome(part, "not run", note=f"{part.needs} is not on the PATH")
    if seconds < 10:
        return Outcome(part, "not run", note="no time left")
    log = folder / f"{re.sub(r'[^a-z0-9]+', '-', part.name.lower())}.log"
    command = part.check if dry else part.command
    if not command:
        return Outcome(part, "passed")
    environment = {**os.environ, **part.environment, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if dry:
        # Whether the command line makes sense does not depend on what is compiled.
        environment |= {"GRL_EXT_BUILD": "cpu", "GRL_EXT_REQUIRE_COMPILED": "0"}
    start = time.monotonic()
    with log.open("w") as out:
        out.write(" ".join(command) + "\n")
        out.flush()
        try:
            status = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, timeout=min(seconds, part.limit)
            ).returncode
            outcome = Outcome(
                part, "passed" if status == 0 else "failed", note="" if status == 0 else f"exit status {status}, see {log.name}"
            )
        except subprocess.TimeoutExpired:
            outcome = Outcome(part, "ran out of time", note=f"see {log.name}")
        except OSError as error:
            outcome = Outcome(part, "failed", note=str(error))
    outcome.seconds = time.monotonic() - start
    return outcome


# ---------------------------------------------------------------------------------------------------------------------
# The summary
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    text: str
    case: str  # a pattern for the case's name
    dtype: str
    holds: Callable[[dict[str, float]], tuple[bool, str]]  # medians of the case's steps by kind of row


def within(copies: float) -> Callable[[dict[str, float]], tuple[bool, str]]:
    def holds(medians: dict[str, float]) -> tuple[bool, str]:
        ratio = medians["ours"] / medians["limit"]
        return ratio <= copies, f"{ratio:.2f} of a copy"

    return holds


def times_naive(factor: float) -> Callable[[dict[str, float]], tuple[bool, str]]:
    def holds(medians: dict[str, float]) -> tuple[bool, str]:
        ratio = medians["naive"] / medians["ours"]
        return ratio >= factor, f"{ratio:.1f} times naive"

    return holds


def over_linear(medians: dict[str, float]) -> tuple[bool, str]:
    ratio = medians["ours"] / medians["peer"]
    return ratio <= 1.01, f"{ratio:.3f} of nn.Linear"


GOALS = (
    Goal("scale-and-negate at 95 % of the copy's bandwidth, the slowest form", r"bandwidth/", "float32", within(1 / 0.95)),
    Goal("scale-and-negate at 95 % of the copy's bandwidth, the slowest form", r"bandwidth/", "bfloat16", within(1 / 0.95)),
    Goal("heads and loss within 1.3 copies, f32, up to 12 columns", r"heads/65536x1024_(2\+2|10\+2)$", "float32", within(1.3)),
    Goal("heads and loss within 1.5 copies, bf16, up to 33 columns", r"heads/65536x2048_", "bfloat16", within(1.5)),
    Goal("heads at 5 times naive or better", r"heads/", "float32", times_naive(5)),
    Goal("heads at 5 times naive or better", r"heads/", "bfloat16", times_naive(5)),
    Goal("GRLLinear within 1 % of nn.Linear", r"grl_linear/", "float32", over_linear),
)


def medians_of(case: dict) -> dict[str, float]:
    """By kind: of ours the slowest, of the others the fastest."""
    found: dict[str, list[float]] = {}
    for row in case["rows"]:
        found.setdefault(row["kind"], []).append(row["total"]["median"])
    return {kind: max(values) if kind == "ours" else min(values) for kind, values in found.items()}


def goals_met(folder: Path) -> list[str]:
    lines = []
    documents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    for goal in GOALS:
        cases = [
            case
            for document in documents
            if document["environment"]["dtype"] == goal.dtype
            for case in document["cases"]
            if re.match(goal.case, case["name"])
        ]
        if not cases:
            lines.append(f"| {goal.text} | {goal.dtype} | - | not measured |")
        for case in cases:
            good, figure = goal.holds(medians_of(case))
            lines.append(f"| {goal.text} | {goal.dtype} | {case['name']} | {figure}: {'met' if good else '**missed**'} |")
    return lines


def write_summary(folder: Path, device: str, outcomes: Sequence[Outcome]) -> None:
    lines = [
        f"# {device}",
        "",
        f"{datetime.date.today()}, torch {torch.__version__}, commit {compare.commit() or 'unknown'}: `make gpu`",
        "",
        "| part | | seconds | |",
        "|---|---|---|---|",
        *(f"| {o.part.name} | {o.state} | {o.seconds:.0f} | {o.note} |" for o in outcomes),
        "",
        "| goal | dtype | case | |",
        "|---|---|---|---|",
        *goals_met(folder),
    ]
    (folder / "summary.md").write_text("\n".join(lines) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="check each part's command line; needs no GPU")
    parser.add_argument("--out", type=Path, help="instead of bench/results/gpu-<name>")
    options = parser.parse_args(argv)
    if not options.dry and not torch.cuda.is_available():
        raise SystemExit("no GPU is here; --dry checks the command lines without one")
    device, capability = "no GPU: command lines only", "9.0"
    if not options.dry:
        device = torch.cuda.get_device_name()
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
    results = ROOT / "bench" / "results" / ("gpu-" + re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-"))
    folder = (options.out or (ROOT / "out" / "gpu-dry" if options.dry else results)).resolve()
    folder.mkdir(parents=True, exist_ok=True)

    end = time.monotonic() + BUDGET
    outcomes: list[Outcome] = []
    for part in parts(folder, capability):
        same = next((o for o in outcomes if options.dry and part.check and o.part.check == part.check), None)
        outcomes.append(Outcome(part, same.state, note=same.note) if same else run(part, folder, end - time.monotonic(), options.dry))
        print(f"{outcomes[-1].state:>15} {outcomes[-1].seconds:6.1f} s  {part.name}  {outcomes[-1].note}", flush=True)
        write_summary(folder, device, outcomes)
    print(f"summary: {folder / 'summary.md'}")
    return int(any(outcome.state in ("failed", "ran out of time") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
