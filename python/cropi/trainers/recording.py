"""Writing a step's rollouts while training runs: what cannot be a record is left out and said, and it goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from cropi.trainers.dumps.fields import Left
from cropi.trainers.dumps.rollout import Rollout, group_rollouts, write_groups

logger = logging.getLogger(__name__)


def record_step(path: Path, read: Callable[[Left], Iterator[Rollout]]) -> int:
    """Write the rollouts of one step as trajectory records; how many prompts there are.

    Args:
        path: the file, written whole or not at all; not at all where no rollout can be used.
        read: gives the rollouts, and hands those that cannot be used to its argument.

    Raises:
        CropiError: the batch as a whole is not what the trainer's batches are, or the file cannot be written.
    """
    left = Left(skip_bad=True)
    rollouts = list(read(left))
    groups = list(group_rollouts(rollouts, left=left)) if rollouts else []  # notes what it leaves out
    for name, count in left.counts.items():
        first = left.first[name]
        logger.warning(
            "%s: %d rollouts are left out; the first: %s: %s", path, count, first.where, first.problem
        )
    return write_groups(path, groups).prompts if groups else 0
