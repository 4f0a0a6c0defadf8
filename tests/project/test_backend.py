"""Which implementation a process gets, and that every instruction set computes the same bits.

Each case is a process of its own: what is loaded is decided by `import grl_ext`, once.
"""

import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from pure_python import copy_package

import grl_ext
from grl_ext import __main__, _backend, _paths

pytestmark = pytest.mark.core

PACKAGE = Path(grl_ext.__file__).parent
NAME = "_C_torch{}_{}".format(*_backend.release(torch.__version__))

# Warnings go to stdout, one a line, so that all that a process says is in one place and in order.
# An editable install would find its own extension for a copy of the package that has none.
PRELUDE = """
import sys, warnings
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
warnings.simplefilter("always")

def show(message, category, *_):
    if "grl_ext" in str(message):
        print(f"{category.__name__}: {message}")

warnings.showwarning = show
"""

USE = """
import torch, grl_ext
from grl_ext import _backend
x = torch.ones(3, requires_grad=True)
layer = grl_ext.GRL(0.5)
layer(x).sum().backward()
print("compiled" if _backend.C else "fallback", x.grad.tolist())
"""


def run(code: str, package: Path = PACKAGE, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(package.parent), **environment}
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code], env=environment, capture_output=True, text=True, cwd=package.parent
    )


@pytest.fixture
def package_without_extension(tmp_path) -> Path:
    copy_package(tmp_path)
    return tmp_path / "grl_ext"


def test_the_compiled_extension_is_used_without_a_word(compiled):
    assert run(USE).stdout.splitlines() == ["compiled [-0.5, -0.5, -0.5]"]


def test_without_an_extension_the_fallback_works_without_a_word(package_without_extension):
    result = run(USE, package_without_extension)
    assert (result.stdout.splitlines(), result.stderr) == (["fallback [-0.5, -0.5, -0.5]"], "")


def test_an_extension_that_does_not_load_gives_one_warning_and_the_fallback_works(package_without_extension):
    file = f"{NAME}{EXTENSION_SUFFIXES[0]}"
    (package_without_extension / file).write_bytes(b"not a library")
    result = run(USE, package_without_extension)
    warning, outcome = result.stdout.splitlines()
    assert outcome == "fallback [-0.5, -0.5, -0.5]"
    assert warning.startswith(
        "RuntimeWarning: grl_ext runs without its kernels: the compiled extension does not load with torch "
        f"{torch.__version__}: "
    )
    assert file in warning, "the loader's own reason"
    assert warning.endswith("Rebuild it for this torch: pip install --force-reinstall --no-deps --no-cache-dir .")


def test_an_extension_built_for_another_torch_gives_one_warning_and_is_not_loaded(package_without_extension):
    # Its mere loading would crash, or register its operators for graphs.
    (package_without_extension / f"_C_torch1_99{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    warning, outcome = run(USE, package_without_extension).stdout.splitlines()
    assert outcome == "fallback [-0.5, -0.5, -0.5]"
    reason = f"the compiled extension was built for torch 1.99, this is torch {torch.__version__}"
    assert (
        warning.startswith(f"RuntimeWarning: grl_ext runs without its kernels: {reason}. ") and "pip install" in warning
    )


def test_of_several_extensions_the_one_for_this_torch_is_loaded(compiled, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "grl_ext", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "grl_ext" / f"_C_torch1_99{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    assert run(USE, tmp_path / "grl_ext").stdout.splitlines() == ["compiled [-0.5, -0.5, -0.5]"]


def test_a_patch_release_of_torch_is_the_same_torch(compiled, monkeypatch, recwarn):
    major, minor = torch.__version__.split(".")[:2]
    monkeypatch.setattr(torch, "__version__", f"{major}.{minor}.99")
    assert _backend._load() == (compiled, "")
    assert not recwarn.list


@pytest.mark.parametrize(
    "version, said", [("2.8.0+cu128", False), ("2.14.9", False), ("2.15.0", True), ("3.0.0a0+git1234", True)]
)
def test_the_report_says_where_nobody_has_tested(monkeypatch, capsys, version, said):
    monkeypatch.setattr(_backend, "NEWEST_TESTED_TORCH", (2, 14))
    monkeypatch.setattr(torch, "__version__", version)
    __main__.main()
    first = capsys.readouterr().out.splitlines()[0]
    untested = " (not tested; the newest tested torch is 2.14)" if said else ""
    assert first.startswith(f"grl_ext {grl_ext.__version__} on torch {version}{untested}, Python ")


@pytest.mark.parametrize(
    "version, compiler", [("12.2.0", "GCC 12.2.0"), ("Clang 17.0.6", "Clang 17.0.6")], ids=["GCC", "Clang"]
)
def test_the_report_names_the_compiler_and_who_chose_the_instructions(compiled, monkeypatch, capsys, version, compiler):
    info = {**compiled.build_info(), "compiler": version, "cpu_isa": "avx2"}
    monkeypatch.setattr(compiled, "build_info", lambda: info)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.delenv("GRL_EXT_CPU_ISA", raising=False)
    __main__.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith(f", by {compiler}") and lines[1].startswith("compiled:      for torch ")
    assert lines[2] == "CPU kernels:   avx2 (the widest here; GRL_EXT_CPU_ISA can ask for another), 1 thread"
    monkeypatch.setenv("GRL_EXT_CPU_ISA", "avx2")
    __main__.main()
    assert capsys.readouterr().out.splitlines()[2] == "CPU kernels:   avx2 (GRL_EXT_CPU_ISA=avx2), 1 thread"


@pytest.fixture
def two_gpus(compiled, monkeypatch):
    """A build for CUDA on a machine with a GPU that its code serves and an old one that it does not."""
    info = {**compiled.build_info(), "cuda_archs": "7.5;8.0"}
    monkeypatch.setattr(compiled, "build_info", lambda: info)
    monkeypatch.setattr(compiled, "serves_gpu", lambda index: index == 0)
    monkeypatch.setattr(_backend, "kernel_devices", ("cpu", "cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    capabilities = {0: (8, 0), 1: (7, 0), "cuda:1": (7, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.get)


def test_a_gpu_without_code_has_no_kernels_and_the_report_says_so(two_gpus, capsys):
    assert [_backend.has_kernels(torch.device(name)) for name in ("cpu", "cuda:0", "cuda:1", "meta")] == [
        True,
        True,
        False,
        False,
    ]
    __main__.main()
    report = capsys.readouterr().out
    served, old = report.split("cuda:0:\n")[1].split("cuda:1:\n")
    assert "compute capability" not in served and "fused kernels" in served
    reason = "PyTorch operators (nothing compiled for its compute capability, 7.0)"
    assert [line.endswith(reason) for line in old.splitlines()[:2]] == [True, True]


@pytest.mark.parametrize("gpus, said", [(2, "7.5;8.0"), (0, "7.5;8.0 (PyTorch sees no GPU here)")])
def test_the_report_of_a_build_for_cuda_says_where_there_is_no_gpu(two_gpus, monkeypatch, capsys, gpus, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    __main__.main()
    assert f"CUDA kernels:  {said}\n" in capsys.readouterr().out


def test_a_graph_takes_no_operator_on_a_gpu_without_code(compiled, monkeypatch):
    monkeypatch.setattr(_backend, "has_kernels", lambda device: False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not _paths._has_operator(torch.ones(2, 2), ())
    monkeypatch.setattr(_backend, "has_kernels", lambda device: True)
    assert _paths._has_operator(torch.ones(2, 2), ())


# --- instruction sets
# ------------------------------------------------------------------------------------------------------

SCALE = """
import hashlib, torch, grl_ext
from grl_ext import _backend
print(_backend.C.build_info()["cpu_isa"])

def report(name, result):
    print(name, hashlib.sha256(result.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest())

torch.manual_seed(0)
patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
scale = torch.ops.grl_ext._scale
for dtype in (torch.float16, torch.bfloat16):
    for factor in (-0.3, 1.0, 0.0, -65504.0, -6e-8):
        report(f"{dtype}, all patterns, {factor}", scale(patterns.view(dtype), factor, None))
    report(f"{dtype}, all patterns, each", scale(patterns.view(dtype), -1.0, torch.randn(2**16)))
for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128):
    wide = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    for size in (1, 7, 31, 33, 1000):  # none a multiple of every vector
        grad = torch.randn(3, size, dtype=dtype) * torch.logspace(-30, 30, size)
        grad[0, 0] = float("inf")
        grad[1, size // 2] = float("nan")
        report(f"{dtype}, {size}, number", scale(grad, -0.3, None))
        for shape in ((3, 1), (size,), (3, size)):
            report(f"{dtype}, {size}, {shape}", scale(grad, -1.0, torch.randn(shape, dtype=wide)))
"""


def runnable_isas() -> list[str]:
    """From the message that lists them, which is thereby tested too."""
    error = run("import grl_ext", GRL_EXT_CPU_ISA="nonsense").stderr.splitlines()[-1]
    text = "ValueError: GRL_EXT_CPU_ISA is 'nonsense'; this machine runs: "
    assert error.startswith(text)
    return error.removeprefix(text).split(", ")


def test_every_instruction_set_computes_the_same_bits(compiled):
    isas = runnable_isas()
    if len(isas) == 1:
        pytest.skip(f"this machine runs no other instruction set than {isas[0]}")
    assert compiled.build_info()["cpu_isa"] == os.environ.get("GRL_EXT_CPU_ISA", isas[0])
    outputs = {}
    for isa in isas:
        result = run(SCALE, GRL_EXT_CPU_ISA=isa)
        assert result.returncode == 0, result.stderr
        used, *outputs[isa] = result.stdout.splitlines()
        assert used == isa
    assert isas[-1] == "baseline" and len(outputs["baseline"]) > 100
    for isa in isas[:-1]:
        assert outputs[isa] == outputs["baseline"], isa
