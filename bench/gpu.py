"""What needs a GPU, in two commands and a quarter of an hour, on a machine that has torch, numpy, tqdm, pytest and
hypothesis: tests, measures, and writes a summary and one archive.

    make gpu-build                                                   # here: the extension for that machine's torch
    python3 bench/gpu.py --parts first --no-build --budget 540       # there
    python3 bench/gpu.py --parts second --no-build --budget 240
    make gpu DRY=1       # no GPU: each part runs on the CPU as far as it can

A part is several jobs, each a process of its own: what a faulting kernel leaves of a process is no use to the next
test. A job that fails, hangs or lacks a tool is named in the summary; the others run all the same. Both files are
written anew after each part.
"""

import argparse
import datetime
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":  # the command line has no PYTHONPATH; who imports this has its own grl_ext
    sys.path.insert(1, str(ROOT))
sys.path.append(str(ROOT / "tests"))

import every_kernel  # noqa: E402

import compare  # noqa: E402
import gpu_goals  # noqa: E402

# What the products of half types run on (csrc/cuda/heads_plan.h): a GPU decides which is to be the default.
HALF_PATHS = {path: {"GRL_EXT_CUDA_HEADS": path} for path in ("lanes", "matrix")}
WITHOUT_COMPILED = {"TORCH_COMPILE_DISABLE": "1"}  # compiling the rivals takes longer than all the rest
SANITIZER = ["compute-sanitizer", "--error-exitcode", "9", "--kernel-name", "kernel_substring=grl_ext", "--tool"]
FEW_THREADS = {"OMP_NUM_THREADS": "2"}  # for each of several processes
# Without the caching allocator an access past a tensor is one past an allocation.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
COUNTERS = (
    "dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__throughput.avg.pct_of_peak_sustained_elapsed,"
    "smsp__inst_executed.sum,l1tex__data_bank_conflicts_pipe_lsu.sum,gpu__time_duration.sum"
)
NO_CUDA = {"GRL_EXT_BUILD": "cpu", "GRL_EXT_REQUIRE_COMPILED": "0"}  # for a dry run, which needs no compiler either
MERCY = 10  # seconds that a stopped job has for its last words


@dataclass(frozen=True)
class Job:
    name: str
    command: Sequence[str]
    # What runs instead without a GPU, one after the other: the same lines on the CPU, or the command line's check.
    dry: Sequence[Sequence[str]]
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""  # a tool on the PATH


@dataclass(frozen=True)
class Part:
    name: str
    jobs: Sequence[Job]
    limit: int  # seconds
    at_once: int = 1


@dataclass
class Outcome:
    name: str
    state: str  # passed, failed, ran out of time, not run
    seconds: float = 0.0
    note: str = ""


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# ---------------------------------------------------------------------------------------------------------------------
# The parts
# ---------------------------------------------------------------------------------------------------------------------


def build_part(capability: str) -> Part:
    command = python("setup.py", "--quiet", "build_ext", "--inplace")
    environment = {"TORCH_CUDA_ARCH_LIST": capability, "GRL_EXT_BUILD": "cuda"}
    return Part("build", [Job("build", command, [[*command, "--help"]], environment)], 420)


def kernels_part(dry: bool) -> Part:
    """Every variant of every kernel against double precision on the CPU."""
    command = python("tests/every_kernel.py", "--check", "--only")
    names = list(every_kernel.work(every_kernel.Operators("cuda", check=True)))
    if dry:  # all of a type in one process
        names = sorted({name.split(":")[0] + ":" for name in names})
    jobs = []
    for name in names:
        halves = "float16" in name and "heads" in name
        for path, environment in HALF_PATHS.items() if halves else [("", {})]:
            environment = environment | FEW_THREADS
            title = f"kernels {name}" + (f" on {path}" if path else "")
            jobs.append(Job(title, [*command, name], [[*command, name, "--device", "cpu"]], environment))
    return Part("kernels", jobs, 90, at_once=8)


PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "report_at_once")
TESTED = ("tests/everywhere", "tests/layer", "tests/heads")


def tests_part(dry: bool, limit: int, name: str = "tests", files: Sequence[str] = ()) -> Part:
    """The tests that run on a GPU, a file a process."""
    every = sorted(str(path.relative_to(ROOT)) for folder in TESTED for path in (ROOT / folder).glob("test_*.py"))
    chosen = list(files) or every
    jobs = [
        Job(
            f"{name} {Path(file).stem}",
            python(*PYTEST, file, "-k", "cuda"),
            [],
            {"GRL_EXT_REQUIRE_COMPILED": "1", **FEW_THREADS},
        )
        for file in chosen
    ]
    if dry:
        collected = python(*PYTEST, *chosen, "--collect-only")
        jobs = [Job(f"{name} collected", [], [collected])]
    return Part(name, jobs, limit, at_once=8)


def bench_job(
    name: str, dtype: str, cases: Sequence[str], folder: Path, environment: dict[str, str], on_cpu: bool = True
) -> Job:
    """bench/compare.py; without a GPU all the case names, and a case of its smallest size if `on_cpu`."""
    results = ["--json", str(folder / f"{file_name(name)}.json")]
    command = python("bench/compare.py", "--device", "cuda", "--dtype", dtype, "--cases", *cases)
    dry = [[*command, "--list"]]
    if on_cpu:
        small = ("--device", "cpu", "--dtype", dtype, "--quick", "--cases", "heads/128x256_10+2")
        dry.append(python("bench/compare.py", *small, *results))
    return Job(name, [*command, *results], dry, environment)


@functools.cache
def cases_of(dtype: str) -> dict[str, list[str]]:
    """The benchmark's cases on CUDA as bench/compare.py has them now: those of the goals, then the rest by group."""
    settings = compare.cases.Settings("cuda", getattr(torch, dtype), quick=False)
    found: dict[str, list[str]] = {"goals": []}
    for case in compare.select([], settings):
        of_goal = any(goal.dtype == dtype and re.match(goal.case, case.name) for goal in gpu_goals.GOALS)
        found.setdefault("goals" if of_goal else case.name.split("/")[0], []).append(case.name)
    return found


def goals_part(folder: Path) -> Part:
    """What the goals are about, but for the rivals that are compiled."""
    jobs = [bench_job("goals float32", "float32", cases_of("float32")["goals"], folder, WITHOUT_COMPILED)]
    for path, environment in HALF_PATHS.items():
        cases = cases_of("bfloat16")["goals"]
        jobs.append(bench_job(f"goals bfloat16 {path}", "bfloat16", cases, folder, environment | WITHOUT_COMPILED))
    return Part("goals", jobs, 240)


def counters_part(folder: Path) -> Part:
    """The profiler sets the clocks of a card to their base unless told not to; then its times would not be those of the
    benchmark."""
    command = python("tests/every_kernel.py", "--large")
    jobs = []
    for path, environment in HALF_PATHS.items():
        log = folder / f"counters-{path}.csv"
        profiler = [
            "ncu",
            "--clock-control",
            "none",
            "--kernel-name",
            "regex:grl_ext|heads_|scale_",
            "--metrics",
            COUNTERS,
        ]
        jobs.append(
            Job(
                f"counters {path}",
                [*profiler, "--csv", "--log-file", str(log), *command],
                [[*command, "--device", "cpu"]],
                environment,
                needs="ncu",
            )
        )
    return Part("counters", jobs, 80)


def sanitizer_part(tool: str, dry: bool) -> Part:
    command = python("tests/every_kernel.py", "--only")
    jobs = []
    for dtype in ("float32",) if dry else ("float16", "bfloat16", "float32", "float64"):
        for path, environment in HALF_PATHS.items() if dtype.endswith("16") else [("", {})]:
            jobs.append(
                Job(
                    f"{tool} {dtype} {path}".strip(),
                    [*SANITIZER, tool, *command, f"{dtype}: "],
                    [[*command, f"{dtype}: ", "--device", "cpu"]],
                    environment | UNCACHED | FEW_THREADS,
                    needs="compute-sanitizer",
                )
            )
    return Part(tool, jobs, 80, at_once=6)


def compiled_part(folder: Path) -> Part:
    """The goals that are about compiled rivals."""
    jobs = []
    for dtype in gpu_goals.DTYPES:
        large = [case for case in cases_of(dtype)["goals"] if re.match(gpu_goals.LARGE[dtype], case)]
        jobs.append(bench_job(f"compiled {dtype}", dtype, large, folder, {}))
    return Part("compiled", jobs, 200)


def rest_part(folder: Path) -> Part:
    """The benchmark's other cases, the heads first."""
    jobs = []
    cases = {dtype: cases_of(dtype) for dtype in gpu_goals.DTYPES}
    groups = [group for group in cases["float32"] if group != "goals"]
    for group in sorted(groups, key=lambda group: (not group.startswith("heads"), groups.index(group))):
        for dtype in gpu_goals.DTYPES:
            own = cases[dtype][group]
            jobs.append(bench_job(f"{group} {dtype}", dtype, own, folder, WITHOUT_COMPILED, on_cpu=False))
    return Part("rest", jobs, 540)


# Each set's limits add up to its command's time, but for the last part, which has what is left.
FIRST = ("kernels", "goals", "tests", "counters")
SECOND = ("memcheck", "racecheck", "graphs", "compiled")
GRAPHS = ("tests/everywhere/test_cuda_device.py", "tests/everywhere/test_graphs.py")


def parts(names: Sequence[str], folder: Path, capability: str, dry: bool) -> list[Part]:
    makers = {
        "build": lambda: build_part(capability),
        "kernels": lambda: kernels_part(dry),
        "tests": lambda: tests_part(dry, 120),
        "goals": lambda: goals_part(folder),
        "counters": lambda: counters_part(folder),
        "memcheck": lambda: sanitizer_part("memcheck", dry),
        "racecheck": lambda: sanitizer_part("racecheck", dry),
        "compiled": lambda: compiled_part(folder),
        "graphs": lambda: tests_part(dry, 60, "graphs", GRAPHS),
        "initcheck": lambda: sanitizer_part("initcheck", dry),
        "synccheck": lambda: sanitizer_part("synccheck", dry),
        "rest": lambda: rest_part(folder),
    }
    sets = {"first": FIRST, "second": SECOND, "all": tuple(makers)[1:]}
    wanted = [part for name in names for part in sets.get(name, (name,))]
    if unknown := [name for name in wanted if name not in makers]:
        raise SystemExit(f"unknown part {', '.join(unknown)}; there are {', '.join([*sets, *makers])}")
    return [makers[name]() for name in dict.fromkeys(wanted)]


# ---------------------------------------------------------------------------------------------------------------------
# Running them
# ---------------------------------------------------------------------------------------------------------------------


def environment_of(own: dict[str, str]) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **own}


def stop(process: subprocess.Popen) -> None:
    """With all that it has started: a compiler that outlived it would disturb what is measured next. First it is asked
    to stop, so that it can say what it has found."""
    for sent in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
            process.wait(MERCY)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


def run_job(job: Job, folder: Path, end: float, dry: bool) -> Outcome:
    """Until `end` at the latest, by time.monotonic()."""
    if job.needs and not dry and not shutil.which(job.needs):
        return Outcome(job.name, "not run", note=f"{job.needs} is not on the PATH")
    if end - time.monotonic() < 2:
        return Outcome(job.name, "not run", note="no time left")
    log = folder / f"{file_name(job.name)}.log"
    start = time.monotonic()
    outcome = Outcome(job.name, "passed")
    with log.open("w") as out:
        for command in job.dry if dry else [job.command]:
            out.write(" ".join(command) + "\n")
            out.flush()
            try:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment_of(job.environment | (NO_CUDA if dry else {})),
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                outcome = Outcome(job.name, "failed", note=str(error))
                break
            try:
                status = process.wait(max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                stop(process)
                outcome = Outcome(job.name, "ran out of time", note=f"see {log.name}")
                break
            if status not in (0, 5):  # 5: pytest found no test that the device is for
                outcome = Outcome(job.name, "failed", note=f"exit status {status}, see {log.name}")
                break
    outcome.seconds = time.monotonic() - start
    return outcome


def run(part: Part, folder: Path, seconds: float, dry: bool) -> list[Outcome]:
    # A dry run measures nothing, and the machine may be slow and busy.
    end = time.monotonic() + (10 * part.limit if dry else min(seconds, part.limit) - MERCY)
    at_once = min(part.at_once, os.cpu_count() or 1)
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda job: run_job(job, folder, end, dry), part.jobs))


def write_results(out: Path, folder: Path, device: str, outcomes: dict[str, list[Outcome]]) -> None:
    """summary.md, and an archive of all else."""
    lines = [
        f"# {device}",
        "",
        f"{datetime.date.today()}, torch {torch.__version__}, commit {compare.commit() or 'unknown'}: `bench/gpu.py`",
        "",
        "| part | jobs passed | seconds of all jobs | |",
        "|---|---|---|---|",
    ]
    for part, jobs in outcomes.items():
        bad = "; ".join(f"{job.name}: {job.state}, {job.note}" for job in jobs if job.state != "passed")
        passed = sum(job.state == "passed" for job in jobs)
        lines.append(f"| {part} | {passed} of {len(jobs)} | {sum(job.seconds for job in jobs):.0f} | {bad} |")
    lines += ["", "| goal | measured as | case | |", "|---|---|---|---|", *gpu_goals.goals_met(folder)]
    (out / "summary.md").write_text("\n".join(lines) + "\n")
    with tarfile.open(out / "details.tar.gz", "w:gz") as archive:
        archive.add(folder, arcname="details")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="all", help="first, second, all, or parts by name, with commas")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds, for all parts together")
    parser.add_argument("--no-build", action="store_true", help="the extension is there")
    parser.add_argument("--dry", action="store_true", help="without a GPU: on the CPU, as far as that can be")
    parser.add_argument("--out", type=Path, help="instead of bench/results/gpu-<name>, with the parts if not all")
    options = parser.parse_args(argv)
    start = time.monotonic()
    if not options.dry and not torch.cuda.is_available():
        raise SystemExit("no GPU is here; --dry runs without one")
    device, capability = "no GPU: a dry run", "9.0"
    if not options.dry:
        device = torch.cuda.get_device_name()
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
    name = file_name(device if options.parts == "all" else f"{device} {options.parts}")
    results = ROOT / "bench" / "results" / f"gpu-{name}"
    out = (options.out or (ROOT / "out" / "gpu-dry" if options.dry else results)).resolve()
    folder = ROOT / "build" / "gpu" / name
    shutil.rmtree(folder, ignore_errors=True)
    for path in (out, folder):
        path.mkdir(parents=True, exist_ok=True)

    names = [*([] if options.no_build else ["build"]), *options.parts.split(",")]
    budget = float("inf") if options.dry else options.budget
    outcomes: dict[str, list[Outcome]] = {}
    for part in parts(names, folder, capability, options.dry):
        begun = time.monotonic()
        outcomes[part.name] = run(part, folder, budget - (begun - start), options.dry)
        states = {state: sum(o.state == state for o in outcomes[part.name]) for state in STATES}
        said = ", ".join(f"{count} {state}" for state, count in states.items() if count)
        print(f"{time.monotonic() - begun:6.1f} s  {part.name}: {said}", flush=True)
        for outcome in outcomes[part.name]:
            if outcome.state != "passed":
                print(f"          {outcome.name}: {outcome.state}, {outcome.note}", flush=True)
        write_results(out, folder, device, outcomes)
    print(f"summary: {out / 'summary.md'}")
    # A dry run has everything it needs: what it did not run counts as a failure.
    bad = STATES[1:] if options.dry else STATES[1:3]
    return int(any(outcome.state in bad for jobs in outcomes.values() for outcome in jobs))


STATES = ("passed", "failed", "ran out of time", "not run")


if __name__ == "__main__":
    sys.exit(main())
