"""The selection in the form that a trainer reads: rows of its own dataset, or the prompts' records, ids or row numbers.

``docs/trainers.md`` says which form each trainer takes and by which option.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cropi.data.identity import dataset_ids
from cropi.data.readers import read
from cropi.data.records import PromptGroup
from cropi.data.rows_out import check_json, rows_of, table_of, taken, write_jsonl, write_parquet
from cropi.errors import CropiError, optional
from cropi.files import lines_of, replacing, write_atomic

FORMATS = ("jsonl", "parquet", "ids", "indices")
# What a trajectory record holds besides the prompt; a trainer makes its own.
ROLLOUT_KEYS = (
    "responses",
    "rewards",
    "response_ids",
    "logprobs",
    "loss_mask",
    "prompt_ids",
    "truncated",
    "temperature",
    "policy",
)


def export(
    out: str | Path,
    ids: Sequence[str],
    *,
    format: str = "jsonl",
    trajectories: Any = (),
    dataset: str | Path | None = None,
    id_key: str | None = None,
) -> int:
    """Write the chosen prompts, best first, for a trainer; returns how many rows.

    Args:
        out: the file.
        ids: prompt ids, best first.
        format: "jsonl" or "parquet" (rows), "ids" (one id a line), or "indices" (a JSON list of row numbers of
            ``dataset``, from 0).
        trajectories: the records of the chosen prompts (anything that :func:`cropi.data.readers.read` takes); the rows
            are made from them, without the rollouts, when there is no ``dataset``. With one, they tell whether its rows
            are the prompts that their ids say.
        dataset: the trainer's own dataset (``.parquet``, ``.jsonl`` or ``.json``); its rows are copied whole, with
            every column. A parquet file's schema is kept.
        id_key: the column of ``dataset`` that holds the prompt id; dots lead into nested columns
            (``extra_info.index``). None takes the one of :data:`cropi.data.identity.ID_KEYS` that agrees with the ids
            and, where ``trajectories`` are given, with the prompts.

    Raises:
        CropiError: unknown format, no such dataset or column, ids that are missing or twice in it.
    """
    if format not in FORMATS:
        raise CropiError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    out = Path(out)
    if format == "ids":
        for name in ids:
            if name.splitlines() != [name]:
                raise CropiError(f"format ids: the prompt id {name!r} is not one line; use jsonl")
        write_atomic(out, "".join(f"{name}\n" for name in ids))
        return len(ids)
    if dataset is None:
        if format == "indices":
            raise CropiError("format indices needs a dataset, whose rows it numbers; give --dataset")
        if not trajectories:
            raise CropiError(f"format {format} needs the prompts' rows: give --dataset or --trajectories")
        _write_rows(out, format, _rows_of_records(trajectories, ids))
        return len(ids)
    table = read_dataset(dataset)
    chosen = read(trajectories, skip_bad=True).take(ids) if trajectories else ()
    known = [PromptGroup(group.id, group.prompt, None, []) for group in chosen]  # without the rollouts
    places = _places(table, dataset, ids, id_key, known)
    if format == "indices":
        write_atomic(out, json.dumps(places) + "\n")
    elif format == "parquet" and not isinstance(table, list):
        with replacing(out) as temporary:
            optional("pyarrow.parquet").write_table(taken(table, places), temporary)
    else:
        _write_rows(out, format, rows_of(table, places))
    return len(ids)


def check_export(
    format: str,
    *,
    trajectories: Any = (),
    dataset: str | Path | None = None,
    id_key: str | None = None,
    records: Sequence[PromptGroup] = (),
) -> None:
    """Check before the work that an export can be written: the dataset is there, has the ids, and fits the format.

    Args:
        format, trajectories, dataset, id_key: as for :func:`export`.
        records: some prompts of the trajectories, by whose ids and texts the dataset's rows are checked.

    Raises:
        CropiError: as :func:`export` would after it.
    """
    if format not in FORMATS:
        raise CropiError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if dataset is None:
        if format == "indices":
            raise CropiError("format indices needs a dataset, whose rows it numbers; give --dataset")
        if format == "parquet" and trajectories:
            table_of([_row(group) for group in read(trajectories, skip_bad=True)])
        return
    table = read_dataset(dataset)
    dataset_ids(table, dataset, id_key, records)
    if format == "jsonl" and not isinstance(table, list):
        check_json(table.schema, dataset)
    elif format == "parquet" and isinstance(table, list):
        table_of(table)


def _row(group: PromptGroup) -> dict[str, Any]:
    """A record without its rollouts."""
    return {key: value for key, value in group.to_record().items() if key not in ROLLOUT_KEYS}


def _rows_of_records(trajectories: Any, ids: Sequence[str]) -> list[dict[str, Any]]:
    """The prompts of records, without the rollouts; the answer, the task and all extra keys stay."""
    rows = []
    for group in read(trajectories, skip_bad=True).take(ids):
        if group.prompt is None:
            raise CropiError(
                f"{group.where}: the record {group.id!r:.100} has prompt_ids but no text, which trainers read; "
                "give --dataset"
            )
        rows.append(_row(group))
    return rows


def read_dataset(path: str | Path) -> Any:
    """A trainer's dataset: a pyarrow table (``.parquet``), or a list of JSON objects (``.jsonl``, ``.json``).

    Raises:
        CropiError: there is no such file, or it is not of that form.
    """
    path = Path(path)
    if not path.is_file():
        raise CropiError(f"dataset: there is no file {path}")
    if path.suffix == ".parquet":
        return optional("pyarrow.parquet").read_table(path)
    if path.suffix not in (".jsonl", ".json"):
        raise CropiError(f"dataset: {path} should end in .parquet, .jsonl or .json")
    try:
        rows = (
            json.loads(path.read_text(encoding="utf-8"))
            if path.suffix == ".json"
            else [json.loads(line) for line in lines_of(path) if line.strip()]
        )
    except ValueError as error:
        raise CropiError(f"dataset: {path} is not {path.suffix[1:]}: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise CropiError(f"dataset: {path} should hold objects, one per prompt")
    return rows


def _places(
    table: Any, path: str | Path, ids: Sequence[str], id_key: str | None, records: Sequence[PromptGroup]
) -> list[int]:
    """The row number of every id."""
    found = dataset_ids(table, path, id_key, records or [PromptGroup(name, None, None, []) for name in ids])
    return found.places(ids)


def _write_rows(out: Path, format: str, rows: Iterable[Mapping[str, Any]]) -> None:
    if format == "jsonl":
        write_jsonl(out, rows)
    else:
        write_parquet(out, list(rows))
