"""Races in shared memory: two threads that access the same byte, one of them to write, with no barrier between. Which
of them came first here does not matter, so what is found does not depend on luck."""

from typing import NamedTuple

import numpy as np

from ptx.values import Array, Fault

MOST_BYTES = 1 << 22  # to be kept at a time


class Access(NamedTuple):
    where: Array  # addresses
    size: int
    threads: Array
    phases: Array  # how many barriers of its block each thread has passed,
    warp_phases: Array  # and of its warp
    writes: bool
    text: str


class SharedAccesses:
    """The block's barrier orders all its threads, bar.warp.sync those of a warp; shuffles and votes order nothing."""

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        self.kept: list[Access] = []
        self.bytes = 0

    def add(self, access: Access) -> None:
        """If it is of shared memory: a generic address may be."""
        inside = (access.where >= self.begin) & (access.where < self.end)
        if not inside.all():
            if not inside.any():
                return
            arrays = (access.where, access.threads, access.phases, access.warp_phases)
            where, threads, phases, warp_phases = (array[inside] for array in arrays)
            access = Access(where, access.size, threads, phases, warp_phases, access.writes, access.text)
        self.kept.append(access)
        self.bytes += access.size * access.where.size

    def check(self, phase: int) -> None:
        """All that is kept of phases before this one, that no thread of the grid is still in."""
        old = [access for access in self.kept if int(access.phases.max()) < phase]
        self.kept = [access for access in self.kept if int(access.phases.max()) >= phase]
        self.bytes = sum(access.size * access.where.size for access in self.kept)
        if not old:
            return

        def by_byte(values: list[Array]) -> Array:
            return np.concatenate([np.repeat(v, access.size) for v, access in zip(values, old, strict=True)])

        address = np.concatenate([(a.where[:, None] + np.arange(a.size)).reshape(-1) - self.begin for a in old])
        phases, warp_phases = by_byte([a.phases for a in old]), by_byte([a.warp_phases for a in old])
        threads = by_byte([a.threads for a in old])
        writes = by_byte([np.full(a.where.size, a.writes) for a in old])
        which = by_byte([np.full(a.where.size, k) for k, a in enumerate(old)])

        def find(key: Array, owner: Array) -> None:
            """A group of one key that has several owners and a write."""
            order = np.argsort(key, kind="stable")
            begins = np.flatnonzero(np.diff(key[order], prepend=-1))
            owners = owner[order]
            several = np.minimum.reduceat(owners, begins) != np.maximum.reduceat(owners, begins)
            bad = np.flatnonzero(several & np.logical_or.reduceat(writes[order], begins))
            if bad.size:
                end = begins[bad[0] + 1] if bad[0] + 1 < begins.size else order.size
                group = order[begins[bad[0]] : end]
                write = group[writes[group]][0]
                other = group[owner[group] != owner[write]][0]
                raise Fault(
                    f"race in shared memory: thread {threads[write]} at {old[which[write]].text}; "
                    f"thread {threads[other]} at {old[which[other]].text}"
                )

        key = address << 15 | phases
        find(key, threads // 32)
        # What is left of the groups with a write is of one warp each.
        find(key << 15 | warp_phases % (1 << 15), threads)
