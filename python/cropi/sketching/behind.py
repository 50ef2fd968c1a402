"""Rows are added to a store in a thread of its own: passes go on while the disk takes and syncs what is written."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from cropi.store.rows import RowInfo
from cropi.store.store import SketchStore

MOST_ROWS, MOST_BYTES = 64, 1 << 26  # that wait for the disk


class Behind:
    """A context manager inside which a store is written to through :meth:`add` and :meth:`flush` alone.

    At its end all rows were added, also after an error. What the store raises is raised by a later call, or at the end.
    """

    def __init__(self, store: SketchStore) -> None:
        self.store = store
        self.most = max(1, min(MOST_ROWS, MOST_BYTES // (4 * store.dim)))
        self._thread = ThreadPoolExecutor(1, "cropi-store")
        self._waiting: deque[Future[Any]] = deque()

    def add(self, row: RowInfo, vector: torch.Tensor | None = None) -> None:
        """:meth:`SketchStore.add`, of a copy; it waits where the disk is behind by ``most`` rows."""
        kept = None if vector is None else vector.detach().to("cpu", torch.float32, copy=True)
        self.wait(self.most - 1)
        self._waiting.append(self._thread.submit(self.store.add, row, kept))

    def flush(self) -> None:
        """:meth:`SketchStore.flush`, after the rows that wait."""
        self._waiting.append(self._thread.submit(self.store.flush))

    def wait(self, most: int = 0) -> None:
        """Until at most so many rows have not been added."""
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > most):
            self._waiting.popleft().result()

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        self._thread.shutdown()
        if kind is None:  # else the error that is on its way says more
            self.wait()
