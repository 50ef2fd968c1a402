"""Temporary files and folders that go with the command, also where SIGTERM or SIGHUP ends it.

Python removes them when it ends by itself, but these signals end it at once: dumps that were being read stayed in
TMPDIR as folders of records, as large as they are.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

_made: weakref.WeakSet[Any] = weakref.WeakSet()
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class KeptFolder:
    """A folder that lives as long as this object; TemporaryDirectory would warn that nobody closed it."""

    def __init__(self, prefix: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        self.close = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        _made.add(self)


def temporary_file(prefix: str, suffix: str = "") -> Any:
    """A named file that is removed when it is closed, or when nobody holds it."""
    file = tempfile.NamedTemporaryFile(prefix=prefix, suffix=suffix)
    _made.add(file)
    return file


@contextlib.contextmanager
def removed_by_signals() -> Iterator[None]:
    """Inside, a signal that would end the process removes what was made here first. It ends the process even so.

    Signals that are ignored (``nohup``) or taken by somebody else stay as they are. So do those of the processes of a
    launcher, which wait for each other where Python takes no signal: they would not end.
    """
    process, before = os.getpid(), dict[int, Any]()

    def end(number: int, frame: FrameType | None) -> None:
        # A child that was forked holds the files of its parent.
        for one in list(_made) if os.getpid() == process else ():
            with contextlib.suppress(OSError):
                # Not file.close(): the signal may come while the file is written, and Python lets no other call in.
                one.close() if isinstance(one, KeptFolder) else os.unlink(one.name)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    with contextlib.suppress(ValueError):  # not in the main thread: it gets no signals
        for number in ENDING if os.environ.get("WORLD_SIZE", "1") == "1" else ():
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
