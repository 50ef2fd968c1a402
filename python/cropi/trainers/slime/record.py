"""slime's rollouts as trajectory records: exact token ids, masks and log-probs of the sampling engine.

::

    --custom-rollout-log-function-path cropi.trainers.slime.record.record_rollouts
    CROPI_RECORD=rollouts                         # see cropi.trainers.slime.options
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.slime import rollouts_of
from cropi.trainers.recording import record_step
from cropi.trainers.slime.options import option

WHAT = "record_rollouts"


def record_rollouts(
    rollout_id: int,
    args: Any,
    samples: Iterable[Any],
    rollout_extra_metrics: Any = None,
    rollout_time: Any = None,
) -> bool:
    """Write the rollouts of one step to ``FOLDER/{rollout_id}.jsonl``, whole or not at all; slime calls it.

    Samples that slime does not train on, and those that make no record, are left out and said in the log.

    Returns:
        False: slime logs as it always does.

    Raises:
        CropiError: no folder is given, or it cannot be written.
    """
    folder, key = Path(option(args, "record", WHAT)), option(args, "id_key", WHAT)
    reward, held = getattr(args, "reward_key", None), list(samples)
    columns = {} if reward is None else {"reward": reward}
    reading = Reading(id_key=key, temperature=getattr(args, "rollout_temperature", None), columns=columns)
    record_step(
        folder / f"{rollout_id}.jsonl",
        lambda left: rollouts_of(lambda: held, f"rollout {rollout_id}", int(rollout_id), reading, left),
    )
    return False
