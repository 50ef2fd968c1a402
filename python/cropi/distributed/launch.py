"""What a launcher (torchrun, ``accelerate launch``, or anything that sets the same variables) says of this process."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from cropi.errors import CropiError

# How long processes wait for each other to start. Weights are loaded later.
JOIN_SECONDS = 600.0
# Every process makes as many.
_connections = itertools.count()
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
REMEDY = (
    "start the job by `torchrun --nproc-per-node N -m cropi ...` or `accelerate launch -m cropi ...`, which set RANK, "
    "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; for one process alone, unset RANK and WORLD_SIZE"
)


@dataclass(frozen=True)
class Launched:
    """One of several processes.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        local: its number on this machine.
        variables: the environment that it was started with.
    """

    rank: int
    world: int
    local: int
    variables: Mapping[str, str]

    def device(self, asked: str) -> str:
        """The device of this process: of ``cuda`` or ``auto``, the GPU with its local number, or the only one that it
        sees.

        Raises:
            CropiError: the machine has fewer GPUs than processes.
        """
        if asked not in ("cuda", "auto"):
            return asked
        import torch

        count = torch.cuda.device_count()
        if count <= 1:  # none: loading says so
            return asked
        if self.local >= count and not self.variables.get("LOCAL_RANK"):
            raise CropiError(
                f"rank {self.rank}: the machine has {count} GPUs, and LOCAL_RANK (RANK's place among the processes of "
                "one machine) is not set; set it to a number from 0 on (under SLURM, LOCAL_RANK=$SLURM_LOCALID)"
            )
        if self.local >= count:
            raise CropiError(
                f"rank {self.rank} is process {self.local} of its machine, which has {count} GPUs; start at most one "
                "process a GPU (--nproc-per-node)"
            )
        return f"cuda:{self.local}"

    def connect(self, seconds: float = JOIN_SECONDS) -> Any:
        """The list of keys and values that all processes share (a ``torch.distributed.Store``).

        Raises:
            CropiError: the others do not come, or the address is wrong.
        """
        from torch.distributed import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        address = f"{self.variables['MASTER_ADDR']}:{self.variables['MASTER_PORT']}"
        try:
            store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
        except (RuntimeError, ValueError, OSError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CropiError(
                f"RANK={self.rank} and WORLD_SIZE={self.world} are set, but {self.world} processes did not come "
                f"together at {address} within {seconds:.0f} s ({first}); {REMEDY}"
            ) from error
        # A launcher that starts its processes again (--max-restarts) keeps the list, with what the dead ones wrote.
        attempt, run = (os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RESTART_COUNT", "RUN_ID"))
        return PrefixStore(f"cropi/{run}/{attempt}/{next(_connections)}", store)


def launched(variables: Mapping[str, str] | None = None) -> Launched | None:
    """This process among those of a launcher; None where it is alone.

    Raises:
        CropiError: some of the variables are missing, or are not numbers.

    >>> launched({}) is None, launched({"RANK": "0", "WORLD_SIZE": "1"}) is None
    (True, True)
    >>> launched({"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}).local
    2
    """
    held = os.environ if variables is None else variables
    if "RANK" not in held and "WORLD_SIZE" not in held:
        return None
    if held.get("WORLD_SIZE", "").strip() == "1":
        return None
    missing = [name for name in NEEDED if not held.get(name)]
    if missing:
        there = ", ".join(f"{name}={held[name]}" for name in NEEDED if held.get(name))
        raise CropiError(
            f"{there} is set, but {' and '.join(missing)} not, so there is no process group; {REMEDY}"
        )
    rank, world = _number(held, "RANK"), _number(held, "WORLD_SIZE")
    local = _number(held, "LOCAL_RANK") if held.get("LOCAL_RANK") else rank
    _number(held, "MASTER_PORT")
    if not 0 <= rank < world:
        raise CropiError(f"RANK={rank} and WORLD_SIZE={world} do not fit together; {REMEDY}")
    return Launched(
        rank, world, local, {name: held[name] for name in (*NEEDED, "LOCAL_RANK") if held.get(name)}
    )


def _number(held: Mapping[str, str], name: str) -> int:
    try:
        return int(held[name])
    except ValueError:
        raise CropiError(f"{name}={held[name]!r} is not an integer; {REMEDY}") from None
