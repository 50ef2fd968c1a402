"""Progress for people: a bar on a terminal and in a notebook, a line a minute in a log file."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

from cropi.amounts import duration
from cropi.errors import optional

SECONDS = 60.0  # between two lines of a log


def in_log() -> bool:
    """Whether standard error is read later, where a bar would be one long line."""
    bar = optional("tqdm.auto").tqdm
    # In a notebook tqdm.auto has a class of its own, and draws though nothing is a terminal.
    if bar is not optional("tqdm.asyncio").tqdm:
        return False
    with contextlib.suppress(ValueError):  # it was closed
        return not getattr(sys.stderr, "isatty", bool)()
    return True


def bar_of(
    total: int | None, name: str, progress: bool, *, unit: str = "prompt", initial: int = 0, **options: Any
) -> Any:
    """What shows how far a job is.

    Args:
        total: how much there is to do; None: unknown.
        name: of the job.
        progress: show it.
        unit: of what is counted.
        initial: how much was done before.
        options: more for a bar, as tqdm takes them.
    """
    if progress and in_log():
        return Lines(total, name, unit, initial)
    return optional("tqdm.auto").tqdm(
        total=total, desc=name, unit=unit, initial=initial, disable=not progress, smoothing=0.1, **options
    )


class Lines:
    """As much of a tqdm bar as is used here, in lines of standard error, none of them in the first minute."""

    disable = False

    def __init__(self, total: int | None, name: str, unit: str, initial: int) -> None:
        self.total, self.name, self.unit, self.n = total, name, unit, initial
        self._initial, self._note = initial, ""
        self._start = self._said = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, n: int) -> None:
        """``n`` more are done."""
        self.n += n
        if n:
            self._say()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """``text`` stands at the end of the next line."""
        self._note = text
        if refresh:
            self._say()

    def write(self, text: str) -> None:
        """Print a line of its own."""
        print(text)

    def close(self) -> None:
        """Nothing is left to say: every command prints what it has done."""

    def _say(self) -> None:
        now = time.monotonic()
        # Without a standard error (2>&-) print would write to standard output, where results are.
        if now - self._said < SECONDS or sys.stderr is None:
            return
        self._said, spent, new = now, now - self._start, self.n - self._initial
        of = "" if self.total is None else f" of {self.total}"
        words = [f"{self.name}: {self.n}{of} {self.unit}s after {duration(spent)}"]
        if new:
            words.append(f"{new / spent:.3g} a second")
        if new and self.total is not None:
            words.append(f"about {duration((self.total - self.n) * spent / new)} left")
        # A log whose disk is full, or a reader that has gone, ends no job.
        with contextlib.suppress(OSError, ValueError):
            print(", ".join([*words, self._note] if self._note else words), file=sys.stderr, flush=True)
