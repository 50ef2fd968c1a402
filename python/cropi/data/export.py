"""The selection in the form that a trainer reads: rows of its own dataset, or the prompts' records, ids or row numbers.

``docs/trainers.md`` says which form each trainer takes and by which option.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from cropi.atomic import replacing, write_atomic
from cropi.bulk import check_bulk
from cropi.data import parquet, saved
from cropi.data.formats import begins, ending_of
from cropi.data.hub import from_hub, is_hub_name
from cropi.data.identity import dataset_ids
from cropi.data.keys import RENDERED
from cropi.data.lines import MARK, lines_of, values_of
from cropi.data.opened import peek, unpacked
from cropi.data.readers import read
from cropi.data.records import PromptGroup
from cropi.data.rows_out import check_json, check_table, rows_of, table_of, taken, write_jsonl, write_parquet
from cropi.data.sources import kind_of
from cropi.data.spilled import Rows
from cropi.data.tables import check_saved, is_saved
from cropi.data.trainer_rows import FILES, check_text, trainer_row
from cropi.errors import CropiError, article, optional, shown
from cropi.files import meant, reading
from cropi.form import is_writable
from cropi.sealed import check_sums, summed

FORMATS = ("jsonl", "parquet", "ids", "indices", "weights", "save_to_disk", *FILES)
# These name rows of a dataset by their places, and mean nothing without it.
BY_PLACE = ("indices", "weights")
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
    dataset: Any = None,
    id_key: str | None = None,
    weights: Mapping[str, float] | None = None,
    data_source: str | None = None,
) -> int:
    """Write the chosen prompts, best first, for a trainer; returns how many rows.

    ``<out>.sha256`` gets the checksums of what is written (``sha256sum -c``).

    Args:
        out: the file; of "save_to_disk" the folder.
        ids: prompt ids, best first.
        format: "jsonl" or "parquet" (rows), "save_to_disk" (rows, as a folder of ``datasets``), "ids" (one id a line),
            "indices" (a JSON list of row numbers of ``dataset``, from 0), "weights" (a JSON list with a number for
            every row of ``dataset``, 0 where a prompt has none), or a trainer of
            :data:`cropi.data.trainer_rows.FILES`: rows with the columns that it reads.
        trajectories: the records of the chosen prompts (anything that :func:`cropi.data.readers.read` takes); the rows
            are made from them, without the rollouts (of demonstrations: whole), when there is no ``dataset``. With
            one, they tell whether its rows are the prompts that their ids say.
        dataset: the trainer's own dataset: a path (``.parquet``, ``.jsonl``, ``.json``, a folder of ``save_to_disk``),
            a name on the hub, or a ``datasets.Dataset``; its rows are copied whole, with every column. A table's
            schema is kept.
        id_key: the column of ``dataset`` that holds the prompt id; dots lead into nested columns
            (``extra_info.index``). None takes the one of :data:`cropi.data.identity.ID_KEYS` that agrees with the ids
            and, where ``trajectories`` are given, with the prompts.
        weights: of "weights": by prompt id.
        data_source: of "verl": see :func:`cropi.data.trainer_rows.trainer_row`.

    Raises:
        CropiError: unknown format, no such dataset or column, ids that are missing or twice in it.
    """
    check_format(format, dataset, trajectories, id_key, data_source)
    with summed(out):
        return _export(Path(out), ids, format, trajectories, dataset, id_key, weights, data_source)


def _export(
    out: Path,
    ids: Sequence[str],
    format: str,
    trajectories: Any,
    dataset: Any,
    id_key: str | None,
    weights: Mapping[str, float] | None,
    data_source: str | None,
) -> int:
    if format == "ids":
        check_lines(ids)
        write_atomic(out, "".join(f"{name}\n" for name in ids))
        return len(ids)
    if format in BY_PLACE:
        _, places, names = located(dataset, ids, id_key, trajectories)
        numbers: list[Any] = places
        if format == "weights":
            if weights is None:
                raise CropiError("format weights needs the weights; use Selection.save, or cropi select")
            numbers = [weights.get(name, 0.0) for name in names]
        write_atomic(out, json.dumps(numbers) + "\n")
        return len(numbers)
    if format in FILES:
        groups = read(trajectories, skip_bad=True, rewards=None).take(ids)
        _write_rows(out, FILES[format], (trainer_row(format, group, data_source) for group in groups))
        return len(ids)
    if format == "save_to_disk":
        saved.save_folder(out, chosen_dataset(ids, trajectories=trajectories, dataset=dataset, id_key=id_key))
        return len(ids)
    if dataset is None:
        _write_rows(out, format, _rows_of_records(trajectories, ids))
        return len(ids)
    table, places, _ = located(dataset, ids, id_key, trajectories)
    if format == "parquet" and not isinstance(table, Rows):
        with replacing(out) as temporary:
            optional("pyarrow.parquet").write_table(taken(table, places), temporary)
    else:
        _write_rows(out, format, rows_of(table, places))
    return len(ids)


def check_lines(ids: Sequence[str]) -> None:
    """Check that every id can be a line of a file, and is read again as it is."""
    for place, name in enumerate(ids):
        if name.splitlines() != [name] or name != name.strip():
            raise CropiError(
                f"format ids: the prompt id {name!r} is not one line without spaces around it; use jsonl"
            )
        # Read again, the first would be JSON; where the file begins, the second is a mark of its encoding.
        if name[0] == "{" or name[0] == "\ufeff" and not place:
            raise CropiError(f"format ids: the prompt id {name!r} begins with {name[0]!r}; use jsonl")
        if not is_writable(name):
            raise CropiError(
                f"format ids: the prompt id {name!r} has half of a surrogate pair, which is not a character: no "
                "file takes it; give the prompt another id"
            )


def chosen_dataset(
    ids: Sequence[str], *, trajectories: Any = (), dataset: Any = None, id_key: str | None = None
) -> Any:
    """The chosen prompts as a ``datasets.Dataset``, best first; the arguments are those of :func:`export`.

    Raises:
        CropiError: as there.
    """
    if dataset is None:
        return saved.dataset_of(table_of(_rows_of_records(trajectories, ids)))
    table, places, _ = located(dataset, ids, id_key, trajectories)
    if hasattr(dataset, "select") and hasattr(dataset, "features"):
        return dataset.select(places)  # whose features say more than a table's types
    rows = table_of(table.taken(places)) if isinstance(table, Rows) else taken(table, places)
    return saved.dataset_of(rows)


def check_format(
    format: str,
    dataset: Any,
    trajectories: Any = None,
    id_key: str | None = None,
    data_source: str | None = None,
) -> None:
    """Check that a format is known, has what it is made from, and looks at the options that are given with it;
    ``trajectories=None``: they are still to come.

    Raises:
        CropiError: it is not, or has not.
    """
    if format not in FORMATS:
        raise CropiError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format in BY_PLACE and dataset is None:
        raise CropiError(f"format {format} needs a dataset, whose rows it numbers; give --dataset")
    if format == "ids" and dataset is not None:
        raise CropiError("format ids writes ids alone, and a dataset has rows; leave --dataset out")
    if format in FILES and dataset is not None:
        raise CropiError(
            f"format {format} makes rows from the records; a dataset's own rows are copied whole by --format "
            f"{FILES[format]}; leave --dataset out, or give that format"
        )
    if id_key is not None and dataset is None:
        raise CropiError(
            f"id_key {shown(id_key)} names a column of a dataset; give --dataset, or leave it out"
        )
    if data_source is not None and format != "verl":
        raise CropiError(
            f"data_source {shown(data_source)} is for format verl, not for {format}; leave it out"
        )
    if format != "ids" and dataset is None and trajectories is not None and not trajectories:
        raise CropiError(f"format {format} needs the prompts' rows: give --dataset or --trajectories")


def check_export(
    format: str,
    *,
    trajectories: Any = (),
    dataset: Any = None,
    id_key: str | None = None,
    records: Sequence[PromptGroup] = (),
    data_source: str | None = None,
    out: str | Path | None = None,
) -> None:
    """Check before the work that an export can be written: the dataset is there, has the ids, and fits the format.

    Args:
        format, trajectories, dataset, id_key, data_source: as for :func:`export`.
        records: some prompts of the trajectories, by whose ids and texts the dataset's rows are checked.
        out: where it will be written.

    Raises:
        CropiError: as :func:`export` would after it.
    """
    check_format(format, dataset, None, id_key, data_source)
    if format == "save_to_disk":
        optional("datasets")
        if out is not None:
            saved.check_folder(Path(out))
    if dataset is None:
        if trajectories and (format in FILES or format in ("parquet", "save_to_disk")):
            rows = (
                trainer_row(format, group, data_source) if format in FILES else _row(group)
                for group in read(trajectories, skip_bad=True, rewards=None)
            )
            if FILES.get(format) == "jsonl":
                for _ in rows:  # a row that cannot be made raises an error
                    pass
            else:
                table_of(list(rows))
        return
    table = read_dataset(dataset)
    dataset_ids(table, _called(dataset), id_key, records)
    if format == "jsonl" and not isinstance(table, Rows):
        check_json(table.schema, _called(dataset))
    elif format in ("parquet", "save_to_disk") and isinstance(table, Rows):
        check_table(table)


def _row(group: PromptGroup) -> dict[str, Any]:
    """A record without its rollouts; a demonstration is what is trained on, and stays whole."""
    return group.to_record() if group.demonstrations else without_rollouts(group)


def without_rollouts(group: PromptGroup) -> dict[str, Any]:
    """The keys of a record that are not of its rollouts."""
    return {key: value for key, value in group.to_record().items() if key not in ROLLOUT_KEYS}


def _rows_of_records(trajectories: Any, ids: Sequence[str]) -> list[dict[str, Any]]:
    """The prompts of records; the answer, the task and all extra keys stay."""
    rows = []
    for group in read(trajectories, skip_bad=True, rewards=None).take(ids):
        check_text(group)
        rows.append(_row(group))
    return rows


def read_dataset(path: Any) -> Any:
    """A trainer's dataset: a pyarrow table (``.parquet``, a folder of ``save_to_disk``, a name on the hub, a
    ``datasets.Dataset``, a pandas frame), or :class:`cropi.data.spilled.Rows` (``.jsonl``, ``.json``, a list of
    dictionaries).

    Raises:
        CropiError: the file does not exist, is not of that form, or holds no row.
    """
    table = _read_dataset(path)
    if not len(table):
        raise CropiError(
            f"dataset: {_called(path)} holds no row; give the dataset that the rollouts were made from"
        )
    return table


def _read_dataset(path: Any) -> Any:
    """The same, which may be empty."""
    if not isinstance(path, (str, Path)):
        return _held(path)
    if is_hub_name(path) and not os.path.exists(path):
        return from_hub(str(path), lambda file, _: read_dataset(file), lambda held, _: read_dataset(held))
    path = Path(path)
    check_sums(path)
    if is_saved(path):
        return saved.table_in(path) if check_saved(path) else ()
    if not os.path.isfile(path):
        raise CropiError(f"dataset: there is no file {path}; {meant(path)}give the path of one")
    with reading(path, missing=True):
        return _dataset_in(path)


def _held(dataset: Any) -> Any:
    """The same for a dataset in memory."""
    if hasattr(dataset, "with_format") and hasattr(dataset, "__len__") and not isinstance(dataset, Mapping):
        return saved.table_of_dataset(dataset)
    if hasattr(dataset, "schema") and hasattr(dataset, "column_names"):
        return dataset
    if hasattr(dataset, "iterrows"):  # pandas
        return optional("pyarrow").Table.from_pandas(dataset, preserve_index=False)
    if isinstance(dataset, Sequence) and all(isinstance(row, Mapping) for row in dataset):
        return Rows(dict(row) for row in dataset)
    kind = type(dataset).__name__
    if (
        isinstance(dataset, Mapping)
        and dataset
        and all(hasattr(part, "column_names") for part in dataset.values())
    ):
        raise CropiError(
            f"dataset: {article(kind)} of {', '.join(map(str, dataset))}: give one of its splits"
        )
    remedy = "a datasets.Dataset, a table, a pandas frame, a list of dictionaries (one a prompt), a path or a hub name"
    if hasattr(dataset, "to_arrow"):
        remedy = "dataset.to_arrow()"
    raise CropiError(f"dataset: got {kind_of(dataset)}; give {remedy}")


def _dataset_in(path: Path) -> Any:
    ending = ending_of(path)
    if ending == ".parquet":
        with reading(path):
            return parquet.table_of(path)
    if ending not in (".jsonl", ".json"):
        raise CropiError(f"dataset: {path} should end in .parquet, .jsonl or .json")
    try:
        rows = Rows(_objects(path))
    except RecursionError as error:
        raise CropiError(
            f"dataset: {path} has a row with too many brackets in one another: {error}"
        ) from None
    return rows


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects in a file, one at a time."""
    name = f"dataset: {path}"
    with unpacked(path) as file:
        values = values_of(file, name) if begins(peek(file)) == b"[" else _values_of_lines(file, name)
        for where, value, _ in values:
            if not isinstance(value, dict):
                raise CropiError(
                    f"{where} is {shown(value)}, but a dataset should hold objects, one per prompt"
                )
            yield value


def _values_of_lines(file: IO[bytes], name: str) -> Iterator[tuple[str, Any, bytes]]:
    """:func:`cropi.data.lines.values_of` for JSON lines."""
    for where, _, line in lines_of(file, name):
        check_bulk(line, where)
        if not (text := line.removeprefix(MARK)).strip():
            continue
        try:
            yield where, json.loads(text), text
        except (ValueError, RecursionError) as error:
            raise CropiError(f"{where} is not JSON: {error}; write one object a line") from None


def located(
    dataset: Any, ids: Sequence[str], id_key: str | None = None, trajectories: Any = ()
) -> tuple[Any, list[int], list[str]]:
    """A dataset's rows, the row number of every id, and the ids of all rows.

    Raises:
        CropiError: as :func:`cropi.data.identity.dataset_ids`.
    """
    table = read_dataset(dataset)
    of_rows = dataset_ids(table, _called(dataset), id_key, known_of(ids, trajectories))
    return table, of_rows.places(ids), of_rows.names


def known_of(ids: Sequence[str], trajectories: Any = ()) -> list[PromptGroup]:
    """What a dataset's rows are compared with: the prompts of some ids without their rollouts, or the ids alone where
    there are no ``trajectories``."""
    chosen = read(trajectories, skip_bad=True, rewards=None).take(ids) if trajectories else ()
    known = [
        PromptGroup(group.id, group.prompt, None, [], extra={RENDERED: group.extra.get(RENDERED)})
        for group in chosen
    ]
    return known or [PromptGroup(name, None, None, []) for name in ids]


def _called(dataset: Any) -> str:
    """What messages call a dataset."""
    return str(dataset) if isinstance(dataset, (str, Path)) else f"the {type(dataset).__name__}"


def _write_rows(out: Path, format: str, rows: Iterable[Mapping[str, Any]]) -> None:
    if format == "jsonl":
        write_jsonl(out, rows)
    else:
        write_parquet(out, rows if isinstance(rows, Rows) else list(rows))
