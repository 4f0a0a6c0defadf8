"""The tests of graphs again in a process that has no compiled extension at all: there the operators in a graph are Python's."""

import subprocess
import sys
from pathlib import Path

from pure_python import copy_package

TESTS = Path(__file__).parent


def test_graphs_stay_reversed_where_nothing_is_compiled(tmp_path):
    kinds = "exported or decompositions or a_trace or a_script_is_reversed or compiled_autograd_of"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"fallback and ({kinds})", "test_graphs.py"]
    result = subprocess.run(command, env=copy_package(tmp_path), cwd=TESTS, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout and "failed" not in result.stdout
