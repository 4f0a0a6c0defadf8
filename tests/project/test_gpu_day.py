"""bench/gpu.py: what it does with parts that fail, hang or lack a tool, and how it reads the goals out of what was
measured."""

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import compare  # noqa: E402
import gpu  # noqa: E402
import heads  # noqa: E402

pytestmark = pytest.mark.once


def part(code: str, limit: int = 60, needs: str = "") -> gpu.Part:
    return gpu.Part("a part", gpu.python("-c", code), gpu.python("-c", "pass"), limit, needs)


@pytest.mark.parametrize(
    "planned, state, note",
    [
        (part("print('fine')"), "passed", ""),
        (part("raise SystemExit(3)"), "failed", "exit status 3, see a-part.log"),
        (part("import time; time.sleep(60)", limit=1), "ran out of time", "see a-part.log"),
        (part("pass", needs="no-such-tool"), "not run", "no-such-tool is not on the PATH"),
    ],
)
def test_a_part_ends_in_its_state(tmp_path, planned, state, note):
    outcome = gpu.run(planned, tmp_path, seconds=100, dry=False)
    assert (outcome.state, outcome.note) == (state, note)


def test_nothing_is_started_when_the_time_is_up(tmp_path):
    assert gpu.run(part("pass"), tmp_path, seconds=5, dry=False).note == "no time left"


def test_the_log_holds_the_command_and_what_it_said(tmp_path):
    gpu.run(part("print('fine')"), tmp_path, seconds=100, dry=False)
    assert (tmp_path / "a-part.log").read_text().splitlines() == [" ".join(part("print('fine')").command), "fine"]


def a_part_checked_by(check) -> gpu.Part:
    return gpu.Part("a part", gpu.python("-c", "pass"), check, 60)


def test_a_check_in_this_process_ends_in_its_state(tmp_path):
    def leave():
        raise SystemExit("there is no such case")

    for check, state in ((lambda: 0, "passed"), (lambda: 1, "failed"), (leave, "failed")):
        assert gpu.run(a_part_checked_by(check), tmp_path, seconds=100, dry=True).state == state
    assert "there is no such case" in (tmp_path / "a-part.log").read_text()


@pytest.mark.parametrize("wrong", [["--cases", "headz"], ["--dtype", "int7"], ["--no-such-option"]])
def test_a_wrong_command_line_of_the_benchmark_is_found(tmp_path, wrong):
    good = gpu.bench_part("some", "float32", tmp_path, 60, ["bandwidth"])
    assert gpu.run(good, tmp_path, seconds=100, dry=True).state == "passed"
    bad = a_part_checked_by(lambda: compare.main([*good.command[2:], *wrong, "--list"]))
    assert gpu.run(bad, tmp_path, seconds=100, dry=True).state == "failed"


def measured(name: str, **medians: float) -> dict:
    """Rows by kind or kind_name."""
    rows = []
    for row, median in medians.items():
        kind, _, rest = row.partition("_")
        names = {"fused": heads.FUSED, "graph": f"{heads.FUSED} in a CUDA graph", "copy": heads.COPY}
        rows.append({"name": names.get(rest, rest or kind), "kind": kind, "total": {"median": median}})
    return {"name": name, "rows": rows}


def verdicts(folder: Path) -> set[tuple[str, str, str]]:
    """(dtype, case, verdict)"""
    return {tuple(cell.strip() for cell in line.strip("|").split("|"))[1:] for line in gpu.goals_met(folder)}


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
    (tmp_path / "some.json").write_text(json.dumps({"environment": {"dtype": "float32"}, "cases": cases}))
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
        assert ("float32", case, verdict) in found
    assert ("bfloat16", "-", "not measured") in found
    assert not any(
        case == "heads/65536x1024_31+2" and "copies" in verdict for _, case, verdict in found
    )  # wider than the goal


@pytest.mark.parametrize("check, status", [(lambda: 0, 0), (lambda: 1, 1)])
def test_a_dry_run_fails_if_a_command_line_is_wrong_and_names_every_goal(monkeypatch, tmp_path, check, status):
    monkeypatch.setattr(
        gpu, "parts", lambda folder, capability: [a_part_checked_by(lambda: 0), a_part_checked_by(check)]
    )
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == status
    summary = (tmp_path / "summary.md").read_text()
    assert all(f"| {goal.text} | {goal.dtype} | - | not measured |" in summary for goal in gpu.GOALS)


def test_every_goal_has_cases_and_all_are_measured_first(tmp_path):
    for dtype in gpu.DTYPES:
        cases = gpu.cases_of(dtype)["goals"]
        for goal in gpu.GOALS:
            assert goal.dtype != dtype or any(re.match(goal.case, case) for case in cases), goal.text
    names = [p.name for p in gpu.parts(tmp_path, "9.0")]
    assert names.index("bench goals bfloat16") < names.index("all tests")


def test_every_part_has_a_command_line_that_can_be_checked(tmp_path):
    parts = gpu.parts(tmp_path, "9.0")
    names = [p.name for p in parts]
    assert len(set(names)) == len(names)
    assert names[0] == "build"
    for wanted in (
        "graphs, streams, sizes",
        "all tests",
        *(f"sanitizer {tool}" for tool in gpu.SANITIZER_TOOLS),
        "profiler counters",
    ):
        assert wanted in names
    for dtype in gpu.DTYPES:
        planned = [case for cases in gpu.cases_of(dtype).values() for case in cases]
        commands = [p.command for p in parts if p.name.startswith("bench") and p.name.endswith(dtype)]
        assert sorted(planned) == sorted(word for command in commands for word in command if word in planned)
