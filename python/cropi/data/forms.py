"""Rows in the forms that people have them: columns of other names, a row a response, conversations, prompts alone.

===============  ====================================================  ==============================================
form             a row has                                             what becomes of it
===============  ====================================================  ==============================================
record           ``rewards``, a list                                   it is one prompt group
response         ``reward``, a number, and one response                rows are grouped by ``id``, or by the prompt
conversation     ``reward`` and ``messages`` with the assistant's      the same; the prompt ends where the assistant
                                                                       first speaks
demonstration    a response or ``messages``, and no reward             the same, where the estimator takes them
prompt           neither rewards nor responses                         an error: it has to be rolled out first
===============  ====================================================  ==============================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cropi.data.keys import ALIASES, FIELDS, REASONS
from cropi.errors import CropiError, RecordError, did_you_mean, shown

RECORD, RESPONSE, CONVERSATION = "record", "response", "conversation"
HASHED = "text-"  # what ids begin with that are hashes
# The keys that a hash is of.
CONTENT = ("prompt", "messages", "prompt_ids", "prompt_token_ids", "answer", "tools")
# What a row that holds one response calls the parts of a record, and what it is in the record.
SINGLE = {
    "response": "responses", "completion": "responses", "reward": "rewards", "response_ids": "response_ids",
    "completion_ids": "response_ids", "response_token_ids": "response_ids", "logprobs": "logprobs",
    "truncated": "truncated", **{key: name for key, name in ALIASES.items() if name in ("loss_mask", "truncated")},
    "loss_mask": "loss_mask",
}  # fmt: skip
COLUMNS = tuple(dict.fromkeys((*FIELDS, "response", "reward", *SINGLE, *ALIASES)))
# What trainers call the policy's version or the step that a response was sampled at.
STEPS = (
    "step", "global_step", "global_steps", "gen_step", "training_step", "train_step", "iteration", "policy",
    "policy_version", "model_version", "weight_version", "tail_version",
)  # fmt: skip
_PROMPTS = ("prompt", "prompt_ids", "messages", "question", "problem", "query", "instruction", "input")
_SCORES = ("score", "scores", "reward_score", "rewards", "reward", "correct", "accuracy")
_ANSWERS = (
    "response",
    "responses",
    "completion",
    "completions",
    "output",
    "outputs",
    "generation",
    "generations",
)
ROLL_OUT = (
    "these are prompts without responses; selection needs several scored responses of your policy to each of them: "
    "`cropi rollout` samples and scores them (docs/rollout.md)"
)


def is_prompt(row: Mapping[str, Any]) -> bool:
    """Whether a row holds a prompt, and neither a response nor a score."""
    keys = [key for key, value in row.items() if value is not None]
    talks = is_conversation(row)
    answered = talks or any(key in (*_ANSWERS, *_SCORES) or _is_single(key) for key in keys)
    return any(key in _PROMPTS for key in keys) and not answered


def is_failed(row: Mapping[str, Any]) -> bool:
    """Whether a row holds null in place of its responses and of their rewards: none was made. It tells no form."""
    told = ("reward" in row and has_response(row)) or (
        "rewards" in row and not row.keys().isdisjoint(_ANSWERS)
    )
    return (
        told
        and not is_conversation(row)
        and not any(
            value is not None and (key in (*_ANSWERS, *_SCORES) or _is_single(key))
            for key, value in row.items()
        )
    )


def _is_single(key: str) -> bool:
    return key in SINGLE and key not in REASONS


def parse_columns(words: str | Mapping[str, str] | None) -> dict[str, str]:
    """``prompt=question,reward=score`` as a dictionary; a name without a column leaves that column out.

    Raises:
        CropiError: not of that form, or a name that no record has.
    """
    if words is None or isinstance(words, Mapping):
        names = dict(words or {})
    else:
        pairs = [part.partition("=") for part in words.split(",") if part.strip()]
        if not all(mark for _, mark, _ in pairs):
            raise CropiError(f"columns: NAME=COLUMN,... is expected, got {shown(words)}")
        names = {name.strip(): column.strip() for name, _, column in pairs}
    for name, column in names.items():
        if name not in COLUMNS and column:
            raise CropiError(
                f"columns: {name!r} is not part of a record; {did_you_mean(name, COLUMNS)}known are "
                f"{', '.join(COLUMNS)}"
            )
    return names


def renamed(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """The row with its columns under the names of the record.

    Raises:
        RecordError: it has no such column.
    """
    taken = set(columns.values())
    made = {key: value for key, value in row.items() if key not in columns and key not in taken}
    for name, column in columns.items():
        value: Any = row
        for part in [column] if column in row or not column else column.split("."):
            if column and (not isinstance(value, Mapping) or part not in value):
                raise RecordError(
                    where,
                    f"there is no column {column!r} for {name!r}",
                    f"{did_you_mean(column, map(str, row))}its columns are {', '.join(map(str, row)):.300}; columns "
                    f"are named for all files together: where they differ, make records of each by `cropi convert`"
                    f"{dotted_names(row, alone=True) if '.' in column else ''}",
                )
            value = value[part] if column else None
        if value is not None:
            made[name] = value
    return made


def form_of(row: Mapping[str, Any], where: str, *, rewards: bool | None = True) -> str:
    """The form of a row (see above); ``rewards``: see :func:`cropi.data.records.make_group`.

    Raises:
        CropiError: it holds prompts alone, or neither form whole; the message says what is missing.
    """
    keys = [key for key, value in row.items() if value is not None]
    if "rewards" in keys or "responses" in keys or "completions" in keys:
        return RECORD
    if not rewards and any(SINGLE.get(key) == "response_ids" and _is_nested(row[key]) for key in keys):
        return RECORD
    holds = has_response(keys)
    talks = is_conversation(row)
    # A response that could not be scored has a reward that is null.
    has_reward = not rewards or "reward" in (row if holds or talks else keys)
    # One that was not made is null, beside its reward.
    if has_reward and (holds or ("reward" in keys and has_response(row) and not talks)):
        return RESPONSE
    if has_reward and talks:
        return CONVERSATION
    answered = holds or talks or any(key in _ANSWERS for key in keys)
    scored = has_reward or any(key in _SCORES for key in keys)
    if not any(key in _PROMPTS for key in keys) and not (answered or scored):
        return RECORD  # which says what is missing
    if not answered and not scored:
        raise CropiError(f"{where}: {ROLL_OUT} ({_held(keys)}){dotted_names(row)}")
    if not has_reward:
        _missing("reward", _SCORES, row, keys, where)
    if not (holds or talks):
        _missing("response", _ANSWERS, row, keys, where)
    return RECORD


def dotted_names(row: Mapping[str, Any], *, alone: bool = False) -> str:
    """Where a column holds columns of responses and rewards, how these are named; else nothing.

    Args:
        row: of a table, or a record.
        alone: take one of the two, too: of prompts a ``metadata.accuracy`` says how hard they are.

    >>> dotted_names({"prompt": "1+1=", "rollouts": {"responses": ["2", "3"], "scores": [1, 0]}})
    '; nested columns are named with dots: --columns responses=rollouts.responses,rewards=rollouts.scores'
    """
    for key, value in row.items():
        several = isinstance(value, (list, tuple)) and bool(value)
        inner = value[0] if several else value
        names: dict[str, str] = {}
        for name, held in inner.items() if isinstance(inner, Mapping) else ():
            if name in (*_ANSWERS, *_SCORES):
                wanted = "reward" if name in _SCORES else "response"
                names.setdefault(f"{wanted}s" if isinstance(held, (list, tuple)) else wanted, f"{key}.{name}")
        if names and (alone or {name.rstrip("s") for name in names} == {"response", "reward"}):
            rows = (
                f"{key!r} is a list of rows: make a row of each (pandas: frame.explode({key!r})), and name "
                if several
                else "nested columns are named with dots: "
            )
            return f"; {rows}--columns {','.join(f'{name}={column}' for name, column in names.items())}"
    return ""


def is_conversation(row: Mapping[str, Any]) -> bool:
    """Whether its messages hold a response."""
    messages = row.get("messages")
    return isinstance(messages, list) and any(
        isinstance(message, Mapping) and message.get("role") == "assistant" for message in messages
    )


def check_response(row: Mapping[str, Any], where: str) -> None:
    """Check that a row of a file with a response a row is no conversation, whose messages end in its response."""
    last = row["messages"][-1] if is_conversation(row) else None
    ends = isinstance(last, Mapping) and last.get("role") == "assistant"
    if ends and not has_response([key for key in row if row[key] is not None]):
        raise RecordError(
            where, "the row is a conversation ('messages'), and the first row of the file holds its response apart",
            "give rows of one form, or pass --skip-bad",
        )  # fmt: skip


def has_response(keys: Iterable[str]) -> bool:
    """Whether one of the keys holds a single response."""
    return any(SINGLE.get(key) in ("responses", "response_ids") for key in keys)


def _is_nested(ids: Any) -> bool:
    return isinstance(ids, (list, tuple)) and any(isinstance(one, (list, tuple)) for one in ids)


def _held(keys: Sequence[str]) -> str:
    return f"the row has {', '.join(map(repr, keys[:40]))}"


def _missing(
    wanted: str, names: Sequence[str], row: Mapping[str, Any], keys: Sequence[str], where: str
) -> None:
    """Raise of a row that lacks ``wanted``, unless it has an id and not one reward, and so is a whole record, and no
    column of ``names`` that may be meant for it."""
    near = next((key for key in keys if key in names and key != wanted), None)
    if near is None and "id" in keys and not (wanted == "response" and "reward" in keys):
        return
    # One row a prompt holds lists, one row a response single values.
    if near is not None and isinstance(row[near], (list, tuple)):
        name, needs = f"{wanted}s", f"the key '{wanted}s' is missing"
    else:
        name, needs = wanted, f"a row a response needs {wanted!r}, and has none"
    hint = f"did you mean --columns {name}={near}? " if near else ""
    if wanted == "response" and not near and is_conversation({"messages": row.get("prompt")}):
        hint = "where 'prompt' is a conversation with the response, call it 'messages' (--columns messages=NAME); or "
    more = (
        "; demonstrations, which have none, go with --estimator sft"
        if wanted == "reward" and not hint
        else ""
    )
    raise CropiError(
        f"{where}: {needs}; {hint}name the column with --columns {name}=NAME ({_held(keys)}){more}"
    )


def split_conversation(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row with ``messages`` as one with a prompt and a response, which begins where the assistant first speaks."""
    messages = row.get("messages")
    if messages is None:
        raise RecordError(
            where, "there are no 'messages', and the first row of the file is a conversation",
            "give rows of one form, or pass --skip-bad",
        )  # fmt: skip
    if has_response(key for key in row if row[key] is not None):
        raise RecordError(
            where, "the response stands apart from 'messages', and the first row of the file is a conversation",
            "give rows of one form, or pass --skip-bad",
        )  # fmt: skip
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise RecordError(where, f"'messages' must be a list of messages, got {shown(messages)}")
    first = next((i for i, message in enumerate(messages) if message.get("role") == "assistant"), None)
    if not first:
        raise RecordError(
            where, "'messages' needs a message before the assistant's first one, and one of the assistant",
            "give the whole conversation, prompt and response",
        )  # fmt: skip
    made = {key: value for key, value in row.items() if key != "messages"}
    return made | {"prompt": messages[:first], "response": messages[first:]}


def group_key(row: Mapping[str, Any]) -> str:
    """What rows of one prompt share: their id, or the content of the prompt."""
    return f"id {row['id']}" if row.get("id") is not None else content_id(row)


def content_id(record: Mapping[str, Any]) -> str:
    """An id made from the prompt and its reference answer: equal prompts have equal ids, and a changed one a new id."""
    ids = record.get("prompt_ids", record.get("prompt_token_ids"))
    prompt = record.get("prompt", record.get("messages"))
    content = [prompt if prompt is not None else ids, record.get("answer"), record.get("tools")]
    return hashed(json.dumps(content, sort_keys=True, default=repr))


def hashed(text: str) -> str:
    """An id made from a text."""
    return HASHED + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def joined(rows: list[dict[str, Any]], wheres: list[str]) -> dict[str, Any]:
    """The record of some rows that hold a response each. Columns that differ between them are left out.

    Raises:
        RecordError: the rows disagree on the prompt or on what the record can hold once.
    """
    made: dict[str, Any] = {}
    names = list(dict.fromkeys(key for row in rows for key in row))
    if any(row.get("truncated") is not None for row in rows):
        names = [key for key in names if key not in REASONS]
    for key in names:
        values = [row.get(key) for row in rows]
        if key in SINGLE:
            if any(value is not None for value in values):
                if (name := "finish_reasons" if key in REASONS else SINGLE[key]) in made:
                    raise RecordError(wheres[0], f"{name!r} is there under two names", "keep one of them")
                made[name] = values
        elif all(value == values[0] for value in values[1:]):
            made[key] = values[0]
        elif key in STEPS:
            raise RecordError(
                wheres[0],
                f"the responses to this prompt are of several policies ({key} {shown(values)})",
                f"give the rows of one step; where the column is no policy's, leave it out (--columns {key}=)",
            )
        elif key in FIELDS or key in ALIASES:
            other = next(i for i, value in enumerate(values) if value != values[0])
            same = (
                "of the same prompt" if rows[0].get("id") is None else f"with the id {shown(rows[0]['id'])}"
            )
            raise RecordError(
                wheres[other], f"another row {same}, at {wheres[0]}, has another {key!r}",
                "give every prompt its own id, or pass --skip-bad",
            )  # fmt: skip
    if "logprobs" in made and any(value is None for value in made["logprobs"]):
        raise RecordError(wheres[0], "some responses to this prompt have 'logprobs', and some have none")
    return made
