"""The instructions that a thread executes by itself. make(kernel, instruction) returns what to call with the threads
and with who of them executes it."""

import ctypes
import operator
import re
from collections.abc import Callable

import numpy as np

from ptx import memory
from ptx.module import Instruction, Kernel, split
from ptx.threads import Address, Read, Threads, Who, Write, address, reader, writer
from ptx.values import (
    DTYPES,
    SIZES,
    UNSIGNED,
    Array,
    Fault,
    bf16_to_f32,
    f32_to_bf16,
    halves_of,
    narrow,
    pair_of,
    to_f32,
    widen,
)

Step = Callable[[Threads, Who], None]


class Operands:
    """An instruction's operands, to be read and written."""

    def __init__(self, kernel: Kernel, instruction: Instruction) -> None:
        self.kernel, self.instruction = kernel, instruction

    def read(self, index: int, kind: str) -> Read:
        return reader(self.kernel, self.instruction.operands[index], kind)

    def write(self, kind: str, index: int = 0) -> Write:
        return writer(self.kernel, self.instruction.operands[index], kind)

    def address(self, index: int, space: str) -> Address:
        return address(self.kernel, self.instruction.operands[index], space)

    def list(self, index: int) -> tuple[str, ...]:
        """{a, b} or a."""
        return split(self.instruction.operands[index].strip("{} "))


MAKERS: dict[str, Callable[[Instruction, Operands], Step]] = {}


def makes(*names: str) -> Callable:
    def register(maker: Callable[[Instruction, Operands], Step]) -> Callable[[Instruction, Operands], Step]:
        MAKERS.update(dict.fromkeys(names, maker))
        return maker

    return register


def make(kernel: Kernel, instruction: Instruction) -> Step:
    maker = MAKERS.get(instruction.opcode[0])
    if maker is None:
        raise Fault(f"unknown instruction: {instruction.text}")
    return maker(instruction, Operands(kernel, instruction))


def computed(o: Operands, kind: str, function: Callable[..., Array], *reads: Read) -> Step:
    """function of what is read, into the first operand."""
    write = o.write(kind)
    if len(reads) == 1:
        (x,) = reads
        return lambda t, w: write(t, w, function(x(t, w)))
    if len(reads) == 2:
        x, y = reads
        return lambda t, w: write(t, w, function(x(t, w), y(t, w)))
    return lambda t, w: write(t, w, function(*(read(t, w) for read in reads)))


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

SPACES = ("global", "shared", "param", "local", "const")


def space_of(i: Instruction) -> str:
    return next((part.split("::")[0] for part in i.opcode if part.split("::")[0] in SPACES), "generic")


def vector_of(i: Instruction) -> int:
    return next((int(part[1]) for part in i.opcode if part in ("v2", "v4", "v8")), 1)


@makes("ld", "ldu")
def _load(i: Instruction, o: Operands) -> Step:
    at, size, count = o.address(1, space_of(i)), SIZES[i.type], vector_of(i)
    writes = [writer(o.kernel, register, i.type) for register in o.list(0)]
    dtype, space = DTYPES[i.type], space_of(i)

    def load(t: Threads, w: Who) -> None:
        where = at(t, w, size * count)
        memory.check(where, size * count, i.text)
        note(t, w, where, size * count, space, False, i.text)
        for write, value in zip(writes, [memory.load(where, size, k).view(dtype) for k in range(count)], strict=True):
            write(t, w, value)

    return load


@makes("st")
def _store(i: Instruction, o: Operands) -> Step:
    if space_of(i) == "param":
        return _store_call_parameter(i, o)
    at, size, count = o.address(0, space_of(i)), SIZES[i.type], vector_of(i)
    reads = [reader(o.kernel, value, f"b{8 * size}") for value in o.list(1)]
    space = space_of(i)

    def store(t: Threads, w: Who) -> None:
        where = at(t, w, size * count)
        memory.check(where, size * count, i.text)
        note(t, w, where, size * count, space, True, i.text)
        for k, read in enumerate(reads):
            memory.store(where, size, read(t, w), k)

    return store


def _store_call_parameter(i: Instruction, o: Operands) -> Step:
    name, read = re.sub(r"[\[\]\s]|\+.*", "", i.operands[0]), o.read(1, i.type)

    def store(t: Threads, w: Who) -> None:
        t.call_parameters[name] = int(np.ravel(read(t, w))[0])

    return store


@makes("call")
def _call(i: Instruction, o: Operands) -> Step:
    """The one function that is called: an assertion's failure, with its text."""
    if not i.has("uni") or "__assertfail" not in i.operands:
        raise Fault(f"unknown call: {i.text}")

    def fail(t: Threads, w: Who) -> None:
        said = ctypes.string_at(t.call_parameters["param0"]).decode()
        raise Fault(f"assertion failed in {t.numbers[w].size} threads: {said}")

    return fail


def note(t: Threads, w: Who, where: Array, size: int, space: str, writes: bool, text: str) -> None:
    """For what is counted and for races."""
    if t.tally is not None and space == "shared":
        t.tally["wavefronts"] += wavefronts(t, w, where, size)
    if t.accesses is not None and space in ("shared", "generic"):
        t.accessed(w, where, size, writes, text)


def wavefronts(t: Threads, w: Who, where: Array, size: int) -> int:
    """How often a warp's access goes to shared memory: once for each 4-byte word that a bank has to give, where 8 bytes
    a thread go in two halves and 16 in four quarters."""
    total = 0
    group = t.numbers[w] // (32 // max(1, size // 4))
    for number in np.unique(group):
        words = np.unique((where[group == number, None] + np.arange(0, size, 4)) // 4)
        total += int(np.bincount(words % 32).max())
    return total


@makes("cp")
def _copy(i: Instruction, o: Operands) -> Step:
    if i.opcode[1] != "async" or i.opcode[2] not in ("ca", "cg", "commit_group", "wait_group", "wait_all"):
        raise Fault(f"unknown copy: {i.text}")
    if i.has("commit_group"):

        def commit(t: Threads, w: Who) -> None:
            t.group[w] += 1

        return commit
    if i.has("wait_group") or i.has("wait_all"):
        pending = int(i.operands[0]) if i.has("wait_group") else -1  # all: those not committed too
        return lambda t, w: t.arrive(w, pending)
    to, source, size = o.address(0, "shared"), o.address(1, "global"), int(i.operands[2])
    read = int(i.operands[3]) if len(i.operands) > 3 and i.operands[3].isdigit() else size
    if size not in ((16,) if i.has("cg") else (4, 8, 16)) or read != size:
        raise Fault(f"unknown copy: {i.text}")

    def start(t: Threads, w: Who) -> None:
        there, here = to(t, w, size), source(t, w, size)
        memory.check(there, size, i.text)
        memory.check(here, size, i.text)
        for k in range(size // 4):
            memory.store(there, 4, np.uint32(0xFFFFFFFF), k)
        note(t, w, there, size, "shared", True, i.text)
        t.copies.append((t.numbers[w], t.group[w].copy(), there, here, size))

    return start


@makes("cvta")
def _convert_address(i: Instruction, o: Operands) -> Step:
    space, read, write = space_of(i), o.read(1, i.type), o.write(i.type)
    sign = -1 if i.has("to") else 1

    def convert(t: Threads, w: Who) -> None:
        base = t.shared_base[w] if space == "shared" else t.local_base[w] if space == "local" else 0
        write(t, w, (read(t, w).astype(np.int64) + sign * base).astype(np.uint64))

    return convert


@makes("membar", "fence", "prefetch", "prefetchu")
def _nothing(i: Instruction, o: Operands) -> Step:
    return lambda t, w: None


# ---------------------------------------------------------------------------------------------------------------------
# Moves and conversions
# ---------------------------------------------------------------------------------------------------------------------


@makes("mov")
def _move(i: Instruction, o: Operands) -> Step:
    size = SIZES[i.type]
    if i.operands[0].startswith("{"):
        names = o.list(0)
        part = size // len(names)
        writes, read = [writer(o.kernel, name, f"b{8 * part}") for name in names], o.read(1, f"b{8 * size}")

        def unpack(t: Threads, w: Who) -> None:
            value = read(t, w)
            for k, write in enumerate(writes):
                write(t, w, (value >> np.asarray(8 * part * k, value.dtype)).astype(UNSIGNED[part]))

        return unpack
    if i.operands[1].startswith("{"):
        names = o.list(1)
        part, whole = size // len(names), UNSIGNED[size]
        reads, write = [reader(o.kernel, name, f"b{8 * part}") for name in names], o.write(f"b{8 * size}")

        def pack(t: Threads, w: Who) -> None:
            value = np.asarray(0, whole)
            for k, read in enumerate(reads):
                value = value | (read(t, w).astype(whole) << np.asarray(8 * part * k, whole))
            write(t, w, value)

        return pack
    return computed(o, i.type, lambda x: x, o.read(1, i.type))


@makes("selp")
def _select(i: Instruction, o: Operands) -> Step:
    return computed(
        o, i.type, lambda x, y, p: np.where(p, x, y), o.read(1, i.type), o.read(2, i.type), o.read(3, "pred")
    )


@makes("cvt")
def _convert(i: Instruction, o: Operands) -> Step:
    to, of = i.opcode[-2], i.opcode[-1]
    rounding = next((part for part in i.opcode if part in ("rn", "rz", "rm", "rp")), "rn")
    if to in ("bf16x2", "f16x2"):
        half = to[:-2]
        return computed(o, "b32", lambda x, y: pair_of(narrow(y, half), narrow(x, half)), o.read(1, of), o.read(2, of))
    read = o.read(1, of)
    if to == "bf16":
        return computed(o, "b16", lambda x: f32_to_bf16(x), read)
    if of == "bf16":
        return computed(o, to, lambda x: bf16_to_f32(x).astype(DTYPES[to]), read)
    to_integer = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}
    whole = next((to_integer[part] for part in i.opcode if part in to_integer), None)
    dtype = DTYPES[to]
    if of[0] == "f" and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        top = np.nextafter(np.float64(limits.max) + 1, 0) if dtype.itemsize == 8 else np.float64(limits.max)

        def to_int(x: Array) -> Array:
            x = (whole or np.trunc)(x.astype(np.float64))
            return np.where(np.isnan(x), 0, np.clip(x, float(limits.min), top)).astype(dtype)

        return computed(o, to, to_int, read)
    if whole is not None:
        return computed(o, to, lambda x: whole(x).astype(dtype), read)
    if i.has("sat"):
        return computed(o, to, lambda x: np.fmax(0, np.fmin(x.astype(dtype), 1)).astype(dtype), read)
    if to == "f32" and of == "f64":
        return computed(o, to, lambda x: to_f32(x, rounding), read)
    if rounding != "rn" and dtype.kind == "f":
        raise Fault(f"unknown rounding: {i.text}")
    return computed(o, to, lambda x: x.astype(dtype), read)


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons and bits
# ---------------------------------------------------------------------------------------------------------------------

COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
COMPARISONS |= {"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def comparison_of(name: str, kind: str) -> Callable[[Array, Array], Array]:
    if kind[0] != "f":
        return COMPARISONS[name]

    def either_nan(x: Array, y: Array) -> Array:
        return np.isnan(x) | np.isnan(y)

    if name in ("nan", "num"):
        return lambda x, y: either_nan(x, y) == (name == "nan")
    if name.endswith("u"):
        return lambda x, y: COMPARISONS[name[:-1]](x, y) | either_nan(x, y)
    return lambda x, y: COMPARISONS[name](x, y) & ~either_nan(x, y)


@makes("setp")
def _compare(i: Instruction, o: Operands) -> Step:
    compare, x, y, write = comparison_of(i.opcode[1], i.type), o.read(1, i.type), o.read(2, i.type), o.write("pred")
    if i.opcode[2] not in LOGIC:
        return lambda t, w: write(t, w, compare(x(t, w), y(t, w)))
    logic, third = LOGIC[i.opcode[2]], i.operands[3]
    also, inverted = reader(o.kernel, third.lstrip("!"), "pred"), third.startswith("!")
    return lambda t, w: write(t, w, logic(compare(x(t, w), y(t, w)), also(t, w) ^ inverted))


@makes("and", "or", "xor")
def _logic(i: Instruction, o: Operands) -> Step:
    return computed(o, i.type, LOGIC[i.opcode[0]], o.read(1, i.type), o.read(2, i.type))


@makes("not")
def _not(i: Instruction, o: Operands) -> Step:
    return computed(o, i.type, np.invert, o.read(1, i.type))


@makes("shl", "shr")
def _shift(i: Instruction, o: Operands) -> Step:
    """By the type's width or more leaves zeros, or the sign."""
    left, top = i.opcode[0] == "shl", 8 * SIZES[i.type] - 1
    shift = operator.lshift if left else operator.rshift

    def shifted(x: Array, by: Array) -> Array:
        value = shift(x, np.minimum(by, top).astype(x.dtype))
        if (by <= top).all():
            return value
        beyond = x >> np.asarray(top, x.dtype) if i.type[0] == "s" and not left else np.zeros_like(x)
        return np.where(by > top, beyond, value)

    return computed(o, i.type, shifted, o.read(1, i.type), o.read(2, "u32"))


def bit_length(x: Array) -> Array:
    """The position of the highest bit, from 1; 0: there is none."""
    length = np.zeros(x.shape, np.int64)
    for bit in range(8 * x.dtype.itemsize):
        length = np.where((x >> np.asarray(bit, x.dtype)) & np.asarray(1, x.dtype), bit + 1, length)
    return length


@makes("popc", "clz", "bfind", "brev")
def _count_bits(i: Instruction, o: Operands) -> Step:
    width = 8 * SIZES[i.type]

    def find(x: Array) -> Array:
        length = bit_length(x)
        return np.where(length == 0, -1, width - length if i.has("shiftamt") else length - 1)

    def reverse(x: Array) -> Array:
        bits = [(x >> np.asarray(bit, x.dtype)) & np.asarray(1, x.dtype) for bit in range(width)]
        return sum((b << np.asarray(width - 1 - k, x.dtype) for k, b in enumerate(bits)), np.zeros_like(x))

    functions = {"popc": np.bitwise_count, "clz": lambda x: width - bit_length(x), "bfind": find, "brev": reverse}
    function = functions[i.opcode[0]]
    result = f"b{width}" if i.opcode[0] == "brev" else "u32"
    return computed(o, result, lambda x: function(x).astype(DTYPES[result]), o.read(1, f"b{width}"))


@makes("bfe")
def _extract_bits(i: Instruction, o: Operands) -> Step:
    if i.type[0] == "s":
        raise Fault(f"unknown instruction: {i.text}")

    def extract(x: Array, begin: Array, count: Array) -> Array:
        mask = (np.uint64(1) << np.minimum(count, 63).astype(np.uint64)) - np.uint64(1)
        return ((x.astype(np.uint64) >> begin.astype(np.uint64)) & mask).astype(x.dtype)

    return computed(o, i.type, extract, o.read(1, i.type), o.read(2, "u32"), o.read(3, "u32"))


@makes("bfi")
def _insert_bits(i: Instruction, o: Operands) -> Step:
    def insert(x: Array, into: Array, begin: Array, count: Array) -> Array:
        begin = begin.astype(np.uint64)
        mask = ((np.uint64(1) << np.minimum(count, 63).astype(np.uint64)) - np.uint64(1)) << begin
        return ((into.astype(np.uint64) & ~mask) | ((x.astype(np.uint64) << begin) & mask)).astype(x.dtype)

    return computed(o, i.type, insert, o.read(1, i.type), o.read(2, i.type), o.read(3, "u32"), o.read(4, "u32"))


@makes("shf")
def _funnel_shift(i: Instruction, o: Operands) -> Step:
    def shift(low: Array, high: Array, by: Array) -> Array:
        by = (by & np.uint32(31) if i.has("wrap") else np.minimum(by, np.uint32(32))).astype(np.uint64)
        value = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        return ((value << by) >> np.uint64(32) if i.has("l") else value >> by).astype(np.uint32)

    return computed(o, "b32", shift, *(o.read(k, "b32") for k in (1, 2, 3)))


@makes("prmt")
def _permute_bytes(i: Instruction, o: Operands) -> Step:
    """Each four bits of the third say which byte of the two first, and whether its sign fills the place."""

    def permute(x: Array, y: Array, choice: Array) -> Array:
        both = x.astype(np.uint64) | (y.astype(np.uint64) << np.uint64(32))
        result = np.uint64(0)
        for k in range(4):
            four = (choice.astype(np.uint64) >> np.uint64(4 * k)) & np.uint64(15)
            byte = (both >> ((four & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            result = result | (np.where(four & np.uint64(8), sign, byte) << np.uint64(8 * k))
        return np.asarray(result).astype(np.uint32)

    return computed(o, "b32", permute, *(o.read(k, "b32") for k in (1, 2, 3)))


@makes("lop3")
def _logic_of_three(i: Instruction, o: Operands) -> Step:
    table = int(i.operands[4], 0)

    def look_up(x: Array, y: Array, z: Array) -> Array:
        result = np.uint32(0)
        for k in range(8):
            if table >> k & 1:
                result = result | ((x if k & 4 else ~x) & (y if k & 2 else ~y) & (z if k & 1 else ~z))
        return result

    return computed(o, "b32", look_up, *(o.read(k, "b32") for k in (1, 2, 3)))


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------------------------------


def divided(x: Array, y: Array) -> Array:
    """Rounded to zero; by 0, some number."""
    y = np.where(y == 0, np.ones_like(y), y)
    quotient = x // y
    if x.dtype.kind == "i":
        quotient = quotient + ((x % y != 0) & ((x < 0) != (y < 0)))
    return quotient.astype(x.dtype)


def remainder(x: Array, y: Array) -> Array:
    return x - divided(x, y) * y


def high_product(x: Array, y: Array) -> Array:
    if x.dtype.itemsize < 8:
        wide = np.dtype(f"{x.dtype.kind}{2 * x.dtype.itemsize}")
        return ((x.astype(wide) * y.astype(wide)) >> np.asarray(8 * x.dtype.itemsize, wide)).astype(x.dtype)
    exact = np.asarray(x).astype(object) * np.asarray(y).astype(object)
    return np.asarray(exact >> 64).astype(x.dtype)


BINARY = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
OF_INTEGERS = BINARY | {"div": divided, "rem": remainder, "min": np.minimum, "max": np.maximum}
OF_REALS = BINARY | {"div": operator.truediv, "min": np.fmin, "max": np.fmax}
UNARY = {"neg": np.negative, "abs": np.abs}


def fused_multiply_add(i: Instruction) -> Callable[[Array, Array, Array], Array]:
    """In a type that holds the product of two f32 exactly; that of two f64 it rounds, to 11 bits more than f64 has."""
    if i.type == "f64":
        wide = np.longdouble
        return lambda x, y, z: (x.astype(wide) * y.astype(wide) + z.astype(wide)).astype(np.float64)
    rounding = i.opcode[1]
    return lambda x, y, z: to_f32(x.astype(np.float64) * y.astype(np.float64) + z.astype(np.float64), rounding)


@makes(*OF_INTEGERS, "mad", "fma", *UNARY)
def _arithmetic(i: Instruction, o: Operands) -> Step:
    name, kind = i.opcode[0], i.type
    if "f16" in kind:
        return _half_arithmetic(i, o)
    if any(part in ("cc", "NaN", "rp") or part == "sat" for part in i.opcode):
        raise Fault(f"unknown instruction: {i.text}")
    if name in UNARY:
        return computed(o, kind, UNARY[name], o.read(1, kind))
    if kind[0] == "f":
        reads = [o.read(k, kind) for k in range(1, len(i.operands))]
        if name in ("fma", "mad"):
            return computed(o, kind, fused_multiply_add(i), *reads)
        function = OF_REALS[name]
        if i.opcode[1] in ("rz", "rm") and kind == "f32":
            rounding = i.opcode[1]
            return computed(
                o, kind, lambda x, y: to_f32(function(x.astype(np.float64), y.astype(np.float64)), rounding), *reads
            )
        return computed(o, kind, function, *reads)
    if name not in ("mul", "mad"):
        return computed(o, kind, OF_INTEGERS[name], o.read(1, kind), o.read(2, kind))
    out = f"{kind[0]}{2 * int(kind[1:])}" if i.has("wide") else kind
    dtype = DTYPES[out]

    def product(x: Array, y: Array) -> Array:
        return high_product(x, y) if i.has("hi") else x.astype(dtype) * y.astype(dtype)

    if name == "mul":
        return computed(o, out, product, o.read(1, kind), o.read(2, kind))
    return computed(o, out, lambda x, y, z: product(x, y) + z, o.read(1, kind), o.read(2, kind), o.read(3, out))


def _half_arithmetic(i: Instruction, o: Operands) -> Step:
    """In f32, in which every sum and product of two halves is exact or nearly so, and of pairs for each half alone."""
    name, half = i.opcode[0], "bf16" if "bf16" in i.type else "f16"
    functions = OF_REALS | UNARY | {"fma": lambda x, y, z: x.astype(np.float64) * y + z}
    function = functions[name]
    if any(part in ("relu", "sat", "NaN") for part in i.opcode):
        raise Fault(f"unknown instruction: {i.text}")

    def one(*bits: Array) -> Array:
        return narrow(function(*(widen(x, half) for x in bits)), half)

    def both(*pairs: Array) -> Array:
        lower, upper = zip(*(halves_of(np.asarray(x)) for x in pairs), strict=True)
        return pair_of(one(*lower), one(*upper))

    bits = f"b{8 * SIZES[i.type]}"
    reads = [o.read(k, bits) for k in range(1, len(i.operands))]
    return computed(o, bits, both if i.type.endswith("x2") else one, *reads)


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "rcp": lambda x: 1 / x,
    "ex2": np.exp2,
    "lg2": np.log2,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


@makes(*FUNCTIONS)
def _function(i: Instruction, o: Operands) -> Step:
    """Correctly rounded, where a device may be one or two units of the last place off. An approximation in f64 is as
    rough as a device's."""
    function, dtype = FUNCTIONS[i.opcode[0]], DTYPES[i.type]
    rough = np.dtype(np.float32) if i.type == "f64" and i.has("approx") else dtype
    return computed(o, i.type, lambda x: function(x).astype(rough).astype(dtype), o.read(1, i.type))


@makes("copysign")
def _copy_sign(i: Instruction, o: Operands) -> Step:
    return computed(o, i.type, lambda sign, x: np.copysign(x, sign), o.read(1, i.type), o.read(2, i.type))


@makes("testp")
def _test(i: Instruction, o: Operands) -> Step:
    tests = {"finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan}
    return computed(o, "pred", tests[i.opcode[1]], o.read(1, i.type))
