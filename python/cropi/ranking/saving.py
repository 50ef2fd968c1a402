"""A selection in the forms that people take it on in: rows, a data set, weights, a file for a trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cropi.data.export import BY_PLACE, FORMATS, check_format, chosen_dataset, export, read_dataset
from cropi.data.prompt_ids import column_values
from cropi.data.readers import PromptGroups
from cropi.data.rows_out import table_of, write_jsonl, write_parquet
from cropi.data.saved import check_hub_name, dataset_of, push, save_folder
from cropi.data.trainer_rows import FILES
from cropi.errors import CropiError
from cropi.files import path_of
from cropi.options import BASELINES
from cropi.ranking.values import again_for_chances, no_score

if TYPE_CHECKING:
    from cropi.ranking.selection import Selection

# By the ending of a path.
ENDINGS = {".jsonl": "jsonl", ".json": "indices", ".parquet": "parquet", ".txt": "ids", "": "save_to_disk"}

# Rows with one of these are trajectories.
REWARDS = {"rewards", "reward"}


def own_rows(selection: Selection) -> list[dict[str, Any]]:
    """A row a chosen prompt, best first: id, rank from 1, the value it was ranked by, its score per validation set, and
    how often it is chosen when the validation prompts are drawn anew, where that is known."""
    scores = selection.scores
    rows = []
    for rank, i in enumerate(selection.chosen, 1):
        row: dict[str, Any] = {"id": scores.rows[i].id, "rank": rank, "value": float(selection.fused[i])}
        row |= {f"score[{name}]": float(scores.table[i, v]) for v, name in enumerate(scores.sets)}
        if scores.p_selected is not None and selection.method not in BASELINES:
            row["p_selected"] = float(scores.p_selected[i])
        rows.append(row)
    return rows


def weights_of(selection: Selection) -> dict[str, float]:
    """See :attr:`cropi.ranking.selection.Selection.weights`."""
    scores = selection.scores
    if selection.method in BASELINES:
        raise CropiError(f"weights: this is {no_score(selection.method)}: take the chosen prompts")
    if scores.p_selected is None:
        why = scores.meta.get("uncertainty_missing", "they were made without --draws")
        again = again_for_chances(scores.meta)
        raise CropiError(
            f"weights: the scores hold no p_selected ({why}); {again}, or take the chosen prompts"
        )
    weights = {
        row.id: float(p) for row, p in zip(scores.rows, scores.p_selected) if not math.isnan(p) and p > 0
    }
    drawn = round(sum(weights.values()))
    if drawn != len(selection.chosen):
        raise CropiError(
            f"weights: p_selected in the scores is of choices of {drawn} prompts, and this selection has "
            f"{len(selection.chosen)}; score again with its fraction and pool (`cropi run`, or cropi.score), or select "
            "with the fraction that the scores were made with"
        )
    return weights


def to_dataset(selection: Selection, rows: Any, id_key: str | None) -> Any:
    """See :meth:`cropi.ranking.selection.Selection.to_dataset`."""
    if rows is None:
        check_format("jsonl", None, None, id_key)
        return dataset_of(table_of(own_rows(selection)))
    trajectories, dataset = _parts(rows, id_key)
    return chosen_dataset(selection.ids, trajectories=trajectories, dataset=dataset, id_key=id_key)


def save(
    selection: Selection,
    path: str | Path,
    format: str | None,
    rows: Any,
    id_key: str | None,
    data_source: str | None,
) -> int:
    """See :meth:`cropi.ranking.selection.Selection.save`."""
    path = path_of(path, "path", "a file, or a folder for save_to_disk")
    form = format or ENDINGS.get(path.suffix)
    if form is None or form not in FORMATS:
        raise CropiError(
            f"format must be one of {', '.join(FORMATS)}, got {form!r}; or let the path end in "
            f"{', '.join(end for end in ENDINGS if end)}"
        )
    if form == "ids" and rows is not None:
        raise CropiError("format ids writes ids alone; leave rows out")
    if rows is None and form in ("jsonl", "parquet", "save_to_disk"):
        check_format(form, None, None, id_key, data_source)
        made = own_rows(selection)
        if form == "save_to_disk":
            save_folder(path, dataset_of(table_of(made)))
        else:
            (write_jsonl if form == "jsonl" else write_parquet)(path, made)
        return len(made)
    trajectories, dataset = _parts(rows, id_key, form)
    return export(
        path,
        selection.ids,
        format=form,
        trajectories=trajectories,
        dataset=dataset,
        id_key=id_key,
        weights=weights_of(selection) if form == "weights" else None,
        data_source=data_source,
    )


def push_to_hub(selection: Selection, name: str, rows: Any, id_key: str | None, **options: Any) -> str:
    """See :meth:`cropi.ranking.selection.Selection.push_to_hub`."""
    if not options.get("token"):
        check_hub_name(name)
    return push(to_dataset(selection, rows, id_key), name, **options)


def _parts(rows: Any, id_key: str | None, format: str = "") -> tuple[Any, Any]:
    """``(trajectories, dataset)``: rows are records where they are rolled out, and a trainer's own dataset if not."""
    if rows is None:
        return (), None
    if isinstance(rows, PromptGroups) or format in FILES:
        return rows, None
    if format in BY_PLACE or id_key is not None:
        return (), rows
    if isinstance(rows, (list, tuple)):
        if all(isinstance(row, Mapping) and not REWARDS & row.keys() for row in rows):
            return (), rows
        return rows, None
    try:
        table = read_dataset(rows)
    except CropiError:
        if not isinstance(rows, (str, Path)):
            raise
        return rows, None  # only trajectories have this form
    columns = column_values(table)[0]
    return (rows, None) if REWARDS & set(columns) else ((), rows)
