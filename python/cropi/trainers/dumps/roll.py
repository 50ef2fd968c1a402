"""Reader of the rollouts that ROLL saves (``rollout_dump_dir``): ``rollout_dump_data.step_{N}.jsonl``.

A line is a step, with columns that are lists over its responses: ``global_step``, ``id``, ``responses`` and
``scores``, and ``messages`` (as JSON text), to which ROLL applies its template, or ``prompt``, which the policy reads
as it is. ``sampling_params`` is the batch's table of settings as JSON text, with a ``generation_config``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cropi.form import nested
from cropi.trainers.dumps.fields import Left, Unused, check_keys, from_json, whole
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.rollout import Rollout, checked
from cropi.trainers.dumps.rows import id_of, reward_of, rows_of_columns, rows_of_dump, text_of
from cropi.trainers.dumps.text_rows import step_of, warn_text

KEYS = ("responses", "scores")
WARM = "generation_config.temperature"


def read_dump(path: Path, reading: Reading, left: Left) -> Iterator[Rollout]:
    """The rollouts in one file, ``rollout_dump_data.step_{N}.jsonl``. Prompt ids: ``reading.id_key``, a column, or
    ``id``, or a hash of the prompt where there is none. ``reading.temperature`` goes before that of a row.
    """
    warn_text(path, left)
    step = step_of(path)

    def read(pair: tuple[str, dict[str, Any]]) -> Rollout:
        where, row = pair
        check_keys(row, KEYS, where, "a rollout of ROLL")
        if row["responses"] == "":
            raise Unused(where, "responses", "is empty")
        messages = row.get("messages")
        if isinstance(messages, str) and messages:
            messages = from_json(messages, "messages", where)
        prompt = messages if row.get("messages") else text_of(row.get("prompt"), "prompt", where)
        task = next(
            (row[key] for key in ("domain", "tag") if isinstance(row.get(key), str) and row[key]), None
        )
        at = row.get("global_step")
        settings = row.get("sampling_params")
        if reading.temperature is None and settings and isinstance(settings, str):
            settings = from_json(settings, "sampling_params", where)
        return checked(Rollout(
            id=id_of(row, reading.id_key or ("id" if row.get("id") is not None else None), prompt, where), where=where,
            step=step if at is None else whole(at, "global_step", where), prompt=prompt,
            response=text_of(row["responses"], "responses", where), reward=reward_of(row["scores"], "scores", where),
            answer=row.get("ground_truth"),
            temperature=reading.warmth(nested(settings, WARM), f"sampling_params.{WARM}", where),
            extra={"lossy": True, **({"task": task} if task else {})},
        ))  # fmt: skip

    yield from left.each(left.flat(rows_of_dump(path, left), rows_of_columns), read)
