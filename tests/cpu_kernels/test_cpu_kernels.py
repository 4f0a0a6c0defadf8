"""The CPU kernels' tables, without PyTorch, for each compiler and processor that this machine has tools for: see
table_test.cpp."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ISA = HERE.parents[1] / "csrc" / "cpu" / "isa"

pytestmark = pytest.mark.once


def first_installed(*names: str) -> str | None:
    return next((path for path in map(shutil.which, names) if path), None)


@dataclass(frozen=True)
class Target:
    """A compiler, and what runs its programs here."""

    compilers: Sequence[str]
    flags: Sequence[str] = ()
    emulators: Sequence[str] = ()

    def tools(self) -> tuple[str, list[str]]:
        compiler = first_installed(*self.compilers)
        if compiler is None:
            pytest.skip(f"{self.compilers[0]} is not installed")
        if not self.emulators:
            return compiler, []
        emulator = first_installed(*self.emulators)
        if emulator is None:
            pytest.skip(f"{self.emulators[0]} is not installed")
        return compiler, [emulator]


CLANG = ("clang++", *(f"clang++-{version}" for version in range(30, 13, -1)))
TARGETS = {
    "gcc": Target(("g++",)),
    "clang": Target(CLANG),
    "aarch64": Target(
        ("aarch64-linux-gnu-g++",), flags=("-static",), emulators=("qemu-aarch64", "qemu-aarch64-static")
    ),
}


def compile_with(compiler: str, *arguments: str | Path) -> None:
    options = ["-std=c++20", "-O2", "-fwrapv", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]
    compiled = subprocess.run([compiler, *options, *map(str, arguments)], capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr[:3000]


@pytest.fixture(scope="module", params=TARGETS)
def program(request, tmp_path_factory) -> list[str]:
    """The command that runs the tables' test."""
    target = TARGETS[request.param]
    compiler, emulator = target.tools()
    binary = tmp_path_factory.mktemp(request.param) / "table_test"
    compile_with(compiler, *target.flags, HERE / "table_test.cpp", *sorted(ISA.glob("*.cpp")), "-o", binary)
    return [*emulator, str(binary)]


@pytest.mark.parametrize("what", ["logits", "gradients", "halves", "scale"])
def test_every_table_equals_the_loops(program, what):
    result = subprocess.run([*program, what], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the tables are x86-64's")
@pytest.mark.parametrize("isa, register", [("avx2", "ymm"), ("avx512", "zmm")])
@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_a_table_is_compiled_for_what_it_is_named_after(tmp_path, name, isa, register):
    """Fused multiply-adds work on whole registers. A compiler that did not know the pragma would make SSE2 code."""
    compiler, _ = TARGETS[name].tools()
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    compile_with(compiler, "-c", ISA / f"{isa}.cpp", "-o", tmp_path / "table.o")
    code = subprocess.run(["objdump", "-d", tmp_path / "table.o"], capture_output=True, text=True, check=True).stdout
    fused = re.findall(r"\bvfn?m(?:add|sub)\d+p[sd] .*", code)
    assert len(fused) > 1000
    assert sum(f"%{register}" in line for line in fused) > 0.9 * len(fused)
