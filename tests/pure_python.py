"""The package as an installation without its compiled extension, for processes of their own."""

import os
import shutil
from pathlib import Path

import grl_ext


def copy_package(folder: Path) -> dict[str, str]:
    """Into the folder. Returns the environment of a process that imports it from there."""
    shutil.copytree(
        Path(grl_ext.__file__).parent, folder / "grl_ext", ignore=shutil.ignore_patterns("__pycache__", "_C_torch*")
    )
    environment = {name: value for name, value in os.environ.items() if name != "GRL_EXT_REQUIRE_COMPILED"}
    # Nor what Inductor has made of operators of the same names here.
    return {**environment, "PYTHONPATH": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
