"""Ranks that are threads of this process: what they agree on, share and gather is pickled, as between processes."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from cropi.trainers.trl.ranks import Ranks

T = TypeVar("T")


class Threads(Ranks):
    """One of them."""

    def __init__(self, rank: int, box: list[bytes], barrier: threading.Barrier) -> None:
        self.rank, self.world, self.box, self.barrier = rank, len(box), box, barrier

    def gather(self, value: T) -> list[T]:
        """Every rank's value."""
        self.box[self.rank] = pickle.dumps(value)
        self.barrier.wait()
        values = [pickle.loads(one) for one in self.box]
        self.barrier.wait()
        return values

    def share(self, value: T | None) -> T:
        """Rank 0's value."""
        given: Any = self.gather(value)[0]
        result: T = given
        return result


def on_ranks(world: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What ``work`` gives on every rank, or the error that it raised there."""
    box, barrier, found = [b""] * world, threading.Barrier(world, timeout=300), dict[int, Any]()

    def run(rank: int) -> None:
        try:
            found[rank] = work(Threads(rank, box, barrier))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(world)]
