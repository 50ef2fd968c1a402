"""The file of scores: one row a training prompt, in parquet, with what the scores were made from beside it.

A damaged file would select other prompts. Pages carry parquet's checksums, which reading verifies; what lies outside of
the pages (columns, their kinds, the metadata) carries one of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from cropi.atomic import replacing
from cropi.checked import fits
from cropi.data.parquet import opened, plain
from cropi.errors import CropiError, optional, printable, shown
from cropi.files import check_name, is_file, meant, reading
from cropi.form import check_form, is_number, is_writable, wrong_form
from cropi.ranking.scores import Scores
from cropi.ranking.selection import Selection
from cropi.ranking.table_rows import TableRows, fill_numbers
from cropi.store.rows import SCORED_AT

SCORES = "scores.parquet"  # its name in a folder of results
# What pyarrow and the lines below raise on a damaged file, beside Arrow's own errors.
DAMAGED = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    OSError,
    MemoryError,
    NotImplementedError,
)
LARGEST = 1 << 30  # bytes of numbers that any file may ask for; others four times their size
HEALTH = ("ratio", "ess", "clipped")  # of a row's ``extra``
EXTRA = (*HEALTH, "file", SCORED_AT)
FIELDS = {
    "id": "id", "set": "set", "task": "task", "pass_rate": "pass_rate", "n_tokens": "tokens", "norm": "norm",
    "status": "status", "reason": "reason",
}  # fmt: skip

# The form (:mod:`cropi.form`) of what a table says of how it was made.
_SET = {
    "name": str, "prompts": lambda count: fits(count, int) and count > 1, "stderr": is_number,
    "stderr_at_cut": is_number, "signal": is_number, "from_responses?": is_number, "own?": is_number,
}  # fmt: skip
_OF_SCORES = {"sets": [_SET], "own_signal?": is_number}  # written with a baseline, which draws nothing
_UNCERTAINTY = {
    **_OF_SCORES, "overlap": is_number, "halves": is_number, "overlap_of_set": {str: is_number}, "draws": int,
    "fraction": float,
}  # fmt: skip
_PATHS = {"path?": str, "paths?": [str]}
META = {
    "metric?": str, "mean?": str, "uncertainty_missing?": str, "selection?": dict,
    "train?": {
        **_PATHS, "stage?": str | None, "model?": (str | None, {"weights?": str | None}),
    },
    "valid?": ([_PATHS | {"path": str}], None),
    "groups?": lambda names: fits(names, list[str]) and len(set(names)) == len(names),
    "uncertainty?": lambda held: _is_whole(held),
}  # fmt: skip


def columns_of(scores: Scores, selection: Selection | None = None) -> dict[str, Any]:
    """The table by the names of its columns (see :func:`write_scores`)."""
    columns: dict[str, Any] = {
        name: [getattr(row, key) for row in scores.rows] for name, key in FIELDS.items()
    }
    columns |= {name: [row.extra.get(name) for row in scores.rows] for name in EXTRA}
    if not any(columns[SCORED_AT]):
        del columns[SCORED_AT]
    columns |= {f"score[{name}]": scores.table[:, v] for v, name in enumerate(scores.sets)}
    if scores.contributions is not None:
        columns |= dict(zip(_parts(scores.sets, scores.groups), _flat(scores.contributions).T, strict=True))
    if scores.stderr is not None:
        columns |= {f"stderr[{name}]": scores.stderr[:, v] for v, name in enumerate(scores.sets)}
    if scores.p_selected is not None:
        columns["p_selected"] = scores.p_selected
    if selection is not None:
        rank = {i: place for place, i in enumerate(selection.order, 1)}
        chosen = set(selection.chosen)
        columns["rank"] = [rank.get(i) for i in range(len(scores.rows))]
        columns["selected"] = [i in chosen for i in range(len(scores.rows))]
    return columns


def write_scores(path: str | Path, scores: Scores, selection: Selection | None = None) -> None:
    """Write ``scores.parquet``.

    Columns: id, set, task, pass_rate, n_tokens, norm, status, reason; ratio, ess and clipped (null where a prompt was
    not computed); file (what it was read from); where an earlier stage sketched a prompt scored_at (that stage; null
    for those of this one); ``score[<set>]``; of stores with groups of parameters ``contribution[<set>][<group>]``,
    which add up to the score; where validation prompts were resampled ``stderr[<set>]`` and p_selected; with a
    selection rank (from 1, null without a score) and selected. What the scores were made from stands in the schema's
    metadata under ``cropi``, as JSON.
    """
    pyarrow, parquet = optional("pyarrow"), optional("pyarrow.parquet")
    kinds = dict.fromkeys(("set", "task", "file", SCORED_AT), pyarrow.string()) | dict.fromkeys(
        HEALTH, pyarrow.float64()
    )
    kinds["rank"] = pyarrow.int64()
    arrays = {}
    for name, values in columns_of(scores, selection).items():
        try:
            arrays[name] = pyarrow.array(values, kinds.get(name))
        except (
            pyarrow.ArrowException,
            TypeError,
            OverflowError,
        ) as error:  # of a store that another hand sealed
            raise CropiError(
                f"cannot write {path}: a row holds a value of another kind for the column {shown(name)} "
                f"({printable(str(error)[:200])}); make the store of the training prompts again"
            ) from error
    table = pyarrow.table(arrays)
    meta = json.dumps(scores.meta | ({} if selection is None else {"selection": selection.settings}))
    table = table.replace_schema_metadata(
        {"cropi": meta, "cropi_sha256": _sealed(table.schema, table.num_rows, meta)}
    )
    with replacing(Path(path)) as temporary:
        parquet.write_table(table, temporary, write_page_checksum=True, row_group_size=1 << 16)


def read_scores(path: str | Path, *, only: Sequence[str] | None = None, errors: bool = True) -> Scores:
    """Read what :func:`write_scores` wrote.

    Args:
        path: the file.
        only: what is read of the rows beside their ids, by its name in :class:`cropi.store.rows.RowInfo` or in its
            ``extra``; the rest is None. None reads all of it.
        errors: read the standard errors, too.

    Raises:
        CropiError: the file does not exist, is damaged, or is not a score table.
    """
    file = Path(path)
    if is_file(file / SCORES):
        raise CropiError(f"{file} is a folder; its score table is {file / SCORES}: give that")
    if not os.path.isfile(file):
        check_name(file)
        near = meant(file)
        remedy = "give the path of one" if near else f"make one with `cropi influence --out {file}`"
        raise CropiError(f"{file}: there is no such score table; {near}{remedy}")
    try:
        with reading(file, missing=True), ExitStack() as stack:
            table = stack.enter_context(opened(file))
            schema = table.schema_arrow
            metadata = schema.metadata or {}
            text = metadata[b"cropi"].decode("utf-8")
            meta = json.loads(text)
            check_form(meta, META, f"{file} is damaged", "make it again with `cropi influence`")
            if not is_writable(meta):
                raise ValueError("its metadata holds half a character")
            seal = _sealed(schema, table.metadata.num_rows, text)
            # Tables of other writers have no checksum.
            intact = metadata.get(b"cropi_sha256", seal.encode()).decode() == seal
            scores = _scores(file, table, meta, only, errors)
    except CropiError:
        raise
    except (*DAMAGED, optional("pyarrow").ArrowException) as error:
        raise CropiError(
            f"{file} is not a score table of this release ({printable(str(error)[:200])}); make one with "
            "`cropi influence`"
        ) from error
    if not intact:
        raise CropiError(
            f"{file} is damaged: its checksum does not match; make it again with `cropi influence`"
        )
    return scores


def written_with(path: str | Path, chosen: Sequence[int]) -> bool | None:
    """Whether a score table was written with the choice of these rows; None: with no choice."""
    parquet = optional("pyarrow.parquet")
    with reading(Path(path), missing=True):
        if "selected" not in parquet.read_schema(path).names:
            return None
        column = parquet.read_table(path, columns=["selected"]).column(0).to_numpy()
    return bool(np.array_equal(np.flatnonzero(np.asarray(column, dtype=bool)), np.sort(chosen)))


def _scores(
    path: Path,
    file: Any,
    meta: dict[str, Any],
    only: Sequence[str] | None,
    errors: bool,
) -> Scores:
    """The table, read by batches: the whole of it as Arrow's takes as much memory again."""
    schema, count = file.schema_arrow, file.metadata.num_rows
    sets = _sets(path, schema, count, meta)
    wanted = {name: key for name, key in FIELDS.items() if only is None or key in ("id", *only)}
    rows = TableRows(schema, count, wanted, [name for name in EXTRA if only is None or name in only])
    kinds = ["score", *(["stderr"] if errors and sets and f"stderr[{sets[0]}]" in schema.names else [])]
    numbers = {kind: np.full((count, len(sets)), np.nan) for kind in kinds}
    drawn = np.full(count, np.nan) if "p_selected" in schema.names else None
    groups = list(meta.get("groups") or ())
    parts = np.full((count, len(sets), len(groups)), np.nan) if groups else None
    filled = {
        f"{kind}[{name}]": table[:, v] for kind, table in numbers.items() for v, name in enumerate(sets)
    }
    if parts is not None:
        filled |= zip(_parts(sets, groups), _flat(parts).T, strict=True)
    if drawn is not None:
        filled["p_selected"] = drawn
    for batch in map(plain, file.iter_batches(8192, columns=[*rows.columns, *filled])):
        begin = len(rows)
        rows.add(batch)
        for name, column in filled.items():
            fill_numbers(column[begin : len(rows)], batch.column(name))
    if drawn is not None and not np.isfinite(drawn[~np.isnan(drawn)]).all():
        raise ValueError("a value of the column p_selected is infinite")
    # What it keeps for the next columns would stay beside the table.
    optional("pyarrow").default_memory_pool().release_unused()
    if len(rows) != count:
        raise ValueError(f"it holds {len(rows)} of {count} rows")
    rows.check()
    return Scores(
        rows, sets, numbers["score"], meta, numbers.get("stderr"), drawn, groups=groups, contributions=parts
    )


def _sets(path: Path, schema: Any, count: int, meta: Mapping[str, Any]) -> list[str]:
    """The validation sets of a table of ``count`` rows.

    Raises:
        ValueError: it holds no scores, or more than the file can stand for; or its uncertainty is of other sets.
    """
    sets = [name[6:-1] for name in schema.names if name.startswith("score[")]
    if not sets or not count:
        raise ValueError("it holds no scores")
    told = {one["name"] for one in meta["uncertainty"]["sets"]} if "uncertainty" in meta else set(sets)
    if lacking := set(sets) - told:
        raise ValueError(f"its uncertainty leaves out the set {min(lacking)!r}")
    # Of equal values a small file may name any number.
    size = 8 * count * len(schema)
    if size > max(LARGEST, 4 * os.path.getsize(path)):
        raise ValueError(f"its {count} rows would take {size / 1e9:.3g} GB")
    return sets


def _parts(sets: Sequence[str], groups: Sequence[str]) -> list[str]:
    """The columns of contributions, in the order of :func:`_flat`."""
    return [f"contribution[{name}][{group}]" for name in sets for group in groups]


def _flat(contributions: np.ndarray) -> np.ndarray:
    """``[n, sets * groups]``."""
    return contributions.reshape(len(contributions), -1)


def _sealed(schema: Any, count: int, meta: str) -> str:
    """The SHA-256 of what pages do not hold: the columns' names and kinds, the number of rows, the metadata."""
    kinds = [(field.name, str(field.type)) for field in schema]
    return hashlib.sha256(json.dumps([kinds, count, meta]).encode()).hexdigest()


def _is_whole(held: Any) -> bool:
    drawn = isinstance(held, dict) and bool(held.keys() - {"sets", "own_signal"})
    if wrong_form(held, _UNCERTAINTY if drawn else _OF_SCORES):
        return False
    # A set that is subtracted has an overlap, and no scores of its own.
    names = [one["name"] for one in held["sets"]]
    return len(set(names)) == len(names) and (not drawn or set(names) <= held["overlap_of_set"].keys())
