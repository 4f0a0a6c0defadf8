"""A day with a GPU in one command: builds for it, tests, measures, and writes what it found to
bench/results/gpu-<name>/.

    make gpu             # environment, then this
    make gpu DRY=1       # no GPU: every step's command line is checked, nothing is measured

The most important parts come first. A part that fails, hangs or lacks a tool is named in the summary; the others run
all the same.
"""

import argparse
import contextlib
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
import heads

ROOT = Path(__file__).parents[1]
BUDGET = 24 * 60  # seconds, for all parts together
DTYPES = ("float32", "bfloat16")
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
COUNTERS = (
    "dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__throughput.avg.pct_of_peak_sustained_elapsed,"
    "gpu__time_duration.sum"
)


@dataclass(frozen=True)
class Part:
    name: str
    command: Sequence[str]
    check: (
        Sequence[str] | Callable[[], object]
    )  # asks only whether the command line makes sense: a command, or a call here
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


def bench_part(name: str, dtype: str, folder: Path, limit: int, cases: Sequence[str]) -> Part:
    arguments = [
        "--device",
        "cuda",
        "--dtype",
        dtype,
        "--cases",
        *cases,
        "--json",
        str(folder / f"{name}-{dtype}.json"),
    ]
    # The check is the same command line with --list, which names the cases: it fails on an option or a case that there
    # is not.
    return Part(
        f"bench {name} {dtype}",
        python("bench/compare.py", *arguments),
        lambda: compare.main([*arguments, "--list"]),
        limit,
    )


def cases_of(dtype: str) -> dict[str, list[str]]:
    """The benchmark's cases on CUDA as bench/compare.py has them now: those of the goals, then the rest by group."""
    settings = compare.cases.Settings("cuda", getattr(torch, dtype), quick=False)
    found: dict[str, list[str]] = {"goals": []}
    for case in compare.select([], settings):
        of_goal = any(goal.dtype == dtype and re.match(goal.case, case.name) for goal in GOALS)
        found.setdefault("goals" if of_goal else case.name.split("/")[0], []).append(case.name)
    return found


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
            "tests/everywhere/test_cuda_device.py",
            "tests/layer/test_in_place_backward.py",
            "tests/layer/test_lambda_on_the_host.py",
        ),
    ]
    cases = {dtype: cases_of(dtype) for dtype in DTYPES}
    found += [bench_part("goals", dtype, folder, 300, cases[dtype].pop("goals")) for dtype in DTYPES]
    found += [
        pytest_part(
            "all tests",
            420,
            "tests",
            "-m",
            "not once",
            "--ignore=tests/project",
        ),
        kernels_part("sanitizer memcheck", 180, ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]),
        kernels_part("sanitizer racecheck", 180, ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9"]),
    ]
    # The heads of the other sizes first.
    rest = sorted(
        cases[DTYPES[0]], key=lambda group: (not group.startswith("heads"), list(cases[DTYPES[0]]).index(group))
    )
    found += [bench_part(group, dtype, folder, 150, cases[dtype][group]) for group in rest for dtype in DTYPES]
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
    if dry and callable(part.check):
        return call(part, log)
    command = part.check if dry else part.command
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
                command,
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=min(seconds, part.limit),
            ).returncode
            outcome = Outcome(
                part,
                "passed" if status == 0 else "failed",
                note="" if status == 0 else f"exit status {status}, see {log.name}",
            )
        except subprocess.TimeoutExpired:
            outcome = Outcome(part, "ran out of time", note=f"see {log.name}")
        except OSError as error:
            outcome = Outcome(part, "failed", note=str(error))
    outcome.seconds = time.monotonic() - start
    return outcome


def call(part: Part, log: Path) -> Outcome:
    """The part's check, which runs in this process."""
    start = time.monotonic()
    with log.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        print(" ".join(part.command))
        try:
            status = part.check()
        except (Exception, SystemExit) as error:  # noqa: BLE001
            print(error)
            status = 1
    state, note = ("failed", f"see {log.name}") if status else ("passed", "")
    return Outcome(part, state, time.monotonic() - start, note)


# ---------------------------------------------------------------------------------------------------------------------
# The summary
# ---------------------------------------------------------------------------------------------------------------------


Rows = dict[str, dict]  # of a case, by name: as bench/compare.py writes them


@dataclass(frozen=True)
class Goal:
    text: str
    case: str  # a pattern for the case's name
    dtype: str
    # Whether it is met, and the figure. Raises Missing where a row that it needs was not measured.
    holds: Callable[[Rows], tuple[bool, str]]


class Missing(Exception):
    """There is no such row."""


def named(rows: Rows, what: str, matches: Callable[[dict], bool], choose: Callable = min) -> tuple[str, float]:
    """The name and the median of the fastest such row, or of the slowest by choose=max."""
    medians = {name: row["total"]["median"] for name, row in rows.items() if matches(row)}
    if not medians:
        raise Missing(f"no row {what}")
    return choose(medians.items(), key=lambda item: item[1])


def fused(rows: Rows) -> float:
    return named(rows, heads.FUSED, lambda row: row["name"] == heads.FUSED)[1]


def pasted(rows: Rows) -> float:
    return named(rows, "pasted", lambda row: row["kind"] == "reference")[1]


def every_form_within(copies: float) -> Callable[[Rows], tuple[bool, str]]:
    def holds(rows: Rows) -> tuple[bool, str]:
        name, slowest = named(rows, "of ours", lambda row: row["kind"] == "ours", max)
        copy = named(rows, "yardstick", lambda row: row["kind"] == "yardstick")[1]
        return slowest <= copies * copy, f"{100 * copy / slowest:.1f} % of the copy's bandwidth, {name}"

    return holds


def within(copies: float) -> Callable[[Rows], tuple[bool, str]]:
    def holds(rows: Rows) -> tuple[bool, str]:
        copy = named(rows, heads.COPY, lambda row: row["name"] == heads.COPY)[1]
        ratio = fused(rows) / copy
        return ratio <= copies, f"{ratio:.2f} copies"

    return holds


def times_pasted(factor: float) -> Callable[[Rows], tuple[bool, str]]:
    def holds(rows: Rows) -> tuple[bool, str]:
        ratio = pasted(rows) / fused(rows)
        graphs = [row for name, row in rows.items() if name == f"{heads.FUSED} in a CUDA graph"]
        also = "".join(f", {pasted(rows) / row['total']['median']:.1f} in a CUDA graph" for row in graphs)
        return ratio >= factor, f"{ratio:.1f} times{also}"

    return holds


def times_compiled(factor: float) -> Callable[[Rows], tuple[bool, str]]:
    def holds(rows: Rows) -> tuple[bool, str]:
        name, best = named(rows, "compiled", lambda row: row["name"].startswith("compiled"))
        return best >= factor * fused(rows), f"{best / fused(rows):.1f} times {name}"

    return holds


def over_linear(rows: Rows) -> tuple[bool, str]:
    ratio = (
        named(rows, "of ours", lambda row: row["kind"] == "ours")[1]
        / named(rows, "nn.Linear", lambda row: row["kind"] == "peer")[1]
    )
    return ratio <= 1.01, f"{ratio:.3f} of nn.Linear"


def at_most(launches: int) -> Callable[[Rows], tuple[bool, str]]:
    return lambda rows: (fused(rows) <= launches, f"{fused(rows):.0f} launches")


# The shapes whose features are 256 MB.
LARGE = {"float32": "heads/65536x1024_", "bfloat16": "heads/65536x2048_"}

GOALS = (
    *(
        Goal(
            "scale-and-negate at 95 % of a copy's bandwidth in every form",
            r"bandwidth/",
            d,
            every_form_within(1 / 0.95),
        )
        for d in DTYPES
    ),
    Goal(
        "heads and loss within 1.3 copies, up to 12 columns", LARGE["float32"] + r"(2|10)\+2$", "float32", within(1.3)
    ),
    Goal(
        "heads and loss within 1.5 copies, up to 32 columns",
        LARGE["bfloat16"] + r"(2|10|30)\+2$",
        "bfloat16",
        within(1.5),
    ),
    *(
        Goal("heads and loss 5 times as fast as layer by layer, 256 MB of features", LARGE[d], d, times_pasted(5))
        for d in DTYPES
    ),
    *(
        Goal("heads and loss 2 times as fast as the best compiled row, 256 MB", LARGE[d], d, times_compiled(2))
        for d in DTYPES
    ),
    *(
        Goal(
            "heads and loss 5 times as fast as layer by layer, wall-clock, 128x256",
            r"heads/128x256_",
            d,
            times_pasted(5),
        )
        for d in DTYPES
    ),
    *(Goal("heads and loss in 4 launches or fewer, 128x256", r"heads_launches/", d, at_most(4)) for d in DTYPES),
    *(Goal("GRLLinear within 1 % of nn.Linear", r"grl_linear/", d, over_linear) for d in DTYPES),
)


def goals_met(folder: Path) -> list[str]:
    """A line for each goal and case; for a goal that no case was measured for, a line that says so."""
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
            try:
                good, figure = goal.holds({row["name"]: row for row in case["rows"]})
                verdict = f"{figure}: {'met' if good else '**missed**'}"
            except Missing as missing:
                verdict = f"not measured: {missing}"
            lines.append(f"| {goal.text} | {goal.dtype} | {case['name']} | {verdict} |")
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
        same = next(
            (o for o in outcomes if options.dry and o.part.check == part.check), None
        )  # every_kernel.py, once for all tools
        outcomes.append(
            Outcome(part, same.state, note=same.note)
            if same
            else run(part, folder, end - time.monotonic(), options.dry)
        )
        print(f"{outcomes[-1].state:>15} {outcomes[-1].seconds:6.1f} s  {part.name}  {outcomes[-1].note}", flush=True)
        write_summary(folder, device, outcomes)
    print(f"summary: {folder / 'summary.md'}")
    # A dry run has everything it needs: what it did not check counts as a failure.
    bad = ("failed", "ran out of time", "not run") if options.dry else ("failed", "ran out of time")
    return int(any(outcome.state in bad for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
