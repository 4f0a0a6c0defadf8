"""bench/gpu.py: what it does with parts that fail, hang or lack a tool, and how it reads the goals out of what was measured."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import gpu  # noqa: E402


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


def measured(name: str, **medians: float) -> dict:
    return {"name": name, "rows": [{"kind": kind.split("_")[0], "total": {"median": median}} for kind, median in medians.items()]}


def test_goals_are_read_from_the_slowest_of_ours_and_the_fastest_of_the_others(tmp_path):
    cases = [
        measured("bandwidth/64M", naive=5.0, ours_in=1.02, ours_out=1.2, limit=1.0),
        measured("heads/65536x1024_10+2", naive_a=9.0, naive_b=8.0, ours=1.25, limit=1.0),
        measured("grl_linear/4096x1024", naive=3.0, peer=1.0, ours=1.005),
    ]
    (tmp_path / "some.json").write_text(json.dumps({"environment": {"dtype": "float32"}, "cases": cases}))
    lines = {tuple(cell.strip() for cell in line.strip("|").split("|")) for line in gpu.goals_met(tmp_path)}
    found = {(dtype, case, verdict) for _, dtype, case, verdict in lines}
    assert ("float32", "bandwidth/64M", "1.20 of a copy: **missed**") in found
    assert ("float32", "heads/65536x1024_10+2", "1.25 of a copy: met") in found
    assert ("float32", "heads/65536x1024_10+2", "6.4 times naive: met") in found
    assert ("float32", "grl_linear/4096x1024", "1.005 of nn.Linear: met") in found
    assert ("bfloat16", "-", "not measured") in found


def test_every_part_has_a_command_line_that_can_be_checked(tmp_path):
    parts = gpu.parts(tmp_path, "9.0")
    names = [p.name for p in parts]
    assert len(set(names)) == len(names)
    assert names[0] == "build"
    for wanted in ("graphs, streams, sizes", "all tests", *(f"sanitizer {tool}" for tool in gpu.SANITIZER_TOOLS), "profiler counters"):
        assert wanted in names
    for dtype in gpu.DTYPES:
        assert f"bench bandwidth {dtype}" in names and f"bench grl_linear {dtype}" in names
        assert any(name.startswith("bench heads") and name.endswith(dtype) for name in names)
