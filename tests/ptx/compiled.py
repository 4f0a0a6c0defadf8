"""What the tests here run: the PTX of the kernels, under the test programs as libraries."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from built import BUILD, built

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "csrc" / "cuda"
PROGRAMS = ROOT / "tests" / "cuda_on_cpu"
IN_CUDA_CHECK = [
    pytest.mark.core,
    pytest.mark.skipif(
        os.environ.get("GRL_EXT_REQUIRE_CUDA_CODE") != "1",
        reason="GRL_EXT_REQUIRE_CUDA_CODE=1 is not set: `make cuda-check` runs these minutes of nvcc and interpreter",
    ),
]
ELEMENTS = {"half": "__half", "bfloat16": "__nv_bfloat16", "float": "float", "double": "double"}


def find_nvcc() -> Path | None:
    """That of the toolkit which the extension is built with, or else the one on the PATH."""
    sys.path.append(str(ROOT))  # last, so that other tests still import what is installed
    import build_backend

    torch = build_backend.find_torch()
    toolkit = build_backend.find_toolkit(torch)[0] if torch and torch.cuda else None
    if toolkit:
        return toolkit / "bin" / "nvcc"
    on_path = shutil.which("nvcc")
    return Path(on_path) if on_path else None


def require(tool: Path | str | None, name: str) -> str:
    if not tool:
        reason = f"needs {name}, which is not installed"
        pytest.fail(reason) if os.environ.get("GRL_EXT_REQUIRE_CUDA_CODE") == "1" else pytest.skip(reason)
    return str(tool)


def ptx_of(element: str) -> Path:
    """The PTX of every kernel for this element type."""
    nvcc = require(find_nvcc(), "nvcc")
    command = [nvcc, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-arch=sm_80", f"-I{KERNELS}"]
    headers = Path(nvcc).resolve().parents[1] / "include"
    command += [f"-I{headers}"] if (headers / "cuda_runtime.h").exists() else []
    command += [f"-DELEMENT={ELEMENTS[element]}", "--ptx", str(HERE / "kernels.cu"), "-o"]
    sources = [HERE / "kernels.cu", *KERNELS.rglob("*.cuh"), *KERNELS.rglob("*.h")]
    return built(BUILD / "ptx" / f"{element}.ptx", sources, command)


def library_of(program: str) -> Path:
    """A test program of tests/cuda_on_cpu."""
    compiler = require(shutil.which("g++"), "g++")
    command = [compiler, "-std=c++17", "-O1", "-w", "-pthread", "-shared", "-fPIC", f"-I{PROGRAMS / 'include'}"]
    command += [f"-I{KERNELS}", str(PROGRAMS / f"{program}.cpp"), "-ldl", "-o"]
    folders = (PROGRAMS, KERNELS)
    sources = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".cpp", ".h", ".cuh")]
    return built(BUILD / "ptx" / f"{program}.so", sources, command)


def interpret(program: str, ptx: Path, option: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The test program, its kernels run from this PTX (program.py), in a process of its own, which a wild access may
    end."""
    command = [sys.executable, "-m", "ptx.program", option, library_of(program), ptx, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
