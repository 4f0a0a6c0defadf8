"""Runs a test program of tests/cuda_on_cpu, built as a library, with every launch run from PTX.

    python -m ptx.program LIBRARY PTX [ARGUMENT...]

The program's exit status is this one's. A last line names, in JSON, the kernels that ran, and which of its barriers
each has come to; with --counts, what each has executed.
"""

import argparse
import ctypes
import faulthandler
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from ptx.launch import Counts, Launch, program_of
from ptx.module import Kernel, read_module
from ptx.values import Fault

RUN = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_uint64,
    ctypes.c_void_p,
    ctypes.c_uint64,
)


class Launches:
    def __init__(self, kernels: dict[str, Kernel], seed: int | None, races: bool, counts: bool) -> None:
        self.kernels, self.seed, self.races = kernels, seed, races
        self.run: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.counts: defaultdict[str, Counts] | None = defaultdict(Counts) if counts else None

    def __call__(
        self, name: bytes, grid_x: int, grid_y: int, threads: int, dynamic_bytes: int, at: int, parameter_bytes: int
    ) -> int:
        kernel = name.decode()
        self.run[kernel] += 1
        start = time.monotonic()
        try:
            if kernel not in self.kernels:
                raise Fault("there is no such kernel in the PTX")
            seed = None if self.seed is None else self.seed + self.run.total()
            parameters = ctypes.string_at(at, parameter_bytes)
            grid, counts = (grid_x, grid_y), self.counts[kernel] if self.counts is not None else None
            Launch(self.kernels[kernel], grid, threads, dynamic_bytes, parameters, seed, self.races, counts).run()
        except Fault as fault:
            print(f"{kernel}: {fault}", flush=True)
            return 1
        finally:
            self.seconds[kernel] += time.monotonic() - start
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("ptx", type=Path)
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--seed", type=int, help="run one warp at a time, in an order by this number")
    parser.add_argument("--races", action="store_true", help="races in shared memory are faults")
    parser.add_argument("--counts", action="store_true", help="count what each kernel executes")
    parser.add_argument("--times", action="store_true", help="say how long each kernel took")
    options = parser.parse_args(argv)
    faulthandler.enable()
    launches = Launches(read_module(options.ptx.read_text()), options.seed, options.races, options.counts)
    callback = RUN(launches)
    library = ctypes.CDLL(str(options.library.resolve()))
    ctypes.c_void_p.in_dll(library, "cuda_emulation_run_elsewhere").value = ctypes.cast(callback, ctypes.c_void_p).value
    words = [b"program", *(argument.encode() for argument in options.arguments)]
    status = library.main(len(words), (ctypes.c_char_p * (len(words) + 1))(*words, None))
    if options.times:
        for kernel, seconds in launches.seconds.most_common():
            print(f"{seconds:7.2f} s {launches.run[kernel]:5d} launches  {kernel}")
    sys.stdout.flush()
    if launches.counts is not None:
        said = {name: counts.total for name, counts in launches.counts.items()}
    else:
        ran = [name for name in launches.run if name in launches.kernels]
        said = {name: program_of(launches.kernels[name]).barriers_met for name in ran}
    print(json.dumps(said))
    return status


if __name__ == "__main__":
    sys.exit(main())
