"""What nvcc makes of csrc/cuda: instructions in the PTX, registers and memory in ptxas's report. Needs no GPU.

A kernel may be right and still not be what was written: a 16-byte store split into four, an array that lands in local
memory, more registers than a launch of its size may have. None of that shows in a test of results.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from ptx.compiled import ELEMENTS, ptx_of
from ptx.module import read_module

pytestmark = pytest.mark.core

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHS = ("sm_80", "sm_90")
REGISTERS = 65536  # of a multiprocessor, whose threads of a launched block must all have theirs
PARAMETER_BYTES = 4096  # of a kernel, that every driver takes


class Kernel(NamedTuple):
    threads: int  # of a block, from its launch bounds; 0: it has none
    parameter_bytes: int
    body: list[str]


class Report(NamedTuple):
    registers: int
    shared_bytes: int  # static
    spilled_bytes: int


@pytest.fixture(scope="module")
def nvcc():
    """nvcc's path and options, as the build gives them."""
    sys.path.append(str(SOURCES.parents[1]))  # last, so that other tests' processes still import what is installed
    from torch.utils.cpp_extension import include_paths

    import build_backend

    toolkit, obstacle = None, "a CUDA build of torch"
    if torch.version.cuda is not None:
        toolkit, obstacle = build_backend.find_toolkit(build_backend.Torch(torch.__version__, torch.version.cuda))
    if toolkit is None:
        reason = f"needs a CUDA toolkit and a torch to match: {obstacle}"
        pytest.fail(reason) if os.environ.get("GRL_EXT_REQUIRE_CUDA_CODE") == "1" else pytest.skip(reason)
    standard = "c++20" if build_backend.Torch(torch.__version__, None).release >= (2, 13) else "c++17"
    includes = [f"-I{path}" for path in [*include_paths(), toolkit / "include"]]
    return [str(toolkit / "bin" / "nvcc"), f"-std={standard}", "-O3", "--expt-relaxed-constexpr", *includes]


@pytest.fixture(scope="module")
def compiled_code(nvcc, tmp_path_factory):
    """compiled_code(source, arch) -> (kernels by name from the PTX, reports by name from ptxas), each compiled once."""
    folder = tmp_path_factory.mktemp("cuda_code")
    done = {}

    def compile_once(source: str, arch: str):
        if (source, arch) not in done:
            ptx = folder / f"{source}.{arch}.ptx"
            subprocess.run([*nvcc, f"-arch={arch}", "--ptx", SOURCES / source, "-o", ptx], check=True, timeout=900)
            ptxas = [Path(nvcc[0]).parent / "ptxas", "-O3", "-v", f"-arch={arch}", ptx, "-o", folder / "cubin"]
            report = subprocess.run(ptxas, check=True, capture_output=True, text=True, timeout=900)
            done[source, arch] = kernels_of(ptx.read_text()), reports_of(report.stdout + report.stderr)
        return done[source, arch]

    return compile_once


def kernels_of(ptx: str) -> dict[str, Kernel]:
    found = {}
    for name, parameters, directives, body in re.findall(r"\.entry (\w+)\((.*?)\)\s*([^{]*?)\{\n(.*?)\n\}", ptx, re.S):
        bounds = re.search(r"\.maxntid (\d+)", directives)
        lines = [line.strip() for line in body.splitlines()]
        found[name] = Kernel(int(bounds[1]) if bounds else 0, parameter_bytes_of(parameters), lines)
    return found


def parameter_bytes_of(parameters: str) -> int:
    """From a list such as: .param .u64 a, .param .align 8 .b8 b[4000]."""
    end = 0
    for align, bits, count in re.findall(r"\.param (?:\.align (\d+) )?\.[a-z](\d+) \w+(?:\[(\d+)\])?", parameters):
        size, alignment = int(bits) // 8, int(align or int(bits) // 8)
        end = -(-end // alignment) * alignment + size * int(count or 1)
    return end


def reports_of(text: str) -> dict[str, Report]:
    found = {}
    for part in text.split("Compiling entry function '")[1:]:

        def number(pattern: str, part: str = part) -> int:
            match = re.search(pattern, part)
            return int(match[1]) if match else 0

        found[part.split("'")[0]] = Report(
            registers=number(r"Used (\d+) registers"),
            shared_bytes=number(r"(\d+) bytes smem"),
            spilled_bytes=number(r"(\d+) bytes spill stores"),
        )
    return found


def loops_of(body: list[str]) -> list[list[str]]:
    """The lines of each loop that holds no other: from a label to the branch back to it."""
    labels = {line[:-1]: i for i, line in enumerate(body) if re.fullmatch(r"\$\w+:", line)}
    spans = []
    for end, line in enumerate(body):
        branch = re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line)
        if branch and labels.get(branch[1], end) < end:
            spans.append((labels[branch[1]], end))
    inner = [
        span
        for span in spans
        if not any(span[0] <= other[0] and other[1] <= span[1] for other in spans if other != span)
    ]
    return [body[begin:end] for begin, end in inner]


def straight_lines_of(body: list[str]) -> list[list[str]]:
    """The runs of lines that no label, branch or call interrupts."""
    runs = [[]]
    for line in body:
        if re.match(r"\$\w+:|(@!?%\w+ +)?(bra|call|ret)\b", line):
            runs.append([])
        else:
            runs[-1].append(line)
    return runs


def accesses_of(lines: list[str]) -> list[str]:
    """Reads and writes of global memory, but for those through the read-only cache (.nc): the factor's."""
    found = [re.match(r"(?:@!?%\w+ +)?((?:ld|st|atom|red)\.global[.\w:]*)", line) for line in lines]
    return [match[1] for match in found if match and ".nc" not in match[1]]


def bytes_of(access: str) -> int:
    """How many one instruction moves."""
    count, bits = re.search(r"(?:\.v(\d))?\.[a-z](\d+)$", access).groups()
    return int(count or 1) * int(bits) // 8


def is_vector(access: str) -> bool:
    """Of csrc/cuda/scale.cuh, whatever its width: past L1, which nothing else there is."""
    return ".cg." in access


def test_the_parser_sees_loops_and_split_stores():
    body = """
    $L0:
    ld.global.cg.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1];
    @%p1 st.global.f32 [%rd2], %f1;
    ld.global.nc.f32 %f1, [%rd3];
    @%p2 bra $L0;
    ld.global.u16 %rs1, [%rd4];
    bra.uni $L1;
    $L1:
    """
    (loop,) = loops_of([line.strip() for line in body.splitlines()])
    assert accesses_of(loop) == ["ld.global.cg.v4.u32", "st.global.f32"]
    assert [is_vector(access) for access in accesses_of(loop)] == [True, False]
    assert [bytes_of(access) for access in accesses_of(loop)] == [16, 4]


@pytest.mark.parametrize("arch", ARCHS)
def test_the_norm_has_eight_rows_in_flight(compiled_code, arch):
    """Labels (8 bytes) and, where rows have weights, those: eight loads with nothing between them that waits."""
    kernels, _ = compiled_code("heads_loss.cu", arch)
    adding = {name: kernel for name, kernel in kernels.items() if "heads_norm_kernel" in name}
    assert len(adding) == TYPES
    for name, kernel in adding.items():
        loads = [
            sum(bool(re.match(r"ld\.global\.nc\.[a-z]64\b", line)) for line in lines)
            for lines in straight_lines_of(kernel.body)
        ]
        assert max(loads) >= 8, f"{name}: {loads}"
        for loop in loops_of(kernel.body):
            if any(line.startswith("ld.global.nc") for line in loop):
                assert not any("call" in line for line in loop), f"{name}: the assertion stands in the loop"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", ["heads_loss.cu", "linear_heads.cu"])
def test_the_sweep_starts_its_copies_in_one_place(compiled_code, source, arch):
    """Copies of 16 bytes, unrolled by four, of 8 and of 4: each place where they stand costs a hundred instructions."""
    kernels, _ = compiled_code(source, arch)
    sweeps = {name: kernel for name, kernel in kernels.items() if "heads_sweep_kernel" in name}
    assert sweeps
    for name, kernel in sweeps.items():
        copies = sum(line.startswith("cp.async.c") for line in kernel.body)
        assert 3 <= copies <= 10, f"{name}: {copies} asynchronous copies"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", ["heads_loss.cu", "linear_heads.cu"])
def test_the_matrix_units_get_their_operands_in_few_instructions(compiled_code, source, arch):
    """For 16 rows and 16 features: each operand is loaded once, and little else is done for a product. The matrix
    instructions are those of the columns padded to 8, 16 or 32, twice where a gradient takes part in two pieces."""
    kernels, _ = compiled_code(source, arch)
    found = {name: kernel for name, kernel in kernels.items() if "MatrixTile" in name}
    assert len(found) == len(GROUPS) * HALF_TYPES
    for name, kernel in found.items():
        groups = int(re.search(r"MatrixTileI\w+?Li(\d)E", name)[1])
        loads = max(1, groups // 2)  # of the weight: two groups of 8 columns at a time
        logits, back = products_of(kernel.body)
        assert logits and back, name
        for loop in logits:
            blocks = loop["ldmatrix"] // (1 + loads)
            assert loop["mma"] == blocks * groups and loop["ldmatrix"] == blocks * (1 + loads), (name, loop)
            assert loop.total() <= blocks * INSTRUCTIONS_OF_LOGITS[groups], (name, loop)
        for loop in back:
            blocks = loop["ldmatrix"] // loads
            assert loop["mma"] == blocks * 2 * groups and loop["st"] == blocks * 4, (name, loop)
            assert loop.total() <= blocks * INSTRUCTIONS_OF_DX[groups], (name, loop)
        # dW is not in a loop: its numbers stay in registers.
        in_loops = sum(loop["mma"] for loop in (*logits, *back))
        pieces = 2 if source == "heads_loss.cu" else 1
        assert sum("mma.sync" in line for line in kernel.body) - in_loops == MATRIX_BLOCKS * pieces, name


def products_of(body: list[str]) -> tuple[list[Counter], list[Counter]]:
    """The instructions of the loops that make logits and of those that make dx, which are stored."""
    loops = [Counter(opcode_of(line) for line in loop) for loop in loops_of(body)]
    loops = [Counter({name: n for name, n in loop.items() if name}) for loop in loops if loop["mma"]]
    return [loop for loop in loops if not loop["st"]], [loop for loop in loops if loop["st"]]


def opcode_of(line: str) -> str:
    """The first word of an instruction; nothing for a label or a declaration."""
    match = re.match(r"(?:@!?%\w+ +)?([a-z]\w*)\b(?!:)", line)
    return match[1] if match else ""


GROUPS = (1, 2, 4)  # of 8 columns
HALF_TYPES = 2
MATRIX_BLOCKS = 16  # of 16 features and 8 columns, whose sums a warp has in registers
INSTRUCTIONS_OF_LOGITS = {1: 9, 2: 11, 4: 15}  # in PTX
INSTRUCTIONS_OF_DX = {1: 34, 2: 36, 4: 44}


def test_every_kernel_of_the_extension_is_run_on_the_cpu(compiled_code):
    """tests/ptx runs those of a source of its own, which names no kernel but what starts them."""
    run = {name for element in ELEMENTS for name in read_module(ptx_of(element).read_text())}
    for source in SOURCES.glob("*.cu"):
        kernels, _ = compiled_code(source.name, "sm_80")
        assert kernels.keys() <= run, source.name


FORMS = 5  # of the factor: a value, a float or a double on the device, a tensor with 32- or 64-bit indices
FORMS_OF_LISTS = 3  # the first three
ELEMENT_BYTES = {"6__half": 2, "13__nv_bfloat16": 2, "f": 4, "d": 8}  # by their names in a kernel's
TYPES = len(ELEMENT_BYTES)


@pytest.mark.parametrize("arch", ARCHS)
def test_scale_moves_16_bytes_an_instruction(compiled_code, arch):
    kernels, _ = compiled_code("scale.cu", arch)
    assert len(kernels) == (FORMS + FORMS_OF_LISTS) * TYPES
    for name, kernel in kernels.items():
        # A loop for each width of vectors, with four loads before its first store, also where fewer are left. Those of
        # less than 16 bytes are for an `out` aligned otherwise than `grad`, which there is not where they are the same.
        loops = [accesses for accesses in map(accesses_of, loops_of(kernel.body)) if any(map(is_vector, accesses))]
        assert all(is_vector(access) for accesses in loops for access in accesses), f"{name}: {loops}"
        widths = sorted(sorted({bytes_of(access) for access in accesses}) for accesses in loops)
        element = next(size for mark, size in ELEMENT_BYTES.items() if re.search(f"kernelI{mark}NS", name))
        narrower = [] if "list" in name else [width for width in (4, 8) if width > element]
        assert widths == [[width] for width in (*narrower, 16)], f"{name}: {loops}"
        kinds = {"".join(access[0] for access in accesses) for accesses in loops}  # l for a load, s for a store
        assert kinds == {"llllssss"}, f"{name}: {loops}"
        # Elements outside the vectors, all of them where no vector has more than one, have as many in flight.
        elements = [
            accesses for accesses in map(accesses_of, loops_of(kernel.body)) if not any(map(is_vector, accesses))
        ]
        moving = ["".join(access[0] for access in accesses) for accesses in elements]
        assert all(kinds.startswith("llllssss") for kinds in moving if "l" in kinds), f"{name}: {moving}"
        assert any("l" in kinds for kinds in moving), f"{name}: {moving}"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", sorted(path.name for path in SOURCES.glob("*.cu")))
def test_kernels_can_be_launched_and_keep_their_numbers_in_registers(compiled_code, source, arch):
    kernels, reports = compiled_code(source, arch)
    assert kernels and kernels.keys() == reports.keys()
    for name, report in reports.items():
        assert kernels[name].threads > 0, f"{name} has no launch bounds"
        # Registers are given out to warps in steps of 256, which is 8 a thread.
        registers = -(-report.registers // 8) * 8
        assert registers * kernels[name].threads <= REGISTERS, (name, report)
        assert 0 < kernels[name].parameter_bytes <= PARAMETER_BYTES, (name, kernels[name].parameter_bytes)
        sweep = "heads_sweep_kernel" in name
        assert report.spilled_bytes <= (SPILLED_BYTES_OF_THE_SWEEP if sweep else SPILLED_BYTES), (name, report)
        assert not sweep or report.shared_bytes <= static_bytes_planned_for(), (name, report)


# What a thread keeps in memory for want of registers. The sweep fills its 128; what it puts away are addresses, between
# tiles. The others have next to nothing: what lives across the call of the assertion.
SPILLED_BYTES_OF_THE_SWEEP = 128
SPILLED_BYTES = 16


def static_bytes_planned_for() -> int:
    """Beside its dynamic shared memory, by heads_plan.h's reckoning."""
    return int(re.search(r"kStaticBytes = (\d+)", (SOURCES / "heads_plan.h").read_text())[1])
