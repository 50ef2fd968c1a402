"""What a pass over files has read, piece by piece, so that a later pass sees when they were changed meanwhile."""

from __future__ import annotations

import hashlib
import zlib
from array import array

from cropi.errors import CropiError


class Pieces:
    """The length and CRC-32 of every line (of a table: of every MiB), in the order in which they were read."""

    def __init__(self) -> None:
        self._held, self._whole = array("Q"), hashlib.sha256()

    def add(self, piece: bytes) -> None:
        """Take note of the next one."""
        self._whole.update(piece)
        self._held.append(_digest(piece))

    def fingerprint(self) -> str:
        """SHA-256 of all pieces so far."""
        return self._whole.hexdigest()

    def again(self, names: str) -> Again:
        """What compares a later pass with this one; ``names`` are the files, for messages."""
        return Again(self._held, names)


class Again:
    """A later pass over the same files."""

    def __init__(self, held: array[int], names: str) -> None:
        self._held, self._names, self._count = held, names, 0

    def check(self, piece: bytes) -> None:
        """Compare the next piece.

        Raises:
            CropiError: it is not what was read before, or there was none.
        """
        if self._count >= len(self._held):
            raise CropiError(self._changed("has grown"))
        if self._held[self._count] != _digest(piece):
            raise CropiError(self._changed(f"line {self._count + 1} is another one"))
        self._count += 1

    def finish(self) -> None:
        """The pass is over.

        Raises:
            CropiError: something is missing at the end.
        """
        if self._count < len(self._held):
            raise CropiError(self._changed("is shorter"))

    def _changed(self, how: str) -> str:
        return (
            f"{self._names} was changed while this job used it: it {how}; what is stored comes from the file as it "
            "was. Put that back and run the same command again, or give a new --out"
        )


def _digest(piece: bytes) -> int:
    return (len(piece) & 0xFFFFFFFF) << 32 | zlib.crc32(piece)
