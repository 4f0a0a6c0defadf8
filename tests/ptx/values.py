"""PTX's types as numpy's. bf16 has none there: it is kept as bits."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray

SIZES = {f"{kind}{8 * size}": size for kind in "bus" for size in (1, 2, 4, 8)}
SIZES |= {"f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "f32": 4, "f64": 8, "pred": 1, "b128": 16}

UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}

DTYPES = {kind: UNSIGNED[size] for kind, size in SIZES.items() if size in UNSIGNED}
DTYPES |= {f"s{8 * size}": np.dtype(f"i{size}") for size in UNSIGNED}
DTYPES |= {f"f{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)}
DTYPES["pred"] = np.dtype(bool)


class Fault(Exception):
    """What a device would stop at, or do wrong: a bad access, threads that wait in vain, a failed assertion. Also an
    instruction that is not known here."""


def bf16_to_f32(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: Array) -> Array:
    """To the nearest, of two the even one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def widen(bits: Array, kind: str) -> Array:
    """Halves, given by their bits, to f32."""
    return bf16_to_f32(bits) if kind == "bf16" else np.asarray(bits, np.uint16).view(np.float16).astype(np.float32)


def narrow(values: Array, kind: str) -> Array:
    """To the bits of halves."""
    if kind == "bf16":
        return f32_to_bf16(np.asarray(values, np.float32))
    return np.asarray(values).astype(np.float16).view(np.uint16)


def halves_of(pairs: Array) -> tuple[Array, Array]:
    """The lower and the upper 16 bits."""
    return (pairs & np.uint32(0xFFFF)).astype(np.uint16), (pairs >> np.uint32(16)).astype(np.uint16)


def pair_of(lower: Array, upper: Array) -> Array:
    return lower.astype(np.uint32) | (upper.astype(np.uint32) << np.uint32(16))


def to_f32(values: Array, rounding: str) -> Array:
    """f64 to f32, rounded as PTX's suffix says: rn to the nearest, rz to zero, rm down, rp up."""
    nearest = np.asarray(values).astype(np.float32)
    if rounding == "rn":
        return nearest
    down = np.where(nearest > values, np.nextafter(nearest, np.float32(-np.inf)), nearest)
    up = np.where(nearest < values, np.nextafter(nearest, np.float32(np.inf)), nearest)
    if rounding == "rz":
        return np.where(values < 0, up, down)
    return down if rounding == "rm" else up
