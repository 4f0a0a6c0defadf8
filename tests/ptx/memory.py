"""The process's own memory as numpy arrays: a device address is an address here."""

import numpy as np

from ptx.values import UNSIGNED, Array, Fault

FIRST = 1 << 16  # nothing lies below, and numpy takes no array at address 0
END = 1 << 47


class _Everything:
    def __init__(self, size: int) -> None:
        shape = ((END - FIRST) // size,)
        self.__array_interface__ = {"data": (FIRST, False), "shape": shape, "typestr": UNSIGNED[size].str, "version": 3}


_WORDS = {size: np.asarray(_Everything(size)) for size in UNSIGNED}


def check(addresses: Array, size: int, what: str) -> None:
    """That accesses of this size lie in memory and are aligned to it."""
    if (addresses % size).any():
        raise Fault(f"misaligned address {hex(int(addresses[addresses % size != 0][0]))}: {what}")
    if addresses.size and int(addresses.min()) < FIRST:
        raise Fault(f"address {hex(int(addresses.min()))}: {what}")


def load(addresses: Array, size: int, at: int = 0) -> Array:
    """The words of `size` bytes, `at` words past each address."""
    return _WORDS[size][(addresses - FIRST) // size + at]


def store(addresses: Array, size: int, values: Array, at: int = 0) -> None:
    _WORDS[size][(addresses - FIRST) // size + at] = values


def copy(to: Array, source: Array, size: int) -> None:
    for at in range(size // 4):
        store(to, 4, load(source, 4, at), at)
