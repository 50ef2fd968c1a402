"""A store's sketches as a NumPy file that can be mapped into memory, or as a parquet table."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cropi.atomic import forget, replacing, sync, write_parts
from cropi.errors import CropiError, optional
from cropi.files import check_ending, path_of, writing
from cropi.sealed import summed
from cropi.store.rows import RowInfo, placed, rows_to_json
from cropi.store.store import SketchStore
from cropi.store.unit import unit_rows

FORMATS = ("npy", "parquet")


def export(
    store: SketchStore, path: str | Path, *, to: str | None = None, normalise: bool = False
) -> list[Path]:
    """Write the sketches of all prompts that have one as float32.

    ``npy``: the matrix ``[n, dim]``, rows in order of prompt id, for ``np.load(path, mmap_mode="r")``; beside it
    ``<path>.rows.jsonl`` says which prompt a row is (id, set, task, pass rate, tokens, norm). ``parquet``: the same
    columns and the list ``sketch``, rows in the order of the store. ``<path>.sha256`` holds the checksums of the files
    (``sha256sum -c``). Memory: one block of rows.

    Args:
        store: the store.
        path: of the file.
        to: "npy" or "parquet"; None: as the path ends.
        normalise: divide every sketch by its length, so that inner products are cosines.

    Returns:
        The files that were written.

    Raises:
        CropiError: an unknown format, a store that is unfinished or has no sketch, or the disk is full.
    """
    path = path_of(path, "path", "a file that ends in .npy or .parquet")
    form = to or path.suffix.lstrip(".")
    if form not in FORMATS:
        known = ", ".join(FORMATS)
        if to is None:
            raise CropiError(
                f"{path}: its ending names none of the formats {known}; change it, or give --to (to=...)"
            )
        raise CropiError(f"to must be one of {known}, got {form!r}")
    check_ending("path", path, (f".{form}",))
    store.check_finished()
    rows = [row for row in store.rows() if row.row is not None]
    if not rows:
        raise CropiError(f"the store {store.path} holds no sketch, so there is nothing to export")
    if form == "npy":
        beside = path.with_name(path.name + ".rows.jsonl")
        with summed(path, beside), replacing(path) as matrix:
            _write_npy(matrix, store, rows, normalise)
            with replacing(beside) as lines, writing(path):
                write_parts(lines, [_line(row, place).encode() for place, row in enumerate(rows)])
                sync(matrix)
                sync(lines)
                # No room is needed from here on. The rows get their name first: a matrix that is there has its own
                # beside it, whenever the process is killed.
                forget(path)
        return [path, beside]
    with summed(path):
        _write_parquet(path, store, normalise)
    return [path]


def _line(row: RowInfo, place: int) -> str:
    return rows_to_json([placed(row, place)])[1:-1] + "\n"


def _tables(store: SketchStore, normalise: bool) -> Iterator[tuple[list[RowInfo], np.ndarray]]:
    for rows, table in store.shards():
        yield rows, (unit_rows(table) if normalise else table).numpy()


def _write_npy(path: Path, store: SketchStore, rows: Sequence[RowInfo], normalise: bool) -> None:
    place = {row.id: number for number, row in enumerate(rows)}
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(rows), store.dim)}
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        start, width = file.tell(), 4 * store.dim
        for kept, table in _tables(store, normalise):
            for row, vector in zip(kept, table, strict=True):
                # Not through a map: a full disk would end the process there.
                _write_at(
                    file.fileno(), vector.astype("<f4", copy=False).tobytes(), start + width * place[row.id]
                )


def _write_at(file: int, data: bytes, begin: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], begin + done)


def _write_parquet(path: Path, store: SketchStore, normalise: bool) -> None:
    pyarrow, parquet = optional("pyarrow"), optional("pyarrow.parquet")
    columns: dict[str, Any] = {
        "id": pyarrow.string(), "set": pyarrow.string(), "task": pyarrow.string(), "pass_rate": pyarrow.float64(),
        "tokens": pyarrow.int64(), "norm": pyarrow.float64(),
    }  # fmt: skip
    schema = pyarrow.schema([*columns.items(), ("sketch", pyarrow.list_(pyarrow.float32(), store.dim))])
    with replacing(path) as temporary:
        with parquet.ParquetWriter(temporary, schema, write_page_checksum=True, compression="none") as writer:
            for rows, table in _tables(store, normalise):
                arrays = [
                    pyarrow.array([getattr(row, name) for row in rows], kind)
                    for name, kind in columns.items()
                ]
                flat = pyarrow.array(table.reshape(-1))
                arrays.append(pyarrow.FixedSizeListArray.from_arrays(flat, store.dim))
                writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
