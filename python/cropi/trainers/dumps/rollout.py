"""Single rollouts, as trainers dump them, to prompt groups, as trajectory records hold them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from cropi.atomic import replacing
from cropi.data.keys import FIELDS, RENDERED
from cropi.data.records import PromptGroup, parse_record
from cropi.data.spilled import Spilled
from cropi.errors import CropiError, RecordError
from cropi.sealed import summed
from cropi.trainers.dumps.fields import BadSample, Left, shown
from cropi.trainers.values import plain_value, whole_text

STEPS = ("newest", "all")


@dataclass(frozen=True)
class Rollout:
    """One response to one prompt. ``id`` is the prompt's; ``step`` the training step that it was sampled at.

    Either ``prompt_ids`` and ``response_ids``, or text: ``prompt`` and ``response``, each a string or messages.
    ``loss_mask`` is 0 on response tokens of tools and of the user, which are context; None where all are the policy's.
    """

    id: str
    reward: float
    step: int
    where: str
    prompt_ids: list[int] | None = None
    response_ids: list[int] | None = None
    logprobs: list[float] | None = None
    prompt: Any = None
    response: Any = None
    answer: Any = None
    temperature: float | None = None
    loss_mask: list[int] | None = None
    truncated: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def messages(value: Any) -> Any:
    """A prompt as text or text messages, for people and exports, or None; token ids are what counts."""
    if isinstance(value, str):
        return whole_text(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, (list, tuple)) or not value:
        return None
    texts = ("role", "content")
    if not all(isinstance(m, Mapping) and all(isinstance(m.get(key), str) for key in texts) for m in value):
        return None
    try:
        return [plain_value(dict(m), "") for m in value]
    except CropiError:
        return None


def plain_answer(value: Any, field: str, where: str) -> Any:
    """A reference answer in JSON's types.

    Raises:
        BadSample: it has no form in JSON.
    """
    try:
        return plain_value(value, where)
    except CropiError:
        raise BadSample(where, field, f"has no form in JSON: {shown(value)}") from None


def checked(rollout: Rollout) -> Rollout:
    """The rollout, once it has made a record of one response that reads like any other.

    Raises:
        BadSample: it does not, and the field is named; or it is text that calls tools, without their schemas.
    """
    where, problem = rollout.where, ""
    if rollout.prompt_ids is None and not rollout.extra.get("tools") and _calls(rollout.response):
        raise BadSample(
            where, "tools", "are missing: the response calls tools, which the prompt listed for the policy",
            "write their JSON schemas beside every rollout as 'tools', or store token ids; or pass --skip-bad",
        )  # fmt: skip
    try:
        parse_record(_line(rollout.id, [rollout]), where)
    except RecordError as error:
        problem = error.problem
    except (ValueError, TypeError, RecursionError) as error:
        problem = str(error)
    if problem:
        match = re.match(r"'?([a-z_]+)", problem)
        raise BadSample(where, match[1] if match and match[1] in FIELDS else "record", problem)
    return rollout


def _calls(response: Any) -> bool:
    """Whether a response of messages has a call of a tool in a field of its own."""
    turns = response if isinstance(response, list) else ()
    return any(isinstance(turn, Mapping) and bool(turn.get("tool_calls")) for turn in turns)


def group_rollouts(
    rollouts: Iterable[Rollout],
    *,
    steps: str = "newest",
    left: Left | None = None,
    order: Callable[[str], Any] | None = None,
) -> Iterator[PromptGroup]:
    """Collect the responses to each prompt.

    All rollouts are read before this returns, into a temporary file; the groups are made one after the other.

    Args:
        rollouts: in any order.
        steps: of a prompt that was rolled out at several steps: "newest" takes those of its last step, so that a group
            has one behaviour policy; "all" takes them all, which needs log-probs with every one, since the policies
            differ.
        left: takes the rollouts that do not fit to the first one of their prompt; None raises.
        order: a sort key of prompts' ids, asked when all rollouts are read; None: by the ids.

    Raises:
        CropiError: nothing to group, or mixed policies without log-probs.
        BadSample: rollouts of one prompt disagree on it.
    """
    if steps not in STEPS:
        raise CropiError(f"steps must be one of {', '.join(STEPS)}, got {steps!r}")
    left = Left() if left is None else left
    kept, places = Spilled(), dict[str, list[int]]()
    for rollout in rollouts:
        places.setdefault(rollout.id, []).append(kept.put(rollout))
    if not places:
        reasons = "; ".join(error.of_left_out[:300] for error in list(left.first.values())[:3])
        raise CropiError(f"the dump holds no rollout that can be used{': ' if reasons else ''}{reasons}")
    return (
        _record(name, [kept.get(at) for at in places[name]], steps, left)
        for name in sorted(places, key=order)
    )


def _record(name: str, members: list[Rollout], steps: str, left: Left) -> PromptGroup:
    last = max(member.step for member in members)
    if steps == "newest":
        members = [member for member in members if member.step == last]
    elif len({member.step for member in members}) > 1 and any(m.logprobs is None for m in members):
        raise CropiError(
            f"{members[0].where}: the prompt {shown(name)} was rolled out at several steps, by different policies, and "
            "not every rollout has log-probs, so they cannot be put into one group; use --steps newest"
        )
    first = members[0]
    members = [first, *left.each(members[1:], lambda other: _alike(first, other))]
    return parse_record(_line(name, members), first.where)  # by the rules of every other record


def _alike(first: Rollout, other: Rollout) -> Rollout:
    if (other.prompt_ids, other.prompt) != (first.prompt_ids, first.prompt):
        raise BadSample(
            other.where, "prompt", f"another prompt at {first.where} has the same id {shown(first.id)}",
            "give every prompt of the dataset its own id, and name it with --id-key, or pass --skip-bad",
        )  # fmt: skip
    if other.temperature != first.temperature:
        raise BadSample(
            other.where, "temperature", f"{other.temperature} here and {first.temperature} at {first.where}, "
            "but a record has one", "use --steps newest, or pass --skip-bad",
        )  # fmt: skip
    return other


def _line(name: str, members: list[Rollout]) -> str:
    first = members[0]
    masked = any(m.loss_mask for m in members)
    cut = [m.truncated for m in members]
    record: dict[str, Any] = {
        "id": name, "prompt": first.prompt, "prompt_ids": first.prompt_ids, "answer": first.answer,
        "responses": [m.response for m in members] if first.response is not None else None,
        "response_ids": [m.response_ids for m in members] if first.response_ids is not None else None,
        "logprobs": [m.logprobs for m in members] if all(m.logprobs is not None for m in members) else None,
        "loss_mask": [m.loss_mask or [1] * len(m.response_ids or ()) for m in members] if masked else None,
        # One of which it is not known is taken for whole, as where it is known of none.
        "truncated": list(map(bool, cut)) if any(value is not None for value in cut) else None,
        "rewards": [m.reward for m in members], "temperature": first.temperature,
        "policy": f"step {max(m.step for m in members)}", RENDERED: isinstance(first.prompt, str) or None,
        **first.extra,
    }  # fmt: skip
    record = {key: value for key, value in record.items() if value is not None}
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


@dataclass
class Written:
    """How many prompts and responses were written, and how many of the records hold token ids and log-probs."""

    prompts: int = 0
    responses: int = 0
    with_ids: int = 0
    with_logprobs: int = 0

    def add(self, group: PromptGroup) -> None:
        """Count a record."""
        self.prompts += 1
        self.responses += group.size
        self.with_ids += group.response_ids is not None
        self.with_logprobs += group.logprobs is not None

    def __add__(self, other: Written) -> Written:
        return Written(*map(sum, zip(astuple(self), astuple(other))))


def write_groups(path: str | Path, groups: Iterable[PromptGroup]) -> Written:
    """Write prompt groups as JSON lines, whole or not at all; returns what they were."""
    written = Written()
    with (
        summed(path),
        replacing(Path(path)) as temporary,
        open(temporary, "w", encoding="utf-8", newline="\n") as file,
    ):
        for group in groups:
            file.write(group.raw + "\n")
            written.add(group)
    return written
