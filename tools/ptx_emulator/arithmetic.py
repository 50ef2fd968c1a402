"""Instructions that compute from registers alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx_emulator import numbers
from ptx_emulator.lanes import Lanes
from ptx_emulator.numbers import UNSIGNED, Array, words
from ptx_emulator.text import Instruction

SHARED_WINDOW = np.uint64(1 << 56)
SHORT = ("bf16", "bf16x2", "f16x2")  # floats that numpy does not have
ROUNDINGS = ("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi")


class Arithmetic(Lanes):
    def _binary(self, i: Instruction) -> None:
        kind = i.modifiers[-1]
        if kind in SHORT:
            return self._short_floats(i)
        d, a, b = i.operands
        second = "u32" if i.name in ("shl", "shr") else kind
        result = numbers.BINARY[i.name](self.value(a, kind), self.value(b, second))
        self.assign(d, np.maximum(result, 0) if "relu" in i.modifiers else result)

    _add = _sub = _and = _or = _xor = _shl = _shr = _min = _max = _rem = _div = _binary

    def _unary(self, i: Instruction) -> None:
        kind = i.modifiers[-1]
        if kind in SHORT:
            return self._short_floats(i)
        d, a = i.operands
        self.assign(d, numbers.UNARY[i.name](self.value(a, kind)))

    _abs = _neg = _not = _sqrt = _rsqrt = _rcp = _ex2 = _lg2 = _sin = _cos = _unary

    def _short_floats(self, i: Instruction) -> None:
        """In float32, rounded once."""
        kind = i.modifiers[-1]
        pairs, wide = kind.endswith("x2"), kind.startswith("bf16")
        d, *sources = i.operands
        bits = [np.atleast_1d(self.value(s, "u32" if pairs else "u16")) for s in sources]
        parts = [numbers.halves(b) if pairs else (b,) for b in bits]
        read: Callable[[Array], Array] = numbers.from_bfloat16 if wide else numbers.from_float16
        write = numbers.to_bfloat16 if wide else numbers.to_float16
        out = [write(numbers.SHORT[i.name](*(read(p[h]) for p in parts))) for h in range(1 + pairs)]
        self.assign(d, numbers.pack(*out) if pairs else out[0])

    def _mov(self, i: Instruction) -> None:
        d, source = i.operands
        kind = i.modifiers[-1]
        word = self.value(source, kind)
        if not isinstance(d, tuple):
            return self.assign(d, word)
        width = int(kind[1:]) // len(d)
        for n, part in enumerate(d):
            self.assign(part, (word >> word.dtype.type(n * width)).astype(UNSIGNED[width // 8]))

    def _cvta(self, i: Instruction) -> None:
        """Global addresses are generic ones; shared ones have a window of their own, as a pointer may not be null."""
        d, a = i.operands
        word = self.value(a, i.modifiers[-1])
        if "shared" in i.modifiers:
            word = word - SHARED_WINDOW if "to" in i.modifiers else word + SHARED_WINDOW
        self.assign(d, word)

    def _mul(self, i: Instruction) -> None:
        kind = i.modifiers[-1]
        if kind in SHORT:
            return self._short_floats(i)
        d, a, b = i.operands
        half = next((m for m in i.modifiers if m in ("lo", "hi", "wide")), "lo")
        self.assign(d, numbers.product(self.value(a, kind), self.value(b, kind), half))

    def _mad(self, i: Instruction) -> None:
        d, a, b, c = i.operands
        kind = i.modifiers[-1]
        half = next(m for m in i.modifiers if m in ("lo", "hi", "wide"))
        third = f"{kind[0]}{int(kind[1:]) * 2}" if half == "wide" else kind
        self.assign(d, numbers.product(self.value(a, kind), self.value(b, kind), half) + self.value(c, third))

    def _fma(self, i: Instruction) -> None:
        kind = i.modifiers[-1]
        if kind in SHORT:
            return self._short_floats(i)
        d, *abc = i.operands
        self.assign(d, numbers.multiply_add(*(self.value(x, kind) for x in abc)))

    def _setp(self, i: Instruction) -> None:
        kind = i.modifiers[-1]
        if kind in ("f16x2", "bf16x2"):  # a predicate for each half
            *to, a, b = i.operands
            read = numbers.from_bfloat16 if kind == "bf16x2" else numbers.from_float16
            pairs = [numbers.halves(np.atleast_1d(self.value(s, "u32"))) for s in (a, b)]
            for d, x, y in zip(to, *pairs, strict=True):
                self.assign(d, numbers.compare(i.modifiers[0], read(x), read(y)))
            return
        d, a, b, *other = i.operands
        x, y = (
            numbers.from_bfloat16(np.atleast_1d(self.value(s, "u16")))
            if kind == "bf16"
            else self.value(s, kind)
            for s in (a, b)
        )
        result = numbers.compare(i.modifiers[0], x, y)
        if other:
            result = numbers.BINARY[i.modifiers[1]](result, self.value(other[0], "pred"))
        self.assign(d, result)

    def _selp(self, i: Instruction) -> None:
        d, a, b, p = i.operands
        kind = i.modifiers[-1]
        self.assign(d, np.where(self.value(p, "pred"), self.value(a, kind), self.value(b, kind)))

    def _cvt(self, i: Instruction) -> None:
        to, kind = i.modifiers[-2:]
        d, *sources = i.operands
        if kind == "bf16":
            values = [numbers.from_bfloat16(self.value(s, "u16")) for s in sources]
        else:
            values = [np.asarray(self.value(s, kind)) for s in sources]
        if to in ("bf16", "bf16x2", "f16x2"):
            write = numbers.to_bfloat16 if to.startswith("bf16") else numbers.to_float16
            bits = [write(v) for v in values]
            self.assign(d, numbers.pack(bits[1], bits[0]) if to.endswith("x2") else bits[0])
        else:
            rounding = next((m for m in i.modifiers if m in ROUNDINGS), None)
            self.assign(d, numbers.convert(values[0], to, rounding))

    def _prmt(self, i: Instruction) -> None:
        d, a, b, selector = i.operands
        sources = (np.atleast_1d(self.value(x, "u32")) for x in (a, b, selector))
        self.assign(d, numbers.permute_bytes(*sources))

    def _bfe(self, i: Instruction) -> None:
        d, a, position, length = i.operands
        word = self.value(a, i.modifiers[-1])
        self.assign(d, numbers.extract_bits(word, self.value(position, "u32"), self.value(length, "u32")))

    def _bfi(self, i: Instruction) -> None:
        d, a, b, position, length = i.operands
        field, word, p, n = (self.value(x, "u32").astype(np.uint64) for x in (a, b, position, length))
        mask = (np.uint64(1) << n) - np.uint64(1) << p
        self.assign(d, ((word & ~mask) | (field << p & mask)).astype(np.uint32))

    def _lop3(self, i: Instruction) -> None:
        """Any function of three bits: ``table`` has its value for each of the eight."""
        d, *abc, table = i.operands
        a, b, c = (words(np.atleast_1d(self.value(x, "u32"))) for x in abc)
        out = np.zeros((), np.uint32)
        for n in range(8):
            if int(str(table)) >> n & 1:
                out = out | (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
        self.assign(d, out)

    def _shf(self, i: Instruction) -> None:
        """A word of high:low, shifted."""
        d, *sources = i.operands
        low, high, by = (self.value(x, "u32").astype(np.uint64) for x in sources)
        both = low | high << np.uint64(32)
        by = by & np.uint64(31) if "wrap" in i.modifiers else np.minimum(by, np.uint64(32))
        shifted = both << by >> np.uint64(32) if i.modifiers[0] == "l" else both >> by
        self.assign(d, shifted.astype(np.uint32))
