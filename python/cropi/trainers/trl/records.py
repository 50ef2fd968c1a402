"""From what a GRPOTrainer holds to trajectory records that the reader takes: checked when they are written."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cropi.data.keys import FIELDS
from cropi.data.prompt_ids import PromptIds, column_values
from cropi.data.records import parse_record
from cropi.data.rewards import LARGEST_REWARD
from cropi.errors import CropiError, RecordError
from cropi.trainers.trl.options import Recording
from cropi.trainers.values import plain_value, text_value

PER_RESPONSE = ("responses", "response_ids", "loss_mask", "truncated", "logprobs", "rewards_by_function")
# The recorder sets these itself, so that no column of the dataset can.
OURS = frozenset(FIELDS) - {"task", "answer"} | {"rewards_by_function", "reward", "step", "stage"}


def id_of(row: Mapping[str, Any], column: str) -> str:
    """The prompt's id, as :class:`PromptIds` finds it: dots lead into nested columns."""
    value: Any = row
    for key in [column] if column in row else column.split("."):
        value = value[key]
    return str(value)


def columns_of(row: Mapping[str, Any], columns: Sequence[str], where: str) -> dict[str, Any]:
    """The columns that go into a record, where the row has them."""
    made = {
        name: text_value(row[name], where) if name == "task" else plain_value(row[name], where)
        for name in columns
        if row.get(name) is not None
    }
    return {name: value for name, value in made.items() if value is not None}


def group_record(
    rows: list[dict[str, Any]], common: Mapping[str, Any], left_out: Counter[str]
) -> dict[str, Any] | None:
    """One trajectory record from the rows of one prompt; None if fewer than two of them can be used.

    Responses that no reward function scored are left out, as TRL leaves them out of the advantages. So are empty ones,
    and those whose reward is infinite or beyond 1e30, with which the group's advantages would overflow.

    Args:
        rows: a response each.
        common: what all records of the moment hold.
        left_out: counts, by reason, the responses that are left out.

    Raises:
        CropiError: the rows belong to different prompts, or begin with different tokens.
    """
    ids = {row["id"] for row in rows}
    if len(ids) != 1:
        raise CropiError(
            f"the prompts {', '.join(sorted(ids))} stand in one group: the trainer's rows are not in groups of "
            f"{len(rows)}; a sampler that is not TRL's cannot be recorded"
        )
    if any(row["prompt_ids"] != rows[0]["prompt_ids"] for row in rows):
        raise CropiError(
            f"the responses to the prompt {rows[0]['id']!r} follow prompts of different tokens, and a record holds one "
            "prompt: let an environment's reset say the same to all of them; let rollout_func return the same "
            "prompt_ids, with what differs at the beginning of completion_ids (0 in env_mask); or pass recording=None"
        )
    reasons = [_unusable(row) for row in rows]
    left_out.update(reason for reason in reasons if reason)
    rows = [row for row, reason in zip(rows, reasons) if not reason]
    if len(rows) < 2:
        return None
    record = {key: value for key, value in rows[0].items() if key not in (*PER_RESPONSE, "reward")}
    record["rewards"] = [row["reward"] for row in rows]
    record |= {key: [row[key] for row in rows] for key in PER_RESPONSE if key in rows[0]}
    return record | dict(common)


def _unusable(row: Mapping[str, Any]) -> str:
    if not row["response_ids"]:
        return "empty"
    if math.isnan(row["reward"]):
        return "without a reward"
    if math.isinf(row["reward"]):
        return "with an infinite reward"
    if not any(row.get("loss_mask", (1,))):
        return "without a token that is scored"
    return f"with a reward beyond {LARGEST_REWARD:g}" if abs(row["reward"]) > LARGEST_REWARD else ""


def checked_line(record: Mapping[str, Any], where: str) -> str:
    """The record as a line of JSON, read once as ``cropi sketch`` will read it.

    Raises:
        CropiError: it cannot be read: what is wrong is named now, not when the prompts are selected.
    """
    try:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        line.encode()
        parse_record(line, where)
    except RecordError as error:
        raise _unreadable(record, where, error.problem) from error
    except (ValueError, TypeError) as error:  # a NaN, half a surrogate pair, a type that JSON lacks
        raise _unreadable(record, where, str(error)) from error
    return line + "\n"


def _unreadable(record: Mapping[str, Any], where: str, problem: str) -> CropiError:
    return CropiError(
        f"{where}: the rollouts of the prompt {record.get('id')!r:.200} (step {record.get('step', 0)}) make no record "
        f"that can be read: {problem:.1000}; mend what makes them (the reward function, the dataset's columns, a model "
        "whose log-probs are not finite), or record less: Recording(columns=(), text=False, logprobs=False)"
    )


def check_columns(dataset: Any, name: str, recording: Recording, every: bool = True) -> None:
    """Check that what the recorder copies of every row of a dataset can be written and read.

    Args:
        dataset: its columns are read once.
        name: what it is called in messages.
        recording: names the columns.
        every: columns that the user named must be there.

    Raises:
        CropiError: names the row, the column and the value.
    """
    for column in recording.columns:
        if column in OURS:
            raise CropiError(
                f"recording: columns names {column!r}, which every record holds anyway or sets itself; leave it out"
            )
    tables: dict[str, list[Any]] = {}
    for column in recording.columns:
        values = column_values(dataset, column)[1][0] if len(dataset) else None
        if values is not None:
            tables[column] = values
        elif every and column not in Recording().columns and len(dataset):
            known = ", ".join(column_values(dataset, column)[0])
            raise CropiError(f"recording: columns names {column!r}, but {name} has only {known}")
    tried: set[tuple[str, type]] = set()
    for i, cells in enumerate(zip(*tables.values())):
        where = f"{name}, row {i}"
        row = columns_of(dict(zip(tables, cells)), recording.columns, where)
        # Plain text and numbers are read alike in every row; what is nested is tried in each.
        new = {(key, type(value)) for key, value in row.items() if _nested(value)}
        new |= {(key, type(value)) for key, value in row.items()} - tried
        if not new:
            continue
        tried |= new
        record = {"id": "x", "prompt_ids": [0], "response_ids": [[0], [0]], "rewards": [0.0, 1.0]} | row
        try:
            parse_record(json.dumps(record, ensure_ascii=False, allow_nan=False), where)
        except (RecordError, ValueError, RecursionError) as error:
            problem = error.problem if isinstance(error, RecordError) else str(error)
            raise CropiError(
                f"{where}: its columns {', '.join(row)} do not go into a trajectory record: {problem:.1000}; leave the "
                "column out of Recording(columns=...), or turn it into text"
            ) from error


def _nested(value: Any) -> bool:
    return isinstance(value, (dict, list)) or (isinstance(value, int) and abs(value) >= 1 << 63)


def check_datasets(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], column: str, recording: Recording | None
) -> PromptIds | None:
    """Check the datasets that a trainer is about to be built with, before a model is loaded: ids, recorded columns.

    Returns:
        The ids of ``train_dataset``, or None without one.

    Raises:
        CropiError: an id is missing or used twice, or a column cannot be recorded.
    """
    names = ("model", "reward_funcs", "args", "train_dataset", "eval_dataset")
    given = dict(zip(names, args)) | dict(kwargs)
    train, valid = given.get("train_dataset"), given.get("eval_dataset")
    ids = None if train is None else PromptIds(train, column)
    if train is not None and recording is not None:
        check_columns(train, "train_dataset", recording)
    seen: dict[str, str] = {}
    parts = valid.items() if isinstance(valid, Mapping) else [] if valid is None else [("", valid)]
    for key, dataset in parts:
        name = f"eval_dataset[{key!r}]" if key else "eval_dataset"
        for prompt in PromptIds(dataset, column, name).names:
            if prompt in seen:
                raise CropiError(
                    f"{name} and {seen[prompt]} both have the {column} {prompt!r}; ids must be unique over all eval "
                    "datasets, for example by putting the set's name in front"
                )
            seen[prompt] = name
        if recording is not None:
            check_columns(dataset, name, recording, every=train is None)
    return ids
