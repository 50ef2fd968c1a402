"""Standard output and error that end no work: closed, full, or with a reader that has gone."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class Lasting:
    """A stream whose failures are noted and not raised; what is written after the first one is dropped."""

    def __init__(self, stream: Any) -> None:
        self.lost = stream is None
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream

    def write(self, text: str) -> int:
        """As a stream's."""
        try:
            self._stream.write(text)
        except (OSError, ValueError):
            self._lose()
        return len(text)

    def flush(self) -> None:
        """As a stream's."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._lose()

    def _lose(self) -> None:
        self.lost = True
        # What is left in its buffer must not fail again when the interpreter ends.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            empty = os.open(os.devnull, os.O_WRONLY)
            os.dup2(empty, self._stream.fileno())
            os.close(empty)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_streams() -> Iterator[Lasting]:
    """Inside, standard output and error are such streams; gives the first one."""
    # Where one is closed, the next file would take its number, and what is printed.
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    out, error = Lasting(sys.stdout), Lasting(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            yield out
        finally:
            out.flush()
            error.flush()
