"""The instructions that the lanes of a warp execute together. `who` are whole warps."""

from collections.abc import Callable

import numpy as np

from ptx import memory
from ptx.module import Instruction, Kernel
from ptx.operations import Operands, Step
from ptx.threads import WARP, Threads, Who, reader, writer
from ptx.values import Array, Fault, halves_of, pair_of, widen

LANES = np.arange(WARP)


def is_warp_operation(i: Instruction) -> bool:
    return i.opcode[0] in MAKERS or i.opcode[:2] == ("bar", "warp")


def make(kernel: Kernel, i: Instruction) -> Step:
    o = Operands(kernel, i)
    if i.opcode[0] == "bar":
        return with_all_lanes(o, 0, _order)
    return MAKERS[i.opcode[0]](i, o)


def _order(t: Threads, w: Who) -> None:
    t.warp_phase[w] += 1


def with_all_lanes(o: Operands, mask_at: int, step: Step) -> Step:
    """The mask of lanes must name them all: no kernel here has another, and the lanes that it leaves out would have to
    be told apart."""
    mask = o.read(mask_at, "b32")

    def checked(t: Threads, w: Who) -> None:
        if (mask(t, w) != 0xFFFFFFFF).any():
            raise Fault(f"a mask that leaves out lanes: {o.instruction.text}")
        step(t, w)

    return checked


def _shuffle(i: Instruction, o: Operands) -> Step:
    """PTX ISA, shfl.sync: c holds the last lane that may be asked and, above, what divides the warp into segments."""
    mode, names = i.opcode[2], i.operands[0].split("|")
    write = writer(o.kernel, names[0], "b32")
    write_valid = writer(o.kernel, names[1], "pred") if len(names) > 1 else None
    value, b, c = (o.read(k, "b32") for k in (1, 2, 3))

    def shuffle(t: Threads, w: Who) -> None:
        numbers = t.numbers[w]
        lane = numbers % WARP
        by, limits = b(t, w).astype(np.int64), c(t, w).astype(np.int64)
        last, segment = limits & 31, (limits >> 8) & 31
        end = (lane & segment) | (last & ~segment)
        if mode == "bfly":
            source, valid = lane ^ by, (lane ^ by) <= end
        elif mode == "down":
            source, valid = lane + by, lane + by <= end
        elif mode == "up":
            source, valid = lane - by, lane - by >= end
        else:
            source = (lane & segment) | (by & ~segment & 31)
            valid = source <= end
        source = np.where(valid, source, lane)
        sent = np.broadcast_to(value(t, w), numbers.shape).reshape(-1, WARP)
        write(t, w, np.take_along_axis(sent, source.reshape(-1, WARP), 1).reshape(-1))
        if write_valid:
            write_valid(t, w, valid)

    return with_all_lanes(o, 4, shuffle)


def _vote(i: Instruction, o: Operands) -> Step:
    mode, name = i.opcode[2], i.operands[1]
    said, inverted = reader(o.kernel, name.lstrip("!"), "pred"), name.startswith("!")
    functions: dict[str, Callable[[Array], Array]] = {
        "ballot": lambda votes: (votes.astype(np.uint64) << LANES.astype(np.uint64)).sum(1).astype(np.uint32),
        "any": lambda votes: votes.any(1),
        "all": lambda votes: votes.all(1),
        "uni": lambda votes: votes.all(1) | ~votes.any(1),
    }
    function, write = functions[mode], o.write("b32" if mode == "ballot" else "pred")

    def vote(t: Threads, w: Who) -> None:
        votes = np.broadcast_to(said(t, w) ^ inverted, t.numbers[w].shape).reshape(-1, WARP)
        write(t, w, np.repeat(function(votes), WARP))

    return with_all_lanes(o, 2, vote)


def _load_matrices(i: Instruction, o: Operands) -> Step:
    """PTX ISA, ldmatrix: lane 8 m + r gives the address of row r of matrix m, eight halves. Lane l gets elements
    2 (l % 4) and the next of row l / 4, or with .trans of column l / 4."""
    count = next((int(part[1]) for part in i.opcode if part in ("x1", "x2", "x4")), 0)
    if count == 0 or not i.has("m8n8") or i.type != "b16":
        raise Fault(f"unknown instruction: {i.text}")
    at = o.address(1, "shared")
    writes = [writer(o.kernel, name, "b32") for name in o.list(0)]

    def load(t: Threads, w: Who) -> None:
        # Only these lanes' addresses matter; the others may hold anything.
        rows = t.numbers[w].reshape(-1, WARP)[:, : 8 * count].reshape(-1)
        where = at(t, rows, 16)
        memory.check(where, 16, i.text)
        t.accessed(rows, where, 16, False, i.text)
        where = where.reshape(-1, count, 8)
        if t.tally is not None:
            t.tally["wavefronts"] += sum(wavefronts_of_rows(matrix) for warp in where for matrix in warp)
        for m, write in enumerate(writes):
            matrix = np.stack([memory.load(where[:, m], 2, k) for k in range(8)], -1)  # (warps, rows, columns)
            if i.has("trans"):
                matrix = matrix.transpose(0, 2, 1)
            pair = pair_of(matrix[:, LANES // 4, 2 * (LANES % 4)], matrix[:, LANES // 4, 2 * (LANES % 4) + 1])
            write(t, w, pair.reshape(-1))

    return load


def wavefronts_of_rows(where: Array) -> int:
    """A matrix takes as many as rows lie in the same four banks."""
    return int(np.bincount(np.unique(where) // 16 % 8).max())


def _multiply_matrices(i: Instruction, o: Operands) -> Step:
    """PTX ISA, mma.m16n8k16: A (16, 16) row by row, B (16, 8) column by column, both halves; C and D (16, 8) in f32. In
    lane l, with g = l / 4 and c = 2 (l % 4), register r of A holds row g + 8 (r % 2), columns c + 8 (r / 2) and the
    next; register r of B rows c + 8 r and the next of column g; register r of C row g + 8 (r / 2), column c + r % 2."""
    kind = i.opcode[-2]
    if i.opcode[3:6] != ("m16n8k16", "row", "col") or i.opcode[6:] not in (
        ("f32", kind, kind, "f32"), ("f32", "f16", "f16", "f32"), ("f32", "bf16", "bf16", "f32")
    ) or kind not in ("f16", "bf16"):  # fmt: skip
        raise Fault(f"unknown instruction: {i.text}")
    of_a, of_b = ([reader(o.kernel, name, "b32") for name in o.list(k)] for k in (1, 2))
    of_c = [reader(o.kernel, name, "f32") for name in o.list(3)]
    writes = [writer(o.kernel, name, "f32") for name in o.list(0)]
    g, c = LANES // 4, 2 * (LANES % 4)

    def multiply(t: Threads, w: Who) -> None:
        warps = t.numbers[w].size // WARP
        a, b, sums = (np.zeros((warps, *shape)) for shape in ((16, 16), (16, 8), (16, 8)))
        for r, read in enumerate(of_a):
            for half, bits in enumerate(halves_of(read(t, w))):
                a[:, g + 8 * (r % 2), c + half + 8 * (r // 2)] = widen(bits, kind).reshape(-1, WARP)
        for r, read in enumerate(of_b):
            for half, bits in enumerate(halves_of(read(t, w))):
                b[:, c + half + 8 * r, g] = widen(bits, kind).reshape(-1, WARP)
        for r, read in enumerate(of_c):
            sums[:, g + 8 * (r // 2), c + r % 2] = np.broadcast_to(read(t, w), t.numbers[w].shape).reshape(-1, WARP)
        sums += a @ b
        for r, write in enumerate(writes):
            write(t, w, sums[:, g + 8 * (r // 2), c + r % 2].astype(np.float32).reshape(-1))

    return multiply


MAKERS: dict[str, Callable[[Instruction, Operands], Step]] = {
    "shfl": _shuffle,
    "vote": _vote,
    "ldmatrix": _load_matrices,
    "mma": _multiply_matrices,
}
