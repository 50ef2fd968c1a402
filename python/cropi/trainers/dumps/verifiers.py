"""Reader of rollouts of prime-rl and of verifiers: ``rollouts/step_{N}/train_rollouts.jsonl``, ``results.jsonl``,
``traces.jsonl``.

Newer releases save traces, which :mod:`cropi.trainers.dumps.traces` puts into the layout of the older ones. A row of
those is one rollout: ``example_id`` (the prompt's number in its environment), ``task``, ``prompt`` and ``completion``
(messages), ``reward``, ``answer``, ``tool_defs`` (schemas of tools); where the trajectory is saved, ``trajectory`` has
a step a turn, whose ``tokens`` hold ``prompt_ids``, ``completion_ids``, ``completion_mask`` and
``completion_logprobs``. Where every turn's prompt begins with all tokens before it, they are one sequence: what lies
between two turns (tools, users) is context, masked with 0.

prime-rl's packed ``.bin`` batches hold no prompt ids, and their fields stand in an order that changes from release to
release: they are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cropi.form import nested
from cropi.trainers.dumps.fields import (
    BadSample,
    Left,
    Unused,
    check_keys,
    listed,
    log_probs,
    loss_mask,
    prompt_id,
    token_ids,
    whole,
)
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.rollout import Rollout, checked
from cropi.trainers.dumps.rows import id_of, reward_of, rows_of_dump
from cropi.trainers.dumps.text_rows import step_of, warn_text
from cropi.trainers.dumps.traces import rows_of_traces

WARM = "sampling_args.temperature"


def read_dump(path: Path, reading: Reading, left: Left) -> Iterator[Rollout]:
    """The rollouts in one file. Those that ended in an error are left out, as in training.

    Prompt ids: ``reading.id_key``, a column, or ``task`` and ``example_id``. The step is in the name of the file or of
    its folder. ``reading.temperature`` goes before ``sampling_args.temperature`` of a row.
    """
    step = step_of(path)

    def read(pair: tuple[str, dict[str, Any]]) -> Rollout:
        where, row = pair
        check_keys(row, ("example_id", "prompt", "completion"), where, "a rollout of prime-rl")
        if row.get("error"):
            raise Unused(where, "error", "the rollout ended in an error")
        labels = (row.get("task"), row.get("env_id"))
        task = next((label for label in labels if isinstance(label, str) and label), None)
        name = str(prompt_id(row["example_id"], "example_id", where))
        name = f"{task}-{name}" if task else name
        if reading.id_key is not None:
            name = id_of(row, reading.id_key, row["prompt"], where)
        warm = reading.warmth(nested(row, WARM), WARM, where)
        tokens = sequence(row.get("trajectory"), where)
        if tokens is None:
            warn_text(path, left)
        response = row["completion"]
        if tokens is None and not response:
            raise Unused(where, "completion", "is empty")
        cut = row.get("is_truncated")
        return checked(Rollout(
            id=name, reward=reward_of(row.get("reward"), "reward", where), where=where,
            step=step if row.get("at_step") is None else whole(row["at_step"], "run.work.step", where),
            prompt=row["prompt"], response=response or None, answer=row.get("answer"), temperature=warm,
            truncated=cut if isinstance(cut, bool) else None,
            extra={**({"task": task} if task else {}), **({} if tokens else of_text(row))},
            **(tokens or {}),
        ))  # fmt: skip

    yield from left.each(rows_of_traces(rows_of_dump(path, left), left), read)


def of_text(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a record of text says: that it is, and which tools the prompt listed, as chat templates know them."""
    held = row.get("tools") or row.get("tool_defs")
    if not isinstance(held, list):
        return {"lossy": True}
    tools = [
        tool
        if not isinstance(tool, Mapping) or "function" in tool
        else {"type": "function", "function": tool}
        for tool in held
    ]
    return {"lossy": True, "tools": tools}


def sequence(turns: Any, where: str) -> dict[str, Any] | None:
    """Prompt, response, mask and log-probs of a trajectory's turns as one sequence; None where no tokens are saved.

    Raises:
        BadSample: a turn does not go on from the one before it.
    """
    if (
        not isinstance(turns, list)
        or not turns
        or any(not isinstance(turn, dict) or not isinstance(turn.get("tokens"), dict) for turn in turns)
    ):
        return None
    prompt: list[int] = []
    ids: list[int] = []
    mask: list[int] = []
    probs: list[float] = []
    for number, turn in enumerate(turns):
        name, held = f"trajectory[{number}].tokens", turn["tokens"]
        before = token_ids(held.get("prompt_ids"), f"{name}.prompt_ids", where)
        said = token_ids(held.get("completion_ids"), f"{name}.completion_ids", where)
        if number == 0:
            prompt = before
        so_far = prompt + ids
        if before[: len(so_far)] != so_far:
            raise BadSample(
                where, name, "does not go on from the turns before it, so the rollout is not a single sequence",
                "save rollouts whose turns only add to the conversation, or pass --skip-bad",
            )  # fmt: skip
        between = before[len(so_far) :]
        marks = listed(held.get("completion_mask", [1] * len(said)), f"{name}.completion_mask", where)
        logprobs = log_probs(
            held.get("completion_logprobs"), len(said), None, f"{name}.completion_logprobs", where
        )
        if logprobs is None or len(marks) != len(said):
            raise BadSample(where, name, "has no mask or log-prob for every token")
        ids += between + said
        mask += [0] * len(between) + marks
        probs += [0.0] * len(between) + logprobs
    if not ids:
        raise Unused(where, "trajectory", "holds no token of the policy")
    kept = loss_mask(mask, len(ids), "completion_mask", where)
    return {"prompt_ids": prompt, "response_ids": ids, "loss_mask": kept, "logprobs": probs}
