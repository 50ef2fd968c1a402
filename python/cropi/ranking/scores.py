"""A table of scores: one row a training prompt, one column a validation set. It needs no torch."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cropi.checked import fits
from cropi.errors import CropiError, article, optional
from cropi.files import check_ending, is_file, path_of
from cropi.ranking.table_rows import values_of
from cropi.store.rows import RowInfo

if TYPE_CHECKING:
    from cropi.ranking.pairwise import Pairwise
    from cropi.ranking.selection import Selection
    from cropi.store.store import SketchStore


@dataclass(frozen=True)
class Scores:
    """One row per training prompt, in order of id. ``table`` is float64 ``[n, sets]``, NaN without a usable sketch.

    Where the validation prompts were resampled (:mod:`cropi.ranking.resampling`), ``stderr`` float64 ``[n, sets]``
    holds the standard errors of the scores, ``p_selected`` float64 ``[n]`` how often a prompt was chosen, and
    ``meta["uncertainty"]`` the rest. ``store`` is the training prompts' store, where this call made the scores.

    Of stores with groups of parameters, ``groups`` are their names, and ``contributions`` float64 ``[n, sets, groups]``
    says what each gives to a score: they add up to it (:mod:`cropi.ranking.influence`).

    >>> from cropi.store.rows import RowInfo
    >>> scores = Scores([RowInfo("a"), RowInfo("b")], ["sums"], np.array([[0.1], [0.4]]), {})
    >>> scores.top("sums", 1)
    [('b', 0.4)]
    """

    rows: Sequence[RowInfo]
    sets: list[str]
    table: NDArray[np.float64]
    meta: dict[str, Any]
    stderr: NDArray[np.float64] | None = None
    p_selected: NDArray[np.float64] | None = None
    store: SketchStore | None = field(default=None, repr=False, compare=False)
    pairs: Pairwise | None = field(default=None, repr=False, compare=False)
    groups: Sequence[str] = ()
    contributions: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "sets"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise CropiError(f"{name} is of type {type(value).__name__}: give a list")
        kind, shape = type(self.table).__name__, list(np.shape(self.table))
        if not isinstance(self.table, np.ndarray) or shape != [len(self.rows), len(self.sets)]:
            raise CropiError(
                f"table is {article(kind)} of shape {shape}: give a numpy array [{len(self.rows)}, {len(self.sets)}], "
                "a row per prompt and a column per validation set"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without the store: other processes have its folder."""
        return {name: value for name, value in vars(self).items() if name != "store"}

    @property
    def ids(self) -> list[str]:
        """The prompt ids."""
        return values_of(self.rows, "id")

    @property
    def self_influence(self) -> NDArray[np.float64]:
        """``|S g(s)|^2``, float64 ``[n]``: the influence of a prompt on itself; 0 without a gradient. Large ones are
        prompts that move the policy most, whatever the direction."""
        return np.array([row.norm for row in self.rows], dtype=np.float64) ** 2

    @property
    def estimator(self) -> Mapping[str, Any]:
        """Settings of the estimator by which the training prompts were sketched; empty where they are not known."""
        train = self.meta.get("train")
        held = train.get("estimator") if isinstance(train, dict) else None
        return held if isinstance(held, dict) else {}

    @property
    def usable(self) -> NDArray[np.bool_]:
        """bool ``[n]``: prompts with a score for every set."""
        usable: NDArray[np.bool_] = np.all(np.isfinite(self.table), axis=1)
        return usable

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def open(cls, path: str | Path) -> Scores:
        """Read a score table that :meth:`save`, `cropi influence` or `cropi run` wrote.

        Args:
            path: the file, or the folder of a run.

        Raises:
            CropiError: the file does not exist, is damaged, or is not a score table.
        """
        from cropi.ranking.table import SCORES, read_scores

        path = path_of(path, "path", "a scores.parquet or the folder of a run")
        inside = path / SCORES
        return read_scores(inside if is_file(inside) else path)

    def save(self, path: str | Path) -> None:
        """Write the table as parquet, for :meth:`open`, `cropi select` and other readers.

        Raises:
            CropiError: the path ends as another format does, or the file cannot be written.
        """
        from cropi.ranking.table import write_scores

        path = path_of(path, "path", "a file that ends in .parquet")
        check_ending("path", path, (".parquet",))
        write_scores(path, self)

    @classmethod
    def summed(cls, several: Sequence[Scores], weights: Sequence[float] | None = None) -> Scores:
        """The influence over several checkpoints: the scores by the sketches under each, times a weight, and added.

            score[s, v] = sum_t weight_t score_t[s, v]

        With the learning rates as weights and ``metric="dot"`` it is TracIn (Pruthi et al., *Estimating Training Data
        Influence by Tracing Gradient Descent*, 2020), with cosines what LESS ranks by. NaN where one of the scores is;
        ``rows`` are those of the first; standard errors and chances are not known of a sum, and are left out.

        Args:
            several: of the same prompts and validation sets, by one metric.
            weights: one for each, finite; None: 1.

        Raises:
            CropiError: no scores, of other prompts or sets or made otherwise, or weights that are not one for each.

        >>> from cropi.store.rows import RowInfo
        >>> early, late = (Scores([RowInfo("a")], ["sums"], np.array([[x]]), {}) for x in (0.1, 0.3))
        >>> Scores.summed([early, late], [2.0, 1.0]).top("sums", 1)
        [('a', 0.5)]
        """
        if not isinstance(several, (list, tuple)) or not all(isinstance(one, Scores) for one in several):
            raise CropiError(
                f"several is {several!r:.100}: give a list of Scores (cropi.influence, Scores.open)"
            )
        try:
            given = [1.0] * len(several) if weights is None else [float(weight) for weight in weights]
        except (TypeError, ValueError):
            raise CropiError(f"weights are {weights!r:.100}: give a number for each score table") from None
        if not several or len(given) != len(several) or not all(map(math.isfinite, given)):
            raise CropiError(
                f"weights are {given!r:.100} for {len(several)} score tables: give a number for each"
            )
        first, alike = several[0], ("metric", "mean", "aggregate", "minus", "minus_weight")
        for number, other in enumerate(several[1:], 1):
            for what in ("sets", "ids"):
                if getattr(other, what) != getattr(first, what):
                    raise CropiError(
                        f"scores {number} are of other {what} than scores 0: give scores of the same training prompts "
                        "and validation sets"
                    )
            for what in alike:
                mine, theirs = (one.meta.get(what) for one in (first, other))
                if mine != theirs:
                    raise CropiError(
                        f"scores {number} were made with {what} {theirs!r}, and scores 0 with {mine!r}: make all of "
                        "them alike"
                    )
        table = sum(weight * one.table for weight, one in zip(given, several, strict=True))
        kept = {name: first.meta[name] for name in alike if name in first.meta}
        return cls(first.rows, first.sets, np.asarray(table), kept | {"weights": given})

    def select(self, fraction: float = 0.1, **options: Any) -> Selection:
        """The best fraction of the prompts: :func:`cropi.ranking.selection.select`, with its options."""
        from cropi.ranking.selection import select

        return select(self, fraction=fraction, **options)

    def top(self, set: str | None = None, n: int = 5) -> list[tuple[str, float]]:
        """The ``n`` prompts with the highest scores for a validation set, and these; equal ones by id.

        ``set`` may be left out where there is one set.

        Raises:
            CropiError: no such set, several sets and no name, or ``n`` below 1.
        """
        if set is None and len(self.sets) == 1:
            set = self.sets[0]
        if set not in self.sets:
            number = f"; n={set} is how many" if fits(set, int) else ""
            raise CropiError(f"set is {set!r}: give one of {', '.join(map(repr, self.sets))}{number}")
        if not fits(n, int) or n < 1:
            raise CropiError(f"n must be an integer of at least 1, got {n!r}")
        column = self.table[:, self.sets.index(set)]
        order = sorted(
            np.flatnonzero(np.isfinite(column)).tolist(), key=lambda i: (-column[i], self.rows[i].id)
        )
        return [(self.rows[i].id, float(column[i])) for i in order[:n]]

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` with the columns of :func:`cropi.ranking.table.write_scores`, a row a prompt."""
        from cropi.ranking.table import columns_of

        return optional("pandas").DataFrame(columns_of(self))

    def plot(self, path: str | Path, *, fraction: float = 0.1, method: str = "rrf") -> None:
        """Write a plot (.png, .pdf or .svg) of the scores, with the prompts that would be selected."""
        from cropi.ranking.plot import plot_scores

        path = path_of(path, "path", "a file that ends in .png, .pdf or .svg")
        plot_scores(path, self, self.select(fraction, method=method))

    def __repr__(self) -> str:
        sets = ", ".join(map(repr, self.sets))
        return f"Scores({len(self)} prompts, {int(self.usable.sum())} usable, against {sets})"

    def _repr_html_(self) -> str:
        """For notebooks: the five highest prompts for every set."""
        head = "".join(f"<th>{html.escape(name)}</th><th></th>" for name in self.sets)
        best = [self.top(name) for name in self.sets]
        rows = ""
        for place in range(max(map(len, best))):
            cells = [column[place] if place < len(column) else ("", math.nan) for column in best]
            shown = "".join(
                f"<td>{html.escape(name)}</td><td>{'' if math.isnan(value) else f'{value:.4f}'}</td>"
                for name, value in cells
            )
            rows += f"<tr><td>{place + 1}</td>{shown}</tr>"
        return f"<p>{html.escape(repr(self))}</p><table><tr><th>rank</th>{head}</tr>{rows}</table>"
