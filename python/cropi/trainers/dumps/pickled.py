"""Dumps that a trainer pickled, by ``torch.save`` or ``pickle``: read without running what they name."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cropi.data.opened import BUFFER
from cropi.errors import CropiError
from cropi.files import meant, open_to_read, reading
from cropi.trainers.dumps.pickle_items import PickleItems, load
from cropi.trainers.dumps.unpickle import Forbidden, Reader, StandIn, read_zip

LARGEST = 16 * 2**30
# What damaged bytes make the readers raise.
DAMAGED = (
    pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error, ValueError, KeyError, TypeError,
    AttributeError, IndexError, EOFError, NotImplementedError, RuntimeError, OverflowError, ArithmeticError,
    RecursionError, MemoryError, OSError,
)  # fmt: skip


def load_dump(
    path: Path, what: str, *, allow_pickle: bool = False, largest: int = LARGEST, by_items: bool = False
) -> Any:
    """What a pickled file holds.

    Plain containers, numbers, arrays and tensors come out as such; objects of a trainer's classes as a
    :class:`~cropi.trainers.dumps.unpickle.StandIn`, without the class.

    Args:
        path: the file.
        what: what it should be, for messages.
        allow_pickle: load it by ``torch.load`` or ``pickle`` instead, which **run whatever code the file names**.
        largest: bytes that it may hold, packed and unpacked.
        by_items: of a list that is long, make the items while they are gone through:
            one :class:`~cropi.trainers.dumps.pickle_items.PickleItems` stands in place of them. What is wrong with an
            item shows then (:func:`in_words`).

    Raises:
        CropiError: it is too large, damaged, of another kind, or names what a dump has no need of.
    """
    check_size(path, largest)
    with in_words(path, what):
        if allow_pickle:
            with reading(path, missing=True):
                return _trusted(path)
        with open_to_read(path, BUFFER) as file:
            packed = file.read(2) == b"PK"
            file.seek(0)
            if packed:
                return read_zip(file, largest, by_items)
            return load(file.read(), Reader) if by_items else Reader(Bounded(file)).load()


@contextlib.contextmanager
def in_words(path: Path, what: str) -> Iterator[None]:
    """Inside, what damaged bytes make the readers raise becomes an error in words.

    Raises:
        CropiError: the file is damaged, of another kind, or names what a dump has no need of.
    """
    try:
        yield
    except CropiError:
        raise
    except Forbidden as error:
        raise CropiError(
            f"{path}: {error}, which {what} has no need of. Pickles can run code, so only plain data is read; if you "
            "wrote this file yourself, or trust who did, pass --allow-pickle"
        ) from error
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            with reading(path):
                raise
        raise CropiError(f"{path} is not {what} ({type(error).__name__}: {str(error)[:300]})") from error


class Bounded:
    """A file of which no more is asked for than there is: a pickle may name any size, and room would be made for it."""

    def __init__(self, file: Any) -> None:
        self._file, self._size = file, os.fstat(file.fileno()).st_size
        self.peek, self.readline = file.peek, file.readline

    def read(self, size: int) -> bytes:
        """The next bytes."""
        return self._file.read(min(size, self._size - self._file.tell()))


def items_of(held: list[Any] | tuple[Any, ...], path: Path, what: str) -> Iterator[Any]:
    """The items of a list that :func:`load_dump` gave.

    Raises:
        CropiError: an item is damaged.
    """
    if len(held) != 1 or not isinstance(held[0], PickleItems):
        yield from held
        return
    items, end = iter(held[0]), object()
    while True:
        with in_words(path, what):
            item = next(items, end)
        if item is end:
            return
        yield item


def check_size(path: Path, largest: int = LARGEST) -> None:
    """Check that a file is there, and not larger than is read at once.

    Raises:
        CropiError: it is not.
    """
    if not os.path.isfile(path):
        raise CropiError(f"there is no file {path}; {meant(path)}give the path of one")
    with reading(path, missing=True):
        size = path.stat().st_size
    if size > largest:
        raise CropiError(
            f"{path} has {size / 2**30:.3g} GiB, more than the {largest / 2**30:.3g} GiB that are read at once; dump "
            "fewer steps into a file, or pass a larger --max-gib"
        )


def inner(data: Any, largest: int = LARGEST) -> Any:
    """A file of ``torch.save`` inside a pickle, as verl's DataProto has it.

    Raises:
        Forbidden, ValueError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError: as :func:`read_zip`.
    """
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError("a batch without its bytes")
    return read_zip(io.BytesIO(data), largest)


def contents(value: Any) -> Any:
    """The state of an object of a trainer's class as a table of its fields, anything else as it is.

    An enumeration's member is the value that it was made from.
    """
    if hasattr(value, "__dataclass_fields__"):
        return vars(value)
    if not isinstance(value, StandIn):
        return value
    if isinstance(value.state, Mapping):
        return value.state
    return value.args[0] if len(value.args) == 1 and value.state is None else value


def _trusted(path: Path) -> Any:
    import torch

    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            file.seek(0)
            held = pickle.load(file)
            # torch.save wrote this number first before it wrote archives. An array is compared by its elements.
            if not (isinstance(held, int) and held == torch.serialization.MAGIC_NUMBER):
                return held
    return torch.load(path, map_location="cpu", weights_only=False)
