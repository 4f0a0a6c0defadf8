"""What a tile of 16 rows of 1024 bf16 features costs, counted while the compiled sweep runs: the table of
docs/design.md, and that no resource of a multiprocessor is asked for more than the goal on an H100 allows."""

import json
from collections import Counter
from typing import NamedTuple

import pytest

from ptx.compiled import IN_CUDA_CHECK, interpret, ptx_of

pytestmark = IN_CUDA_CHECK

# Assumed of an H100: nine tenths of its memory's 3.35e12 bytes/s, and its clock.
BYTES_PER_SECOND = 3.0e12
CYCLES_PER_SECOND = 1.755e9
MULTIPROCESSORS = 132
COPY_BYTES = 2 * 16 * 1024 * 2  # a tile is read and written
COPY_CYCLES = COPY_BYTES * MULTIPROCESSORS / BYTES_PER_SECOND * CYCLES_PER_SECOND

SCHEDULERS = 4  # each issues an instruction a cycle, and has a matrix unit
ISSUE_SLOTS_USED = 0.8
MATRIX_CYCLES = 8  # of an m16n8k16 on a matrix unit, at the most


class Cost(NamedTuple):
    """Of a tile."""

    issue: float  # cycles, if none of the schedulers' is lost
    matrix_instructions: int
    wavefronts: int  # of shared memory, one a cycle


def cost_of_tile(units: str, columns: int) -> Cost:
    """The fourth tile of a block, by the difference. With it, the copies of a tile to come are counted. The third and
    the fourth need as many warps to read their rows' targets ahead."""
    counts = []
    for tiles in (3, 4):
        done = interpret("heads_test", ptx_of("bfloat16"), "--counts", f"tiles{units}", str(columns), str(tiles))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        kernels = json.loads(done.stdout.splitlines()[-1])
        (sweep,) = (Counter(count) for name, count in kernels.items() if "heads_sweep_kernel" in name)
        counts.append(sweep)
    counts[1].subtract(counts[0])
    tile = counts[1]
    wavefronts = tile.pop("wavefronts")
    matrix_instructions = sum(count for name, count in tile.items() if name.startswith("mma."))
    return Cost(tile.total() / SCHEDULERS, matrix_instructions, wavefronts)


def assert_is_documented(cost: Cost, documented: Cost) -> None:
    assert cost.matrix_instructions == documented.matrix_instructions
    # Which rows are ignored changes this a little.
    assert cost.wavefronts == pytest.approx(documented.wavefronts, rel=0.03)
    # So does the version of nvcc.
    assert cost.issue == pytest.approx(documented.issue, rel=0.06)


def test_a_copy_of_a_tile_is_documented():
    assert pytest.approx(5060, rel=0.001) == COPY_CYCLES


@pytest.mark.parametrize(
    ("columns", "copies", "documented"), [(12, 1.3, Cost(3200, 640, 2700)), (32, 1.5, Cost(5400, 1280, 4200))]
)
def test_a_tile_on_matrix_units_keeps_to_the_goal(columns, copies, documented):
    cost = cost_of_tile("_on_matrix_units", columns)
    goal = copies * COPY_CYCLES
    assert cost.issue / ISSUE_SLOTS_USED < goal
    assert cost.matrix_instructions * MATRIX_CYCLES / SCHEDULERS < goal
    assert cost.wavefronts < goal
    assert_is_documented(cost, documented)


def test_a_tile_on_lanes_misses_the_goal():
    """Or else the plan need not prefer matrix units."""
    cost = cost_of_tile("", 12)
    assert cost.issue > 1.3 * COPY_CYCLES
    assert_is_documented(cost, Cost(13200, 0, 6300))
