"""Reader of the rollouts of open-instruct (``--save_traces``, ``--rollouts_save_path``):
``{run}_rollouts_{number}.jsonl``.

A line is a response: ``prompt_tokens``, ``response_tokens``, ``reward``, ``step``, and perhaps ``logprobs`` of the
sampling engine, ``ground_truth``, ``dataset`` and ``request_info``. What tools said stands among the response's
tokens, and which tokens those are is not written: such responses are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cropi.form import nested
from cropi.trainers.dumps.fields import (
    BadSample,
    Left,
    Unused,
    check_keys,
    log_probs,
    token_ids,
    whole,
)
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.rollout import Rollout, checked, plain_answer
from cropi.trainers.dumps.rows import id_of, reward_of, rows_of_dump
from cropi.trainers.dumps.text_rows import step_of

KEYS = ("prompt_tokens", "response_tokens", "reward")


def read_dump(path: Path, reading: Reading, left: Left) -> Iterator[Rollout]:
    """The rollouts in one file. Prompt ids: ``reading.id_key``, a column, or a hash of the prompt's tokens."""
    step = step_of(path)

    def read(pair: tuple[str, dict[str, Any]]) -> Rollout:
        where, row = pair
        check_keys(row, KEYS, where, "a rollout of open-instruct")
        if nested(row, "request_info.tool_calleds"):
            raise BadSample(
                where, "request_info", "the response called tools, whose tokens stand among the policy's, unmarked",
                "leave runs with tools out, or pass --skip-bad to leave out these responses",
            )  # fmt: skip
        prompt, ids = (token_ids(row[key], key, where) for key in KEYS[:2])
        if not ids:
            raise Unused(where, KEYS[1], "is empty")
        task = row.get("dataset")
        return checked(Rollout(
            id=id_of(row, reading.id_key, " ".join(map(str, prompt)), where),
            reward=reward_of(row["reward"], "reward", where), where=where,
            step=step if row.get("step") is None else whole(row["step"], "step", where), prompt_ids=prompt,
            response_ids=ids, logprobs=log_probs(row.get("logprobs"), len(ids), None, "logprobs", where),
            answer=plain_answer(row.get("ground_truth"), "ground_truth", where), temperature=reading.temperature,
            extra={"task": task} if isinstance(task, str) and task else {},
        ))  # fmt: skip

    yield from left.each(rows_of_dump(path, left), read)
