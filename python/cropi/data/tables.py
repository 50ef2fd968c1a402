"""Rows of tables as records: parquet, arrow and datasets, some rows in memory at a time."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cropi.data.columns import table_groups
from cropi.data.formats import ARROW_FILE, PARQUET
from cropi.data.parquet import batches_of, bytes_of_row, opened, plain, plain_bytes_of_row
from cropi.data.values import without_empty
from cropi.errors import CropiError, RecordError, optional, printable
from cropi.files import is_file, is_there, open_to_read, reading

# Python's objects take some five times the room of a table's numbers.
BATCH_BYTES, MOST_ROWS = 8 * 2**20, 4096
# Rows that pyarrow makes at once: the first ones may be short, and what lists of equal numbers and equal texts take
# later is known once they are made.
AT_ONCE = 128
# datasets' save_to_disk writes these into a folder.
STATE, SPLITS = "state.json", "dataset_dict.json"


# Columns of conversations and of what a chat template gets.
RENDERED = frozenset({
    "prompt", "messages", "responses", "response", "completions", "completion", "tools", "chat_template_kwargs",
})  # fmt: skip


class TableRow(dict[str, Any]):
    """A row of a table, which holds None where the table has a column and the row has nothing in it."""


def row_of_table(row: Mapping[str, Any]) -> dict[str, Any]:
    """A table's row without what is empty, inside conversations too."""
    return {
        key: without_empty(value) if key in RENDERED else value
        for key, value in row.items()
        if value is not None
    }


def rows_of_table_file(
    path: Path,
    form: str,
    shown: str | None = None,
    *,
    groups: bool = False,
    only: Sequence[int] | None = None,
) -> Iterator[tuple[str, int, Any]]:
    """``(file, row n)``, n and the row of a parquet or arrow file.

    Args:
        path: the file.
        form: of it.
        shown: what messages call it.
        groups: give a row's prompt group, where it is simple.
        only: the numbers of the rows that are wanted, in order; of the others nothing is made. None: all rows.

    Raises:
        CropiError: the file is damaged or cut.
    """
    pyarrow, name = optional("pyarrow"), shown or str(path)
    wanted, start = None if only is None else np.asarray(only), 0
    try:
        for start, batch in _parquet(path, wanted, name) if form == PARQUET else _arrow(path, form):
            end = start + batch.num_rows
            numbers: Sequence[int] = range(start, end)
            if wanted is not None:
                numbers = _within(wanted, start, batch.num_rows).tolist()
                batch = batch.take(pyarrow.array([number - start for number in numbers], pyarrow.int64()))
            made = table_groups(batch, name, numbers) if groups else None
            if made is None:
                rows = _rows_or_errors(batch, name, numbers)
                made = ((f"{name}, row {number}", row) for number, row in zip(numbers, rows))
            for number, (where, row) in zip(numbers, made):
                yield where, number, row
            start = end
    except (pyarrow.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            with reading(path):
                raise
        why, kind = printable(str(error)[:200]), form.removesuffix(" file")
        raise CropiError(
            f"{name}: the {kind} file is damaged or was cut after row {start} ({why}); copy it again"
        ) from error


def _within(numbers: np.ndarray, start: int, count: int) -> np.ndarray:
    """The part of sorted ``numbers`` that lies in ``[start, start + count)``."""
    first, last = np.searchsorted(numbers, [start, start + count])
    return numbers[first:last]


def _rows_or_errors(batch: Any, name: str, numbers: Sequence[int]) -> Iterator[Any]:
    """The rows of a batch; a RecordError in place of one whose text is not UTF-8."""
    try:
        yield from list(rows_of_batch(batch))
        return
    except UnicodeDecodeError:
        pass
    for i in range(batch.num_rows):
        row = TableRow()
        try:
            for column in batch.schema.names:
                row[column] = batch.column(column)[i].as_py()
        except UnicodeDecodeError as error:
            yield RecordError(
                f"{name}, row {numbers[i]}",
                f"the text in the column {column!r} is not UTF-8 (byte {error.start})",
            )
        else:
            yield row


def check_saved(path: Path) -> bool:
    """Check that the files of such a folder are whole, of which ``datasets`` itself reads a cut one without a word;
    gives whether there is any. Without a row there is none, which ``datasets`` does not load.

    Raises:
        CropiError: as :func:`rows_of_saved`.
    """
    for _ in rows_of_saved(path, only=()):
        pass
    return bool(_files_of_saved(path))


def rows_of_saved(path: Path, only: Sequence[int] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a folder that datasets' ``save_to_disk`` wrote; ``only``: as for each of its files.

    Raises:
        CropiError: it holds several splits, or a file of it is missing, damaged or cut.
    """
    if is_there(path / SPLITS):
        text = _bytes_of(path / SPLITS)
        try:
            names = json.loads(text)["splits"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CropiError(f"{path / SPLITS} is damaged ({error}); save the dataset again") from None
        if not names:
            raise CropiError(f"{path} holds a dictionary of datasets without a split; save the dataset again")
        raise CropiError(
            f"{path} holds the splits {', '.join(map(str, names))}; give the folder of one, for example "
            f"{path / str(names[0])}"
        )
    files = _files_of_saved(path)
    number = itertools.count()  # of the dataset's rows, over all of its files
    for file in files:
        if not is_file(file):
            raise CropiError(f"{path}: its file {file.name} is missing; copy the folder again")
        for _, _, row in rows_of_table_file(file, "arrow stream", only=only):
            yield f"{path}, row {next(number)}", row


def _files_of_saved(path: Path) -> list[Path]:
    """The files with rows of such a folder, of one split."""
    text = _bytes_of(path / STATE)
    try:
        return [path / entry["filename"] for entry in json.loads(text)["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CropiError(f"{path / STATE} is damaged ({error}); save the dataset again") from None


def _bytes_of(path: Path) -> bytes:
    with open_to_read(path) as file:
        return file.read()


def is_saved(path: Path) -> bool:
    """Whether datasets' ``save_to_disk`` wrote this folder."""
    return any(os.path.isfile(path / name) for name in (STATE, SPLITS))


def rows_of_batch(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a record batch as dictionaries."""
    names = batch.schema.names
    columns = [_values(batch.column(i)) for i in range(batch.num_columns)]
    for row in zip(*columns):
        yield TableRow(zip(names, row))


def _parquet(path: Path, wanted: np.ndarray | None, name: str) -> Iterator[tuple[int, Any]]:
    """Batches and the number of their first row; row groups without a row that is wanted are left out."""
    with opened(path) as file:
        meta = file.metadata
        parts = [meta.row_group(i) for i in range(meta.num_row_groups)]
        starts = np.cumsum([0, *(part.num_rows for part in parts)])
        rows = max(1, min(int(BATCH_BYTES / bytes_of_row(file, name)), MOST_ROWS))
        together = (
            [range(len(parts))]
            if wanted is None
            else [
                range(i, i + 1)
                for i, part in enumerate(parts)
                if len(_within(wanted, starts[i], part.num_rows))
            ]
        )
        for some in together:
            first = int(starts[some.start])
            for batch in _joined(batches_of(file, name, min(rows, AT_ONCE), some)):
                yield from _parts(batch, first)
                first += batch.num_rows


def _joined(batches: Iterator[Any]) -> Iterator[Any]:
    """Batches that follow one another as one, up to the bytes and rows of a batch."""
    pyarrow, held, size, rows = optional("pyarrow"), list[Any](), 0.0, 0
    for batch in batches:
        own = plain_bytes_of_row(batch) * batch.num_rows
        if held and (size + own > BATCH_BYTES or rows + batch.num_rows > MOST_ROWS):
            yield pyarrow.concat_batches(held)
            held, size, rows = [], 0.0, 0
        if own > BATCH_BYTES:
            yield batch
        else:
            held.append(plain(batch))
            size, rows = size + own, rows + batch.num_rows
    if held:
        yield pyarrow.concat_batches(held)


def _arrow(path: Path, form: str) -> Iterator[tuple[int, Any]]:
    """Batches and the number of their first row."""
    pyarrow, first = optional("pyarrow"), 0
    with pyarrow.memory_map(str(path)) as source:
        if form == ARROW_FILE:
            reader = pyarrow.ipc.open_file(source)
            batches: Iterator[Any] = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = _stream(source)
        for batch in map(_valid, batches):
            yield from _parts(batch, first)
            first += batch.num_rows


def _parts(batch: Any, first: int) -> Iterator[tuple[int, Any]]:
    """Parts of a batch that are as small as a batch should be, and the number of the first row of each."""
    rows = max(1, min(int(BATCH_BYTES / plain_bytes_of_row(batch)), MOST_ROWS))
    for start in range(0, batch.num_rows, rows):
        yield first + start, plain(batch.slice(start, rows))


# What pyarrow's validation says of values, where lengths and offsets fit: text that is not UTF-8 (found with its row),
# days with a time (Arrow for JavaScript writes them), times behind midnight, decimals with too many digits.
VALUES = ("Invalid UTF8", "whole number of days", "acceptable range", "does not fit in precision")


def _valid(batch: Any) -> Any:
    """The batch, whose lengths and offsets fit: of one with others pyarrow reads what lies beside it, and the process
    ends.

    Raises:
        pyarrow.ArrowInvalid: they do not.
    """
    batch.validate()
    for column in batch.columns:
        try:
            column.validate(full=True)
        except optional("pyarrow").ArrowInvalid as error:
            if not any(words in str(error) for words in VALUES):
                raise
    return batch


def _stream(source: Any) -> Iterator[Any]:
    """The batches of a stream, which is to end as its file does.

    pyarrow takes a file that was cut between two batches for a whole one, and leaves out what stands behind the end.

    Raises:
        EOFError: the stream has no end, or the file goes on behind it.
    """
    reader = optional("pyarrow").ipc.open_stream(source)
    read = source.tell()
    for batch in reader:
        read = source.tell()
        yield batch
    if source.tell() == read:
        raise EOFError("its end is missing, as where its writer was not closed")
    if behind := source.size() - source.tell():
        raise EOFError(f"{behind} bytes stand behind its end")


def _values(column: Any) -> list[Any]:
    """A column as Python values. Lists of numbers, which hold nearly all of a rollout, go through numpy."""
    types, kind = optional("pyarrow").types, column.type
    if types.is_list(kind) or types.is_large_list(kind):
        inner, ends = _values(column.flatten()), _lengths(column)
        lists, start = [], 0
        for size in ends:
            lists.append(None if size is None else inner[start : start + size])
            start += size or 0
        return lists
    if types.is_struct(kind):
        fields = [_values(part) for part in column.flatten()]  # nulls of the struct are nulls of its parts
        names, valid = [field.name for field in kind], column.is_valid().to_pylist()
        rows = zip(*fields) if fields else ((),) * len(column)
        return [dict(zip(names, row)) if there else None for row, there in zip(rows, valid)]
    if (types.is_integer(kind) or types.is_floating(kind)) and column.null_count == 0:
        return list(column.to_numpy(zero_copy_only=False).tolist())
    return list(column.to_pylist())


def _lengths(column: Any) -> list[int | None]:
    return list(optional("pyarrow.compute").list_value_length(column).to_pylist())
