"""Influence: how similar a training prompt's gradient is in direction to the mean gradient of each validation set.

    score[s, v] = cos(S g(s), mean_{s' in v} S g(s'))        (or the dot product)

Sketches are linear and keep inner products, so the mean is taken over sketches. The training store is
streamed shard by shard. Method: arXiv 2510.26491.

A row of a store with groups of parameters is the groups' sketches side by side, ``x = (x_1, ..., x_G)``: a sketch of
the whole gradient too, with ``<x, m> = sum_g <x_g, m_g>`` and ``|x|^2 = sum_g |x_g|^2``. So the score is a sum over
groups, whose terms are the groups' *contributions*:

    contribution[s, v, g] = <x_g, m_g> / (|x| |m|)        (dot product: <x_g, m_g>)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cropi.errors import CropiError, article, warn
from cropi.option_fields import one_of
from cropi.options import Influence
from cropi.ranking.contrast import names_without, without
from cropi.ranking.given import NUMBERED
from cropi.ranking.members import SAME_LENGTH, check_stores, none_usable, validation, validation_means
from cropi.ranking.pairwise import made, nearest_scores
from cropi.ranking.products import in_order
from cropi.ranking.scores import Scores
from cropi.store.rows import OK, RowInfo
from cropi.store.store import SketchStore

METRICS = ("cosine", "dot")
STAGES = ("same", "any")


def influence(
    train: SketchStore,
    valid: Sequence[SketchStore],
    comparing: Influence | None = None,
    *,
    pairs: bool = False,
    stages: str = "same",
    **options: Any,
) -> Scores:
    """Score every training prompt against every validation set.

    Stores that were made with another estimator, tokenizer, template, end token or temperature give a warning
    (:class:`cropi.store.differences.UnlikeStores`), and so do prompts that are on both sides (:class:`SharedPrompts`).

    Args:
        train: the store of training prompts.
        valid: stores of validation prompts; a set is the prompts with one ``set`` name, over all of them.
        comparing: the options; None: those that are given by keyword. ``minus``:
            ``score[s, v] - minus_weight * score[s, minus]``, a set that has no column of its own. ``draws`` is for the
            uncertainty (:mod:`cropi.ranking.resampling`), and not looked at.
        pairs: keep the inner products with every validation prompt as ``scores.pairs``
            (:class:`cropi.ranking.pairwise.Pairwise`): the training store is read once for both.
        stages: "same", or "any" to take training sketches of an earlier stage, whose policy was another: such scores
            only say what to sketch anew (:mod:`cropi.ranking.cut`).
        options: the fields of :class:`cropi.options.Influence`: ``metric="dot"``, ``mean="normalised"``, ...

    Returns:
        The scores; of stores with groups of parameters the groups' contributions too, but not with ``aggregate``
        "nearest".

    Raises:
        CropiError: stores that cannot be compared, an unfinished one, a validation set without a usable prompt,
            an unknown option.
    """
    given = one_of(comparing, options, Influence)
    minus, weight = given.minus, given.minus_weight
    if stages not in STAGES:
        raise CropiError(f"stages must be one of {', '.join(STAGES)}, got {stages!r}")
    for store in [train, *valid]:
        if not isinstance(store, SketchStore):
            raise CropiError(f"a SketchStore is needed, got {type(store).__name__}; score_rows takes tensors")
    check_stores(train, valid, stages)
    compared = _compared(valid, given, pairs)
    kept_sets, wanted = names_without(compared.sets, minus), len(compared.valid) if pairs else 0
    # The nearest prompt is another one for every row: its groups' products are not taken.
    count, groups = len(kept_sets), train.groups if given.aggregate == "mean" else []
    apart = len(compared.sets) if groups else 0

    def score(products: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        # Of all parameters, then of each group, whose products follow.
        several = (products[:, g * apart :] for g in range(len(groups) + 1))
        with np.errstate(divide="ignore", invalid="ignore"):  # a zero sketch has no direction: NaN
            tables = [
                without(compared.score(each, lengths), compared.sets, minus, weight) for each in several
            ]
        return np.concatenate([*tables, lengths[:, None]], axis=1)

    columns = count * (len(groups) + 1) + 1
    rows, streamed, dots = in_order(train, compared.directions, score, columns, wanted, apart)
    _warn_shared(rows, valid)
    table = np.ascontiguousarray(streamed[:, :count])
    if not np.isfinite(table).all(axis=1).any():
        raise none_usable(train)
    meta: dict[str, Any] = {
        "metric": given.metric, "mean": given.mean, "max_valid": given.max_valid, "seed": given.valid_seed,
        "train": _origin(train), "valid": [_origin(store) for store in valid],
    }  # fmt: skip
    if given.aggregate != "mean":
        meta["aggregate"] = given.aggregate
    if minus is not None:
        meta |= {"minus": minus, "minus_weight": weight}
    if train.groups:
        meta["groups"] = groups
    parts = (
        streamed[:, count:-1].reshape(len(rows), len(groups), count).transpose(0, 2, 1) if groups else None
    )
    scores = Scores(rows, kept_sets, table, meta, store=train, groups=groups, contributions=parts)
    if not pairs:
        return scores
    held = made(rows, compared.valid, compared.sketches, dots, streamed[:, -1].copy())
    return replace(scores, pairs=held)


class SharedPrompts(UserWarning):
    """Prompts are on both sides of a comparison."""


def _warn_shared(rows: Sequence[RowInfo], valid: Sequence[SketchStore]) -> None:
    """Say where training prompts are validation prompts too: of one id, with responses and gradients of one length."""
    named = [store for store in valid if not store.manifest.get("notes", {}).get(NUMBERED)]
    others = {row.id: row for store in named for row in store.rows() if row.status == OK and row.norm}
    shared = [row.id for row in rows if row.norm and (other := others.get(row.id)) and _alike(row, other)]
    if shared:
        warn(
            f"{len(shared)} training prompts are validation prompts too, for example {shared[0]!r}: a score holds such "
            "a prompt's own gradient, which raises it; leave them out on one side, unless this is meant",
            SharedPrompts,
        )


def _alike(row: RowInfo, other: RowInfo) -> bool:
    """Whether two rows are of the same responses. Their gradients were rounded in batches of their own."""
    same = (row.tokens, row.pass_rate) == (other.tokens, other.pass_rate)
    return same and abs(row.norm - other.norm) <= SAME_LENGTH * other.norm


@dataclass(frozen=True)
class _Compared:
    """The validation side of a comparison.

    Attributes:
        sets: the names of the validation sets.
        directions: what training sketches are multiplied with: the sets' means, if they are needed, then the sketches
            of the prompts ``valid``.
        score: scores from these products and the lengths of the training sketches.
        valid: the validation prompts whose products are wanted one by one.
        sketches: their sketches.
    """

    sets: list[str]
    directions: torch.Tensor
    score: Callable[[np.ndarray, np.ndarray], np.ndarray]
    valid: list[RowInfo]
    sketches: torch.Tensor


def _compared(valid: Sequence[SketchStore], given: Influence, pairs: bool) -> _Compared:
    metric, nearest = given.metric, given.aggregate == "nearest"
    rows, sketches = (
        validation(valid, given.max_valid, given.valid_seed)
        if pairs or nearest
        else ([], torch.empty(0, valid[0].dim, dtype=torch.float32, device="cpu"))
    )
    if nearest:
        sets, score = nearest_scores(rows, sketches, metric)
        return _Compared(sets, sketches, score, rows, sketches)
    means = validation_means(valid, given)
    directions = torch.stack(list(means.values())).float()
    norms = np.linalg.norm(directions.double().numpy(), axis=1)
    count = len(means)

    def of_means(products: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        with_means = products[:, :count]
        return with_means / norms / lengths[:, None] if metric == "cosine" else with_means

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
        raise CropiError(f"sketches is {article(type(sketches).__name__)}: give a tensor [prompts, dim]")
    if not isinstance(means, Mapping) or not means:
        kind = "empty" if isinstance(means, Mapping) else article(type(means).__name__)
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


def _origin(store: SketchStore) -> dict[str, Any]:
    kept = (
        "spec",
        "spec_fingerprint",
        "stage",
        "model",
        "tokenizer",
        "trajectories",
        "estimator",
        "behaviour",
    )
    several = {"paths": [str(path) for path in store.paths]} if len(store.paths) > 1 else {}
    return {"path": str(store.path)} | several | {key: store.manifest.get(key) for key in kept}
