"""The trajectory record: one prompt group, parsed from one line of JSON and checked.

``docs/trajectories.md`` documents the record. The released CROPI layout
``{id, prompt, answer, responses, rewards}`` is a subset of it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any

from cropi.data.rewards import LARGEST_REWARD
from cropi.errors import RecordError

FIELDS = (
    "id",
    "prompt",
    "answer",
    "responses",
    "rewards",
    "prompt_ids",
    "response_ids",
    "logprobs",
    "temperature",
    "truncated",
    "policy",
    "set",
    "task",
)
# A log-prob slightly above zero is rounding in the engine that wrote it, not a mistake in the file.
LOGPROB_SLACK = 1e-3
ID_REMEDY = (
    "give every prompt an id that no other one has and that stays the same from run to run, the one of your dataset, "
    "or pass --skip-bad"
)


@dataclass(frozen=True)
class PromptGroup:
    """One prompt with its K stored rollouts. ``where`` is ``file:line``, ``raw`` the line it was read
    from."""

    id: str
    prompt: str | list[dict[str, Any]] | None
    responses: list[str] | None
    rewards: list[float]
    answer: Any = None
    prompt_ids: list[int] | None = None
    response_ids: list[list[int]] | None = None
    logprobs: list[list[float]] | None = None
    temperature: float | None = None
    truncated: list[bool] | None = None
    policy: str | None = None
    set: str | None = None
    task: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    where: str = ""
    raw: str = field(default="", repr=False)

    @property
    def size(self) -> int:
        """The number of responses, K."""
        return len(self.rewards)

    def to_record(self) -> dict[str, Any]:
        """The JSON object of this group: every field that is set, then the extra keys."""
        known = {name: getattr(self, name) for name in FIELDS}
        return {name: value for name, value in known.items() if value is not None} | self.extra


def parse_record(line: bytes | str, where: str) -> PromptGroup:
    """Parse and check one line.

    Raises:
        RecordError: not JSON, a key is missing, or the values do not fit together.
    """
    try:
        text = line.decode("utf-8") if isinstance(line, bytes) else line
        record = json.loads(text)
    except UnicodeDecodeError as error:
        raise RecordError(where, f"not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise RecordError(where, f"not a JSON object: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise RecordError(where, f"not readable as JSON: {error}") from None
    if not isinstance(record, dict):
        raise RecordError(where, f"a JSON object is expected, got {type(record).__name__}")
    _check_text(text, record, where)
    values: dict[str, Any] = {name: record.get(name) for name in FIELDS}
    held = f"the record has {', '.join(map(repr, record)) or 'no key'}"
    for name in ("id", "rewards"):
        if values[name] is None:
            remedy = [ID_REMEDY] if name == "id" else []
            raise RecordError(where, f"the key {name!r} is missing: {held}", *remedy)
    for text_key, ids_key in (("prompt", "prompt_ids"), ("responses", "response_ids")):
        if values[text_key] is None and values[ids_key] is None:
            raise RecordError(where, f"the key {text_key!r} is missing (and {ids_key!r} too): {held}")
    if isinstance(values["id"], bool) or not isinstance(values["id"], (str, int)):
        raise RecordError(where, f"'id' must be a string or an integer, got {values['id']!r}", ID_REMEDY)
    values["id"] = str(values["id"])
    extra = {key: value for key, value in record.items() if key not in FIELDS}
    group = PromptGroup(**values, extra=extra, where=where, raw=text.rstrip("\r\n"))
    _check(group)
    return group


def _check_text(line: str, record: dict[str, Any], where: str) -> None:
    """JSON may escape half of a surrogate pair, which is no character: no tokenizer and no file takes it."""
    if "\\ud" not in line.lower():
        return
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        found = error.object[error.start].encode("ascii", "backslashreplace").decode()
        raise RecordError(where, f"{found} is half of a surrogate pair, which is no character") from None


def _check(group: PromptGroup) -> None:
    """Check the values of a record against each other. ``rewards`` sets K."""
    where, count = (
        f"{group.where} (prompt {group.id!r})",
        group.size if isinstance(group.rewards, list) else 0,
    )
    if count == 0:
        raise RecordError(where, "'rewards' must be a list with one number per response")
    for k, reward in enumerate(group.rewards):
        if not _finite(reward):
            raise RecordError(where, f"rewards[{k}] must be a finite number, got {reward!r:.60}")
        if abs(reward) > LARGEST_REWARD:
            raise RecordError(
                where,
                f"rewards[{k}] is {reward!r:.60}, beyond {LARGEST_REWARD:g}, so that advantages would overflow",
                "scale the rewards down, or pass --skip-bad",
            )
    for name in ("responses", "response_ids", "logprobs", "truncated"):
        value = getattr(group, name)
        if value is not None and (not isinstance(value, list) or len(value) != count):
            got = len(value) if isinstance(value, list) else repr(value)
            raise RecordError(where, f"'{name}' must have one entry per reward ({count}), got {got}")
    _check_prompt(group, where)
    for k in range(count):
        _check_response(group, k, where)
    if group.temperature is not None and not _positive(group.temperature):
        raise RecordError(where, f"'temperature' must be a positive number, got {group.temperature!r}")
    if group.truncated is not None and not all(isinstance(value, bool) for value in group.truncated):
        raise RecordError(where, "'truncated' must be a list of true and false")
    for name in ("policy", "set", "task"):
        if getattr(group, name) is not None and not isinstance(getattr(group, name), str):
            raise RecordError(where, f"{name!r} must be a string, got {getattr(group, name)!r}")


def _check_prompt(group: PromptGroup, where: str) -> None:
    if group.prompt_ids is not None:
        _check_ids(group.prompt_ids, "prompt_ids", where)
    elif isinstance(group.prompt, list):
        for message in group.prompt:
            if not isinstance(message, dict) or "role" not in message or "content" not in message:
                raise RecordError(where, f"a message of 'prompt' needs 'role' and 'content', got {message!r}")
    elif not isinstance(group.prompt, str):
        raise RecordError(where, f"'prompt' must be a string or a list of messages, got {group.prompt!r}")
    if group.prompt_ids is None and not group.prompt:
        raise RecordError(where, "the prompt is empty")


def _check_response(group: PromptGroup, k: int, where: str) -> None:
    if group.response_ids is not None:
        _check_ids(group.response_ids[k], f"response_ids[{k}]", where)
    elif group.responses is not None:
        if not isinstance(group.responses[k], str):
            raise RecordError(where, f"responses[{k}] must be a string, got {group.responses[k]!r}")
        if not group.responses[k]:
            raise RecordError(
                where, f"responses[{k}] is empty", "remove it and its reward, or pass --skip-bad"
            )
    if group.logprobs is None:
        return
    if group.response_ids is None:
        raise RecordError(
            where,
            "'logprobs' without 'response_ids' cannot be matched to tokens",
            "add the token ids, or remove 'logprobs'",
        )
    values = group.logprobs[k]
    if not isinstance(values, list) or len(values) != len(group.response_ids[k]):
        got = len(values) if isinstance(values, list) else repr(values)
        raise RecordError(
            where,
            f"logprobs[{k}] must have one entry per token of response_ids[{k}] "
            f"({len(group.response_ids[k])}), got {got}",
        )
    for t, value in enumerate(values):
        if not _finite(value) or value > LOGPROB_SLACK:
            raise RecordError(where, f"logprobs[{k}][{t}] must be a finite number <= 0, got {value!r}")


def _check_ids(ids: Any, name: str, where: str) -> None:
    if not isinstance(ids, list) or not ids:
        raise RecordError(where, f"{name} must be a list of at least one token id")
    for t, value in enumerate(ids):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise RecordError(where, f"{name}[{t}] must be a token id (an integer >= 0), got {value!r}")


def _finite(value: Any) -> bool:
    # The comparison also turns down integers that no float holds, on which math.isfinite would raise.
    return isinstance(value, (int, float)) and -sys.float_info.max <= value <= sys.float_info.max


def _positive(value: Any) -> bool:
    return _finite(value) and not isinstance(value, bool) and value > 0
