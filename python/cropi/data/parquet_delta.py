"""Pages of texts that each begin as the text before (DELTA_BYTE_ARRAY): a small page may stand for any number of bytes.

https://parquet.apache.org/docs/file-format/data-pages/encodings/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO

import numpy as np

from cropi.data.parquet_codecs import unpacked
from cropi.data.thrift import Thrift


@dataclass(frozen=True)
class DeltaPage:
    """Where the bytes of a page begin, how many there are packed and unpacked, how many values it has, the number of
    what packed it (0: nothing), and the bytes of levels before what is packed; None: the levels are packed, too."""

    at: int
    packed: int
    size: int
    count: int
    codec: int
    levels: int | None

    def most(self, file: IO[bytes] | None = None, kinds: int = 0) -> int:
        """The bytes that its texts have in common with those before at most; with the file as many as there are.

        Args:
            file: the file.
            kinds: how many kinds of levels the column has, 0 to 2.
        """
        most = self.count * self.size
        if file is None:
            return most
        file.seek(self.at)
        data = file.read(self.packed)
        try:
            if self.levels is not None:
                data = unpacked(data[self.levels :], self.size - self.levels, self.codec)
            else:
                data = unpacked(data, self.size, self.codec)
                for _ in range(kinds):
                    data = data[4 + int.from_bytes(data[:4], "little") :]
            return min(most, total(data))
        except (ValueError, LookupError):
            return most


def total(data: bytes) -> int:
    """The sum of the whole numbers at the beginning of some bytes, as DELTA_BINARY_PACKED writes them.

    Raises:
        ValueError, LookupError: one is negative, or they are damaged.
    """
    held = Thrift(data)
    block, parts, left = held.size(), held.size(), held.size()
    last = made = held.number()
    each, left = block // parts if parts else 0, left - 1
    if last < 0 or each % 8 or not 0 < each < 2**16:
        raise ValueError("damaged")
    while left > 0:
        step, widths = held.number(), held.take(parts)
        if abs(step) > 2**32 or max(widths) > 32:
            raise ValueError("a length of more than 32 bits")
        for width in widths:
            count = min(each, left)
            if count <= 0:
                break
            if width:
                bits = np.unpackbits(np.frombuffer(held.take(each * width // 8), np.uint8), bitorder="little")
                steps = bits.reshape(each, width)[:count] @ (1 << np.arange(width, dtype=np.int64))
                values = last + np.cumsum(steps + step)
                least, last, some = int(values.min()), int(values[-1]), int(values.sum())
            else:
                some = count * last + step * count * (count + 1) // 2
                last += step * count
                least = last
            if least < 0:
                raise ValueError("a negative length")
            made, left = made + some, left - count
    return made
