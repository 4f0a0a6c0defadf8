"""A launch: which threads execute which instruction when.

Threads at the same instruction execute it together, the ones furthest behind first. A barrier waits for the block, a
warp operation for the warp. Threads that wait for some that never come are a fault, as are those that meet in
different barriers.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from ptx import operations, warp
from ptx.module import Instruction, Kernel
from ptx.operations import Step
from ptx.races import MOST_BYTES
from ptx.threads import WARP, Threads, Who, compact
from ptx.values import Fault


class State(IntEnum):
    RUNS = 0
    WAITS_FOR_BLOCK = 1
    WAITS_FOR_WARP = 2
    RETURNED = 3


@dataclass
class Counts:
    """What a launch executed, between its barriers and in all: warp instructions by their name, and `wavefronts` of
    shared memory."""

    phases: list[Counter[str]] = field(default_factory=lambda: [Counter()])

    @property
    def total(self) -> Counter[str]:
        return sum(self.phases, Counter())


class Launch:
    """run() executes the kernel. With `seed`, one warp runs at a time, as far as it gets, in a random order: what is
    wrong only if a warp is late or early then shows. With `races`, races in shared memory are faults. With `counts`,
    what is executed is counted."""

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int],
        block_threads: int,
        dynamic_bytes: int,
        parameters: bytes,
        seed: int | None = None,
        races: bool = False,
        counts: Counts | None = None,
    ) -> None:
        if kernel.max_threads and block_threads > kernel.max_threads:
            raise Fault(f"{block_threads} threads in a block, where the kernel may have {kernel.max_threads}")
        self.threads = Threads(kernel, grid, block_threads, dynamic_bytes, parameters)
        if races:
            self.threads.look_for_races()
        self.counts = counts
        self.threads.tally = counts.phases[-1] if counts else None
        self.random = None if seed is None else np.random.default_rng(seed)
        self.program = program_of(kernel)
        self.pc = np.zeros(self.threads.count, np.int64)
        self.state = np.full(self.threads.count, State.RUNS, np.int8)
        self.barrier = np.zeros(self.threads.count, np.int64)  # which one is waited at

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while (running := self.state == State.RUNS).any():
                if self.random is not None:
                    running &= self.threads.warp == self.random.choice(np.unique(self.threads.warp[running]))
                at = int(self.pc[running].min())
                mine = running & (self.pc == at)
                others = self.pc[running & ~mine]
                end = len(self.program.steps)
                self.advance(compact(np.flatnonzero(mine)), at, int(others.min()) if others.size else end, mine.all())
        if (self.state != State.RETURNED).any():
            waiting = self.state != State.RETURNED
            places = Counter(self.program.instructions[at].text for at in self.pc[waiting])
            raise Fault(f"threads wait in vain: {dict(places)}; {np.sum(~waiting)} have returned")
        if self.threads.accesses is not None:
            self.threads.accesses.check(int(self.threads.phase.max()) + 1)

    def advance(self, who: Who, at: int, limit: int, all_threads: bool) -> None:
        """From instruction `at` on until the threads part, wait, return or come to `limit`, where others are."""
        program, registers = self.program, self.threads.registers
        while at < limit:
            instruction = program.instructions[at]
            active = who
            if self.counts is not None:
                self.count(who, instruction)
            if instruction.guard:
                holds = registers[instruction.guard][who]
                if instruction.negated:
                    holds = ~holds
                if not holds.all():
                    if not holds.any():
                        at += 1
                        continue
                    active = compact(self.threads.numbers[who][holds])
            step = program.steps[at]
            if step is None:
                step = program.prepare(at)
            if step is not control:
                step(self.threads, active)
                at += 1
            elif instruction.opcode[0] == "bra":
                target = program.labels[instruction.operands[0]]
                if active is not who:
                    self.pc[who] = at + 1
                    self.pc[active] = target
                    return
                at = target
                if limit < len(program.steps):  # there are others, who may now be behind
                    break
            elif instruction.opcode[0] in ("ret", "exit"):
                self.pc[who] = at + 1
                self.state[active] = State.RETURNED
                return
            elif active is not who:
                raise Fault(f"not all threads execute this: {instruction.text}")
            elif warp.is_warp_operation(instruction):
                if not self.warps_are_whole(who, all_threads):
                    self.wait_for_warp(who, at)
                    return
                program.together[at](self.threads, who)
                at += 1
            elif all_threads and len(instruction.operands) == 1:
                self.pass_barrier(who)
                at += 1
            else:
                self.wait_for_block(who, at, instruction)
                return
        self.pc[who] = at
        if at == len(program.steps):
            self.state[who] = State.RETURNED

    def count(self, who: Who, instruction: Instruction) -> None:
        name = ".".join(instruction.opcode)
        self.threads.tally[name] += np.unique(self.threads.warp[who]).size

    def warps_are_whole(self, who: Who, all_threads: bool) -> bool:
        if all_threads:
            return True
        if isinstance(who, slice):
            return who.start % WARP == 0 and who.stop % WARP == 0
        return bool((np.bincount(self.threads.warp[who]) % WARP == 0).all())

    def wait_for_warp(self, who: Who, at: int) -> None:
        """The last to come execute it for all of their warp."""
        self.pc[who] = at
        self.state[who] = State.WAITS_FOR_WARP
        here = (self.state == State.WAITS_FOR_WARP) & (self.pc == at)
        whole = (
            here
            & (np.bincount(self.threads.warp[here], minlength=self.threads.count // WARP) == WARP)[self.threads.warp]
        )
        if whole.any():
            ready = compact(np.flatnonzero(whole))
            self.program.together[at](self.threads, ready)
            self.state[ready] = State.RUNS
            self.pc[ready] = at + 1

    def wait_for_block(self, who: Who, at: int, instruction: Instruction) -> None:
        operands = [int(operand) for operand in instruction.operands]
        number, needed = operands[0], operands[1] if len(operands) > 1 else self.threads.block_threads
        self.pc[who] = at
        self.state[who] = State.WAITS_FOR_BLOCK
        self.barrier[who] = number
        for block in np.unique(self.threads.block[who]):
            in_block = self.threads.block == block
            waiting = in_block & (self.state == State.WAITS_FOR_BLOCK) & (self.barrier == number)
            if int(waiting.sum()) == needed:
                if len(operands) == 1 and np.unique(self.pc[waiting]).size > 1:
                    places = sorted(set(self.pc[waiting].tolist()))
                    raise Fault(f"threads meet in different barriers: instructions {places}")
                self.state[waiting] = State.RUNS
                self.pc[waiting] += 1
                self.pass_barrier(np.flatnonzero(waiting))

    def pass_barrier(self, who: Who) -> None:
        threads = self.threads
        threads.phase[who] += 1
        if threads.accesses is not None and threads.accesses.bytes > MOST_BYTES:
            threads.accesses.check(int(threads.phase[self.state != State.RETURNED].min()))
        if self.counts is not None and not (self.state == State.WAITS_FOR_BLOCK).any():
            self.counts.phases.append(Counter())
            self.threads.tally = self.counts.phases[-1]


def is_barrier(i: Instruction) -> bool:
    """Of the block."""
    return i.opcode[0] in ("bar", "barrier") and i.opcode[1] in ("sync", "cta") and not i.has("arrive")


def control(threads: Threads, who: Who) -> None:
    """Stands for what the launch itself does: branches, returns, barriers, warp operations."""
    raise AssertionError


@dataclass
class Program:
    """A kernel's instructions, made ready one by one when they are first executed: much of a kernel never is."""

    kernel: Kernel
    instructions: list[Instruction]
    labels: dict[str, int]
    steps: list[Step | None]
    together: dict[int, Step] = field(default_factory=dict)

    @property
    def barriers_met(self) -> list[int]:
        """Which of the kernel's barriers any launch has come to, counted in the order of the text."""
        barriers = [at for at, i in enumerate(self.instructions) if is_barrier(i)]
        return [number for number, at in enumerate(barriers) if self.steps[at] is not None]

    def prepare(self, at: int) -> Step:
        instruction = self.instructions[at]
        try:
            self.steps[at] = self.step(at, instruction)
        except (KeyError, IndexError, ValueError) as error:
            raise Fault(f"not understood: {instruction.text} ({error})") from error
        return self.steps[at]

    def step(self, at: int, instruction: Instruction) -> Step:
        name = instruction.opcode[0]
        if warp.is_warp_operation(instruction):
            self.together[at] = warp.make(self.kernel, instruction)
        elif name not in ("bra", "ret", "exit") and not is_barrier(instruction):
            return operations.make(self.kernel, instruction)
        return control


_PROGRAMS: dict[int, Program] = {}  # by the id of the kernel, which the program keeps alive


def program_of(kernel: Kernel) -> Program:
    if id(kernel) not in _PROGRAMS:
        code = kernel.code
        _PROGRAMS[id(kernel)] = Program(kernel, code.instructions, code.labels, [None] * len(code.instructions))
    return _PROGRAMS[id(kernel)]
