"""Two gloo processes that run functions of a test module side by side, started once for all its tests."""

import gc
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from grl_ext import _backend

SECONDS = 300  # for one function; the machine may be busy


def _serve(rank: int, store: str, requests: Connection) -> None:
    torch.set_num_threads(1)  # sums are added in the same order as in one process
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    compiled = _backend.C
    while (request := requests.recv()) is not None:
        path, function, arguments = request
        _backend.C = compiled if path == "compiled" else None
        torch.manual_seed(0)
        try:
            assert _backend.C is not None or path != "compiled", _backend.why_not
            function(rank, *arguments)
            requests.send(None)
        except BaseException:  # goes to the test as its failure
            requests.send(traceback.format_exc())
    gc.collect()  # a DDP object that outlives its process group can hang the process at exit
    dist.destroy_process_group()


class TwoProcesses:
    def __init__(self, folder: Path) -> None:
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        os.environ["OMP_NUM_THREADS"] = "1"
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(folder / "store"), theirs), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process ends the pipe
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, path: str, function: Callable[..., None], *arguments) -> None:
        """`function(rank, *arguments)` in both, by `path`'s implementation; fails as they do."""
        for pipe in self.pipes:
            pipe.send((path, function, arguments))
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        while waiting:
            answered = wait(list(waiting), SECONDS)
            failures = [f"process {waiting.pop(pipe)}: {failure}" for pipe in answered if (failure := pipe.recv())]
            if failures or not answered:
                self.kill()  # the other may wait for this one for ever
                raise AssertionError(
                    "\n".join(failures) or f"no answer within {SECONDS} seconds from {list(waiting.values())}"
                )
            for pipe in answered:
                waiting.pop(pipe)

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def close(self) -> list[int | None]:
        """Ends both. Returns their exit codes; None for one that hung."""
        for pipe in self.pipes:
            if not pipe.closed and self.alive:
                pipe.send(None)
        for process in self.processes:
            process.join(60)
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes
