"""The trajectory record: one prompt group, parsed from one line of JSON and checked.

``docs/trajectories.md`` documents the record. The released CROPI layout
``{id, prompt, answer, responses, rewards}`` is a subset of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cropi.bulk import check_bulk
from cropi.data.checks import ID_REMEDY, REWARDS_REMEDY, check_depth, check_group, check_id
from cropi.data.forms import dotted_names
from cropi.data.keys import FIELDS, named
from cropi.data.rewards import no_gradient_reason
from cropi.data.values import json_value
from cropi.errors import CropiError, RecordError, did_you_mean

Message = dict[str, Any]

WITH_REWARDS = (
    "there are rewards, and the estimator takes demonstrations, which have none",
    "leave them out (--columns rewards=, or reward= of a row a response; a dump becomes records by `cropi convert` "
    "first), or name another --estimator",
)


@dataclass(frozen=True)
class PromptGroup:
    """One prompt with its K stored rollouts. ``where`` is ``file:line``, ``line`` the bytes it was read from.

    ``loss_mask`` holds a 1 for every token of ``response_ids`` that the policy sampled, and a 0 for those that a tool
    or a user put in between, which are context only; None: all are scored. ``demonstrations``: the record has no
    rewards, and each of its responses is one to learn from, as if its reward were 1.
    """

    id: str
    prompt: str | list[Message] | None
    responses: list[str | list[Message]] | None
    rewards: list[float]
    answer: Any = None
    prompt_ids: list[int] | None = None
    response_ids: list[list[int]] | None = None
    logprobs: list[list[float]] | None = None
    loss_mask: list[list[int]] | None = None
    temperature: float | None = None
    truncated: list[bool] | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    policy: str | None = None
    set: str | None = None
    task: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    where: str = ""
    line: bytes | None = field(default=None, repr=False, compare=False)
    demonstrations: bool = False

    @property
    def size(self) -> int:
        """The number of responses, K."""
        return len(self.rewards)

    @property
    def no_gradient(self) -> str | None:
        """Why the prompt has no gradient, as far as its rewards say it; or None."""
        return None if self.demonstrations else no_gradient_reason(self.rewards)

    @property
    def file(self) -> str | None:
        """The file (or the argument, of records in memory) that the group came from, without the number of the line or
        row."""
        match = re.fullmatch(r"(.+?)(?::\d+|\[\d+\]|, row \d+)", self.where, re.DOTALL)
        # Of a name that is not UTF-8 the other bytes are escaped: a row's store and table could not be written.
        return match[1].encode(errors="backslashreplace").decode() if match else None

    @property
    def lengths(self) -> tuple[int | None, list[int] | None]:
        """Tokens of the prompt, and of every response; None where their ids are not stored."""
        prompt, responses = self.prompt_ids, self.response_ids
        sizes = None if responses is None else list(map(len, responses))
        return None if prompt is None else len(prompt), sizes

    @property
    def has_logprobs(self) -> bool:
        """Whether log-probs are stored."""
        return self.logprobs is not None

    @property
    def largest(self) -> int:
        """The largest token id, -1 where there are none."""
        return max(
            (max(ids, default=-1) for ids in (self.prompt_ids or [], *(self.response_ids or []))), default=-1
        )

    @property
    def raw(self) -> str:
        """The line that the group was read from, without its end; its record as JSON where it came another way."""
        if self.line is not None:
            return self.line.decode("utf-8").strip()
        return json.dumps(
            {key: json_value(value, key, self.where) for key, value in self.to_record().items()},
            ensure_ascii=False,
        )

    def to_record(self) -> dict[str, Any]:
        """The JSON object of this group: every field that is set, then the extra keys."""
        known = {
            name: getattr(self, name) for name in FIELDS if not (name == "rewards" and self.demonstrations)
        }
        return {name: value for name, value in known.items() if value is not None} | self.extra


def parse_record(
    line: bytes | str, where: str, *, default_id: str | None = None, rewards: bool | None = True
) -> PromptGroup:
    """Parse and check one line.

    Args:
        line: one JSON object, as UTF-8 if it is bytes.
        where: ``file:line``, for messages.
        default_id: of a record without an ``id``.
        rewards: see :func:`make_group`.

    Raises:
        RecordError: not JSON, a key is missing or not supported, or the values do not fit together.
    """
    data = line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")
    return make_group(parse_json(data, where), where, line=data, default_id=default_id, rewards=rewards)


def parse_json(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object in one line.

    Raises:
        RecordError: it is not one, or it holds half of a surrogate pair, too many brackets or too long a number.
    """
    check_line(line, where)
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecordError(where, f"not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        # Within a text, a literal (of nine letters at most), or between two values.
        left = len(error.doc.rstrip()) - error.pos
        within = error.msg.startswith("Unterminated") or (left < 10 and "Extra" not in error.msg)
        end = ""
        if within and line[-1:] != b"\n":
            end = ", where the file ends: it was not written, or not copied, to its end"
        elif left <= 0:
            end = ", where the line ends: write a record that goes on below on one line (`jq -c .` does)"
        raise RecordError(where, f"not a JSON object: {error.msg} at column {error.colno}{end}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise RecordError(where, f"not readable as JSON: {error}") from None
    if not isinstance(record, dict):
        raise RecordError(where, f"a JSON object is expected, got {type(record).__name__}")
    if b"\\ud" in line.lower():
        check_characters(record, where)
    return record


def check_line(line: bytes, where: str) -> None:
    """Check that the values of a record are of a size that is held at once.

    Raises:
        RecordError: they are not.
    """
    try:
        check_bulk(line, "")
    except CropiError as error:
        raise RecordError(where, str(error).removeprefix(": ")) from None


def make_group(
    record: Mapping[str, Any],
    where: str,
    *,
    line: bytes | None = None,
    default_id: str | None = None,
    rewards: bool | None = True,
) -> PromptGroup:
    """The checked prompt group of a record.

    Args:
        record: its keys and values.
        where, line, default_id: as for :func:`parse_record`.
        rewards: whether it must have rewards; False: it must have none, and holds demonstrations; None: as it is.

    Raises:
        RecordError: a key is missing or not supported, or the values do not fit together.
    """
    check_depth(record, where)
    values: dict[str, Any] = dict.fromkeys(FIELDS)
    record = named(record, where)
    extra = {key: value for key, value in record.items() if key not in values}
    values |= {key: value for key, value in record.items() if key in values}
    if "id" not in record:
        values["id"] = default_id
    demonstrations = not rewards and values["rewards"] is None and record.get("reward") is None
    if rewards is False and not demonstrations:
        raise RecordError(where, *WITH_REWARDS)
    if demonstrations:
        given = values["responses"] if values["response_ids"] is None else values["response_ids"]
        values["rewards"] = [1.0] * len(given) if isinstance(given, list) else []
    _check_there(values, extra, record, where)
    if demonstrations and not values["rewards"]:
        raise RecordError(where, "'responses' must be a list with at least one response")
    values["id"] = check_id(values["id"], where)
    checked = check_group(values, f"{where} (prompt {values['id']!r:.100})")
    return PromptGroup(**checked, extra=extra, where=where, line=line, demonstrations=demonstrations)


def _check_there(
    values: Mapping[str, Any], extra: Mapping[str, Any], record: Mapping[str, Any], where: str
) -> None:
    held = f"the record has {', '.join(map(repr, list(record)[:40])) or 'no key'}"
    if values["id"] is None:
        raise RecordError(where, f"the key 'id' is {_lack('id', record)}: {held}", ID_REMEDY)
    if values["rewards"] is None:
        remedy = _near("rewards", extra) or [REWARDS_REMEDY + dotted_names(extra, alone=True)]
        raise RecordError(where, f"the key 'rewards' is {_lack('rewards', record)}: {held}", *remedy)
    for text_key, ids_key in (("prompt", "prompt_ids"), ("responses", "response_ids")):
        if values[text_key] is None and values[ids_key] is None:
            lack, of_ids = _lack(text_key, record), _lack(ids_key, record)
            ids = f"{ids_key!r} {'too' if of_ids == lack else of_ids}"
            problem = f"the key {text_key!r} is {lack} (and {ids}): {held}"
            raise RecordError(where, problem, *_near(text_key, extra))


def _lack(name: str, record: Mapping[str, Any]) -> str:
    return "null" if name in record else "missing"


def _near(name: str, keys: Mapping[str, Any]) -> list[str]:
    fit = [str(key) for key, value in keys.items() if name == "prompt" or isinstance(value, (list, tuple))]
    near = did_you_mean(name, fit, "--columns " + name + "={}")
    return [f"{near}see docs/trajectories.md, or pass --skip-bad"] if near else []


def check_characters(record: Any, where: str) -> None:
    """Check that no string holds half of a surrogate pair, which is not a character: no tokenizer and no file takes it.

    Raises:
        RecordError: one does.
    """
    try:
        json.dumps(record, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        escaped = error.object[error.start].encode("ascii", "backslashreplace").decode()
        raise RecordError(where, f"{escaped} is half of a surrogate pair, which is not a character") from None
