"""Processes of a job that share one copy of the policy's weights, by transformers' own plans.

A job's ranks are cut into groups of equal size, each of ranks that follow each other. A group is a process group by
itself, the only one that its ranks know; of other groups they see the team's list of work alone.

fsdp:    every rank sketches chunks of its own. Every pass gathers weights from all ranks of the group, so they run
         the same number of passes: before each they count who has work, and who has none runs one on nothing.
tensor:  all ranks of a group sketch the same chunks, which the first one claims; it alone keeps the rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.distributed as dist

from cropi.distributed.ranks import REMEDIES, Claimed
from cropi.distributed.team import AGAIN, Team
from cropi.errors import CropiError
from cropi.model.policy import Policy
from cropi.sketching.job import SketchJob

Kind = Literal["fsdp", "tensor"]
OPTIONS: dict[Kind, str] = {"fsdp": "--fsdp", "tensor": "--tensor-parallel"}
# After a collective has failed: how long a process waits for another one's word on why.
BLAME_SECONDS = 10.0
_groups = itertools.count()


@dataclass(frozen=True)
class Group:
    """The ranks that share a copy of the weights with this one.

    Attributes:
        kind: how the weights are shared.
        size: how many ranks there are in it.
    """

    kind: Kind
    size: int

    @classmethod
    def of(cls, team: Team, kind: Kind, size: int) -> Group:
        """The group of a team's process.

        Raises:
            CropiError: the team cannot be cut into groups of this size.
        """
        if size < 2 or team.world % size:
            raise CropiError(
                f"{OPTIONS[kind]} {size}: the weights are shared by groups of so many of the {team.world} processes; "
                f"give a divisor of {team.world} that is at least 2"
            )
        return cls(kind, size)

    @property
    def copies(self) -> int:
        """How many ranks compute the same rows."""
        return self.size if self.kind == "tensor" else 1

    @property
    def part(self) -> type[Claimed]:
        """How a rank takes part in the job."""
        return Alike if self.kind == "tensor" else InStep

    @property
    def config(self) -> Any:
        """What ``from_pretrained`` of transformers takes as ``distributed_config``."""
        sizes = (
            {"tp_size": self.size, "tp_plan": "auto"} if self.kind == "tensor" else {"fsdp_size": self.size}
        )
        try:
            from transformers.distributed import DistributedConfig

            return DistributedConfig(**sizes)
        except (ImportError, TypeError) as error:
            raise CropiError(
                f"{OPTIONS[self.kind]}: the transformers that is installed does not spread weights over processes "
                f"({error}); install transformers 5.23 or later"
            ) from error

    def check(self, team: Team, policy: Policy, job: SketchJob) -> None:
        """Check what the ranks of a group must have alike before they meet in a pass: each reads its part of the
        weights, and parts of two models would make a third one.

        Raises:
            CropiError: it differs; names the first process that has something else.
        """
        apart = ("trajectories", "out", "behaviour_model", "notes")
        options = {
            about.name: repr(getattr(job, about.name)) for about in fields(job) if about.name not in apart
        }
        checkpoint = team.agree(lambda: policy.checkpoint)
        team.same({"model": {"files": checkpoint}, "options": options}, REMEDIES)

    @contextmanager
    def joined(self, team: Team, device: str) -> Iterator[None]:
        """The process group, for a while.

        Raises:
            RankFailed: a collective failed inside, because another process had failed.
            CropiError: because one is gone; or transformers would put the weights on another device.
        """
        placed = torch.accelerator.current_accelerator() or torch.device("cpu")
        if device != "auto" and torch.device(device).type != placed.type:
            raise CropiError(
                f"--device {device}: transformers puts weights that are shared by processes on {placed.type} here; "
                "leave --device out, or hide the other devices (CUDA_VISIBLE_DEVICES)"
            )
        number, rank = divmod(team.rank, self.size)
        store = dist.PrefixStore(f"group-{next(_groups)}-{number}", team.store)
        backend = "gloo"
        if placed.type != "cpu":  # numbers of chunks and ranks are counted on the CPU all the same
            backend = f"cpu:gloo,{placed.type}:{dist.get_default_backend_for_device(placed)}"
        team.linked = True
        dist.init_process_group(backend, store=store, rank=rank, world_size=self.size)
        try:
            yield
        except RuntimeError as error:
            if not _of_collective(error):
                raise
            team.blame(BLAME_SECONDS)
            why = str(error).splitlines()[0].split(". ")[0]
            raise CropiError(
                f"rank {team.rank} has lost another process of its group of {self.size}: it was killed, or its "
                f"machine is gone ({why}); {AGAIN}"
            ) from error
        finally:
            dist.destroy_process_group()


class InStep(Claimed):
    """A rank that gathers weights from its group in every pass."""

    linked = True

    def begin_pass(self) -> None:
        """Wait until every rank of the group begins a pass."""
        _sum(1)

    def leave(self, interrupted: bool, idle: Callable[[], None]) -> None:
        """Run empty passes as long as another rank of the group has work."""
        if interrupted:
            self.team.stop()
        while _sum(0):
            idle()


class Alike(Claimed):
    """A rank that computes the same as all ranks of its group."""

    linked = True

    @property
    def writes(self) -> bool:  # type: ignore[override]
        """The group's first rank keeps the rows."""
        return dist.get_rank() == 0

    def claim(self) -> int:
        """The number that the group's first rank has claimed."""
        return _first(super().claim() if self.writes else 0)

    def agreed(self, said: bool) -> bool:
        """Whether any rank of the group says so."""
        return _sum(int(said)) > 0


def _sum(number: int) -> int:
    """Over the ranks of the group."""
    total = torch.tensor([number], device="cpu")
    dist.all_reduce(total)
    return int(total)


def _first(number: int) -> int:
    """The ``number`` of the group's first rank, on every rank."""
    told = torch.tensor([number], device="cpu")
    dist.broadcast(told, 0)
    return int(told)


def _of_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(
        name in str(error) for name in ("gloo", "NCCL", "ProcessGroup")
    )
