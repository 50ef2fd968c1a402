"""The processes of one training run, as far as selection needs them: share objects, agree on errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from cropi.agreement import agree, all_gathered
from cropi.errors import CropiError

T = TypeVar("T")


class Ranks:
    """This process among those of the default group of ``torch.distributed``; alone where there is none."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if together else 0
        self.world: int = dist.get_world_size() if together else 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what only one may write."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of rank, on every rank. Values are pickled."""
        return [value] if self.world == 1 else all_gathered(value)

    def share(self, value: T | None) -> T:
        """Rank 0's value, on every rank."""
        box: list[Any] = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        result: T = box[0]
        return result

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather(None)

    def agree(self, work: Callable[[], T]) -> T:
        """Do ``work`` on this rank; if it fails on any rank, raise on every rank.

        Raises:
            CropiError: another rank failed; names it and repeats its message.
            Exception: whatever ``work`` raised here.
        """
        return agree(
            work,
            self.gather,
            lambda error: f"{type(error).__name__}: {error}",
            lambda rank, problem: CropiError(f"rank {rank} failed with {problem}"),
        )
