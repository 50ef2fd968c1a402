"""The records in a text file as bytes: one JSON object a line, or the elements of one JSON array."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from cropi.bulk import SMALL, check_bulk
from cropi.data.opened import LONGEST_LINE
from cropi.errors import CropiError

MARK = b"\xef\xbb\xbf"
_CHUNK = 2**20
_SPACE = " \t\r\n\ufeff"


def lines_of(file: IO[bytes], path: str | Path) -> Iterator[tuple[str, int, bytes]]:
    """``(file:line, offset, line)`` of every line.

    Raises:
        CropiError: a line is longer than :data:`LONGEST_LINE`.
    """
    offset = number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise CropiError(
                f"{path}:{number} is longer than {LONGEST_LINE >> 20} MiB, the limit of one record; write one JSON "
                "object a line"
            )
        yield f"{path}:{number}", offset, line
        offset += len(line)


def elements_of(file: IO[bytes], path: str | Path) -> Iterator[tuple[str, int, bytes]]:
    """``(file[i], i, element)`` of every element of a JSON array, as bytes. Raises as :func:`values_of` does."""
    for number, (where, _, text) in enumerate(values_of(file, path)):
        yield where, number, text.encode("utf-8", "surrogatepass")


def values_of(file: IO[bytes], path: str | Path) -> Iterator[tuple[str, Any, str]]:
    """``(file[i], value, text)`` of every element of a JSON array, of which one at a time is in memory.

    Raises:
        CropiError: the file is not one JSON array in UTF-8, or an element is longer than :data:`LONGEST_LINE`.
    """
    text = _Text(file, path)
    text.skip_space()
    if text.take() != "[":
        raise CropiError(f"{path} is not a JSON array; give one, or a record a line")
    text.skip_space()
    if text.peek() == "]":
        text.take()
    else:
        yield from _elements(text, path)
    text.skip_space()
    if text.peek():
        raise CropiError(f"{path} goes on after the end of its JSON array; remove what stands there")


def _elements(text: _Text, path: str | Path) -> Iterator[tuple[str, Any, str]]:
    """The elements up to the closing bracket, which is taken."""
    decoder = json.JSONDecoder()
    for number in itertools.count():
        where = f"{path}[{number}]"
        text.skip_space()
        value, end = _element(decoder, text, where)
        yield where, value, text.held[text.at : end]
        text.at = end
        text.skip_space()
        if (mark := text.take()) == "]":
            return
        if mark != ",":
            raise CropiError(f"{path}: a comma or ] is expected after element {number}, got {mark!r}")


def _element(decoder: json.JSONDecoder, text: _Text, where: str) -> tuple[Any, int]:
    """The element that begins here, and where it ends in ``text.held``; more is read until it is whole."""
    wanted = _CHUNK
    while True:
        try:
            value, end = decoder.raw_decode(text.held, text.at)
            # A number at the end of what was read may go on behind it.
            if end < len(text.held) or not text.more(wanted):
                return value, end
        except json.JSONDecodeError as error:
            if len(text.held) - text.at > LONGEST_LINE or not text.more(wanted):
                raise CropiError(
                    f"{where} is not JSON, or longer than {LONGEST_LINE >> 20} MiB: {error.msg}; write one JSON "
                    "object a line, so that a bad record can be left out"
                ) from None
            if len(text.held) >= SMALL:  # at most twice the element
                check_bulk(text.held.encode("utf-8", "surrogatepass"), where)
        except CropiError:
            raise  # the disk fails
        except (ValueError, RecursionError) as error:
            raise CropiError(f"{where} is not readable as JSON: {error}") from None
        wanted *= 2


class _Text:
    """The file's text, of which what was taken is dropped."""

    def __init__(self, file: IO[bytes], path: str | Path) -> None:
        self.file, self.path, self.held, self.at = file, path, "", 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def more(self, size: int) -> bool:
        """Read on; False at the end of the file."""
        data = self.file.read(size)
        try:
            text = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise CropiError(
                f"{self.path}: not UTF-8 text ({error.reason}); convert the file to UTF-8"
            ) from None
        self.held, self.at = self.held[self.at :] + text, 0
        return bool(data)

    def peek(self) -> str:
        while self.at >= len(self.held):
            if not self.more(_CHUNK):
                break
        return self.held[self.at : self.at + 1]

    def take(self) -> str:
        mark = self.peek()
        self.at += len(mark)
        return mark

    def skip_space(self) -> None:
        while (next_ := self.peek()) and next_ in _SPACE:
            self.at += 1
