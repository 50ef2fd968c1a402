"""Where rows come from: files of any format that is read, folders, hub data sets, and what is in memory."""

from __future__ import annotations

import atexit
import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Union

from cropi.data.checks import FLAT
from cropi.data.formats import JSON, begins, format_of, packing_of
from cropi.data.hub import from_hub, is_hub_name
from cropi.data.lines import elements_of, lines_of
from cropi.data.opened import Unpacked, check_file, peek, unpacked
from cropi.data.records import PromptGroup, check_characters, parse_json
from cropi.data.spilled import copy_to_temporary, temporary
from cropi.data.tables import TableRow, is_saved, rows_of_batch, rows_of_saved, rows_of_table_file
from cropi.data.values import python_value
from cropi.errors import CropiError, RecordError, article, optional
from cropi.files import open_to_read, reading
from cropi.sealed import check_sums
from cropi.temporary import temporary_file

# (file:line, the line's offset or the number of the table's row or None, the line as bytes or the row as a dictionary)
Row = tuple[str, Union[int, None], Any]  # noqa: UP007 (evaluated, also by Python 3.10)


def is_blank(row: Any) -> bool:
    """Whether a row is a line of nothing but blanks."""
    return isinstance(row, bytes) and not row.strip(b" \t\r\n\xef\xbb\xbf")


def fields_of(row: Any, where: str) -> dict[str, Any]:
    """What a row holds by its columns; of a table's row also columns without a value (:func:`row_of_table`).

    Raises:
        RecordError: a line is no JSON object, text is not UTF-8, or holds half of a surrogate pair.
    """
    if isinstance(row, RecordError):
        raise row
    if isinstance(row, bytes):
        return parse_json(row.removeprefix(b"\xef\xbb\xbf"), where)
    if isinstance(row, PromptGroup):
        return row.to_record()
    if isinstance(row, TableRow):  # whose text is UTF-8
        return row
    made = {str(key): python_value(value) for key, value in row.items()}
    check_characters({key: value for key, value in made.items() if key not in FLAT}, where)
    return made


class Source:
    """Something that gives its rows again and again, in the same order. ``name`` is what messages call it; of one that
    is ``converted`` the columns have the names of records, whatever they are called elsewhere."""

    name: str
    converted = False

    @property
    def files(self) -> list[str]:
        """What it was made from, by names."""
        return [self.name]

    def rows(self) -> Iterator[Row]:
        """The rows, from the first one."""
        raise NotImplementedError

    def grouped_rows(self) -> Iterator[Row]:
        """The same, with prompt groups in place of rows that are checked as columns."""
        return self.rows()

    def lines_file(self) -> Path | None:
        """The file whose lines the rows' offsets point at, where there is one."""
        return None

    def table_file(self) -> Path | None:
        """The file that holds the rows as a table, where there is one."""
        return None

    def table_rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        """The rows of a table with these numbers, which are in order, as :meth:`grouped_rows` gives them."""
        raise NotImplementedError


class PathSource(Source):
    """A file, or a folder that datasets' ``save_to_disk`` wrote."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.name, self.file = name or str(path), path

    def rows(self) -> Iterator[Row]:
        if is_saved(self.file):
            check_sums(self.file)
            return self._read((where, None, row) for where, row in rows_of_saved(self.file))
        check_file(self.file)
        check_sums(self.file)
        return self._read(self._rows())

    def grouped_rows(self) -> Iterator[Row]:
        if is_saved(self.file):
            return self.rows()
        check_file(self.file)
        check_sums(self.file)
        return self._read(self._rows(groups=self.table_file() is not None))

    def lines_file(self) -> Path | None:
        head = self._head()
        return self.file if head and not packing_of(head) and begins(head) == b"{" else None

    def table_file(self) -> Path | None:
        head = self._head()
        return self.file if head.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")) else None

    def table_rows(self, numbers: Sequence[int]) -> Iterator[Row]:
        return self._read(
            rows_of_table_file(
                self.file, format_of(self._head(), self.name), self.name, groups=True, only=numbers
            )
        )

    def _head(self) -> bytes:
        if not os.path.isfile(self.file):
            return b""
        with open_to_read(self.file, 512) as file:
            return file.read(512)

    def _read(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The rows; what the system says meanwhile becomes an error that names the file."""
        with reading(self.name, missing=True):
            yield from rows

    def _rows(self, groups: bool = False) -> Iterator[Row]:
        with ExitStack() as stack:
            stream = stack.enter_context(unpacked(self.file))
            head = peek(stream)
            form, table = format_of(head, self.name), self.file
            if form == JSON:
                rows = elements_of if begins(head) == b"[" else lines_of
                yield from rows(stream, self.name)
                return
            if isinstance(stream, Unpacked):  # tables are not read in one direction
                with temporary():
                    kept = stack.enter_context(temporary_file("cropi-", ".unpacked"))
                copy_to_temporary(stream, kept)
                table = Path(kept.name)
            for where, number, row in rows_of_table_file(table, form, self.name, groups=groups):
                yield where, number if table == self.file else None, row


class StdinSource(PathSource):
    """Standard input, kept in a temporary file because rows are read more than once."""

    _only: StdinSource | None = None

    @classmethod
    def get(cls) -> StdinSource:
        """The one there is: standard input ends when it was read."""
        cls._only = cls._only or cls()
        return cls._only

    def __init__(self) -> None:
        with temporary():
            self._kept = temporary_file("cropi-stdin-")
        atexit.register(self._kept.close)
        with reading("standard input", missing=True):
            copy_to_temporary(sys.stdin.buffer, self._kept)
        super().__init__(Path(self._kept.name), "standard input")


class MemorySource(Source):
    """Dictionaries, prompt groups, a ``datasets.Dataset``, a pyarrow table or a pandas frame."""

    def __init__(self, held: Any, name: str) -> None:
        self.held, self.name = held, name

    def rows(self) -> Iterator[Row]:
        for i, row in enumerate(_rows_of_object(self.held)):
            where = f"{self.name}[{i}]"
            if not isinstance(row, (Mapping, PromptGroup)):
                raise CropiError(
                    f"{where}: a record is a dictionary (or a PromptGroup), got {type(row).__name__}; see "
                    "docs/trajectories.md for its keys"
                )
            yield where, None, row


def sources_of(source: Any, name: str = "records") -> list[Source]:
    """The sources that something names or is: a path, a hub id, ``-``, a table, rows, or a list of any of these.

    Raises:
        CropiError: nothing, or something else.
    """
    if isinstance(source, (str, Path, Source)):
        return [_named(source)]
    if isinstance(source, Mapping):
        if all(hasattr(part, "column_names") for part in source.values()) and source:
            raise CropiError(
                f"{name} is a dictionary of data sets ({', '.join(map(str, source))}); give one of them, for example "
                f"{name}[{str(next(iter(source)))!r}]"
            )
        raise CropiError(f"{name} is one dictionary; give a list of records, even of one")
    if isinstance(source, Sequence) and source:
        named = [isinstance(part, (str, Path, Source)) for part in source]
        if all(named):
            return [_named(part) for part in source]
        if any(named):
            raise CropiError(f"{name}: paths and records are mixed in one list; give one or the other")
        if all(map(_is_table, source)):
            return [MemorySource(part, f"{name}[{i}]") for i, part in enumerate(source)]
    if isinstance(source, Sequence) or _is_table(source):
        if hasattr(source, "__len__") and not len(source):
            raise CropiError(f"{name} is empty; give at least one record")
        return [MemorySource(source, name)]
    if isinstance(source, Iterator):
        raise CropiError(
            f"{name} is {article(type(source).__name__)}, which can be read once, but records are read twice; "
            "give a list"
        )
    remedy = f"; give {name}.to_arrow()" if hasattr(source, "to_arrow") else ""
    raise CropiError(
        f"{name} must be a path, a list of paths or of records, a datasets.Dataset, a pyarrow table or a pandas frame, "
        f"got {kind_of(source)}{remedy}"
    )


def kind_of(value: Any) -> str:
    """The name of a value's class, behind that of its package: two libraries have a DataFrame."""
    package = type(value).__module__.split(".")[0]
    return f"{'' if package == 'builtins' else f'{package}.'}{type(value).__name__}"


def _named(name: str | Path | Source) -> Source:
    if isinstance(name, Source):
        return name
    if str(name) == "-":
        return StdinSource.get()
    path = Path(name)
    if is_hub_name(name) and not os.path.exists(path):
        made: Source = from_hub(str(name), PathSource, MemorySource)
        return made
    return PathSource(path)


def _is_table(held: Any) -> bool:
    return hasattr(held, "column_names") or hasattr(held, "to_batches") or hasattr(held, "iterrows")


def _rows_of_object(held: Any) -> Iterator[Any]:
    if hasattr(held, "iterrows"):  # pandas
        held = optional("pyarrow").Table.from_pandas(held, preserve_index=False)
    if hasattr(held, "to_batches"):  # pyarrow
        return itertools.chain.from_iterable(map(rows_of_batch, held.to_batches(max_chunksize=1024)))
    if hasattr(held, "with_format") and hasattr(held, "iter"):  # datasets
        tables = held.with_format("arrow").iter(batch_size=256)
        batches = itertools.chain.from_iterable(table.to_batches() for table in tables)
        return itertools.chain.from_iterable(map(rows_of_batch, batches))
    return iter(held)
