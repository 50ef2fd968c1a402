"""The columns of a parquet file, read without pyarrow, which ends the process at some damaged ones.

The footer: https://parquet.apache.org/docs/file-format/metadata/.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

from cropi.data.parquet_pages import Part, part_of
from cropi.data.thrift import Thrift
from cropi.errors import CropiError
from cropi.files import check_no_pipe, open_to_read

MAGIC = b"PAR1"
# Fields by their numbers: of the file, of a group of rows, of a column's part in it.
GROUPS, COLUMNS, PART, CODEC, VALUES, DATA, DICTIONARY = 4, 1, 3, 4, 5, 9, 11


def parts_of(path: Path) -> list[list[Part]]:
    """The parts by groups of rows, and in them by columns.

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
