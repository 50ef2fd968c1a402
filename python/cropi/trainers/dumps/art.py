"""Reader of the trajectories that ART (openpipe-art) logs: ``trajectories/{split}/{step}.parquet``.

A row is a trajectory: ``group_index``, ``reward``, ``messages`` with ``trainable`` (true where the policy said it),
``tools`` as JSON, and in sources later than 0.5.18 ``trajectory_index`` and ``trajectory_json``. The prompt ends where
the policy first speaks: what an assistant says before that is an example. Text alone is read: the choices with their
log-probs, in ``trajectory_json``, do not say the prompt's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cropi.trainers.dumps.fields import BadSample, Left, from_json, names, whole
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.rollout import Rollout, checked
from cropi.trainers.dumps.rows import id_of, reward_of, rows_of_dump
from cropi.trainers.dumps.text_rows import step_of, warn_text

# Of a message, those that chat templates know and the policy saw.
FIELDS = ("role", "content", "tool_calls", "tool_call_id")


def read_dump(path: Path, reading: Reading, left: Left) -> Iterator[Rollout]:
    """The rollouts in ``{step}.parquet``. Prompt ids: ``reading.id_key``, a column, or a hash of the prompt."""
    warn_text(path, left)
    step, prompts = step_of(path), dict[int, Any]()

    def read(pair: tuple[str, dict[str, Any]]) -> Rollout:
        where, row = pair
        messages = row.get("messages")
        if (
            not isinstance(messages, list)
            or not messages
            or not all(isinstance(one, Mapping) for one in messages)
        ):
            raise BadSample(
                where, "messages", f"are missing (the row has {names(row)}): the trajectory was recorded as exchanges "
                "with a server",
                "write trajectory records in the rollout function (docs/trajectories.md), or pass --skip-bad",
            )  # fmt: skip
        first = next((i for i, message in enumerate(messages) if message.get("trainable")), len(messages))
        said = [message for message in messages[first:] if message.get("role") == "assistant"]
        if not first or not said or not all(message.get("trainable") for message in said):
            raise BadSample(
                where,
                "messages",
                "should be a prompt, and behind it what the policy said, and no other assistant",
            )
        prompt, response = (
            [_message(message, where) for message in part] for part in (messages[:first], messages[first:])
        )
        group = whole(row.get("group_index"), "group_index", where)
        if prompts.setdefault(group, prompt) != prompt:
            raise BadSample(
                where, "messages", f"begin with another prompt than those of the first trajectory of group {group}",
                "gather the trajectories of one prompt in a group, or pass --skip-bad",
            )  # fmt: skip
        tools = None if row.get("tools") is None else from_json(row["tools"], "tools", where)
        return checked(Rollout(
            id=id_of(row, reading.id_key, prompt, where), step=step, where=where, prompt=prompt, response=response,
            reward=reward_of(row.get("reward"), "reward", where), temperature=reading.temperature,
            extra={"lossy": True, **({"tools": tools} if tools else {})},
        ))  # fmt: skip

    yield from left.each(rows_of_dump(path, left), read)


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    made = {key: message[key] for key in FIELDS if message.get(key) is not None}
    if "tool_calls" in made:
        made["tool_calls"] = from_json(made["tool_calls"], "messages.tool_calls", where)
    return {"content": "", **made}
