"""Every set-up of PyTorch times every operation, on both paths: values and gradients are those of plain PyTorch, and
the tables in `docs/works-with.md` and the README say what the tests give. `tests/matrix/` holds the rows, the columns
and what writes the tables."""

import json

import pytest
import torch
from matrix import table
from matrix.networks import OURS
from matrix.rows import ROWS, outcome
from matrix.run import Runner, cells, path_here, start_pure_python

WRITTEN = table.read()
HOW = "python tests/matrix/write.py writes the tables again"

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="this torch has no torch.distributed with gloo",
    ),
]


@pytest.fixture(scope="module")
def pure_python(tmp_path_factory):
    """The same cells in a process without the extension, beside those here."""
    process, file = start_pure_python(tmp_path_factory.mktemp("pure"))

    def outcomes():
        assert process.wait(1200) == 0, file.with_suffix(".stderr").read_text()[-2000:]
        return json.loads(file.read_text())

    yield outcomes
    process.kill()


@pytest.fixture(scope="module")
def runner(pure_python):
    runner = Runner()
    yield runner
    runner.close()


@pytest.mark.parametrize("name, column", cells())
def test_a_cell_gives_what_the_table_says(compiled, runner, name, column):
    found = runner.outcome(name, column)
    assert found == WRITTEN[name][column]["compiled"], HOW


def test_a_missing_reversal_is_found(monkeypatch):
    monkeypatch.setattr("matrix.networks.gradient_reversal", lambda x, lambda_: x)
    with pytest.raises(AssertionError, match="not close"):
        outcome(ROWS["forward and backward"], OURS[0], path_here())


def test_an_error_that_no_row_declares_is_no_refusal(monkeypatch):
    def broken(x, lambda_):
        raise RuntimeError("broken")

    monkeypatch.setattr("matrix.networks.gradient_reversal", broken)
    with pytest.raises(RuntimeError, match="^broken$"):
        outcome(ROWS["forward and backward"], OURS[0], path_here())


def test_the_cells_where_nothing_is_compiled_give_what_the_table_says(pure_python):
    found = pure_python()
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


def test_the_tables_are_written_from_the_outcomes():
    assert WRITTEN.keys() == ROWS.keys(), HOW
    assert table.PAGE.read_text() == table.page(WRITTEN, json.loads(table.OUTCOMES.read_text())["torch"]), HOW
    readme = table.README.read_text()
    assert readme == table.readme_with(WRITTEN, readme), HOW
