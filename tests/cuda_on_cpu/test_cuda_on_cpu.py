"""The CUDA kernels (csrc/cuda/*.cuh), run on the CPU under sanitizers: see cuda_on_cpu/cuda_emulation.h."""

import shutil
import subprocess
from pathlib import Path

import pytest
from built import BUILD, built

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "csrc" / "cuda"
SUFFIXES = (".cpp", ".h", ".cuh")

pytestmark = [pytest.mark.once, pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")]


@pytest.fixture(scope="module")
def program():
    """program(source, sanitizers) -> the compiled test driver's path, C++17 being what nvcc gets."""
    read = [path for folder in (HERE, KERNELS.parent) for path in folder.rglob("*") if path.suffix in SUFFIXES]

    def build(source: str, sanitizers: str, standard: str = "c++17") -> Path:
        command = ["g++", f"-std={standard}", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        command += ["-pthread", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
        command += [f"-I{HERE / 'include'}", f"-I{KERNELS}", str(HERE / f"{source}.cpp"), "-o"]
        return built(BUILD / "cuda_on_cpu" / f"{source}-{sanitizers}-{standard}", read, command)

    return build


def run(binary: Path, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [binary, *args], capture_output=True, text=True, timeout=900
    )  # on a busy machine; alone a minute at most


def assert_passes(result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[:6000]


def test_scale_equals_the_loop(program):
    assert_passes(run(program("scale_test", "address,undefined", "c++20")))


def test_a_list_of_gradients_is_scaled_in_one_launch(program):
    assert_passes(run(program("scale_test", "address,undefined", "c++20"), "lists"))


CASES = ["half", "bfloat16", "float", "double", "plan", "launches", "small", "rows_share_warps", "device_code"]
CASES_OF_RACES = ["races", "races_of_double", "races_of_bfloat16"]
ON_MATRIX_UNITS = "_on_matrix_units"


@pytest.mark.parametrize("case", [*CASES, *(case + ON_MATRIX_UNITS for case in ("half", "bfloat16", "launches"))])
def test_heads_equal_the_loops(program, case):
    assert_passes(run(program("heads_test", "address,undefined"), case))


@pytest.mark.parametrize("case", [*CASES_OF_RACES, *(f"races_of_{t}{ON_MATRIX_UNITS}" for t in ("half", "bfloat16"))])
def test_heads_have_no_races(program, case):
    assert_passes(run(program("heads_test", "thread"), case))


def test_heads_refuse_a_target_that_is_no_class(program):
    result = run(program("heads_test", "address,undefined"), "bad_target")
    assert result.returncode != 0
    assert "a target is neither a class of its head nor ignore_index" in result.stderr


RIGHT = [
    "reductions",
    "shuffle_lanes",
    "async_copies",
    "last_block",
    "limits",
    "static_shared_memory",
    "many_host_threads",
    "half_types",
    "barrier",
    "warp_barrier",
]


@pytest.mark.parametrize("case", RIGHT)
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_emulation_runs_right_kernels(program, sanitizers, case):
    assert_passes(run(program("emulation_test", sanitizers), case))


@pytest.mark.parametrize(
    "sanitizers, case, message",
    [
        ("thread", "missing_barrier", "ThreadSanitizer: data race"),
        ("thread", "missing_warp_barrier", "ThreadSanitizer: data race"),
        ("thread", "racing_blocks", "ThreadSanitizer: data race"),
        ("address,undefined", "past_shared", "AddressSanitizer: heap-buffer-overflow"),
        ("address,undefined", "misaligned", "misaligned address"),
        ("address,undefined", "early_return", "24 of 64 have returned"),
        ("address,undefined", "two_barriers", "threads meet in different calls"),
        ("address,undefined", "not_in_mask", "lane 8 of 32 calls __ballot_sync with the mask 0xff"),
    ],
)
def test_emulation_finds_planted_errors(program, sanitizers, case, message):
    result = run(program("emulation_test", sanitizers), case)
    assert result.returncode != 0
    assert message in result.stderr
