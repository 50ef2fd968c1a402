"""What jobs that take turns cost: seconds, processor seconds, page faults."""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Cost(NamedTuple):
    """Of one run. Processor seconds are those of all threads; faults are pages that the kernel had to hand out."""

    seconds: float
    processor: float
    faults: int

    @classmethod
    def total(cls, costs: Iterable[Cost]) -> Cost:
        seconds, processor, faults = zip(*costs, strict=True)
        return cls(sum(seconds), sum(processor), sum(faults))


def timed(f: Callable[[], Any]) -> Cost:
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start, processor = time.perf_counter(), time.process_time()
    f()
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return Cost(seconds, processor, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)


def rotated(names: Iterable[str], k: int) -> list[str]:
    """The names from the k-th on, round and round."""
    names = list(names)
    k %= len(names)
    return names[k:] + names[:k]


def alternate(jobs: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, list[Cost]]:
    """A cost per round for each job; the order rotates, so that a slow spell of the machine hits all alike."""
    costs: dict[str, list[Cost]] = {name: [] for name in jobs}
    for f in jobs.values():
        f(0)  # warm-up
    for i in range(rounds):
        # One further after every turn of all jobs: inputs that come round meet every order.
        for name in rotated(jobs, i + i // len(jobs)):
            costs[name].append(timed(functools.partial(jobs[name], i)))
    return costs
