"""Influence: how well a training prompt's gradient points along the mean gradient of each validation set.

    score[s, v] = cos(S g(s), mean_{s' in v} S g(s'))        (or the dot product)

Sketches are linear and keep inner products, so the mean is taken over sketches. The training store is
streamed shard by shard. Method: arXiv 2510.26491.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cropi.errors import CropiError, optional
from cropi.ranking.contrast import names_without, without
from cropi.ranking.products import in_order
from cropi.ranking.table_rows import values_of
from cropi.store.manifest import NOISE, check_comparable, check_scaled, warn_unlike
from cropi.store.shards import OK, RowInfo
from cropi.store.store import SketchStore

if TYPE_CHECKING:
    from cropi.ranking.pairwise import Pairwise
    from cropi.ranking.selection import Selection

METRICS = ("cosine", "dot")
MEANS = ("plain", "normalised")
AGGREGATES = ("mean", "nearest")
STAGES = ("same", "any")
DEFAULT_SET = "valid"


@dataclass(frozen=True)
class Scores:
    """One row per training prompt, in order of id. ``table`` is float64 ``[n, sets]``, NaN without a usable sketch.

    Where the validation prompts were resampled (:mod:`cropi.ranking.uncertainty`), ``stderr`` float64 ``[n, sets]``
    holds the standard errors of the scores, ``p_selected`` float64 ``[n]`` how often a prompt was chosen, and
    ``meta["uncertainty"]`` the rest. ``store`` is the training prompts' store, where this call made the scores.

    >>> from cropi.store.shards import RowInfo
    >>> scores = Scores([RowInfo("a"), RowInfo("b")], ["sums"], np.array([[0.1], [0.4]]), {})
    >>> scores.top("sums", 1)
    [('b', 0.4)]
    """

    rows: Sequence[RowInfo]
    sets: list[str]
    table: np.ndarray
    meta: dict[str, Any]
    stderr: np.ndarray | None = None
    p_selected: np.ndarray | None = None
    store: SketchStore | None = field(default=None, repr=False, compare=False)
    pairs: Pairwise | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("rows", "sets"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise CropiError(f"{name} is of type {type(value).__name__}: give a list")
        kind, shape = type(self.table).__name__, list(np.shape(self.table))
        if not isinstance(self.table, np.ndarray) or shape != [len(self.rows), len(self.sets)]:
            raise CropiError(
                f"table is a {kind} of shape {shape}: give a numpy array [{len(self.rows)}, {len(self.sets)}], a row "
                "per prompt and a column per validation set"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without the store: other processes have its folder."""
        return {name: value for name, value in vars(self).items() if name != "store"}

    @property
    def ids(self) -> list[str]:
        """The prompt ids."""
        return values_of(self.rows, "id", np.arange(len(self.rows)))

    @property
    def self_influence(self) -> np.ndarray:
        """``|S g(s)|^2``, float64 ``[n]``: the influence of a prompt on itself; 0 without a gradient. Large ones are
        prompts that move the policy most, whatever the direction."""
        return np.array([row.norm for row in self.rows], dtype=np.float64) ** 2

    @property
    def usable(self) -> np.ndarray:
        """bool ``[n]``: prompts with a score for every set."""
        return np.isfinite(self.table).all(axis=1)

    def __len__(self) -> int:
        return len(self.rows)

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
            raise CropiError(f"set is {set!r}: give one of {', '.join(map(repr, self.sets))}")
        if not isinstance(n, int) or n < 1:
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
        from cropi.ranking.report import plot_scores

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


def check_stores(train: SketchStore, valid: Sequence[SketchStore], stages: str = "same") -> None:
    """Check that a store of training prompts can be compared with validation stores; warn where it seems not meant.

    Args:
        train, valid: the stores.
        stages: see :func:`influence`.

    Raises:
        CropiError: the training store is unfinished, or two stores do not belong together.
    """
    train.check_finished()
    if train.manifest.get(NOISE):
        raise CropiError(
            f"{train.path} holds the noise of gradients (--noise), which has no influence: give it as noise, beside "
            "the stores of the gradients"
        )
    for store in valid:
        names = str(train.path), str(store.path)
        check_comparable(
            train.manifest, store.manifest, names, () if stages == "same" else ("stage", "model")
        )
        warn_unlike(train.manifest, store.manifest, names)
    check_scaled(
        train.manifest, [store.manifest for store in valid], [str(store.path) for store in (train, *valid)]
    )


def influence(
    train: SketchStore,
    valid: Sequence[SketchStore],
    *,
    metric: str = "cosine",
    mean: str = "plain",
    aggregate: str = "mean",
    minus: str | None = None,
    minus_weight: float = 1.0,
    max_valid: int | None = None,
    seed: int = 0,
    pairs: bool = False,
    stages: str = "same",
) -> Scores:
    """Score every training prompt against every validation set.

    Stores that were made with another estimator, tokenizer, template, end token or temperature give a warning
    (:class:`cropi.store.manifest.UnlikeStores`).

    Args:
        train: the store of training prompts.
        valid: stores of validation prompts; a set is the prompts with one ``set`` name, over all of them.
        metric: "cosine" or "dot".
        mean: "plain", or "normalised" to give every validation prompt the same length first, so that a few
            prompts with long gradients do not make up the mean alone.
        aggregate: "mean", or "nearest": the highest cosine (or dot product) with a single prompt of the set.
        minus: a set whose score counts against a prompt: ``score[s, v] - minus_weight * score[s, minus]``; it has no
            column of its own.
        minus_weight: see there.
        max_valid: at most so many prompts per set, drawn with ``seed``; None takes all.
        seed: of that draw.
        pairs: keep the inner products with every validation prompt as ``scores.pairs``
            (:class:`cropi.ranking.pairwise.Pairwise`): the training store is read once for both.
        stages: "same", or "any" to take training sketches of an earlier stage, whose policy was another: such scores
            only say what to sketch anew (:mod:`cropi.ranking.cut`).

    Raises:
        CropiError: stores that cannot be compared, an unfinished one, a validation set without a usable prompt,
            an unknown option.
    """
    for value, allowed, name in (
        (metric, METRICS, "metric"),
        (mean, MEANS, "mean"),
        (aggregate, AGGREGATES, "aggregate"),
        (stages, STAGES, "stages"),
    ):
        if value not in allowed:
            raise CropiError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if max_valid is not None and max_valid < 1:
        raise CropiError(f"max_valid must be at least 1, got {max_valid}")
    for store in [train, *valid]:
        if not isinstance(store, SketchStore):
            raise CropiError(f"a SketchStore is needed, got {type(store).__name__}; score_rows takes tensors")
    check_stores(train, valid, stages)
    compared = _compared(valid, metric, mean, aggregate, max_valid, seed, pairs)
    kept_sets, wanted = names_without(compared.sets, minus), len(compared.valid) if pairs else 0

    def score(found: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):  # a zero sketch has no direction: NaN
            values = without(compared.score(found, lengths), compared.sets, minus, minus_weight)
        return np.concatenate([values, lengths[:, None]], axis=1)

    rows, streamed, dots = in_order(train, compared.directions, score, len(kept_sets) + 1, wanted)
    table = np.ascontiguousarray(streamed[:, : len(kept_sets)])
    if not np.isfinite(table).all(axis=1).any():
        raise CropiError(
            f"{train.path}: no training prompt has a usable sketch; see `cropi info {train.path}`"
        )
    meta: dict[str, Any] = {
        "metric": metric, "mean": mean, "max_valid": max_valid, "seed": seed,
        "train": _origin(train), "valid": [_origin(store) for store in valid],
    }  # fmt: skip
    if aggregate != "mean":
        meta["aggregate"] = aggregate
    if minus is not None:
        meta |= {"minus": minus, "minus_weight": minus_weight}
    if not pairs:
        return Scores(rows, kept_sets, table, meta, store=train)
    from cropi.ranking.pairwise import made

    held = made(rows, compared.valid, compared.sketches, dots, streamed[:, len(kept_sets)].copy())
    return Scores(rows, kept_sets, table, meta, store=train, pairs=held)


@dataclass(frozen=True)
class _Compared:
    """What training sketches are multiplied with, and the scores of the products: the sets' means first, or none of
    them, then the validation prompts ``valid``, where they are wanted."""

    sets: list[str]
    directions: torch.Tensor
    score: Callable[[np.ndarray, np.ndarray], np.ndarray]
    valid: list[RowInfo]
    sketches: torch.Tensor


def _compared(
    valid: Sequence[SketchStore],
    metric: str,
    mean: str,
    aggregate: str,
    max_valid: int | None,
    seed: int,
    pairs: bool,
) -> _Compared:
    from cropi.ranking.pairwise import nearest_scores, validation

    nearest = aggregate == "nearest"
    rows, sketches = (
        validation(valid, max_valid, seed) if pairs or nearest else ([], torch.empty(0, valid[0].dim))
    )
    if nearest:
        sets, score = nearest_scores(rows, sketches, metric)
        return _Compared(sets, sketches, score, rows, sketches)
    means = validation_means(valid, normalised=mean == "normalised", max_valid=max_valid, seed=seed)
    directions = torch.stack(list(means.values())).float()
    norms = np.linalg.norm(directions.double().numpy(), axis=1)
    count = len(means)

    def of_means(products: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        found = products[:, :count]
        return found / norms / lengths[:, None] if metric == "cosine" else found

    return _Compared(list(means), torch.cat([directions, sketches]), of_means, rows, sketches)


def score_rows(
    sketches: torch.Tensor, means: Mapping[str, torch.Tensor], *, metric: str = "cosine"
) -> np.ndarray:
    """The scores of sketches that are in memory: float64 ``[n, sets]``.

    Args:
        sketches: float ``[n, dim]``, one row per prompt.
        means: for each validation set the mean of its sketches, float ``[dim]``.
        metric: "cosine" or "dot".

    Raises:
        CropiError: kinds or shapes that do not fit together, no validation set, or an unknown metric.
    """
    if metric not in METRICS:
        raise CropiError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if not isinstance(sketches, torch.Tensor):
        raise CropiError(f"sketches is a {type(sketches).__name__}: give a tensor [prompts, dim]")
    if not isinstance(means, Mapping) or not means:
        kind = "empty" if isinstance(means, Mapping) else f"a {type(means).__name__}"
        raise CropiError(
            f"means is {kind}: give a dict with the mean of every validation set, {{'name': [dim]}}"
        )
    if sketches.ndim != 2:
        raise CropiError(f"sketches has shape {list(sketches.shape)}: give [prompts, dim]")
    for name, mean in means.items():
        if mean.shape != sketches.shape[1:]:
            raise CropiError(
                f"means[{name!r}] has shape {list(mean.shape)}: give [{sketches.shape[1]}], the sketches' dim"
            )
    rows = sketches.detach().cpu().double().numpy()
    directions = [mean.detach().cpu().double().numpy() for mean in means.values()]
    # Row by row: a matrix product rounds a row by its place in the shard, and equal sketches would not be equal.
    scores = np.stack([np.einsum("nd,d->n", rows, direction) for direction in directions], axis=1)
    if metric == "cosine":
        lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
        with np.errstate(divide="ignore", invalid="ignore"):  # a zero sketch has no direction: NaN
            scores = scores / [np.linalg.norm(direction) for direction in directions] / lengths[:, None]
    return scores


def validation_means(
    stores: Sequence[SketchStore], *, normalised: bool = False, max_valid: int | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The mean sketch of every validation set, float64 ``[dim]``, by set name in sorted order.

    Raises:
        CropiError: a store is unfinished, a set has no prompt with a usable sketch, or its mean is zero.
    """
    for store in stores:
        store.check_finished()
    chosen = choose_members(stores, max_valid, seed)
    sums = {name: torch.zeros(stores[0].dim, dtype=torch.float64) for name in chosen}
    for number, store in enumerate(stores):
        for kept, sketches in store.shards():
            for row, vector in zip(kept, sketches.double(), strict=True):
                name = row.set or DEFAULT_SET
                if (number, row.id) in chosen[name]:
                    sums[name] += vector / vector.norm() if normalised else vector
    for name, total in sums.items():
        if not float(total.norm()) > 0:
            raise CropiError(
                f"validation set {name!r}: the mean of its gradients is zero, so it has no direction"
            )
    return {name: total / len(chosen[name]) for name, total in sums.items()}


def choose_members(
    stores: Sequence[SketchStore], cap: int | None, seed: int
) -> dict[str, set[tuple[int, str]]]:
    """The prompts of every set that count, as (store number, id)."""
    members: dict[str, list[tuple[int, str]]] = {}
    reasons: dict[str, list[str]] = {}
    for number, store in enumerate(stores):
        for row in store.rows():
            name = row.set or DEFAULT_SET
            members.setdefault(name, [])
            if row.status == OK:
                members[name].append((number, row.id))
            else:
                reasons.setdefault(name, []).append(row.reason)
    if not members:
        raise CropiError(f"{', '.join(str(s.path) for s in stores)}: no validation prompt at all")
    for name, found in members.items():
        if not found:
            why = ", ".join(sorted(set(reasons[name])))
            raise CropiError(
                f"validation set {name!r} has no usable prompt: {len(reasons[name])} were left out ({why}); give it "
                "prompts that are solved sometimes, or leave the set out"
            )
    chosen = {}
    for name in sorted(members):
        found = sorted(members[name])
        if cap is not None and len(found) > cap:
            picked = np.random.default_rng(seed).choice(len(found), cap, replace=False)
            found = [found[i] for i in picked]
        chosen[name] = set(found)
    return chosen


def _origin(store: SketchStore) -> dict[str, Any]:
    kept = ("spec", "spec_fingerprint", "stage", "model", "tokenizer", "trajectories", "estimator")
    several = {"paths": [str(path) for path in store.paths]} if len(store.paths) > 1 else {}
    return {"path": str(store.path)} | several | {key: store.manifest.get(key) for key in kept}


def __getattr__(name: str) -> Any:
    """The first release had the score table's file here."""
    if name not in ("read_scores", "write_scores"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cropi.ranking import table

    return getattr(table, name)
