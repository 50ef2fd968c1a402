"""An error in one process reaches all that share its work, whatever they talk through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


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
