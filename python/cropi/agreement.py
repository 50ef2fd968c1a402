"""The processes that share some work: an error in one reaches all of them, whatever they talk through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Ranks(Protocol):
    """The processes that share the work; :class:`cropi.trainers.trl.ranks.Ranks` is one."""

    rank: int
    world: int

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what only one may write."""

    def agree(self, work: Callable[[], T]) -> T:
        """Do ``work``; if it fails on any rank, raise on every rank."""

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of rank, on every rank."""

    def share(self, value: T | None) -> T:
        """Rank 0's value, on every rank."""


class Alone:
    """One process."""

    rank, world, first = 0, 1, True

    def agree(self, work: Callable[[], T]) -> T:
        """``work()``."""
        return work()

    def gather(self, value: T) -> list[T]:
        """The value itself."""
        return [value]

    def share(self, value: T | None) -> T:
        """The value itself."""
        assert value is not None
        return value


def all_gathered(value: T) -> list[T]:
    """Every rank's value, in order of rank, by the default group of torch.distributed; alone where there is none."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(
    work: Callable[[], T],
    gather: Callable[[str | None], list[str | None]],
    words: Callable[[BaseException], str],
    failed: Callable[[int, str], Exception],
) -> T:
    """Do ``work`` in this process; if it fails in any, raise in every one.

    Without this a process that fails leaves the others waiting in their next common call for ever.

    Args:
        work: what every process does.
        gather: every process's value, in order of rank; all call it.
        words: an error, as the others are told of it.
        failed: what is raised where another one failed, from its rank and words.

    Raises:
        Exception: whatever ``work`` raised here, or what ``failed`` gives.
    """
    error: BaseException | None = None
    result: Any = None
    try:
        result = work()
    except BaseException as caught:  # Ctrl-C in one process must reach the others too
        error = caught
    problems = gather(None if error is None else words(error))
    if error is not None:
        raise error
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise failed(rank, problem)
    done: T = result
    return done
