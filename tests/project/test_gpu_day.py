"""bench/gpu.py: what it does with jobs that fail, hang or lack a tool, and how it reads the goals out of what was
measured."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import compare  # noqa: E402
import gpu  # noqa: E402
import gpu_goals  # noqa: E402
import heads  # noqa: E402

pytestmark = pytest.mark.once


def job(code: str, needs: str = "", dry: str = "pass") -> gpu.Job:
    return gpu.Job("a job", gpu.python("-u", "-c", code), [gpu.python("-c", dry)], needs=needs)


def outcome_of(one: gpu.Job, folder: Path, limit: int = 60, seconds: float = 100, dry: bool = False) -> gpu.Outcome:
    (outcome,) = gpu.run(gpu.Part("a part", [one], limit), folder, seconds, dry)
    return outcome


@pytest.mark.parametrize(
    "planned, limit, state, note",
    [
        (job("print('fine')"), 60, "passed", ""),
        (job("raise SystemExit(3)"), 60, "failed", "exit status 3, see a-job.log"),
        (job("import time; time.sleep(60)"), 13, "ran out of time", "see a-job.log"),
        (job("pass", needs="no-such-tool"), 60, "not run", "no-such-tool is not on the PATH"),
    ],
)
def test_a_job_ends_in_its_state(tmp_path, planned, limit, state, note):
    outcome = outcome_of(planned, tmp_path, limit)
    assert (outcome.state, outcome.note) == (state, note)


def test_nothing_is_started_when_the_time_is_up(tmp_path):
    assert outcome_of(job("pass"), tmp_path, seconds=5).note == "no time left"


def test_the_log_holds_the_command_and_what_it_said(tmp_path):
    fine = job("print('fine')")
    outcome_of(fine, tmp_path)
    assert (tmp_path / "a-job.log").read_text().splitlines() == [" ".join(fine.command), "fine"]


def test_a_job_that_is_stopped_says_what_it_has_found_and_leaves_nothing_behind(tmp_path):
    """A test that fails, then one that does not end, with a process of its own."""
    (tmp_path / "test_some.py").write_text(
        """
import subprocess, sys, time

def test_fails():
    assert 1 + 1 == 3

def test_hangs():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print("child", child.pid, file=sys.__stderr__)
    time.sleep(60)
"""
    )
    command = gpu.python(*gpu.PYTEST, "-s", "-o", "addopts=", "--rootdir", tmp_path, tmp_path / "test_some.py")
    outcome = outcome_of(gpu.Job("a job", command, []), tmp_path, limit=gpu.MERCY + 8)
    log = (tmp_path / "a-job.log").read_text()
    assert outcome.state == "ran out of time"
    assert "assert (1 + 1) == 3" in log
    child = int(re.search(r"child (\d+)", log)[1])
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split(")")[1]


def test_a_dry_run_executes_what_stands_for_the_job(tmp_path):
    assert outcome_of(job("raise SystemExit(3)", needs="no-such-tool"), tmp_path, dry=True).state == "passed"
    assert outcome_of(job("pass", dry="raise SystemExit(3)"), tmp_path, dry=True).state == "failed"


@pytest.mark.parametrize("wrong", [["--cases", "headz"], ["--dtype", "int7"], ["--no-such-option"]])
def test_a_wrong_command_line_of_the_benchmark_is_found(wrong):
    good = gpu.bench_job("some", "float32", ["bandwidth"], Path("."), {})
    listed, on_cpu = (list(command[2:]) for command in good.dry)
    assert compare.main(listed) == 0 and compare.main([*on_cpu[:-2], "--list"]) == 0
    with pytest.raises(SystemExit):
        compare.main([*listed, *wrong])


def measured(name: str, **medians: float) -> dict:
    """Rows by kind or kind_name."""
    rows = []
    for row, median in medians.items():
        kind, _, rest = row.partition("_")
        names = {"fused": heads.FUSED, "graph": f"{heads.FUSED} in a CUDA graph", "copy": heads.COPY}
        rows.append({"name": names.get(rest, rest or kind), "kind": kind, "total": {"median": median}})
    return {"name": name, "rows": rows}


def verdicts(folder: Path) -> set[tuple[str, str, str]]:
    """(file of results, case, verdict)"""
    return {tuple(cell.strip() for cell in line.strip("|").split("|"))[1:] for line in gpu_goals.goals_met(folder)}


def test_goals_are_read_from_the_rows_they_are_about(tmp_path):
    large = {
        "reference": 9.0,
        "peer_tuned": 8.0,
        "peer_compiled": 3.0,
        "peer_compiled2": 2.4,
        "ours_logits": 4.0,
        "ours_fused": 1.25,
    }
    cases = [
        measured("bandwidth/64M", reference=5.0, ours_in=1.02, ours_out=1.25, yardstick=1.0),
        measured("heads/65536x1024_10+2", **large, yardstick_copy=1.0, yardstick_product=0.1),
        measured("heads/65536x1024_31+2", reference=9.0, ours_fused=2.0, yardstick_copy=1.0),
        measured("heads/128x256_10+2", reference=9.0, ours_fused=2.0, ours_graph=1.0),
        measured("heads_launches/128x256_10+2", reference=40, ours_logits=20, ours_fused=4),
        measured("grl_linear/4096x1024", reference=3.0, peer=1.0, ours=1.005),
    ]
    (tmp_path / "goals-float32.json").write_text(json.dumps({"environment": {"dtype": "float32"}, "cases": cases}))
    found = verdicts(tmp_path)
    for case, verdict in (
        ("bandwidth/64M", "80.0 % of the copy's bandwidth, out: **missed**"),
        ("heads/65536x1024_10+2", "1.25 copies: met"),
        ("heads/65536x1024_10+2", "7.2 times: met"),
        ("heads/65536x1024_10+2", "1.9 times compiled2: **missed**"),
        ("heads/65536x1024_31+2", "not measured: no row compiled"),
        ("heads/128x256_10+2", "4.5 times, 9.0 in a CUDA graph: **missed**"),
        ("heads_launches/128x256_10+2", "4 launches: met"),
        ("grl_linear/4096x1024", "1.005 of nn.Linear: met"),
    ):
        assert ("goals-float32", case, verdict) in found
    assert ("bfloat16", "-", "not measured") in found
    assert not any(
        case == "heads/65536x1024_31+2" and "copies" in verdict for _, case, verdict in found
    )  # wider than the goal


@pytest.mark.parametrize("code, status", [("pass", 0), ("raise SystemExit(1)", 1)])
def test_a_dry_run_writes_two_files_that_name_every_goal(monkeypatch, tmp_path, code, status):
    planned = [gpu.Part("one", [job("pass")], 60), gpu.Part("two", [job("pass", dry=code), job("pass")], 60)]
    monkeypatch.setattr(gpu, "parts", lambda *_: planned)
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == status
    assert sorted(path.name for path in tmp_path.iterdir()) == ["details.tar.gz", "summary.md"]
    summary = (tmp_path / "summary.md").read_text()
    assert f"| two | {2 - status} of 2 |" in summary
    assert all(f"| {goal.text} | {goal.dtype} | - | not measured |" in summary for goal in gpu_goals.GOALS)
    with tarfile.open(tmp_path / "details.tar.gz") as archive:
        assert "details/a-job.log" in archive.getnames()


def test_every_goal_has_cases(tmp_path):
    for dtype in gpu_goals.DTYPES:
        cases = gpu.cases_of(dtype)["goals"]
        for goal in gpu_goals.GOALS:
            assert goal.dtype != dtype or any(re.match(goal.case, case) for case in cases), goal.text


def test_the_two_calls_cover_all_parts_but_the_rest(tmp_path):
    names = {part.name for part in gpu.parts(["first", "second"], tmp_path, "9.0", dry=False)}
    assert names == set(gpu.FIRST + gpu.SECOND)
    jobs = [one for part in gpu.parts(["build", "all"], tmp_path, "9.0", dry=False) for one in part.jobs]
    assert len({one.name for one in jobs}) == len(jobs), "two jobs would write the same log"
    files = {word for one in jobs for word in one.command if word.startswith("tests/") and "/test_" in word}
    assert files == {str(path.relative_to(gpu.ROOT)) for f in gpu.TESTED for path in (gpu.ROOT / f).glob("test_*.py")}
    for dtype in gpu_goals.DTYPES:
        planned = {case for cases in gpu.cases_of(dtype).values() for case in cases}
        measured = {word for one in jobs if dtype in one.command for word in one.command}
        assert planned <= measured


def test_no_job_sets_the_clocks(tmp_path):
    for part in gpu.parts(["counters"], tmp_path, "9.0", dry=False):
        for one in part.jobs:
            assert one.command[one.command.index("--clock-control") + 1] == "none"


def test_the_command_finds_the_tree_from_any_folder_without_pythonpath(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, gpu.__file__, "--help"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)


def test_an_unknown_part_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="unknown part goalz; there are first, second, all, build, kernels"):
        gpu.parts(["goalz"], tmp_path, "9.0", dry=True)
