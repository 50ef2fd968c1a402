"""The records in a text file as bytes: one JSON object a line, or the elements of one JSON array."""

from __future__ import annotations

import codecs
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
    decoder, text = json.JSONDecoder(), _Text(file, path)
    text.skip_space()
    if text.take() != "[":
        raise CropiError(f"{path} is not a JSON array; give one, or a record a line")
    number = 0
    text.skip_space()
    if text.peek() == "]":
        text.take()
    else:
        while True:
            text.skip_space()
            end, wanted = -1, _CHUNK
            while end < 0:
                try:
                    # A number at the end of what was read may go on behind it.
                    value, end = decoder.raw_decode(text.held, text.at)
                    if end == len(text.held) and text.more(wanted):
                        end = -1
                except json.JSONDecodeError as error:
                    if len(text.held) - text.at > LONGEST_LINE or not text.more(wanted):
                        raise CropiError(
                            f"{path}[{number}] is not JSON, or longer than {LONGEST_LINE >> 20} MiB: {error.msg}; "
                            "write one JSON object a line, so that a bad record can be left out"
                        ) from None
                    if len(text.held) >= SMALL:  # at most twice the element
                        check_bulk(text.held.encode("utf-8", "surrogatepass"), f"{path}[{number}]")
                except CropiError:
                    raise  # the disk fails
                except (ValueError, RecursionError) as error:
                    raise CropiError(f"{path}[{number}] is not readable as JSON: {error}") from None
                wanted *= 2
            yield f"{path}[{number}]", value, text.held[text.at : end]
            text.at = end
            number += 1
            text.skip_space()
            if (mark := text.take()) == "]":
                break
            if mark != ",":
                raise CropiError(f"{path}: a comma or ] is expected after element {number - 1}, got {mark!r}")
    text.skip_space()
    if text.peek():
        raise CropiError(f"{path} goes on after the end of its JSON array; remove what stands there")


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
