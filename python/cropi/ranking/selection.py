"""Selection: the best fraction of the pool, by fused influence or by a baseline.

The rule (arXiv 2510.26491)::

    n        = floor(N_pool * fraction + 1e-9)
    L_v      = the n prompts with the highest score[., v];   rank_v = 1 .. n inside L_v
    fused(s) = sum over v with s in L_v of 1 / rank_v(s)     (reciprocal rank fusion, constant 0, truncated at
    n) selected = the n prompts with the highest fused

Equal values are ordered by prompt id, so the result does not depend on the order of the files.
"""

from __future__ import annotations

import hashlib
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cropi.data.readers import read
from cropi.errors import CropiError
from cropi.files import lines_of, replacing
from cropi.ranking.influence import Scores

METHODS = ("rrf", "max", "random", "learnability", "pass_rate")
POOLS = ("all", "usable")


@dataclass(frozen=True)
class Selection:
    """The chosen prompts, best first: places in the score table, and the value each was ranked by.

    ``order`` ranks every usable prompt, the chosen ones first; ``fused`` is float64 ``[n prompts]``; ``scores`` is the
    table that the selection was made from.
    """

    chosen: list[int]
    order: list[int]
    fused: np.ndarray
    method: str
    scores: Scores = field(repr=False)

    @property
    def ids(self) -> list[str]:
        """The chosen prompts' ids, best first."""
        return [self.scores.rows[i].id for i in self.chosen]

    @property
    def weights(self) -> dict[str, float]:
        """How often each prompt is chosen when the validation prompts are drawn anew (``p_selected``), by prompt id:
        weights for sampling in place of a filter. Prompts that are never chosen are left out.

        Raises:
            CropiError: the scores hold none, or for choices of another number of prompts.
        """
        from cropi.ranking.saving import weights_of

        return weights_of(self)

    def to_dataset(self, rows: Any = None, *, id_column: str | None = None) -> Any:
        """The chosen prompts as a ``datasets.Dataset``, best first.

        Args:
            rows: a dataset, whose rows are taken whole (a ``datasets.Dataset``, a path, a name on the hub), or
                trajectory records, whose prompts are taken without the rollouts. None: id, rank and scores alone.
            id_column: the column of a dataset that holds the prompt ids; None finds it.

        Raises:
            CropiError: an id has no row.

        >>> import numpy as np
        >>> from cropi.store.shards import RowInfo
        >>> scores = Scores([RowInfo("a"), RowInfo("b")], ["sums"], np.array([[0.1], [0.4]]), {})
        >>> scores.select(0.5).to_dataset()["id"][:]
        ['b']
        """
        from cropi.ranking.saving import to_dataset

        return to_dataset(self, rows, id_column)

    def save(
        self,
        path: str | Path,
        format: str | None = None,
        *,
        rows: Any = None,
        id_column: str | None = None,
        data_source: str | None = None,
    ) -> int:
        """Write the chosen prompts, best first; returns how many rows.

        Args:
            path: the file, or the folder of "save_to_disk".
            format: see :func:`cropi.data.export.export`; None: by the ending of the path (``.jsonl``, ``.parquet``,
                ``.txt`` for ids, ``.json`` for row numbers, none for "save_to_disk").
            rows, id_column: as for :meth:`to_dataset`.
            data_source: of the format "verl": the name of the reward function.

        Raises:
            CropiError: as :func:`cropi.data.export.export`.
        """
        from cropi.ranking.saving import save

        return save(self, path, format, rows, id_column, data_source)

    def push_to_hub(
        self, name: str, rows: Any = None, *, id_column: str | None = None, **options: Any
    ) -> str:
        """Push the chosen prompts to the Hugging Face hub; returns the address.

        Args:
            name: ``owner/name``.
            rows, id_column: as for :meth:`to_dataset`.
            options: of ``datasets.Dataset.push_to_hub``: ``private``, ``token``, ``split``, ...

        Raises:
            CropiError: nobody is logged in, or the hub refuses it.
        """
        from cropi.ranking.saving import push_to_hub

        return push_to_hub(self, name, rows, id_column, **options)

    def __len__(self) -> int:
        return len(self.chosen)

    def __repr__(self) -> str:
        first = ", ".join(map(repr, self.ids[:3])) + (", ..." if len(self) > 3 else "")
        return f"Selection({len(self)} of {len(self.scores.rows)} prompts by {self.method}: {first})"

    def _repr_html_(self) -> str:
        """For notebooks: the chosen prompts, best first, at most twenty."""
        cells = [
            f"<td>{rank}</td><td>{html.escape(self.scores.rows[i].id)}</td><td>{self.fused[i]:.4f}</td>"
            for rank, i in enumerate(self.chosen[:20], 1)
        ]
        rows = "".join(f"<tr>{row}</tr>" for row in cells)
        head = "<tr><th>rank</th><th>prompt</th><th>value</th></tr>"
        return f"<p>{html.escape(repr(self))}</p><table>{head}{rows}</table>"


def fuse_ranks(table: np.ndarray, ids: Sequence[str] | np.ndarray, n: int) -> np.ndarray:
    """Reciprocal rank fusion truncated at n, constant 0: float64 ``[prompts]`` from scores ``[prompts, sets]``.

    ``ids`` settle ties; :func:`ranks_of` them may be given in their place, to sort them once for many tables.
    """
    if table.ndim != 2 or len(table) != len(ids):
        raise CropiError(f"table has shape {list(table.shape)}: give [{len(ids)}, sets], a row per id")
    ties = ids if isinstance(ids, np.ndarray) else ranks_of(ids)
    fused = np.zeros(len(ids))
    for column in table.T:
        best = np.lexsort((ties, -column))[:n]
        fused[best] += 1.0 / np.arange(1, len(best) + 1)
    return fused


def ranks_of(names: Sequence[str]) -> np.ndarray:
    """The place of every name in sorted order, int64 ``[n]``: what settles ties, as one number a prompt."""
    ranks = np.empty(len(names), dtype=np.int64)
    ranks[np.argsort(np.array(names, dtype=object), kind="stable")] = np.arange(len(names))
    return ranks


def order_of(value: np.ndarray, beyond: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """The order of selection, int64 ``[n]``: the highest ``value``, then the highest ``beyond``, then ``ties``."""
    return np.lexsort((ties, -beyond, -value))


def how_many(fraction: float, size: int, least: int = 0) -> int:
    """``floor(size * fraction + 1e-9)``, the number of prompts that a selection from a pool of ``size`` holds at most;
    ``least``, where that is more.

    CROPI's released code takes ``int(size * fraction)``, which is one less where the product should be whole and its
    rounding falls below: 28 of 100 for 0.29, against 29 here.

    Raises:
        CropiError: the fraction is not in (0, 1], or chooses nothing.
    """
    if not 0 < fraction <= 1:
        raise CropiError(f"fraction must be in (0, 1], got {fraction}")
    # 0.29 * 100 is 28.999... in binary; the rule means 29.
    n = max(math.floor(size * fraction + 1e-9), least)
    if n < 1:
        raise CropiError(
            f"fraction {fraction} of a pool of {size} prompts chooses none; give a larger fraction or more prompts"
        )
    return n


def select(
    scores: Scores,
    *,
    fraction: float = 0.1,
    method: str = "rrf",
    pool: str = "all",
    seed: int = 0,
    least: int = 0,
) -> Selection:
    """Choose ``floor(N_pool * fraction + 1e-9)`` prompts (see :func:`how_many`). Prompts without a usable sketch (zero
    gradient) are never chosen.

    Args:
        scores: the score table.
        fraction: share of the pool, in (0, 1].
        method: "rrf" (the rule above), "max" (the highest score over the sets), or a baseline: "random",
            "learnability" (p (1 - p) of the pass rate p), "pass_rate" (the highest p).
        pool: what N_pool counts: "all" prompts of the file, as the released method does, or only "usable"
            ones.
        seed: of "random", and of the order among equal pass rates in the other two baselines.
        least: choose at least so many, where there are so many usable ones (a trainer's batch may need them).

    Raises:
        CropiError: the fraction chooses nothing, or an unknown option.
    """
    for given, allowed, name in ((method, METHODS, "method"), (pool, POOLS, "pool")):
        if given not in allowed:
            raise CropiError(f"{name} must be one of {', '.join(allowed)}, got {given!r}")
    usable = np.flatnonzero(scores.usable)
    n = how_many(fraction, len(scores.rows) if pool == "all" else len(usable), least)
    ids = [scores.rows[i].id for i in usable]
    table = scores.table[usable]
    rates = np.array([scores.rows[i].pass_rate for i in usable])
    if method in ("rrf", "max"):
        value = fuse_ranks(table, ids, n) if method == "rrf" else table.max(axis=1)
        ties: list[str] = ids
    else:
        # Rounded: 0.2 * 0.8 and 0.8 * (1 - 0.8) differ in their last bit, and the harder prompt would always win.
        learnable = np.round(rates * (1 - rates), 12)
        value = {"random": np.zeros(len(ids)), "learnability": learnable, "pass_rate": rates}[method]
        # Pass rates take few values: among equal ones the draw must not follow the names of the tasks.
        ties = [hashlib.sha256(f"{seed}:{name}".encode()).hexdigest() for name in ids]
    # Outside every L_v all fused values are 0; the score keeps that end of the list in a meaningful order.
    beyond = np.where(value == 0, table.max(axis=1), 0.0) if method == "rrf" else np.zeros(len(ids))
    order = order_of(value, beyond, ranks_of(ties))
    fused = np.full(len(scores.rows), math.nan)
    fused[usable] = value
    places = [int(usable[i]) for i in order]
    return Selection(places[:n], places, fused, method, scores)


def write_selection(path: str | Path, scores: Scores, selection: Selection) -> None:
    """Write ``selected.jsonl``: id, rank (from 1), fused value, method, scores per set, stage and model, best
    first."""
    origin = scores.meta["train"]
    with replacing(Path(path)) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for rank, i in enumerate(selection.chosen, 1):
            row = {
                "id": scores.rows[i].id, "rank": rank, "fused": float(selection.fused[i]), "method": selection.method,
                "scores": {name: float(scores.table[i, v]) for v, name in enumerate(scores.sets)},
                "stage": origin["stage"], "model": origin["model"]["weights"],
            }  # fmt: skip
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_selection(path: str | Path) -> list[str]:
    """The prompt ids in a selection file, best first: what :func:`write_selection` wrote, or one id a line.

    Raises:
        CropiError: the file is empty, or a line is not an id.
    """
    lines = [line for line in lines_of(Path(path)) if line.strip()]
    if not lines:
        raise CropiError(f"selection: {path} is empty")
    if not lines[0].lstrip().startswith("{"):
        return [line.strip() for line in lines]
    try:
        return [str(json.loads(line)["id"]) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise CropiError(f"selection: {path} is not what `cropi select` writes ({error})") from error


def write_selected_records(path: str | Path, trajectories: Any, scores: Scores, selection: Selection) -> None:
    """Copy the chosen prompts' trajectory records, unchanged, best first.

    ``trajectories`` is what :func:`cropi.data.readers.read` takes or gave; where a full pass has kept the places of its
    records, the chosen ones alone are read.

    Raises:
        CropiError: a chosen prompt is not in the trajectories.
    """
    groups = read(trajectories, skip_bad=True)
    rest = dict.fromkeys(scores.rows[i].id for i in selection.chosen)
    with replacing(Path(path)) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for group in groups.take(list(rest), missing_ok=True):
            file.write(group.raw + "\n")
            del rest[group.id]
        if rest:
            raise CropiError(
                f"{len(rest)} selected prompts are not in {groups.names}, for example {next(iter(rest))!r}; give the "
                "files that the training store was made from"
            )
