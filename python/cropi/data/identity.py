"""Which row of a trainer's dataset belongs to which prompt id.

A dataset may have several columns of integers that could be the id (``id`` and ``extra_info.index``): which one holds
the ids is decided by what the rows hold, not by its name.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cropi.data.forms import CONTENT, HASHED, content_id, has_response, is_conversation, split_conversation
from cropi.data.keys import RENDERED
from cropi.data.prompt_ids import PromptIds, column_values
from cropi.data.records import PromptGroup
from cropi.data.spilled import Rows
from cropi.data.tables import TableRow, row_of_table, rows_of_batch
from cropi.data.values import python_value
from cropi.errors import CropiError, RecordError, shown

ID_KEYS = ("id", "extra_info.index", "index", "uid")
PROMPT_KEYS = ("prompt", "messages", "question", "problem")


def dataset_ids(
    table: Any, path: str | Path, id_key: str | None, records: Sequence[PromptGroup] = ()
) -> PromptIds:
    """The prompt ids of a dataset that :func:`cropi.data.export.read_dataset` read.

    Args:
        table: a pyarrow table or rows.
        path: what messages call it.
        id_key: the column; None finds it among :data:`ID_KEYS`, and without one names rows by their content, if the
            records' ids are hashes of theirs.
        records: some prompts by their ids; a column is taken if all of them are in it and each row has the record's own
            prompt, wherever the two can be compared.

    Raises:
        CropiError: no column has this name, an id is missing or twice in it, no column agrees with the records, or two
            do that name different rows.
    """
    fitting: list[PromptIds] = []
    reasons: list[CropiError] = []
    keys = (id_key,) if id_key else ID_KEYS
    columns, held = column_values(table, *keys)
    for key, values in zip(keys, held):
        if values is None or None in values:
            continue
        try:
            ids = PromptIds.of(values, key, f"dataset: {path}", "--id-key")
            _check_rows(table, columns, path, ids, records)
        except CropiError as error:
            reasons.append(error)
        else:
            fitting.append(ids)
    if not fitting and reasons:
        raise reasons[0]
    names = [record.id for record in records]
    if not fitting and not id_key and names and all(name.startswith(HASHED) for name in names):
        hashes = _hashes(table, columns)
        if len(set(hashes)) == len(hashes):
            ids = PromptIds.of(hashes, "hash", f"dataset: {path}", "--id-key")
            _check_there(names, ids, path, ": the content of no row has this hash")
            return ids
    if not fitting:
        wanted = f"column {id_key!r}" if id_key else f"one of {', '.join(ID_KEYS)}"
        raise CropiError(
            f"dataset: {path} has no stable prompt id ({wanted} is not among its columns {', '.join(columns)}, or not "
            "in every row); add the trajectories' ids to it as a column, and name it with --id-key"
        )
    for other in fitting[1:]:
        if names and other.places(names) != fitting[0].places(names):
            raise CropiError(
                f"dataset: {path}: the ids are in the columns {fitting[0].column!r} and {other.column!r}, which name "
                f"different rows ({shown(names[0])}: {fitting[0].place[names[0]]} and {other.place[names[0]]}), and "
                "the prompts do not tell which is meant; name the column with --id-key"
            )
    return fitting[0]


def _hashes(table: Any, columns: Sequence[str]) -> list[str]:
    """The ids that the rows would have if they were records without one."""
    rows: Iterable[Any] = table
    if not isinstance(table, Rows):
        batches = table.select([key for key in CONTENT if key in columns]).to_batches(max_chunksize=1024)
        rows = itertools.chain.from_iterable(map(rows_of_batch, batches))
    made, apart = [], has_response(columns)
    for held in rows:
        row = (
            row_of_table(held)
            if isinstance(held, TableRow)
            else {key: python_value(held[key]) for key in CONTENT if key in held}
        )
        if not apart and row.get("prompt") is None and is_conversation(row):
            # A row that is no record has no id that is asked for.
            with contextlib.suppress(RecordError):
                row = split_conversation(row, "")
        made.append(content_id(row))
    return made


def _check_rows(
    table: Any, columns: Sequence[str], path: str | Path, ids: PromptIds, records: Sequence[PromptGroup]
) -> None:
    """Check that the records' ids are all there, and that each row has the prompt of its record."""
    _check_there([record.id for record in records], ids, path)
    key = next((name for name in PROMPT_KEYS if name in columns), None)
    if key is None:
        return
    for record in records:
        row = ids.place[record.id]
        there = table[row].get(key) if isinstance(table, Rows) else table.column(key)[row].as_py()
        if _differ(_comparable(record.prompt), _comparable(there), key, bool(record.extra.get(RENDERED))):
            raise CropiError(
                f"dataset: {path}: by its column {ids.column!r}, row {row} is the prompt {record.id!r:.100}, but it "
                f"holds {shown(there)}, and the trajectories hold {shown(record.prompt)}; name the column with the "
                "trajectories' ids with --id-key"
            )


def _check_there(names: Sequence[str], ids: PromptIds, path: str | Path, why: str = "") -> None:
    if missing := [name for name in names if name not in ids]:
        why = why or f" (its column {ids.column!r} holds, for example, {ids.names[0]!r})"
        raise CropiError(
            f"dataset: {path}: {len(missing)} of {len(names)} prompts have no row, for example "
            f"{missing[0]!r}{why}; {_remedy(missing[0])}"
        )


def _differ(mine: Any, theirs: Any, key: str, rendered: bool) -> bool:
    """Whether a record's prompt cannot be that of a row, both as they can be compared."""
    if mine is None or type(mine) is not type(theirs) or mine == theirs:
        return False
    if isinstance(mine, str):  # a template stands around what a dump holds
        return not (rendered and theirs in mine)
    # The row is a whole conversation, and the record's prompt ends where the assistant speaks.
    n = len(mine)
    whole = theirs[:n] == mine and [role for role, _ in theirs[n : n + 1]] == ["assistant"]
    return not (key == "messages" and whole)


def _remedy(missing: str) -> str:
    if not missing.startswith(HASHED):
        return "give the dataset that the rollouts were made from"
    return (
        "the trajectories name no ids, so that theirs are hashes of their prompts: give them the dataset's ids "
        "(`cropi convert` takes them from a key of the dump by --id-key, or finds them by the prompts in --dataset, "
        "with --model), or leave the dataset out"
    )


def _comparable(prompt: Any) -> Any:
    """A prompt as it can be compared: a string, or messages as (role, text); None for anything else."""
    if isinstance(prompt, str):
        return prompt.strip()
    if not isinstance(prompt, (list, tuple)) or not all(isinstance(message, Mapping) for message in prompt):
        return None
    made = []
    for message in prompt:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
        made.append(
            (message.get("role"), content.strip() if isinstance(content, str) else json.dumps(content))
        )
    return made
