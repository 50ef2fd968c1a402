"""Reader of the completions of ms-swift (``--log_completions true``): ``{output_dir}/completions.jsonl``.

Every line is a table of TRL (:mod:`cropi.trainers.dumps.trl`) by columns: ``step`` (text) or ``gen_step``, ``prompt``
(rendered), ``completion``, a column of each reward function, ``advantages``, and others. ms-swift's trainer for ray
writes a row a completion, with ``gen_step`` and ``reward``. The file holds all steps. A run that was continued and an
evaluation write a step a second time: of lines of columns the last one of a step counts, as a file of TRL's is
written over.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cropi.trainers.dumps.fields import BadSample, Left, check_keys, shown
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.rollout import Rollout
from cropi.trainers.dumps.rows import rows_of_columns, rows_of_dump
from cropi.trainers.dumps.trl import rollouts_of

STEPS = ("gen_step", "step")
RENAMED = {"gen_step": "step", "advantages": "advantage"}


def read_dump(path: Path, reading: Reading, left: Left) -> Iterator[Rollout]:
    """The rollouts in one file, ``completions.jsonl``, as those of :func:`cropi.trainers.dumps.trl.read_dump`."""
    last = {_step(row): number for number, (_, row) in enumerate(rows_of_dump(path, Left(left.skip_bad)))}

    def rows(path: Path, left: Left) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, pair in enumerate(rows_of_dump(path, left)):
            step = _step(pair[1])
            if step is None or last.get(step) == number:
                yield from left.each(left.flat([pair], rows_of_columns) if step else [pair], _row)

    yield from rollouts_of(path, reading, left, rows)


def _step(row: dict[str, Any]) -> str | None:
    """The step of a line of columns; None of a row a completion."""
    return next((str(row[key][:1]) for key in STEPS if isinstance(row.get(key), list)), None)


def _row(pair: tuple[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """A row under the names of TRL's columns.

    Raises:
        BadSample: its step is no number, or its prompt holds turns of the policy.
    """
    where, row = pair
    row = {RENAMED.get(key, key): value for key, value in row.items()}
    check_keys(row, ("step",), where, "a completion of ms-swift")
    step, turns = row["step"], row.get("num_turns")
    if isinstance(step, str):
        if not step.isascii() or not step.isdigit() or len(step) > 18:
            raise BadSample(where, "step", f"should be a number, got {shown(step)}")
        row["step"] = int(step)
    if isinstance(turns, int) and turns > 1:
        raise BadSample(
            where, "num_turns", f"is {turns}: the prompt holds turns of the policy, which text does not tell apart",
            "record the tokens with their loss_mask (docs/trajectories.md), or pass --skip-bad",
        )  # fmt: skip
    return where, row
