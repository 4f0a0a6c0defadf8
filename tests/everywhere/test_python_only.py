"""The tests of graphs again in a process that has no compiled extension at all: there the operators in a graph are
Python's."""

import subprocess
import sys
from pathlib import Path

from pure_python import copy_package

TESTS = Path(__file__).parent
KINDS = ("exported", "decompositions", "a_trace", "a_script_is_reversed", "compiled_autograd_of")


def test_graphs_stay_reversed_where_nothing_is_compiled(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        "-k",
        f"fallback and ({' or '.join(KINDS)})",
        "test_graphs.py",
    ]
    result = subprocess.run(
        command, env=copy_package(tmp_path), cwd=TESTS, capture_output=True, text=True, timeout=1200
    )
    assert result.returncode == 0, result.stdout
    passed = [line for line in result.stdout.splitlines() if " PASSED" in line]
    for kind in KINDS:
        assert any(kind in line for line in passed), f"no test of {kind} has run:\n{result.stdout}"
