"""Values that do not stay in memory: a temporary file holds them, and gives one at a time back."""

from __future__ import annotations

import contextlib
import pickle
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

from cropi.errors import CropiError, optional
from cropi.files import reason
from cropi.temporary import temporary_file

# So much is kept in memory before there is a file.
SMALL = 2**22


class Spilled:
    """Values by the places that :meth:`put` returns. The file goes by :meth:`close`, or when nobody holds them."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(SMALL, prefix="cropi-")
        weakref.finalize(self, self._file.close)

    def put(self, value: Any) -> int:
        """Keep a value; returns its place.

        Raises:
            CropiError: the file cannot be written.
        """
        with temporary():
            place = self._file.seek(0, 2) or self._file.tell()  # Python 3.10 returns None
            pickle.dump(value, self._file, pickle.HIGHEST_PROTOCOL)
        return place

    def get(self, place: int) -> Any:
        """The value at a place."""
        with temporary():
            self._file.seek(place)
            return pickle.load(self._file)  # what put() wrote

    def close(self) -> None:
        """Remove the file."""
        self._file.close()


class Rows(Sequence[Any]):
    """Rows of which one at a time is in memory, when it is asked for.

    Args:
        rows: what is kept.

    Raises:
        CropiError: the file cannot be written.
    """

    def __init__(self, rows: Iterable[Any]) -> None:
        self._kept = Spilled()
        self._places = array("q", map(self._kept.put, rows))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: Any) -> Any:
        return self._kept.get(self._places[place])

    def taken(self, places: Sequence[int]) -> Rows:
        """The rows at some places, in this order."""
        some = Rows.__new__(Rows)
        some._kept, some._places = self._kept, array("q", (self._places[place] for place in places))
        return some


def mapped(schema: Any, batches: Iterator[Any]) -> Any:
    """A pyarrow table of record batches whose bytes are in a temporary file, not in memory.

    Raises:
        CropiError: as :func:`temporary`; what the system says of the batches' source stays as it is.
    """
    pyarrow = optional("pyarrow")
    with temporary():
        kept = temporary_file("cropi-", ".arrow")
    with kept:
        with pyarrow.ipc.new_stream(kept.name, schema) as out:
            for batch in batches:
                with temporary():
                    out.write_batch(batch)
        return pyarrow.ipc.open_stream(pyarrow.memory_map(kept.name)).read_all()


def copy_to_temporary(source: IO[bytes], target: IO[bytes]) -> None:
    """Copy a stream to a temporary file.

    Raises:
        CropiError: as :func:`temporary`; what the system says of the source stays as it is.
    """
    while part := source.read(2**20):
        with temporary():
            target.write(part)
    with temporary():
        target.flush()


@contextlib.contextmanager
def temporary() -> Iterator[None]:
    """Inside, what the system says of a temporary file becomes an error in words.

    Raises:
        CropiError: names the folder of temporary files, the reason and the remedy.
    """
    try:
        yield
    except OSError as error:
        why = reason(error, "set TMPDIR to a folder that can be written")
        raise CropiError(
            f"a temporary file in {tempfile.gettempdir()} (TMPDIR names another folder): {why}"
        ) from error
