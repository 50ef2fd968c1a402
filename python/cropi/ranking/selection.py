"""Selection: the best fraction of the pool, by fused influence or by a baseline.

The rule of the released CROPI code (arXiv 2510.26491)::

    n        = floor(N_pool * fraction + 1e-9)
    L_v      = the n prompts with the highest score[., v];   rank_v = 1 .. n inside L_v
    fused(s) = sum over v with s in L_v of 1 / rank_v(s)     (reciprocal rank fusion, constant 0, truncated at
    n) selected = the n prompts with the highest fused

Equal values are ordered by prompt id, so the result does not depend on the order of the files. Other values to rank by
are in :mod:`cropi.ranking.values`, shares of groups in :mod:`cropi.ranking.shares`, soft draws in
:mod:`cropi.ranking.draws`, and what looks at sketches in :mod:`cropi.ranking.distinct`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cropi.errors import CropiError, article, as_keywords, optional, shown, warn
from cropi.files import is_folder
from cropi.option_fields import changed, one_of
from cropi.options import Selecting
from cropi.ranking.draws import draw, soft_weights
from cropi.ranking.rule import Rule, shared_out
from cropi.ranking.scores import Scores
from cropi.ranking.shares import NotInPool, how_many, read_quotas
from cropi.ranking.table_rows import values_of
from cropi.ranking.values import SCORE_AGAIN, again_for_chances, check_rewards, order_of, students_quantile

# How messages name what :meth:`Selection.save` and others take.
OF_ROWS = {"--dataset": "rows=", "--trajectories": "rows=", "--id-key": "id_key=", "--format": "format="}

if TYPE_CHECKING:  # a selection by scores alone needs no torch
    from cropi.ranking.distinct import Distinct
    from cropi.store.store import SketchStore


@dataclass(frozen=True)
class Selection:
    """The chosen prompts, best first: places in the score table, and the value each was ranked by.

    ``order`` ranks every usable prompt, the chosen ones first; ``fused`` is float64 ``[n prompts]``; ``scores`` is the
    table that the selection was made from; ``settings`` are the options that choose the same again; ``copies`` names
    for every prompt that was left out as a near copy the chosen one that it is near to.

    >>> import cropi
    >>> from cropi.store.rows import RowInfo
    >>> scores = cropi.Scores([RowInfo("a"), RowInfo("b")], ["sums"], np.array([[0.1], [0.4]]), {})
    >>> scores.select(0.5).ids
    ['b']
    """

    chosen: list[int]
    order: list[int]
    fused: NDArray[np.float64]
    method: str
    scores: Scores = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict, repr=False)
    copies: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def ids(self) -> list[str]:
        """The chosen prompts' ids, best first."""
        return values_of(self.scores.rows, "id", np.array(self.chosen, dtype=np.int64))

    @property
    def weights(self) -> dict[str, float]:
        """How often each prompt is chosen when the validation prompts are drawn anew (``p_selected``), by prompt id:
        weights for sampling in place of a filter. Prompts that are never chosen are left out.

        Raises:
            CropiError: the scores hold none, or for choices of another number of prompts.
        """
        from cropi.ranking.saving import weights_of

        return weights_of(self)

    @as_keywords(OF_ROWS)
    def to_dataset(self, rows: Any = None, *, id_key: str | None = None) -> Any:
        """The chosen prompts as a ``datasets.Dataset``, best first.

        Args:
            rows: a dataset, whose rows are taken whole (a ``datasets.Dataset``, a pandas frame, a list of
                dictionaries, a path, a name on the hub), or trajectory records, whose prompts are taken without the
                rollouts (of demonstrations: whole). None: id, rank and scores alone.
            id_key: the column of a dataset that holds the prompt ids; None finds it.

        Raises:
            CropiError: an id has no row.

        >>> import numpy as np
        >>> from cropi.store.rows import RowInfo
        >>> scores = Scores([RowInfo("a"), RowInfo("b")], ["sums"], np.array([[0.1], [0.4]]), {})
        >>> scores.select(0.5).to_dataset()["id"][:]
        ['b']
        """
        from cropi.ranking.saving import to_dataset

        return to_dataset(self, rows, id_key)

    @as_keywords(OF_ROWS)
    def save(
        self,
        path: str | Path,
        format: str | None = None,
        *,
        rows: Any = None,
        id_key: str | None = None,
        data_source: str | None = None,
    ) -> int:
        """Write the chosen prompts, best first; returns how many rows.

        Args:
            path: the file, or the folder of "save_to_disk".
            format: see :func:`cropi.data.export.export`; None: by the ending of the path (``.jsonl``, ``.parquet``,
                ``.txt`` for ids, ``.json`` for row numbers, none for "save_to_disk").
            rows, id_key: as for :meth:`to_dataset`.
            data_source: of the format "verl": the name of the reward function.

        Raises:
            CropiError: as :func:`cropi.data.export.export`.
        """
        from cropi.ranking.saving import save

        return save(self, path, format, rows, id_key, data_source)

    @as_keywords(OF_ROWS)
    def push_to_hub(self, name: str, rows: Any = None, *, id_key: str | None = None, **options: Any) -> str:
        """Push the chosen prompts to the Hugging Face hub; returns the address.

        Args:
            name: ``owner/name``.
            rows, id_key: as for :meth:`to_dataset`.
            options: of ``datasets.Dataset.push_to_hub``: ``private``, ``token``, ``split``, ...

        Raises:
            CropiError: nobody is logged in, or the hub refuses it.
        """
        from cropi.ranking.saving import push_to_hub

        return push_to_hub(self, name, rows, id_key, **options)

    def soft_weights(self, temperature: float = 1.0) -> dict[str, float]:
        """A weight for every usable prompt by id, with mean 1, best first: all are trained on, the better the more.

            w = exp(z / temperature), divided by its mean,        z the normal score of the prompt's rank

        >>> import numpy as np
        >>> from cropi.store.rows import RowInfo
        >>> scores = Scores([RowInfo("a"), RowInfo("b")], ["sums"], np.array([[0.1], [0.4]]), {})
        >>> {name: round(weight, 3) for name, weight in select(scores, fraction=0.5).soft_weights().items()}
        {'b': 1.588, 'a': 0.412}
        """
        weights = soft_weights(len(self.order), temperature)
        return {self.scores.rows[i].id: float(weight) for i, weight in zip(self.order, weights, strict=True)}

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[str]:
        """The chosen prompts' ids, best first."""
        return iter(self.ids)

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


def select(
    scores: Scores,
    selecting: Selecting | None = None,
    *,
    seed: int | None = None,
    least: int = 0,
    sketches: SketchStore | None = None,
    **options: Any,
) -> Selection:
    """Choose ``floor(N_pool * fraction + 1e-9)`` prompts (see :func:`cropi.ranking.shares.how_many`), or ``count``.
    Prompts without a usable sketch (zero gradient) are never chosen.

    What is done, in this order: scores become lower bounds (``confidence``); all prompts with a score are ranked
    (``method``, within the groups of ``per`` and ``quota``); those below ``min_score`` are left out, while the others
    keep their ranks; they may be drawn (``draw``); near copies are left out (``dedup``); of the candidates those are
    chosen that differ (``diversity``). docs/method.md has the formulas.

    Args:
        scores: the score table.
        selecting: the options; None: those that are given by keyword.
        seed: ``select_seed`` by its short name.
        least: choose at least so many, where there are so many usable ones (a trainer's batch may need them).
        sketches: the training prompts' store, for ``dedup`` and ``diversity``; None: the one that the scores were made
            from.
        options: the fields of :class:`cropi.options.Selecting`: ``fraction=0.1``, ``method="max"``, ...

    Raises:
        CropiError: the fraction chooses nothing, an option does not fit the scores, or an unknown option.
    """
    given = one_of(selecting, options if seed is None else options | {"select_seed": seed}, Selecting)
    check_rewards(given.method, scores.estimator)
    if sketches is not None and not given.needs_sketches:
        raise CropiError("sketches are for dedup and diversity; give one of them too, or leave sketches out")
    usable = np.flatnonzero(scores.usable)
    rule = Rule(scores.rows, usable, given, least)
    table = scores.table if len(usable) == len(scores.rows) else scores.table[usable]
    if given.confidence is not None:
        table = _lower(table, scores, given.confidence, usable)
    p_selected = None
    if "p_selected" in (given.method, given.draw):
        p_selected = _p_selected(scores, rule.n)[usable]
    orders, value = rule.rank(table, p_selected)
    good = np.ones(len(usable), bool) if given.min_score is None else table.max(axis=1) >= given.min_score
    if given.min_score is not None and not good.any():
        highest = table.max(initial=-math.inf)
        raise NotInPool(
            f"min_score {given.min_score}: no prompt has so high a score, the highest is {highest:.4f}; lower it"
        )
    store = _store(scores, sketches) if given.needs_sketches else None
    distinct = None if store is None or given.dedup is None else _distinct(store, given.dedup)
    taken = np.zeros(len(usable), bool)
    for number, (order, (_, n)) in enumerate(zip(orders, rule.groups, strict=True)):
        ranked = _drawn(order[good[order]], given, p_selected, number)
        wanted = n if given.diversity == "none" else math.ceil(n * given.candidates)
        if distinct is not None:
            ranked = ranked[distinct.take([rule.ids[i] for i in ranked], wanted)]
        if given.diversity != "none" and len(ranked) > n:
            assert store is not None
            ranked = ranked[:wanted]
            ranked = ranked[_diverse(store, [rule.ids[i] for i in ranked], n, given)]
        taken[ranked[:n]] = True
    merged = _merged(orders, value, table, rule.ties)
    del table, orders  # a million prompts' would stand beside the lists
    first = taken[merged]
    places = usable[np.concatenate([merged[first], merged[~first]])].tolist()
    fused = np.full(len(scores.rows), math.nan)
    fused[usable] = value
    copies = {} if distinct is None else distinct.copies
    settings = changed(given, Selecting, always=("fraction", "method")) | ({"least": least} if least else {})
    return Selection(places[: int(first.sum())], places, fused, given.method, scores, settings, copies)


def check_selecting(
    given: Selecting,
    *,
    prompts: int | None = None,
    usable: int = 0,
    groups: Mapping[str, Sequence[int]] | None = None,
    least: int = 0,
    draws: int = 200,
    alone: str = "",
) -> None:
    """Find what would stop a selection, before anything is sketched.

    Args:
        given: the options.
        prompts, usable: of the pool: all, and those with a gradient; None where they are not known yet.
        groups: the same two numbers of every group that shares are fixed for (:func:`cropi.ranking.rule.fixed_groups`).
        least: as in :func:`select`.
        draws: resamples that the scores will have.
        alone: why they will have none in any case (:func:`cropi.ranking.resampling.one_alone`).

    Raises:
        CropiError: too few prompts, a package that is missing, or options that need resampled scores without them.
    """
    read_quotas(given.quota)
    if prompts is not None:
        if given.count is not None and given.count > usable:
            raise NotInPool(
                f"count {given.count} is more than the {usable} prompts that have a gradient; lower it"
            )
        if given.count is None and given.per == "pool":
            how_many(given.fraction, prompts if given.pool == "all" else usable, least)
    if groups is not None:
        some = {name: good for name, (_, good) in groups.items() if good}
        sizes = {name: every for name, (every, _) in groups.items()} if given.pool == "all" else some
        shared_out(given, sizes, some, least, groups)
    for name, used in (
        ("method p_selected", given.method == "p_selected"), ("draw p_selected", given.draw == "p_selected"),
        ("confidence", given.confidence is not None),
    ):  # fmt: skip
        if used:
            check_resampled(name, draws, alone)
    if given.diversity == "kmeans":
        optional("sklearn.cluster")
    if given.confidence is not None:
        optional("scipy.special")


def check_resampled(name: str, draws: int, alone: str = "") -> None:
    """Refuse what needs resampled scores, by its name, where there will be none.

    Args:
        name: of an option and its value.
        draws, alone: as in :func:`check_selecting`.

    Raises:
        CropiError: with the reason; of validation sets NotInPool.
    """
    if draws < 2:
        raise CropiError(f"{name} needs resampled scores, and draws is {draws}; give draws of at least 2")
    if alone:
        raise NotInPool(f"{name} needs resampled scores, and {alone}")


def _drawn(order: np.ndarray, given: Selecting, p_selected: np.ndarray | None, number: int) -> np.ndarray:
    if given.draw == "best":
        return order
    if given.draw == "soft":
        weights = soft_weights(len(order), given.draw_temperature)
    else:
        assert p_selected is not None
        weights = p_selected[order]
    return order[draw(weights, given.select_seed + number)]


def _merged(
    orders: Sequence[np.ndarray], value: np.ndarray, table: np.ndarray, ties: np.ndarray
) -> np.ndarray:
    """One ranking of several groups, int64: by value, then by the highest score. A single group keeps its own order."""
    if len(orders) == 1:
        return orders[0]
    return order_of(np.nan_to_num(value, nan=-math.inf), table.max(axis=1), ties)


def _lower(table: np.ndarray, scores: Scores, level: float, places: np.ndarray) -> np.ndarray:
    """The scores less Student's quantile times their standard errors, float64 ``[places, sets]``."""
    held = scores.meta.get("uncertainty")
    if scores.stderr is None or held is None:
        raise NotInPool(
            "confidence: the scores have no standard errors "
            f"({scores.meta.get('uncertainty_missing', 'none were made')}); {SCORE_AGAIN}"
        )
    prompts = {one["name"]: one["prompts"] for one in held["sets"]}
    lower = scores.stderr[places]
    lower *= -students_quantile(level, [prompts[name] - 1 for name in scores.sets])
    lower += table  # in place: of a million prompts another table would not fit beside it
    return lower


def _distinct(store: SketchStore, bound: float) -> Distinct:
    from cropi.ranking.distinct import Distinct

    return Distinct(store, bound)


def _diverse(store: SketchStore, ids: Sequence[str], n: int, given: Selecting) -> np.ndarray:
    from cropi.ranking.distinct import diverse_prompts

    return diverse_prompts(store, ids, n, given.diversity, given.select_seed)


class OtherChoices(UserWarning):
    """``p_selected`` is of choices of another number of prompts."""


def _p_selected(scores: Scores, n: int) -> np.ndarray:
    if scores.p_selected is None:
        raise NotInPool(
            f"p_selected: the scores have none ({scores.meta.get('uncertainty_missing', 'none was made')}); "
            f"{again_for_chances(scores.meta)}"
        )
    # The chances add up to the number of prompts in a choice.
    if (held := round(float(np.nansum(scores.p_selected)))) != n:
        warn(
            f"p_selected in the scores is the chance to be among {held} prompts, and {n} are chosen: it does not say "
            "which of the others are better; choose as many, or score again with this fraction (`cropi run`, or "
            "cropi.score)",
            OtherChoices,
        )
    return scores.p_selected


def _store(scores: Scores, given: SketchStore | None) -> SketchStore:
    """The training prompts' sketches: those that were given, those of the call that made the scores, or its folders.

    Raises:
        CropiError: they are not there, or of another model or stage than the scores.
    """
    from cropi.store.differences import first_difference
    from cropi.store.store import SketchStore

    if given is None and scores.store is not None:
        return scores.store
    if given is not None and not isinstance(given, SketchStore):
        raise CropiError(
            f"sketches is {article(type(given).__name__)}: give the SketchStore of the training prompts"
        )
    origin = scores.meta.get("train", {})
    if given is None:
        paths = origin.get("paths") or [origin.get("path")]
        for path in paths:
            if path is None or not is_folder(Path(path)):
                raise CropiError(
                    f"sketches: dedup and diversity look at the training prompts' sketches, and their store ({path}) "
                    "is not there; give it"
                )
        given = SketchStore.join([SketchStore.open(path) for path in paths])
    known = [name for name in ("stage", "model") if name in origin and name in given.manifest]
    made, held = ({name: one[name] for name in known} for one in (origin, given.manifest))
    if differs := first_difference(made, held):
        raise CropiError(
            f"sketches: {given.path} has {differs.field} = {shown(differs.right)}, and the scores were made from "
            f"{shown(differs.left)}; give the stores that they were made from"
        )
    return given
