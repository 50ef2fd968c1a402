"""Structures in Thrift's compact form, in which parquet files describe themselves:
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Thrift:
    """Values one after the other; of those that are of no use nothing is kept but that they were there.

    Attributes:
        at: where the next value begins.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def table(self) -> dict[int, Any]:
        """A structure: values by the numbers of their fields."""
        made: dict[int, Any] = {}
        number = 0
        while byte := self._byte():
            number = number + (byte >> 4) if byte >> 4 else self.number()
            made[number] = self._value(byte & 15, within=False)
        return made

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def size(self) -> int:
        """A whole number that is not negative."""
        made = shift = 0
        while True:
            byte = self._byte()
            made |= (byte & 127) << shift
            shift += 7
            if byte < 128 or shift > 63:
                return made

    def number(self) -> int:
        """A whole number."""
        size = self.size()
        return (size >> 1) ^ -(size & 1)

    def take(self, size: int) -> bytes:
        """Bytes as they stand there."""
        if not 0 <= size <= len(self._data) - self.at:
            raise ValueError("it ends within a value")
        self.at += size
        return self._data[self.at - size : self.at]

    def _value(self, kind: int, within: bool) -> Any:
        """A value by its kind; truth values are their kind, but for those ``within`` a list."""
        if kind in (1, 2):
            return self._byte() == 1 if within else kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self.number()
        if kind in (7, 8):
            self.take(8 if kind == 7 else self.size())
            return None
        if kind in (9, 10):
            return list(self._items())
        if kind == 11:
            return self._map()
        if kind == 12:
            return self.table()
        raise ValueError(f"a value of the kind {kind}")

    def _items(self) -> Iterator[Any]:
        byte = self._byte()
        size = byte >> 4 if byte >> 4 < 15 else self.size()
        return (self._value(byte & 15, within=True) for _ in range(size))

    def _map(self) -> None:
        if size := self.size():
            kinds = self._byte()
            for _ in range(size):
                self._value(kinds >> 4, within=True)
                self._value(kinds & 15, within=True)
