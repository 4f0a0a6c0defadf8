"""The threads of a launch as the instructions see them: their registers and memory. A register is an array with an
element for each thread of the grid; `Who` says which of them an instruction is for."""

import ctypes
import re
from collections import Counter
from collections.abc import Callable

import numpy as np

from ptx import memory
from ptx.module import Kernel, align_up
from ptx.races import Access, SharedAccesses
from ptx.values import DTYPES, SIZES, UNSIGNED, Array, Fault

WARP = 32

Who = slice | Array  # numbers of threads, in order


def compact(numbers: Array) -> Who:
    """Neighbours as a slice, which numpy is faster with."""
    if numbers.size and numbers[-1] - numbers[0] + 1 == numbers.size:
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return numbers


class Registers(dict[str, Array]):
    """By name, as bits. They come into being when they are first used."""

    def __init__(self, types: dict[str, str], threads: int) -> None:
        self.types, self.threads = types, threads

    def __missing__(self, name: str) -> Array:
        kind = self.types[name]
        self[name] = np.zeros(self.threads, bool if kind == "pred" else UNSIGNED[SIZES[kind]])
        return self[name]


class Threads:
    def __init__(
        self, kernel: Kernel, grid: tuple[int, int], threads: int, dynamic_bytes: int, parameters: bytes
    ) -> None:
        if threads % WARP:
            raise Fault(f"a block of {threads} threads: warps must be full")
        if kernel.parameter_bytes != len(parameters):
            raise Fault(f"{len(parameters)} bytes of parameters; the kernel has {kernel.parameter_bytes}")
        self.kernel = kernel
        self.blocks, self.block_threads = grid[0] * grid[1], threads
        self.count = self.blocks * threads
        self.numbers = np.arange(self.count)
        self.block = self.numbers // threads
        self.warp = self.numbers // WARP
        self.registers = Registers(kernel.code.registers, self.count)
        tid = self.numbers % threads
        self.special = {
            "%tid.x": tid, "%ctaid.x": self.block % grid[0], "%ctaid.y": self.block // grid[0], "%laneid": tid % WARP,
            "%ntid.x": threads + 0 * tid, "%nctaid.x": grid[0] + 0 * tid, "%nctaid.y": grid[1] + 0 * tid,
            "%warpid": tid // WARP,
        }  # fmt: skip
        self.special |= dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.z"), 0 * tid)
        self.special |= dict.fromkeys(("%ntid.y", "%ntid.z", "%nctaid.z"), 1 + 0 * tid)
        self._parameters = np.zeros(len(parameters) + 64, np.uint8)
        self.parameters_at = align_up(self._parameters.ctypes.data, 64)
        ctypes.memmove(self.parameters_at, parameters, len(parameters))
        # All ones are NaN.
        self.shared_bytes = kernel.static_shared_bytes + dynamic_bytes
        pitch = align_up(self.shared_bytes, 128) + 128
        self._shared = np.full(pitch * self.blocks + 128, 0xFF, np.uint8)
        self.shared_base = align_up(self._shared.ctypes.data, 128) + self.block * pitch
        pitch = align_up(kernel.code.local_bytes, 16)
        self._local = np.full(pitch * self.count + 16, 0xFF, np.uint8)
        self.local_base = align_up(self._local.ctypes.data, 16) + self.numbers * pitch
        self.group = np.zeros(self.count, np.int64)  # of asynchronous copies, that is not committed yet
        self.copies: list[tuple[Array, Array, Array, Array, int]] = []  # threads, groups, to, from, bytes
        self.call_parameters: dict[str, int] = {}  # of the first thread
        self.tally: Counter[str] | None = None  # what is counted; see launch.py
        self.phase = np.zeros(self.count, np.int64)  # how many barriers of its block a thread has passed,
        self.warp_phase = np.zeros(self.count, np.int64)  # and of its warp
        self.accesses: SharedAccesses | None = None  # where races are looked for

    def look_for_races(self) -> None:
        begin = self._shared.ctypes.data
        self.accesses = SharedAccesses(begin, begin + self._shared.size)

    def accessed(self, who: Who, where: Array, size: int, writes: bool, text: str) -> None:
        if self.accesses is not None:
            numbers = self.numbers[who]
            phases, warp_phases = self.phase[who].copy(), self.warp_phase[who].copy()
            self.accesses.add(Access(where, size, numbers, phases, warp_phases, writes, text))

    def arrive(self, who: Who, pending: int) -> None:
        """Completes these threads' asynchronous copies but for the last `pending` groups."""
        waits = np.zeros(self.count, bool)
        waits[who] = True
        left = []
        for threads, groups, to, source, size in self.copies:
            done = waits[threads] & (groups < self.group[threads] - pending)
            memory.copy(to[done], source[done], size)
            if done.any():
                self.accessed(threads[done], to[done], size, True, "the end of an asynchronous copy")
            if not done.all():
                left.append((threads[~done], groups[~done], to[~done], source[~done], size))
        self.copies = left


# ---------------------------------------------------------------------------------------------------------------------
# Operands
# ---------------------------------------------------------------------------------------------------------------------

Read = Callable[[Threads, Who], Array]
Write = Callable[[Threads, Who, Array], None]


def reader(kernel: Kernel, operand: str, kind: str) -> Read:
    """The operand's value in each thread, as this type."""
    dtype = DTYPES[kind]
    if operand in kernel.code.registers:
        own = kernel.code.registers[operand]
        if kind == "pred" or SIZES[own] == SIZES[kind]:
            return lambda t, w: t.registers[operand][w].view(dtype)
        bits = UNSIGNED[dtype.itemsize]
        return lambda t, w: t.registers[operand][w].astype(bits).view(dtype)
    if re.fullmatch(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid|%warpid", operand):
        return lambda t, w: t.special[operand][w].astype(dtype)
    m = re.fullmatch(r"([\w$]+?)(?:\+(\d+))?", operand)
    if m and m[1] in kernel.parameters:
        at = kernel.parameters[m[1]] + int(m[2] or 0)
        return lambda t, w: np.asarray(t.parameters_at + at, np.uint64).astype(dtype)
    constant = literal(kernel, operand, kind)
    return lambda t, w: constant


def literal(kernel: Kernel, operand: str, kind: str) -> Array:
    dtype = DTYPES[kind]
    if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", operand):
        value = np.asarray(int(m[1] or m[2], 16), np.uint32 if m[1] else np.uint64)
        value = value.view(np.float32 if m[1] else np.float64)
        return value.astype(dtype) if dtype.kind == "f" else value.view(dtype)
    if re.fullmatch(r"[-+]?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
        number = int(operand.rstrip("U"), 0)
        if kind == "pred":
            return np.asarray(number != 0)
        return np.asarray(number % (1 << 8 * dtype.itemsize), UNSIGNED[dtype.itemsize]).view(dtype)
    m = re.fullmatch(r"([\w$]+?)(?:\+(\d+))?", operand)
    if m:
        places = kernel.shared_at | kernel.code.local
        places |= {name: ctypes.addressof(variable) for name, variable in kernel.globals.items()}
        if m[1] in places:
            return np.asarray(places[m[1]] + int(m[2] or 0), np.uint64).astype(dtype)
    raise Fault(f"unknown operand {operand}")


def writer(kernel: Kernel, operand: str, kind: str) -> Write:
    """Into a register that may be wider than the type."""
    if operand == "_":
        return lambda t, w, v: None
    size = SIZES[kernel.code.registers[operand]]
    dtype = DTYPES[kind]
    if kind == "pred":

        def write(t: Threads, w: Who, v: Array) -> None:
            t.registers[operand][w] = v

    elif dtype.kind == "i" and size > dtype.itemsize:
        wide = np.dtype(f"i{size}")

        def write(t: Threads, w: Who, v: Array) -> None:
            t.registers[operand][w] = np.asarray(v, dtype).astype(wide).view(UNSIGNED[size])

    else:
        bits = UNSIGNED[dtype.itemsize]

        def write(t: Threads, w: Who, v: Array) -> None:
            t.registers[operand][w] = np.asarray(v, dtype).view(bits)

    return write


# Where an operand's memory lies in each thread, for an access of this many bytes.
Address = Callable[[Threads, Who, int], Array]


def address(kernel: Kernel, operand: str, space: str) -> Address:
    m = re.fullmatch(r"\[\s*([%\w$.]+?)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
    if m is None:
        raise Fault(f"unknown address {operand}")
    base, offset = (
        reader(kernel, m[1], "b64" if not m[1].startswith("%") else kernel.code.registers[m[1]]),
        int(m[2] or 0),
    )

    def place(t: Threads, w: Who) -> Array:
        return np.broadcast_to(base(t, w).astype(np.int64) + offset, t.numbers[w].shape)

    if space == "shared":

        def shared(t: Threads, w: Who, size: int) -> Array:
            at = place(t, w)
            if at.size and (int(at.min()) < 0 or int(at.max()) + size > t.shared_bytes):
                raise Fault(f"{size} bytes at {at.min()} to {at.max()} of {t.shared_bytes} of shared memory")
            return at + t.shared_base[w]

        return shared
    if space == "local":
        return lambda t, w, size: place(t, w) + t.local_base[w]
    return lambda t, w, size: place(t, w)
