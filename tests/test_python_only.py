"""The tests of graphs again in a process that has no compiled extension at all: there the operators in a graph are Python's."""

import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import grl_ext

TESTS = Path(__file__).parent


def test_graphs_stay_reversed_where_nothing_is_compiled(tmp_path):
    extensions = (f"_C{suffix}" for suffix in EXTENSION_SUFFIXES)
    shutil.copytree(Path(grl_ext.__file__).parent, tmp_path / "grl_ext", ignore=shutil.ignore_patterns("__pycache__", *extensions))
    environment = {name: value for name, value in os.environ.items() if name != "GRL_EXT_REQUIRE_COMPILED"}
    kinds = "exported or decompositions or a_trace or a_script_is_reversed or compiled_autograd_of"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"fallback and ({kinds})", "test_graphs.py"]
    result = subprocess.run(
        command, env={**environment, "PYTHONPATH": str(tmp_path)}, cwd=TESTS, capture_output=True, text=True, timeout=1200
    )
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout and "failed" not in result.stdout
