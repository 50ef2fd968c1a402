"""A command in several processes: who says what, and who holds which device."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cropi.distributed.launch import launched


@contextmanager
def joined(args: argparse.Namespace) -> Iterator[Any]:
    """The processes that a launcher started with this one, as a :class:`cropi.distributed.team.Team`; None where it is
    alone. Only rank 0 shows warnings and progress."""
    found = launched()
    if found is None:
        yield None
        return
    args.device = found.device(args.device)
    store = found.connect()
    from cropi.distributed.team import Team

    team = Team(store, found.rank, found.world)
    with team.telling(), warnings.catch_warnings():
        if not team.first:
            args.progress = False
            warnings.simplefilter("ignore")
        yield team


def quiet(line: object = "") -> None:
    """Say nothing: rank 0 says it."""
