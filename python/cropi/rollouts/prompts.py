"""Prompts to be rolled out, from whatever holds them: files, hub data sets, tables, lists; also trajectory records.

Of a record that was rolled out before, the prompt is taken and the responses are dropped.
"""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from cropi.data.chat import plain_messages
from cropi.data.checks import check_depth, check_id, check_ids
from cropi.data.forms import content_id, parse_columns, renamed
from cropi.data.keys import FIELDS, named
from cropi.data.readers import HashedIds
from cropi.data.records import PromptGroup
from cropi.data.sources import fields_of, is_blank, sources_of
from cropi.data.tables import TableRow, row_of_table
from cropi.data.values import json_value
from cropi.errors import CropiError, RecordError, did_you_mean, warn
from cropi.gradient.tokenize import Tokenize
from cropi.rollouts.options import Prompting

# What an earlier rollout left in a record.
OLD = {
    "responses", "rewards", "response_ids", "logprobs", "loss_mask", "temperature", "truncated", "policy", "response",
    "completion", "completions", "reward", "rollout", "rollout_model", "scorer", "top_k",
    "top_p",
}  # fmt: skip
_NAMES = ("prompt", "messages", "question", "problem", "query", "instruction", "input", "text")


class Prompt:
    """One prompt.

    Attributes:
        id: unique.
        row: what the record keeps of it: ``id``, ``prompt``, ``answer``, ``task`` and the user's own columns; of one
            that is :meth:`packed` made anew each time.
        ids: its token ids.
        where: ``file:line``, for messages.
    """

    __slots__ = ("_row", "id", "ids", "where")

    def __init__(self, id: str, row: dict[str, Any] | bytes, ids: Sequence[int], where: str) -> None:
        self.id, self._row, self.ids, self.where = id, row, ids, where

    @classmethod
    def packed(cls, id: str, row: dict[str, Any], ids: Sequence[int], where: str) -> Prompt:
        """A prompt that takes the memory of its text and four bytes a token: a rollout holds all of its prompts."""
        return cls(id, pickle.dumps(row, pickle.HIGHEST_PROTOCOL), array("i", ids), where)

    @property
    def row(self) -> dict[str, Any]:
        return pickle.loads(self._row) if isinstance(self._row, bytes) else self._row


def read_prompts(
    source: Any, tokens: Tokenize, options: Prompting | None = None, room: int = 0
) -> tuple[list[Prompt], list[RecordError]]:
    """All prompts of a source, tokenised.

    Args:
        source: as for :func:`cropi.data.readers.read`.
        tokens: turns a prompt into token ids; stored ``prompt_ids`` win.
        options: names of columns, the system message, how many; bad rows that are left out are returned.
        room: tokens that have to be left in the context for the response.

    Raises:
        CropiError: a file is missing or empty.
        RecordError: a bad row: no prompt, an id used twice, or a prompt that leaves no room.
    """
    options = options or Prompting()
    names, prompts_read, bad = parse_columns(options.columns), list[Prompt](), list[RecordError]()
    limit = options.limit
    seen: dict[str, int] = {}
    hashed: bool | None = None
    for part in sources_of(source, "prompts"):
        empty = True
        for where, _, row in part.rows():
            if limit is not None and len(prompts_read) == limit:
                break
            if is_blank(row):
                continue
            empty = False
            try:
                record = _record(row, names, where)
                if hashed is None:
                    hashed = record.get("id") is None
                made = _prompt(record, where, tokens, hashed, options.system, room)
                if made.id in seen:
                    raise RecordError(
                        where, f"the prompt id {made.id!r:.100} was used before, at "
                        f"{prompts_read[seen[made.id]].where}",
                        "two rows have the same prompt and answer: remove one, or pass --skip-bad"
                        if hashed else "give every prompt its own id, or pass --skip-bad to keep the first",
                    )  # fmt: skip
            except RecordError as error:
                if not options.skip_bad:
                    raise
                bad.append(error)
                continue
            seen[made.id] = len(prompts_read)
            prompts_read.append(made)
        if empty and (limit is None or len(prompts_read) < limit):
            raise CropiError(
                f"{part.name}: it holds no prompt (one JSON object a line, or one row, is expected)"
            )
    if not prompts_read:
        raise CropiError(f"no prompt is left: all {len(bad)} rows are bad; the first: {bad[0].of_left_out}")
    if hashed:
        warn(
            "the prompts have no 'id', so every prompt's id is a hash of its text and answer; a prompt whose text "
            "changes is another one then, so give ids for a curriculum (--columns id=NAME)", HashedIds,
        )  # fmt: skip
    return prompts_read, bad


def _record(row: Any, columns: Mapping[str, str], where: str) -> dict[str, Any]:
    kept = {
        key: value
        for key, value in fields_of(row, where).items()
        if key not in OLD or key in columns.values()
    }
    made = named(renamed(kept, columns, where) if columns else kept, where)
    made = row_of_table(made) if isinstance(row, TableRow) else made
    made = {key: value for key, value in made.items() if value is not None and key not in OLD}
    check_depth(made, where)
    try:
        return {key: json_value(value, key, where) for key, value in made.items()}
    except CropiError as error:
        raise RecordError(
            where, f"a column has no form in JSON: {error}", "leave it out with --columns NAME="
        ) from None


def _prompt(
    record: dict[str, Any], where: str, tokens: Tokenize, hashed: bool, system: str | None, room: int
) -> Prompt:
    given = record.get("id")
    if (given is None) != hashed:
        raise RecordError(
            where, "some rows have an 'id', and some have none" if hashed else "the key 'id' is missing or null",
            "give every row one, or none of them",
        )  # fmt: skip
    prompt = record.get("prompt")
    if isinstance(prompt, list) and prompt:
        record["prompt"] = prompt = plain_messages(prompt, "prompt", where)
    elif not (isinstance(prompt, str) and prompt) and "prompt_ids" not in record:
        raise RecordError(where, "the key 'prompt' is missing or empty: " + _held(record), _near(record))
    if "prompt_ids" in record:
        check_ids(record["prompt_ids"], "prompt_ids", where)
    if system is not None:
        record["prompt"] = prompt = _with_system(record, system, where)
    name = content_id(record) if hashed else check_id(given, where)
    wanted: dict[str, Any] = {key: record.get(key) for key in FIELDS} | {
        "rewards": [],
        "id": name,
        "where": where,
    }
    ids = tokens.prompt(PromptGroup(**wanted))
    if tokens.context is not None and len(ids) + room > tokens.context:
        raise RecordError(
            where, f"the prompt {name!r:.100} has {len(ids)} tokens and a response may have {room}, but the model's "
            f"context is {tokens.context}", "give a smaller --max-tokens, or pass --skip-bad to leave such prompts out",
        )  # fmt: skip
    return Prompt.packed(name, {"id": name, **{k: v for k, v in record.items() if k != "id"}}, ids, where)


def _with_system(record: dict[str, Any], system: str, where: str) -> list[dict[str, Any]]:
    prompt = record.get("prompt")
    if "prompt_ids" in record:
        raise RecordError(
            where, "the row holds 'prompt_ids', to which no system message can be added",
            "leave --system out, or the column (--columns prompt_ids=)",
        )  # fmt: skip
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or ())
    if messages and messages[0].get("role") == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _held(record: Mapping[str, Any]) -> str:
    return f"the row has {', '.join(map(repr, list(record)[:40])) or 'no column'}"


def _near(record: Mapping[str, Any]) -> str:
    near = next((name for name in _NAMES if name in record), None)
    hint = f"did you mean --columns prompt={near}? " if near else did_you_mean("prompt", record)
    return f"{hint}name the column with --columns prompt=NAME, or pass --skip-bad"
