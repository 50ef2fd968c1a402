"""What the pages of a parquet file stand for by their own headers, which pyarrow goes by, whatever the footer says.

Both are read without pyarrow, which ends the process at some damaged ones. Pages and encodings:
https://parquet.apache.org/docs/file-format/data-pages/; the footer: https://parquet.apache.org/docs/file-format/metadata/.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from struct import Struct, error
from typing import IO, Any

from cropi.data.parquet_codecs import unpacked
from cropi.data.parquet_delta import DeltaPage
from cropi.data.thrift import Thrift
from cropi.errors import CropiError
from cropi.files import check_no_pipe, open_to_read

MAGIC = b"PAR1"
# Fields by their numbers: of the file, of a group of rows, of a column's part in it.
GROUPS, COLUMNS, PART, CODEC, VALUES, DATA, DICTIONARY = 4, 1, 3, 4, 5, 9, 11
# Fields of a page's header by their numbers; by the kind of page the field of what it alone has; fields of that.
KIND, UNPACKED, PACKED = 1, 2, 3
DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
PAGES = {DATA_PAGE: 5, DICTIONARY_PAGE: 7, DATA_PAGE_V2: 8}
COUNT, ENCODING, ENCODING_V2, LEVELS, IS_PACKED = 1, 2, 4, (5, 6), 7
BY_DICTIONARY = (2, 8)
BY_DELTAS = 7
LARGEST_HEADER = 2**24
_size_at = Struct("<I").unpack_from


@dataclass(frozen=True)
class Dictionary:
    """The page of a dictionary: where its bytes begin, how many there are packed and unpacked, how many entries it has,
    and the number of what packed it."""

    at: int
    packed: int
    size: int
    count: int
    codec: int

    def longest(self, file: IO[bytes] | None = None) -> int:
        """The bytes of the longest text at most; with the file those of the one that is the longest."""
        most = max(0, self.size - 4 * self.count)
        if file is None:
            return most
        file.seek(self.at)
        try:
            data = unpacked(file.read(self.packed), self.size, self.codec)
        except ValueError:
            return most  # pyarrow will say so when it reads the page
        found = at = 0
        try:
            for _ in range(self.count):
                (size,) = _size_at(data, at)
                at += 4 + size
                if size > found:  # max() takes twice as long as all of this
                    found = size
        except error:
            pass  # the page ends before its last entry
        return min(found, most)


@dataclass(frozen=True)
class Part:
    """A column in one group of rows: how many values, the bytes of its pages unpacked, how many values name an entry of
    the dictionary, and the pages whose texts begin as others."""

    values: int
    size: int
    coded: int
    dictionary: Dictionary | None
    deltas: tuple[DeltaPage, ...]

    def most(self, file: IO[bytes] | None = None, levels: int = 0) -> int:
        """The bytes that its texts may take; with the file, of which dictionaries and lengths are read, fewer.

        Args:
            file: the file.
            levels: how many kinds of them the column has: 0 to 2.
        """
        longest = self.dictionary.longest(file) if self.dictionary else 0
        return (
            self.size
            + self.coded * (4 + longest)
            + sum(4 * page.count + page.most(file, levels) for page in self.deltas)
        )


def parts_of(path: Path) -> list[list[Part]]:
    """The parts of a parquet file by groups of rows, and in them by columns.

    Raises:
        CropiError: the footer or the header of a page is damaged.
    """
    check_no_pipe(path)
    with open_to_read(path) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 8))
        size, magic = int.from_bytes(file.read(4), "little"), file.read(4)
        file.seek(max(0, end - 8 - size))
        data = file.read(size) if magic == MAGIC else b""
        what = "footer"
        try:
            groups = Thrift(data).table().get(GROUPS, ())
            what = "page"
            return [[_part(file, column[PART]) for column in group[COLUMNS]] for group in groups]
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CropiError(
                f"{path}: the parquet file is damaged or was cut: its {what} cannot be read"
            ) from error


def _part(file: IO[bytes], held: dict[int, Any]) -> Part:
    first = held[DATA]
    if 0 < held.get(DICTIONARY, 0) < first:
        first = held[DICTIONARY]
    return part_of(file, int(first), int(held[VALUES]), int(held[CODEC]))


def part_of(file: IO[bytes], at: int, values: int, codec: int) -> Part:
    """A column's part whose first page begins at a place.

    Args:
        file: the file.
        at: the place.
        values: how many there are by the footer, so that no page is read once there have been so many.
        codec: the number of what packed the pages.

    Raises:
        ValueError, LookupError, TypeError: a header is damaged.
    """
    seen = size = coded = 0
    dictionary, deltas = None, list[DeltaPage]()
    while seen < values:
        held, at = _header(file, at)
        packed, unpacked = int(held[PACKED]), int(held[UNPACKED])
        kind = held[KIND]
        page = held[PAGES[kind]] if kind in PAGES else {COUNT: 0}  # of an index
        count = int(page[COUNT])
        if min(packed, unpacked, count) < 0:
            raise ValueError("a page of negative size")
        size += max(packed, unpacked)
        if kind == DICTIONARY_PAGE:
            dictionary = Dictionary(at, packed, max(packed, unpacked), count, codec)
        else:
            seen += count
            encoding = page.get(ENCODING_V2 if kind == DATA_PAGE_V2 else ENCODING)
            coded += count * (encoding in BY_DICTIONARY)
            if encoding == BY_DELTAS:
                levels = sum(int(page[field]) for field in LEVELS) if kind == DATA_PAGE_V2 else None
                how = codec if page.get(IS_PACKED, True) else 0
                deltas.append(DeltaPage(at, packed, max(packed, unpacked), count, how, levels))
        at += packed
    return Part(seen, size, coded, dictionary, tuple(deltas))


def _header(file: IO[bytes], at: int) -> tuple[dict[int, Any], int]:
    """The header of the page that begins at a place, and where its bytes begin."""
    size = 256
    if not 0 <= at < 2**62:
        raise ValueError("no place in a file")
    while True:
        file.seek(at)
        data = file.read(size)
        held = Thrift(data)
        try:
            return held.table(), at + held.at
        except (LookupError, ValueError):
            if len(data) < size or size >= LARGEST_HEADER:
                raise
        size *= 8
