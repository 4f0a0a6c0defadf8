"""Runs the matrix's cells: in this process, and by `start_pure_python` in one that runs this file as a script."""

import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from matrix import rows_autograd, rows_extras, rows_graphs, rows_processes, rows_training  # noqa: E402, F401
from matrix.networks import COMMON  # noqa: E402
from matrix.rows import IN_TWO_PROCESSES, ROWS, outcome  # noqa: E402
from pure_python import copy_package  # noqa: E402
from two_processes import TwoProcesses  # noqa: E402

from grl_ext import _backend  # noqa: E402


def path_here() -> str:
    return "fallback" if _backend.C is None else "compiled"


def cells() -> list[tuple[str, str]]:
    """Of this process. The common layer does not depend on the path: it is tried on the compiled one."""
    path, every = path_here(), os.environ.get("GRL_EXT_MATRIX") == "all"
    names = [name for name, row in ROWS.items() if every or path not in row.heavy]
    return [(name, column) for name in names for column in ROWS[name].columns if column != COMMON or path == "compiled"]


def start_pure_python(folder: Path) -> tuple[subprocess.Popen, Path]:
    """This script in a process that has no compiled extension at all, and the file that it writes."""
    file = folder / "outcomes.json"
    command = [sys.executable, str(Path(__file__)), str(file)]
    environment = copy_package(folder)
    with file.with_suffix(".stderr").open("w") as stderr:
        return subprocess.Popen(command, env=environment, cwd=folder, stderr=stderr), file


class Runner:
    """Starts the two processes when they are first needed."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.processes: TwoProcesses | None = None
        self.started = 0

    def outcome(self, name: str, column: str) -> str:
        torch.manual_seed(0)
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if ROWS[name].where == IN_TWO_PROCESSES:
                return self._in_two_processes(name, column)
            return outcome(ROWS[name], column, path_here())

    def _in_two_processes(self, name: str, column: str) -> str:
        if self.processes is None or not self.processes.alive:
            self.started += 1
            folder = Path(self.folder.name) / str(self.started)
            folder.mkdir()
            self.processes = TwoProcesses(folder)
        file = Path(self.folder.name) / "outcome"
        self.processes.run(path_here(), in_both, name, column, str(file))
        found = {file.with_suffix(f".{rank}").read_text() for rank in range(2)}
        assert len(found) == 1, found
        return found.pop()

    def close(self) -> None:
        codes = self.processes.close() if self.processes is not None and self.processes.alive else [0, 0]
        self.folder.cleanup()
        assert codes == [0, 0], codes


def in_both(rank: int, name: str, column: str, file: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = outcome(ROWS[name], column, path_here())
    Path(file).with_suffix(f".{rank}").write_text(found)


def outcomes() -> dict[str, dict[str, str]]:
    """Of all cells; what fails is "FAILED" and why."""
    runner = Runner()
    found: dict[str, dict[str, str]] = {}
    for name, column in cells():
        try:
            cell = runner.outcome(name, column)
        except Exception:
            cell = "FAILED: " + traceback.format_exc()
        found.setdefault(name, {})[column] = cell
    runner.close()
    return found


if __name__ == "__main__":
    assert path_here() == "fallback"
    Path(sys.argv[1]).write_text(json.dumps(outcomes()))
