"""Parquet files, opened in one way everywhere, and columns of dictionaries and views as plain ones."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cropi.data.spilled import mapped
from cropi.errors import CropiError, optional, printable

BUFFER = 2**18  # of each column; without it a column is read whole
# Bytes of a batch of a table that does not stay in memory, as its first rows tell them, and rows: later ones may be
# longer.
PART, MOST_ROWS = 2**23, 1024
LARGE = 2**26  # bytes of a table that stays in memory
FIRST = 32  # rows by which the size of a row is told


def opened(path: Path) -> Any:
    """A ``pyarrow.parquet.ParquetFile`` that is read a batch at a time.

    Raises:
        pyarrow.ArrowException, OSError: it is damaged.
    """
    # Spark writes checksums of pages, which pyarrow compares where it is told to.
    options = {"page_checksum_verification": True, "pre_buffer": False, "buffer_size": BUFFER}
    return optional("pyarrow.parquet").ParquetFile(path, **options)


def bytes_of_row(file: Any, name: object) -> float:
    """About how many bytes a row of an open file takes in memory, of plain columns.

    The footer says what the pages take, where equal numbers (a mask, log-probs of 0) and equal texts take next to
    nothing; so the first rows are asked, too. What it says of a column is not asked: where that is damaged, pyarrow
    ends the process.
    """
    meta = file.metadata
    groups = range(meta.num_row_groups)
    told = sum(meta.row_group(group).total_byte_size for group in groups) / max(meta.num_rows, 1)
    first = next(batches_of(file, name, FIRST, groups), None)
    return max(told, plain_bytes_of_row(first) if first is not None else 0.0, 1.0)


def batches_of(file: Any, name: object, rows: int, groups: Sequence[int]) -> Iterator[Any]:
    """The batches of some groups of rows of an open file.

    Where lists hold dictionaries no batch spans two groups, each of which has a dictionary: pyarrow cannot join them.

    Args:
        file: the file.
        name: what messages call it.
        rows: of a batch at most.
        groups: the groups.

    Raises:
        CropiError: pyarrow has lost rows, as it does where its own writer made pages of less than a row.
    """
    types, lacking = (
        optional("pyarrow").types,
        sum(file.metadata.row_group(group).num_rows for group in groups),
    )
    nested = any(
        plain_type(kind) != kind and not types.is_dictionary(kind) for kind in file.schema_arrow.types
    )
    for some in [[group] for group in groups] if nested else [list(groups)]:
        for batch in file.iter_batches(batch_size=rows, row_groups=some):
            lacking -= batch.num_rows
            yield batch
    if lacking:
        raise CropiError(
            f"{name}: {lacking} rows of the parquet file are not found; write it again, or as JSON lines"
        )


def table_of(path: Path) -> Any:
    """The table in a parquet file; one that is large stays on the disk, in a temporary file.

    Raises:
        CropiError: it is damaged, or the temporary file cannot be written.
    """
    try:
        with opened(path) as file:
            meta, size = file.metadata, bytes_of_row(file, path)
            rows = max(1, min(int(PART / size), MOST_ROWS))
            batches = batches_of(file, path, rows, range(meta.num_row_groups))
            if size * meta.num_rows > LARGE:
                return mapped(file.schema_arrow, batches)
            return optional("pyarrow").Table.from_batches(batches, file.schema_arrow)
    except (optional("pyarrow").ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CropiError(
            f"{path}: the parquet file is damaged or was cut ({printable(str(error)[:200])}); copy it again"
        ) from error


def plain_bytes_of_row(batch: Any) -> float:
    """About how many bytes a row of a batch takes where all columns are plain, 1 at least.

    A dictionary is as large for some rows as for all, and a text in it may stand in every row.
    """
    return max(sum(map(_plain_bytes, batch.columns)) / max(batch.num_rows, 1), 1.0)


def _plain_bytes(column: Any) -> int:
    types, kind = optional("pyarrow").types, column.type
    if types.is_dictionary(kind):
        held = column.dictionary
        texts = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
        if held.type in (views := _views()):
            held = held.cast(views[held.type])
        if not any(of(held.type) for of in texts):
            return 8 * len(column)
        compute = optional("pyarrow.compute")
        lengths = compute.binary_length(held).cast("int64").take(column.indices)
        return 4 * len(column) + (compute.sum(lengths).as_py() or 0)
    if kind in _views():
        return _bytes_of_views(column)
    if plain_type(kind) == kind:
        return int(column.nbytes)
    inner = column.flatten()
    return sum(map(_plain_bytes, inner)) if isinstance(inner, list) else _plain_bytes(inner)


def _bytes_of_views(column: Any) -> int:
    """What the texts of views take as plain ones, from their lengths: many views may be of one text, so that plain ones
    of all rows are far larger than the file. Before pyarrow 22 the size of views cannot be asked."""
    if not len(column):
        return 0
    lengths = np.frombuffer(column.buffers()[1], np.int32)[::4][column.offset : column.offset + len(column)]
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    return 8 * len(column) + int(lengths[valid].sum(dtype=np.int64))


def plain(batch: Any) -> Any:
    """A record batch with plain columns in place of those that are dictionaries or views of texts, or hold some."""
    pyarrow = optional("pyarrow")
    kinds = [plain_type(kind) for kind in batch.schema.types]
    if kinds == batch.schema.types:
        return batch
    columns = [_cast(column, kind) for column, kind in zip(batch.columns, kinds)]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _cast(column: Any, kind: Any) -> Any:
    try:
        return column.cast(kind)
    except optional("pyarrow").ArrowNotImplementedError:
        # Dictionaries of views, as Polars writes its categories into Arrow files.
        if optional("pyarrow").types.is_dictionary(column.type):
            return column.dictionary.cast(kind).take(column.indices)
        return optional("pyarrow").array(column.to_pylist(), kind)


# Asked of every column of every batch.
@functools.lru_cache(maxsize=1024)
def plain_type(kind: Any) -> Any:
    """A type without dictionaries, and without views, of which pyarrow takes no rows by number."""
    pyarrow = optional("pyarrow")
    types = pyarrow.types
    if types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if kind in (views := _views()):
        return views[kind]
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(plain_type(field.type)) for field in kind])
    for of, make in ((types.is_list, pyarrow.list_), (types.is_large_list, pyarrow.large_list)):
        if of(kind):
            return make(kind.value_field.with_type(plain_type(kind.value_type)))
    return kind


@functools.cache
def _views() -> dict[Any, Any]:
    pyarrow = optional("pyarrow")
    return {pyarrow.string_view(): pyarrow.large_string(), pyarrow.binary_view(): pyarrow.large_binary()}
