"""What nvcc makes of the kernels gives what the plain loops say. No GPU: the PTX is run by the interpreter here, under
the test programs of tests/cuda_on_cpu."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from ptx.compiled import ELEMENTS, IN_CUDA_CHECK, interpret, ptx_of
from ptx.module import read_module

pytestmark = IN_CUDA_CHECK


class Outcome(NamedTuple):
    status: int
    barriers: dict[str, list[int]]  # of each kernel that ran, those it came to
    said: str


def run(program: str, ptx: Path, case: str) -> Outcome:
    done = interpret(program, ptx, "--races", case)
    lines = done.stdout.splitlines()
    barriers = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return Outcome(done.returncode, barriers, done.stdout[-3000:] + done.stderr[-3000:])


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_kernel_equals_the_loops(element):
    ptx = ptx_of(element)
    outcomes = [run(program, ptx, f"compiled_{element}") for program in ("heads_test", "scale_test")]
    if element in ("half", "bfloat16"):
        outcomes.append(run("heads_test", ptx, f"compiled_{element}_on_matrix_units"))
    for outcome in outcomes:
        assert outcome.status == 0, outcome.said
    ran = {name for outcome in outcomes for name in outcome.barriers}
    assert ran == set(read_module(ptx.read_text())), "kernels that no case reaches"


def test_a_bad_target_fails_the_assertion():
    outcome = run("heads_test", ptx_of("float"), "bad_target")
    assert outcome.status != 0
    assert "a target is neither a class of its head nor ignore_index" in outcome.said


# ---------------------------------------------------------------------------------------------------------------------
# Planted faults: what would be the use of all that, if it did not notice?
# ---------------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A kernel in its PTX."""

    module: str
    begin: int
    end: int

    @property
    def body(self) -> str:
        return self.module[self.begin : self.end]

    def with_text(self, begin: int, end: int, text: str) -> str:
        """The module, after a change in this kernel."""
        body = self.body
        return self.module[: self.begin] + body[:begin] + text + body[end:] + self.module[self.end :]


CASE = "several_tiles"


@pytest.fixture(scope="module")
def sweep() -> tuple[Entry, list[int]]:
    """Of the kernels that the case runs, the one with the most barriers, and which of them it comes to."""
    ptx = ptx_of("float")
    outcome = run("heads_test", ptx, CASE)
    assert outcome.status == 0, outcome.said
    name, barriers = max(outcome.barriers.items(), key=lambda item: len(item[1]))
    text = ptx.read_text()
    begin = text.index(f".entry {name}(")
    return Entry(text, begin, text.index("\n}\n", begin)), barriers


def is_noticed(module: str, folder: Path) -> bool:
    changed = folder / "changed.ptx"
    changed.write_text(module)
    return run("heads_test", changed, CASE).status != 0


def test_a_weaker_wait_for_copies_is_noticed(sweep, tmp_path):
    entry, _ = sweep
    waits = list(re.finditer(r"cp\.async\.wait_group\s+(\d+)", entry.body))
    assert waits
    # A wait stands in each of the ways through the kernel, of which the case takes one.
    assert any(is_noticed(entry.with_text(*wait.span(1), str(int(wait[1]) + 1)), tmp_path) for wait in waits)


def test_a_missing_barrier_is_noticed(sweep, tmp_path):
    entry, met = sweep
    barriers = list(re.finditer(r"\n\s*bar(?:rier)?\.sync[^;]*;", entry.body))
    assert len(met) >= 6
    noticed = [number for number in met if is_noticed(entry.with_text(*barriers[number].span(), ""), tmp_path)]
    # Two may stand where in this case nothing is written between them.
    assert len(noticed) >= len(met) - 2, (met, noticed)
