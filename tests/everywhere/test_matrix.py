"""Every set-up of PyTorch times every operation, on both paths: values and gradients are those of plain PyTorch, and
the tables in `docs/works-with.md` say what the tests give. `tests/matrix/` holds the rows, the columns and what writes
the tables."""

import json

import pytest
import torch
from matrix import table
from matrix.networks import COMMON, LAYER
from matrix.rows import ROWS, outcome
from matrix.rows_autograd import FUNC
from matrix.rows_graphs import COMPILE, EXPORT, OTHER
from matrix.rows_processes import PROCESSES
from matrix.run import Runner, cells, path_here, start_pure_python

TORCH, WRITTEN = table.read()
HOW = "python tests/matrix/write.py writes the tables again"
AS_WRITTEN = torch.__version__.partition("+")[0] == TORCH
VARYING = (COMPILE, EXPORT, OTHER, FUNC, PROCESSES)  # the set-ups that may differ between versions of torch

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no torch.distributed with gloo",
)


@pytest.fixture(scope="module")
def runner():
    runner = Runner()
    yield runner
    runner.close()


def cell(name: str, column: str):
    return pytest.param(name, column, marks=pytest.mark.core if ROWS[name].group in VARYING else pytest.mark.once)


@pytest.mark.parametrize("name, column", [cell(*of) for of in cells() if AS_WRITTEN or of[1] != COMMON])
def test_a_cell_gives_what_the_table_says(compiled, runner, name, column):
    found = runner.outcome(name, column)  # raises for anything but the right gradients and documented refusals
    assert found == WRITTEN[name][column]["compiled"] or not AS_WRITTEN, HOW


def test_a_missing_reversal_is_found(monkeypatch):
    monkeypatch.setattr("matrix.networks.gradient_reversal", lambda x, lambda_: x)
    with pytest.raises(AssertionError, match="not close"):
        outcome(ROWS["forward and backward"], LAYER, path_here())


def test_an_error_that_no_row_declares_is_no_refusal(monkeypatch):
    def broken(x, lambda_):
        raise RuntimeError("broken")

    monkeypatch.setattr("matrix.networks.gradient_reversal", broken)
    with pytest.raises(RuntimeError, match="^broken$"):
        outcome(ROWS["forward and backward"], LAYER, path_here())


@pytest.mark.once
def test_the_cells_where_nothing_is_compiled_give_what_the_table_says(tmp_path):
    process, file = start_pure_python(tmp_path)
    try:
        assert process.wait(1200) == 0, file.with_suffix(".stderr").read_text()[-2000:]
    finally:
        process.kill()
    found = json.loads(file.read_text())
    failed = {
        f"{name} | {column}": cell
        for name, of in found.items()
        for column, cell in of.items()
        if cell.startswith("FAILED")
    }
    assert not failed, "\n".join(f"{cell}: {why}" for cell, why in failed.items())
    differs = [
        f"{name} | {column}: {cell}"
        for name, of in found.items()
        for column, cell in of.items()
        if cell != WRITTEN[name][column]["fallback"]
    ]
    assert found and not differs, (HOW, differs)


def test_the_page_is_written_from_the_outcomes():
    assert WRITTEN.keys() == ROWS.keys(), HOW
    assert table.PAGE.read_text() == table.page(WRITTEN, TORCH), HOW
