"""A command in several processes: who says what, and who holds which device."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import TYPE_CHECKING

from cropi.distributed.launch import launched

if TYPE_CHECKING:
    from cropi.distributed.sharding import Group
    from cropi.distributed.team import Team


@contextmanager
def joined(args: argparse.Namespace) -> Iterator[Team | None]:
    """The processes that a launcher started with this one; None where it is alone.

    Only rank 0 prints anything but errors.
    """
    launch = launched()
    if launch is None:
        yield None
        return
    args.device = launch.device(args.device)
    store = launch.connect()
    from cropi.distributed.team import Team

    team = Team(store, launch.rank, launch.world)
    with team.telling(), warnings.catch_warnings(), ExitStack() as stack:
        if not team.first:
            args.progress = False
            warnings.simplefilter("ignore")
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        yield team


@contextmanager
def grouped(args: argparse.Namespace, team: Team | None) -> Iterator[Group | None]:
    """The processes that share the weights with this one; None where it has them whole."""
    if args.fsdp is None and args.tensor_parallel is None:
        yield None
        return
    from cropi.distributed.sharding import Group

    assert team is not None, "--fsdp and --tensor-parallel are refused without a launcher"
    if args.fsdp is None:
        group = Group.of(team, "tensor", args.tensor_parallel)
    else:
        group = Group.of(team, "fsdp", args.fsdp or team.world)
    with group.joined(team, args.device):
        yield group
