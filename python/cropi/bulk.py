"""What the objects of a JSON text take, told before they are made: three bytes, ``[],``, become sixty-four."""

from __future__ import annotations

from cropi.errors import CropiError

SMALL = 2**24  # the objects of a smaller text take less than LARGEST
LARGEST = 2**30  # bytes of objects that every file may have; a large file TIMES its own size
TIMES = 4
# By the character that a value has: a number and its place in a list, a list, a table with its first keys, a string
# without its characters.
BYTES = {b",": 36, b"[": 90, b"{": 240, b'"': 25}


def check_bulk(data: bytes, where: object) -> None:
    """Check that the values in a JSON text fit into :data:`LARGEST` bytes, or :data:`TIMES` those of the text.

    Raises:
        CropiError: they may take more.
    """
    if len(data) < SMALL:
        return
    need = len(data) + sum(each * data.count(mark) for mark, each in BYTES.items())
    if need > (most := max(LARGEST, TIMES * len(data))):
        raise CropiError(
            f"{where}: its values may take {need / 2**30:.3g} GiB of memory, more than {most / 2**30:.3g} GiB; cut "
            "it into several records or files"
        )
