"""What the pages of a parquet file stand for by their own headers, which pyarrow goes by, whatever the footer says.

Pages and encodings: https://parquet.apache.org/docs/file-format/data-pages/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, Any

from cropi.data.thrift import Thrift
from cropi.errors import optional

# Fields of a page's header by their numbers; by the kind of page the field of what it alone has; fields of that.
KIND, UNPACKED, PACKED = 1, 2, 3
DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
PAGES = {DATA_PAGE: 5, DICTIONARY_PAGE: 7, DATA_PAGE_V2: 8}
COUNT, ENCODING, ENCODING_V2 = 1, 2, 4
BY_DICTIONARY = (2, 8)
CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
LARGEST_HEADER = 2**24


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
        if file is None or self.codec and self.codec not in CODECS:
            return most
        file.seek(self.at)
        data = file.read(self.packed)
        if self.codec:
            pyarrow = optional("pyarrow")
            try:
                data = pyarrow.decompress(data, self.size, CODECS[self.codec], asbytes=True)
            except (pyarrow.ArrowException, OSError):
                return most  # pyarrow will say so when it reads the page
        found = at = 0
        for _ in range(self.count):
            size = int.from_bytes(data[at : at + 4], "little")
            at += 4 + size
            found = max(found, size)
        return min(found, most)


@dataclass(frozen=True)
class Part:
    """A column in one group of rows: how many values, the bytes of its pages unpacked, and how many values name an
    entry of the dictionary."""

    values: int
    size: int
    coded: int
    dictionary: Dictionary | None

    def most(self, file: IO[bytes] | None = None) -> int:
        """The bytes that its texts may take; with the file, whose dictionary is read, fewer."""
        longest = self.dictionary.longest(file) if self.dictionary else 0
        return self.size + self.coded * (4 + longest)


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
    dictionary = None
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
            coded += count * (page.get(ENCODING_V2 if kind == DATA_PAGE_V2 else ENCODING) in BY_DICTIONARY)
        at += packed
    return Part(seen, size, coded, dictionary)


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
