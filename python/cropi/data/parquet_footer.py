"""What a parquet file's footer says of its columns, read without pyarrow, which ends the process at some damaged ones.

The footer is a structure in Thrift's compact form: https://parquet.apache.org/docs/file-format/metadata/.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cropi.errors import CropiError
from cropi.files import open_to_read

MAGIC = b"PAR1"
# Fields by their numbers: of the file, of a group of rows, of a column's part in it.
GROUPS, COLUMNS, PART, VALUES, UNPACKED, DICTIONARY = 4, 1, 3, 5, 6, 11


@dataclass(frozen=True)
class Part:
    """A column in one group of rows: how many values, the bytes that they have unpacked and coded, and whether there is
    a dictionary."""

    values: int
    size: int
    coded: bool


def parts_of(path: Path) -> list[list[Part]]:
    """The parts by groups of rows, and in them by columns.

    Raises:
        CropiError: the footer is damaged.
    """
    with open_to_read(path) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 8))
        size, magic = int.from_bytes(file.read(4), "little"), file.read(4)
        file.seek(max(0, end - 8 - size))
        data = file.read(size) if magic == MAGIC else b""
    try:
        held = _Thrift(data).table()
        return [[_part(column[PART]) for column in group[COLUMNS]] for group in held.get(GROUPS, ())]
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CropiError(
            f"{path}: the parquet file is damaged or was cut: its footer cannot be read"
        ) from error


def _part(held: dict[int, Any]) -> Part:
    return Part(int(held[VALUES]), int(held[UNPACKED]), DICTIONARY in held)


class _Thrift:
    """Values one after the other; of those that are of no use nothing is kept but that they were there."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def table(self) -> dict[int, Any]:
        """A structure: values by the numbers of their fields."""
        made: dict[int, Any] = {}
        number = 0
        while byte := self._byte():
            number = number + (byte >> 4) if byte >> 4 else self._number()
            made[number] = self._value(byte & 15, within=False)
        return made

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _size(self) -> int:
        made = shift = 0
        while True:
            byte = self._byte()
            made |= (byte & 127) << shift
            shift += 7
            if byte < 128 or shift > 63:
                return made

    def _number(self) -> int:
        size = self._size()
        return (size >> 1) ^ -(size & 1)

    def _pass(self, size: int) -> None:
        if size > len(self._data) - self._at:
            raise ValueError("it ends within a value")
        self._at += size

    def _value(self, kind: int, within: bool) -> Any:
        """A value by its kind; truth values are their kind, but for those ``within`` a list."""
        if kind in (1, 2):
            return self._byte() == 1 if within else kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._number()
        if kind in (7, 8):
            return self._pass(8 if kind == 7 else self._size())
        if kind in (9, 10):
            return list(self._items())
        if kind == 11:
            return self._map()
        if kind == 12:
            return self.table()
        raise ValueError(f"a value of the kind {kind}")

    def _items(self) -> Iterator[Any]:
        byte = self._byte()
        size = byte >> 4 if byte >> 4 < 15 else self._size()
        return (self._value(byte & 15, within=True) for _ in range(size))

    def _map(self) -> None:
        if size := self._size():
            kinds = self._byte()
            for _ in range(size):
                self._value(kinds >> 4, within=True)
                self._value(kinds & 15, within=True)
