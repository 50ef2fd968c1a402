"""PTX's arithmetic on arrays of lanes: a register is an array of unsigned words of its width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

KINDS: dict[str, type] = {
    "pred": np.bool_, "f16": np.float16, "f32": np.float32, "f64": np.float64,
    **{f"{k}{n}": getattr(np, f"{'int' if k == 's' else 'uint'}{n}") for k in "bus" for n in (8, 16, 32, 64)},
}  # fmt: skip
UNSIGNED: dict[int, type] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def words(values: Array) -> Array:
    """The bits of any numbers."""
    return values if values.dtype.kind == "b" else values.view(UNSIGNED[values.dtype.itemsize])


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(values: Array) -> Array:
    """Rounded to nearest, ties to even."""
    bits = np.atleast_1d(values.astype(np.float32)).view(np.uint32).astype(np.uint64)
    odd = bits >> np.uint64(16) & np.uint64(1)
    rounded = (bits + np.uint64(0x7FFF) + odd) >> np.uint64(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def from_float16(bits: Array) -> Array:
    return bits.view(np.float16).astype(np.float32)


def to_float16(values: Array) -> Array:
    return np.atleast_1d(values.astype(np.float16)).view(np.uint16)


def halves(bits: Array) -> tuple[Array, Array]:
    return (bits & np.uint32(0xFFFF)).astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)


def pack(low: Array, high: Array) -> Array:
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


def _truncated(a: Array, b: Array) -> Array:
    """Integer division towards zero; what a division by zero gives is not defined, here 0."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, a.dtype.type(0), quotient)


def _shift(how: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """Shifts by more than the width give what is left when every bit is gone."""

    def shift(a: Array, n: Array) -> Array:
        bits = a.dtype.itemsize * 8
        most = np.minimum(n, n.dtype.type(bits - 1)).astype(a.dtype)
        gone = how(how(a, most), a.dtype.type(1))
        return np.where(n >= bits, gone, how(a, most))

    return shift


def product(a: Array, b: Array, half: str) -> Array:
    """``lo`` (of floats, all) and ``hi`` of the exact product; ``wide`` is all of it."""
    if half == "lo":
        return a * b
    if a.dtype.itemsize == 8:  # only the high half is wider than what numpy has
        assert half == "hi" and a.dtype.kind == "u"
        return _high_of_64(a, b)
    kind = np.dtype(f"{a.dtype.kind}{a.dtype.itemsize * 2}")
    exact = a.astype(kind) * b.astype(kind)
    return exact if half == "wide" else (exact >> kind.type(a.dtype.itemsize * 8)).astype(a.dtype)


def _high_of_64(a: Array, b: Array) -> Array:
    """Long multiplication by halves of 32 bits."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & low, a >> shift, b & low, b >> shift
    middle = a1 * b0 + (a0 * b0 >> shift)
    other = a0 * b1 + (middle & low)
    return a1 * b1 + (middle >> shift) + (other >> shift)


def _remainder(a: Array, b: Array) -> Array:
    return a - _truncated(a, b) * b


BINARY: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "shl": _shift(np.left_shift), "shr": _shift(np.right_shift), "min": np.fmin, "max": np.fmax,
    "div": lambda a, b: a / b if a.dtype.kind == "f" else _truncated(a, b), "rem": _remainder,
}  # fmt: skip
UNARY: dict[str, Callable[..., Array]] = {
    "abs": np.abs, "neg": np.negative, "not": np.invert, "sqrt": np.sqrt, "ex2": np.exp2, "lg2": np.log2,
    "rcp": np.reciprocal, "rsqrt": lambda x: x.dtype.type(1) / np.sqrt(x), "sin": np.sin, "cos": np.cos,
}  # fmt: skip
SHORT: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": lambda a, b, c: a * b + c, "neg": np.negative,
    "min": np.fmin, "max": np.fmax, "abs": np.abs,
}  # fmt: skip
COMPARE: dict[str, Callable[..., Array]] = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def compare(name: str, a: Array, b: Array) -> Array:
    """``ne`` is false and the ``u`` forms are true where a number is NaN."""
    unordered = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros((), np.bool_)
    if name in ("nan", "num"):
        return unordered if name == "nan" else ~unordered
    if name.endswith("u"):
        return compare(name[:-1], a, b) | unordered
    return np.not_equal(a, b) & ~unordered if name == "ne" else COMPARE[name](a, b)


def multiply_add(a: Array, b: Array, c: Array) -> Array:
    """Rounded once where double precision holds the exact product."""
    if a.dtype == np.float32:
        wide = np.multiply(a.astype(np.float64), b, dtype=np.float64)  # two casts at once take twice as long
        return np.add(wide, c, dtype=np.float64).astype(np.float32)
    return a * b + c


def convert(values: Array, to: str, rounding: str | None) -> Array:
    """``cvt`` between numbers; from a float to an integer it saturates, and NaN becomes 0."""
    kind = np.dtype(KINDS[to])
    if values.dtype.kind != "f" or kind.kind == "f":
        if values.dtype.kind == "f" and rounding in ("rni", "rzi", "rmi", "rpi"):
            values = ROUND[rounding](values)
        return values.astype(kind)
    whole = np.nan_to_num(ROUND[rounding or "rzi"](values.astype(np.float64)), nan=0.0)
    limits = np.iinfo(kind)
    low, high = whole <= limits.min, whole >= limits.max
    inside = np.where(low | high, 0.0, whole).astype(kind)
    return np.where(low, kind.type(limits.min), np.where(high, kind.type(limits.max), inside))


ROUND: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil,
}  # fmt: skip


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """``prmt``: four bytes of b:a by four nibbles; a nibble's top bit spreads the byte's sign."""
    source = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros(np.broadcast_shapes(np.shape(source), np.shape(selector)), np.uint32)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        place = (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8)
        byte = (source >> place & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        out |= np.where(nibble & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * i)
    return out


def extract_bits(a: Array, position: Array, length: Array) -> Array:
    """``bfe``: a field, sign-extended for signed words."""
    assert a.dtype.itemsize == 4
    position, length = (np.minimum(x.astype(np.int64) & 255, 32) for x in (position, length))
    wide = a.astype(np.int64)
    field = (wide >> position) & ((np.int64(1) << length) - 1)
    if a.dtype.kind == "i":
        top = np.minimum(position + length - 1, 31)
        field -= np.where((length > 0) & ((wide >> top) & 1 == 1), np.int64(1) << length, 0)
    return field.astype(a.dtype)
