"""The selection in the form that a trainer reads: rows of its own dataset, or the prompts' records, ids or row numbers.

``docs/trainers.md`` says which form each trainer takes and by which option.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cropi.data.prompt_ids import PromptIds, column_values
from cropi.data.readers import read_trajectories
from cropi.errors import CropiError, optional
from cropi.files import lines_of, replacing, write_atomic

FORMATS = ("jsonl", "parquet", "ids", "indices")
ID_KEYS = ("id", "extra_info.index", "index", "uid")
# What a trajectory record holds besides the prompt; a trainer makes its own.
ROLLOUT_KEYS = (
    "responses",
    "rewards",
    "response_ids",
    "logprobs",
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
    trajectories: Sequence[str | Path] = (),
    dataset: str | Path | None = None,
    id_key: str | None = None,
) -> int:
    """Write the chosen prompts, best first, for a trainer; returns how many rows.

    Args:
        out: the file.
        ids: prompt ids, best first.
        format: "jsonl" or "parquet" (rows), "ids" (one id a line), or "indices" (a JSON list of row numbers of
            ``dataset``, from 0).
        trajectories: files with the records of the chosen prompts; the rows are made from them, without the rollouts,
            when there is no ``dataset``.
        dataset: the trainer's own dataset (``.parquet``, ``.jsonl`` or ``.json``); its rows are copied whole, with
            every column. A parquet file's schema is kept.
        id_key: the column of ``dataset`` that holds the prompt id; dots lead into nested columns
            (``extra_info.index``). None takes the first of :data:`ID_KEYS` that is there.

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
    places = _places(table, dataset, ids, id_key)
    if format == "indices":
        write_atomic(out, json.dumps(places) + "\n")
    elif format == "parquet" and not isinstance(table, list):
        with replacing(out) as temporary:
            optional("pyarrow.parquet").write_table(table.take(places), temporary)
    else:
        rows = table if isinstance(table, list) else table.take(places).to_pylist()
        _write_rows(out, format, [rows[i] for i in places] if isinstance(table, list) else rows)
    return len(ids)


def _rows_of_records(trajectories: Sequence[str | Path], ids: Sequence[str]) -> list[dict[str, Any]]:
    """The prompts of records, without the rollouts; the answer, the task and all extra keys stay."""
    wanted, rows = set(ids), {}
    for group in read_trajectories(trajectories, skip_bad=True):
        if group.id not in wanted:
            continue
        if group.prompt is None:
            raise CropiError(
                f"{group.where}: the record {group.id!r} has prompt_ids but no text, which trainers read; "
                "give --dataset"
            )
        rows[group.id] = {key: value for key, value in group.to_record().items() if key not in ROLLOUT_KEYS}
    missing = [name for name in ids if name not in rows]
    if missing:
        raise CropiError(
            f"{len(missing)} selected prompts are not in {', '.join(map(str, trajectories))}, for example "
            f"{missing[0]!r}; give the files that the training store was made from"
        )
    return [rows[name] for name in ids]


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


def dataset_ids(table: Any, path: str | Path, id_key: str | None) -> PromptIds:
    """The prompt ids of a dataset that :func:`read_dataset` read; ``id_key`` as for :func:`export`.

    Raises:
        CropiError: it has no such column, or an id is missing or twice in it.
    """
    columns = list(table[0]) if isinstance(table, list) else table.column_names
    for key in [id_key] if id_key else ID_KEYS:
        first = key if key in columns else key.split(".")[0]
        if not isinstance(table, list) and first not in columns:
            continue
        rows = table if isinstance(table, list) else table.select([first]).to_pylist()
        values = column_values(rows, key)[1]
        if values is not None and None not in values:
            return PromptIds(rows, key, f"dataset: {path}", "--dataset-id")
    wanted = f"column {id_key!r}" if id_key else f"one of {', '.join(ID_KEYS)}"
    raise CropiError(
        f"dataset: {path} has no stable prompt id ({wanted} is not among its columns {', '.join(columns)}, or not in "
        "every row); add the trajectories' ids to it as a column, and name it with --dataset-id"
    )


def _places(table: Any, path: str | Path, ids: Sequence[str], id_key: str | None) -> list[int]:
    """The row number of every id."""
    found = dataset_ids(table, path, id_key)
    missing = [name for name in ids if name not in found]
    if missing:
        raise CropiError(
            f"dataset: {path}: {len(missing)} of {len(ids)} selected prompts have no row, for example {missing[0]!r} "
            f"(its column {found.column!r} holds, for example, {found.names[0]!r}); give the dataset that the rollouts "
            "were made from"
        )
    return found.places(ids)


def _write_rows(out: Path, format: str, rows: list[dict[str, Any]]) -> None:
    if format == "jsonl":
        write_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    pyarrow, parquet = optional("pyarrow"), optional("pyarrow.parquet")
    try:
        table = pyarrow.Table.from_pylist(rows)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise CropiError(
            f"format parquet: the rows do not fit into columns of one type ({error}); use jsonl"
        ) from error
    with replacing(out) as temporary:
        parquet.write_table(table, temporary)
