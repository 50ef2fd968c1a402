"""The file of scores: one row a training prompt, in parquet, with what the scores were made from beside it.

A damaged file would select other prompts. Pages carry parquet's checksums, which reading verifies; what lies outside of
the pages (columns, their kinds, the metadata) carries one of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cropi.errors import CropiError, optional
from cropi.files import replacing
from cropi.ranking.influence import Scores
from cropi.ranking.selection import Selection
from cropi.store.shards import RowInfo

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
HEALTH = ("ratio", "ess", "clipped")  # of a row's ``extra``
EXTRA = (*HEALTH, "file")
FIELDS = {
    "id": "id", "set": "set", "task": "task", "pass_rate": "pass_rate", "n_tokens": "tokens", "norm": "norm",
    "status": "status", "reason": "reason",
}  # fmt: skip


def columns_of(scores: Scores, selection: Selection | None = None) -> dict[str, Any]:
    """The table by the names of its columns (see :func:`write_scores`)."""
    columns: dict[str, Any] = {
        name: [getattr(row, key) for row in scores.rows] for name, key in FIELDS.items()
    }
    columns |= {name: [row.extra.get(name) for row in scores.rows] for name in EXTRA}
    columns |= {f"score[{name}]": scores.table[:, v] for v, name in enumerate(scores.sets)}
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
    not computed); file (what it was read from); ``score[<set>]``; where validation prompts were resampled
    ``stderr[<set>]`` and p_selected; with a selection rank (from 1, null without a score) and selected. What the
    scores were made from stands in the schema's metadata under ``cropi``, as JSON.
    """
    pyarrow, parquet = optional("pyarrow"), optional("pyarrow.parquet")
    kinds = dict.fromkeys(("set", "task", "file"), pyarrow.string()) | dict.fromkeys(
        HEALTH, pyarrow.float64()
    )
    kinds["rank"] = pyarrow.int64()
    arrays = {k: pyarrow.array(v, kinds.get(k)) for k, v in columns_of(scores, selection).items()}
    table = pyarrow.table(arrays)
    meta = json.dumps(scores.meta | ({} if selection is None else {"selection": selection.settings}))
    table = table.replace_schema_metadata({"cropi": meta, "cropi_sha256": _sealed(table, meta)})
    with replacing(Path(path)) as temporary:
        parquet.write_table(table, temporary, write_page_checksum=True)


def read_scores(path: str | Path) -> Scores:
    """Read what :func:`write_scores` wrote.

    Raises:
        CropiError: there is no such file, it is damaged, or it is not a score table.
    """
    parquet, file = optional("pyarrow.parquet"), Path(path)
    if not file.is_file():
        raise CropiError(
            f"{file}: there is no such score table; make one with `cropi influence --out {file}`"
        )
    try:
        table = parquet.read_table(file, page_checksum_verification=True)
        metadata = table.schema.metadata or {}
        text = metadata[b"cropi"].decode("utf-8")
        meta = json.loads(text)
        # Files of the first release have no checksum.
        intact = metadata.get(b"cropi_sha256", _sealed(table, text).encode()).decode() == _sealed(table, text)
        scores = _scores(table.to_pydict(), meta)
    except (*DAMAGED, optional("pyarrow").ArrowException) as error:
        raise CropiError(f"{file} is not a score table of this release ({error}); make it again") from error
    if not intact:
        raise CropiError(
            f"{file} is damaged: its checksum does not match; make it again with `cropi influence`"
        )
    return scores


def _scores(columns: Mapping[str, list[Any]], meta: dict[str, Any]) -> Scores:
    sets = [name[6:-1] for name in columns if name.startswith("score[")]
    keys = [key for name, key in FIELDS.items()]
    rows = [
        RowInfo(
            **dict(zip(keys, values, strict=True)),
            # Files of the first release have no such columns.
            extra={name: columns[name][n] for name in EXTRA if name in columns and columns[name][n] is not None},
        )
        for n, values in enumerate(zip(*(columns[name] for name in FIELDS), strict=True))
    ]  # fmt: skip

    def table(kind: str) -> np.ndarray:
        return np.array([columns[f"{kind}[{name}]"] for name in sets], dtype=np.float64).T

    sure = bool(sets) and f"stderr[{sets[0]}]" in columns
    drawn = np.array(columns["p_selected"], dtype=np.float64) if "p_selected" in columns else None
    return Scores(rows, sets, table("score"), meta, table("stderr") if sure else None, drawn)


def _sealed(table: Any, meta: str) -> str:
    """The SHA-256 of what pages do not hold: the columns' names and kinds, the number of rows, the metadata."""
    kinds = [(field.name, str(field.type)) for field in table.schema]
    return hashlib.sha256(json.dumps([kinds, table.num_rows, meta]).encode()).hexdigest()
