"""Ctrl-C and the signals that schedulers send, as a request: the work in hand is finished first."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from cropi.sketching.summary import Summary

# SLURM and Kubernetes send SIGTERM some seconds before they kill; a terminal that is closed sends SIGHUP.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupt:
    """Turns the first signal into a flag, so that the work in hand is finished; the second one acts as usual.

    A terminal is told so after Ctrl-C.

    SIGTERM and SIGHUP stay ignored where they are (``nohup``); SIGINT, which a shell has its background jobs ignore, is
    noted even so.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        try:
            for number in SIGNALS:
                # None: a handler that Python did not install, and could not put back.
                before = signal.getsignal(number)
                if before is not None and (before is not signal.SIG_IGN or number == signal.SIGINT):
                    self._before[number] = signal.signal(number, self._note)
        except ValueError:  # not in the main thread: it gets no signals
            pass
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()
        # A batch takes up to half a minute. Not by print: the signal may come while it writes.
        if number == signal.SIGINT and os.isatty(2):
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this batch; Ctrl-C again stops at once\n")

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def __exit__(self, *raised: object) -> None:
        self._restore()


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while sketching: the finished prompts are in the store ``out``; ``summary`` says what was done."""

    def __init__(self, out: str | Path | None, summary: Summary) -> None:
        super().__init__()
        self.out, self.summary = out, summary
