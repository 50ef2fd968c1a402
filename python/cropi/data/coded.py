"""Columns that are coded by dictionaries or runs, in which a small file may stand for any number of bytes.

What would take more than 400 times the file's size (and 64 MiB) is refused, as packed files are, and what takes less is
unfolded some rows at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cropi.data.opened import LARGEST_RATIO, RATIO_FROM
from cropi.data.parquet_pages import Part, parts_of
from cropi.data.spilled import mapped
from cropi.errors import CropiError, optional, printable
from cropi.files import open_to_read

WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
PART = 2**23  # bytes of a batch that is unfolded
LARGE = 2**26  # bytes of a table that stays in memory


def opened(path: Path, **options: Any) -> tuple[Any, Any, int, int]:
    """A ``pyarrow.parquet.ParquetFile`` whose batches go through :func:`unfolded`, the schema of the file, what its
    columns take in memory at least, in bytes, and what its pages have unpacked.

    Columns that could be too large are given as dictionaries.

    Args:
        path: the file.
        options: further ones of ``ParquetFile``.

    Raises:
        CropiError: it is damaged, or takes too much.
    """
    make = optional("pyarrow.parquet").ParquetFile
    limit, coded = _limit(path), list[str]()
    # Spark writes checksums of pages, which pyarrow compares where it is told to.
    options = {"page_checksum_verification": True, **options}
    file = make(path, **options)
    schema = file.schema_arrow
    columns = list(_columns(file, path))
    least = sum(_least(*column) for column in columns)
    _check(least, limit, path)
    share = limit // max(len(columns), 1)
    with open_to_read(path) as bytes_:
        for column, parts in columns:
            if column.physical_type != "BYTE_ARRAY" or sum(part.most() for part in parts) <= share:
                continue
            # Texts of the largest size that there could be would be too large: now of the sizes that there are.
            levels = (column.max_definition_level > 0) + (column.max_repetition_level > 0)
            most = sum(part.most(bytes_, levels) for part in parts)
            if any(part.deltas for part in parts):  # which pyarrow does not give as dictionaries
                least += most - _least(column, parts)
                _check(least, limit, path)
            elif most > share:
                coded.append(column.path)
    if coded:
        file.close()
        file = make(path, read_dictionary=coded, **options)
    return file, schema, least, sum(part.size for _, parts in columns for part in parts)


def _least(column: Any, parts: Sequence[Part]) -> int:
    """The bytes that a column takes in memory at least: of texts those in pages and of their lengths."""
    values = sum(part.values for part in parts)
    if column.physical_type == "BYTE_ARRAY":
        return max(4 * values, sum(part.size for part in parts))
    return values * (WIDTHS.get(column.physical_type) or int(column.length))


def _columns(file: Any, path: Path) -> Iterator[tuple[Any, tuple[Part, ...]]]:
    """The columns of numbers, texts, ..., and their parts in all groups of rows."""
    groups = parts_of(path)
    count = len(file.schema)
    if len(groups) != file.metadata.num_row_groups or any(len(group) != count for group in groups):
        raise CropiError(f"{path}: the parquet file is damaged or was cut: its groups have other columns")
    return ((file.schema.column(c), tuple(group[c] for group in groups)) for c in range(count))


def table_of(path: Path) -> Any:
    """The table in a parquet file; one that is large stays on the disk, in a temporary file.

    Raises:
        CropiError: it is damaged or takes too much, or the temporary file cannot be written.
    """
    try:
        file, schema, least, size = opened(path, pre_buffer=False, buffer_size=2**18)
        with file:
            size = max(size, least)
            if size <= LARGE and file.schema_arrow == schema:
                return optional("pyarrow.parquet").read_table(path, page_checksum_verification=True)
            rows = max(1, PART * file.metadata.num_rows // max(size, 1))
            return mapped(
                schema,
                unfolded(batches_of(file, rows, range(file.metadata.num_row_groups)), path, schema=schema),
            )
    except (optional("pyarrow").ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CropiError(
            f"{path}: the parquet file is damaged or was cut ({printable(str(error)[:200])}); copy it again"
        ) from error


def batches_of(file: Any, rows: int, groups: Sequence[int]) -> Iterator[Any]:
    """The batches of some groups of rows of a ``pyarrow.parquet.ParquetFile``, of at most ``rows`` rows each.

    Where lists hold dictionaries no batch spans two groups, each of which has a dictionary: pyarrow cannot join them.
    """
    types = optional("pyarrow").types
    if any(_plain(kind) != kind and not types.is_dictionary(kind) for kind in file.schema_arrow.types):
        for group in groups:
            yield from file.iter_batches(batch_size=rows, row_groups=[group])
    else:
        yield from file.iter_batches(batch_size=rows, row_groups=list(groups))


def unfolded(
    batches: Iterable[Any], path: Path, name: str | None = None, schema: Any = None
) -> Iterator[Any]:
    """Batches with plain columns in place of coded ones, cut where they are large.

    Args:
        batches: record batches of a file.
        path: the file.
        name: what messages call it; None: its path.
        schema: whose types the columns get; None: all dictionaries are unfolded.

    Raises:
        CropiError: they take too much.
    """
    pyarrow, limit, need = optional("pyarrow"), _limit(path), 0
    for batch in batches:
        kinds = (
            [_plain(kind) for kind in batch.schema.types]
            if schema is None
            else [schema.field(column).type for column in batch.schema.names]
        )
        some = [i for i, kind in enumerate(batch.schema.types) if kind != kinds[i]]
        if not some:
            yield batch
            continue
        size = sum(_size(batch.column(i)) for i in some)
        need += size
        _check(need, limit, name or path)
        rows = max(1, min(batch.num_rows, PART * batch.num_rows // max(size, 1)))
        for start in range(0, batch.num_rows, rows):
            columns = batch.slice(start, rows).columns
            for i in some:
                columns[i] = columns[i].cast(kinds[i])
            yield pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _limit(path: Path) -> int:
    return max(RATIO_FROM, LARGEST_RATIO * os.path.getsize(path))


def _check(need: int, limit: int, name: object) -> None:
    if need > limit:
        raise CropiError(
            f"{name}: its columns unfold to more than {LARGEST_RATIO} times its size ({need >> 20} MiB so far), which "
            "no trajectories do; write it without dictionaries if it is right"
        )


def _plain(kind: Any) -> Any:
    """A type without dictionaries."""
    pyarrow = optional("pyarrow")
    types = pyarrow.types
    if types.is_dictionary(kind):
        return kind.value_type
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_plain(field.type)) for field in kind])
    for of, make in ((types.is_list, pyarrow.list_), (types.is_large_list, pyarrow.large_list)):
        if of(kind):
            return make(kind.value_field.with_type(_plain(kind.value_type)))
    return kind


def _size(column: Any) -> int:
    """The bytes that a column has once its dictionaries are unfolded."""
    types = optional("pyarrow").types
    if types.is_dictionary(column.type):
        held = column.dictionary
        if not (types.is_string(held.type) or types.is_large_string(held.type) or types.is_binary(held.type)):
            return 8 * len(column)
        lengths = optional("pyarrow.compute").binary_length(held).fill_null(0).to_numpy(zero_copy_only=False)
        places = column.indices.drop_null().to_numpy(zero_copy_only=False)
        return int(lengths.astype(np.int64)[places].sum()) + 4 * len(column)
    if types.is_struct(column.type) or types.is_list(column.type) or types.is_large_list(column.type):
        inner = column.flatten()
        return sum(map(_size, inner)) if isinstance(inner, list) else _size(inner)
    return int(column.nbytes)
