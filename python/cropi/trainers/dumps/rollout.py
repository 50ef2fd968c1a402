"""Single rollouts, as trainers dump them, to prompt groups, as trajectory records hold them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cropi.data.records import PromptGroup, parse_record
from cropi.errors import CropiError
from cropi.files import replacing

KEEP = ("newest", "all")


@dataclass(frozen=True)
class Rollout:
    """One response to one prompt. ``id`` is the prompt's; ``step`` the training step that it was sampled at.

    Either ``prompt_ids`` and ``response_ids``, or text: ``prompt`` (a string or messages) and ``response``.
    """

    id: str
    reward: float
    step: int
    where: str
    prompt_ids: list[int] | None = None
    response_ids: list[int] | None = None
    logprobs: list[float] | None = None
    prompt: Any = None
    response: str | None = None
    answer: Any = None
    temperature: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def text_id(text: str) -> str:
    """A prompt id made from the prompt's text, for dumps that carry none: equal texts have equal ids."""
    return "text-" + hashlib.sha256(text.encode()).hexdigest()[:16]


def group_rollouts(rollouts: Iterable[Rollout], *, keep: str = "newest") -> list[PromptGroup]:
    """Collect the responses to each prompt, in order of id.

    Args:
        rollouts: in any order.
        keep: of a prompt that was rolled out at several steps: "newest" takes those of its last step, so that a group
            has one behaviour policy; "all" takes them all, which needs log-probs with every one, since the policies
            differ.

    Raises:
        CropiError: nothing to group, mixed policies without log-probs, or rollouts of one prompt that disagree on it.
        RecordError: the values do not make a trajectory record.
    """
    if keep not in KEEP:
        raise CropiError(f"keep must be one of {', '.join(KEEP)}, got {keep!r}")
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.id, []).append(rollout)
    if not groups:
        raise CropiError("the dump holds no rollout")
    return [_record(name, members, keep) for name, members in sorted(groups.items())]


def _record(name: str, members: list[Rollout], keep: str) -> PromptGroup:
    last = max(member.step for member in members)
    if keep == "newest":
        members = [member for member in members if member.step == last]
    elif len({member.step for member in members}) > 1 and any(m.logprobs is None for m in members):
        raise CropiError(
            f"{members[0].where}: the prompt {name!r} was rolled out at several steps, by different policies, and not "
            "every rollout has log-probs, so they cannot be put into one group; use --keep newest"
        )
    first = members[0]
    for other in members:
        if (other.prompt_ids, other.prompt) != (first.prompt_ids, first.prompt):
            raise CropiError(
                f"{other.where}: another prompt at {first.where} has the same id {name!r}; give every prompt of the "
                "dataset its own id, and name it with --id-key"
            )
        if other.temperature != first.temperature:
            raise CropiError(
                f"{other.where}: prompt {name!r} was sampled at temperature {other.temperature}, and at "
                f"{first.temperature} at {first.where}; a record has one temperature, use --keep newest"
            )
    record: dict[str, Any] = {
        "id": name, "prompt": first.prompt, "prompt_ids": first.prompt_ids, "answer": first.answer,
        "responses": [m.response for m in members] if first.response is not None else None,
        "response_ids": [m.response_ids for m in members] if first.response_ids is not None else None,
        "logprobs": [m.logprobs for m in members] if all(m.logprobs is not None for m in members) else None,
        "rewards": [m.reward for m in members], "temperature": first.temperature, "policy": f"step {last}",
        **first.extra,
    }  # fmt: skip
    text = json.dumps({key: value for key, value in record.items() if value is not None}, ensure_ascii=False)
    return parse_record(text, first.where)  # by the rules of every other record


def write_groups(path: str | Path, groups: Iterable[PromptGroup]) -> int:
    """Write prompt groups as JSON lines, whole or not at all; returns how many."""
    count = 0
    with replacing(Path(path)) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for group in groups:
            file.write(group.raw + "\n")
            count += 1
    return count


def finite(value: Any, name: str, where: str) -> float:
    """A finite number.

    Raises:
        CropiError: it is not one.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise CropiError(f"{where}: {name} should be a finite number, got {value!r}")
    return number
