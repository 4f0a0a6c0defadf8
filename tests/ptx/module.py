"""PTX, read: a kernel's parameters, variables and instructions."""

import ctypes
import re
from dataclasses import dataclass, field
from functools import cached_property

from ptx.values import SIZES, Fault


@dataclass(frozen=True)
class Instruction:
    guard: str  # the predicate under which it is executed; empty: always
    negated: bool  # the guard
    opcode: tuple[str, ...]  # ld.global.v4.f32 by its parts
    operands: tuple[str, ...]
    text: str

    @property
    def type(self) -> str:
        return self.opcode[-1]

    def has(self, modifier: str) -> bool:
        return modifier in self.opcode


@dataclass
class Code:
    registers: dict[str, str] = field(default_factory=dict)  # the type of each
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # the instruction that follows
    shared: dict[str, int] = field(default_factory=dict)  # where each static variable begins
    shared_bytes: int = 0
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0


@dataclass
class Kernel:
    name: str
    parameters: dict[str, int]  # where each begins
    parameter_bytes: int
    max_threads: int  # of a block; 0: no bound
    body: str
    dynamic_shared: dict[str, int]  # alignments
    globals: dict[str, "ctypes.Array[ctypes.c_char]"]

    @cached_property
    def code(self) -> Code:
        return read_body(self.body)

    @cached_property
    def shared_at(self) -> dict[str, int]:
        """All shared variables: the static ones and, after them, the dynamic one under each of its names."""
        end = max(
            (align_up(self.code.shared_bytes, alignment) for alignment in self.dynamic_shared.values()), default=0
        )
        return self.code.shared | dict.fromkeys(self.dynamic_shared, end)

    @property
    def static_shared_bytes(self) -> int:
        return max((self.shared_at[name] for name in self.dynamic_shared), default=self.code.shared_bytes)


def align_up(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


def split(text: str) -> tuple[str, ...]:
    """At the commas outside brackets."""
    return tuple(part.strip() for part in re.split(r",(?![^\[{(]*[\]})])", text) if part.strip())


def read_module(ptx: str) -> dict[str, Kernel]:
    """The kernels by name."""
    text = re.sub(r"//[^\n]*", "", ptx)
    pattern = r"^(?:\.\w+ )*\.extern \.shared \.align (\d+) \.b8 ([\w$]+)\[\];"
    dynamic = {m[2]: int(m[1]) for m in re.finditer(pattern, text, re.M)}
    variables = read_globals(text)
    kernels = {}
    for m in re.finditer(r"\.entry (\w+)\((.*?)\)\s*([^{]*?)\{\n(.*?)\n\}", text, re.S):
        parameters, end = {}, 0
        for alignment, bits, name, count in re.findall(
            r"\.param (?:\.align (\d+) )?\.[a-z]+(\d+) (\w+)(?:\[(\d+)\])?", m[2]
        ):
            size = int(bits) // 8
            parameters[name] = align_up(end, int(alignment or size))
            end = parameters[name] + size * int(count or 1)
        bound = re.search(r"\.maxntid (\d+)", m[3])
        kernels[m[1]] = Kernel(m[1], parameters, end, int(bound[1]) if bound else 0, m[4], dynamic, variables)
    return kernels


def read_globals(text: str) -> dict[str, "ctypes.Array[ctypes.c_char]"]:
    """Variables and constants of the module, each in memory of its own."""
    pattern = r"^(?:\.visible |\.weak )?\.(?:global|const) \.align \d+ \.(\w+) ([\w$]+)(?:\[(\d+)\])?(?: = ([^;]+))?;"
    found = {}
    for m in re.finditer(pattern, text, re.M):
        size = SIZES[m[1]]
        numbers = [int(number, 0) % (1 << 8 * size) for number in re.findall(r"-?\w+", m[4] or "")]
        data = b"".join(number.to_bytes(size, "little") for number in numbers)
        found[m[2]] = ctypes.create_string_buffer(data, size * int(m[3] or 1) + 1)
    return found


STATEMENT = re.compile(r"\s*(?:[{}]|([$\w]+):|([^;]*);)")


def read_body(body: str) -> Code:
    code = Code()
    at = 0
    while match := STATEMENT.match(body, at):
        at = match.end()
        if match[1]:
            code.labels[match[1]] = len(code.instructions)
        elif match[2] and match[2].startswith("."):
            declare(code, " ".join(match[2].split()))
        elif match[2]:
            code.instructions.append(read_instruction(" ".join(match[2].split())))
    if body[at:].strip():
        raise Fault(f"not understood: {body[at : at + 80]}")
    return code


def declare(code: Code, text: str) -> None:
    if m := re.fullmatch(r"\.reg \.(\w+) (%\w+)<(\d+)>", text):
        code.registers |= {f"{m[2]}{i}": m[1] for i in range(int(m[3]))}
    elif m := re.fullmatch(r"\.reg \.(\w+) (.*)", text):
        code.registers |= dict.fromkeys(split(m[2]), m[1])
    elif m := re.fullmatch(r"\.(local|shared) \.align (\d+) \.(\w+) ([\w$]+)(?:\[(\d+)\])?", text):
        bytes_ = SIZES[m[3]] * int(m[5] or 1)
        if m[1] == "local":
            code.local[m[4]] = align_up(code.local_bytes, int(m[2]))
            code.local_bytes = code.local[m[4]] + bytes_
        else:
            code.shared[m[4]] = align_up(code.shared_bytes, int(m[2]))
            code.shared_bytes = code.shared[m[4]] + bytes_
    elif not text.startswith((".param", ".pragma", ".loc")):
        raise Fault(f"not understood: {text}")


def read_instruction(text: str) -> Instruction:
    m = re.fullmatch(r"(?:@(!?)([%\w]+) )?([\w.:]+) ?(.*)", text)
    if m is None:
        raise Fault(f"not understood: {text}")
    return Instruction(m[2] or "", m[1] == "!", tuple(m[3].split(".")), split(m[4]), text)
