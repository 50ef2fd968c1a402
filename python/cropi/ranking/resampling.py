"""The uncertainty of scores and choices, made from the stores alone, without a model.

The validation prompts are a sample. With n of them, weights w_i (1/n, or 1/(n |g_i|)), the mean m = sum_i w_i g_i and
the training prompt's direction u = g(s) / |g(s)|, the score is ``c = <u, m> / |m|``. Its standard error is that of the
mean of the influence values (the delta method; Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993)::

    z_i = n w_i [ <u, g_i> / |m|  -  c <m, g_i> / |m|^2 ]          se(c)^2 = sum_i (z_i - mean z)^2 / (n (n - 1))

The choice is made again from tables of scores that other validation prompts would give
(:mod:`cropi.ranking.redrawn`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cropi.errors import CropiError
from cropi.options import BASELINES, Influence, Selecting
from cropi.ranking.contrast import names_without, without
from cropi.ranking.redrawn import Moved, combined, redrawn
from cropi.ranking.resampled import MeanSet, NearestSet, ResampledSet
from cropi.ranking.rule import Rule
from cropi.ranking.scores import Scores
from cropi.ranking.uncertainty import SetUncertainty, Uncertainty
from cropi.ranking.values import FROM_SCORES, check_from_scores, no_score
from cropi.store.rows import OK

if TYPE_CHECKING:
    from cropi.ranking.pairwise import Pairwise
    from cropi.ranking.response_noise import ResponseNoise
    from cropi.store.store import SketchStore

BAND = 0.1  # "at the cut": so many of the chosen prompts on each side of it
# Products of this many pairs take 0.5 GB; resampling many more is a matter of minutes, too.
MOST_PAIRS = 1 << 27
OF_SCORES = ("sets", "own_signal")  # of what a table says of uncertainty: what no choice changes


def uncertainty(
    pairs: Pairwise,
    comparing: Influence | None = None,
    selecting: Selecting | None = None,
    *,
    noise: ResponseNoise | None = None,
    least: int = 0,
    redraw: bool = True,
) -> Uncertainty:
    """Standard errors of all scores, and how the choice moves with the validation prompts.

    The choice is the ranking's: near copies, diversity, draws and bounds come after it and are not resampled.

    Args:
        pairs: what :func:`cropi.ranking.pairwise.pairwise` gives.
        comparing: how scores are made, and how many draws there are; None: the defaults.
        selecting: how prompts are chosen, by a method that ranks by scores ("rrf", "rrf_classic", "max", "mean"); None:
            the defaults.
        noise: of the scores, from the finite number of responses, in order of ``pairs.rows``.
        least: as for :func:`cropi.ranking.selection.select`.
        redraw: choose again; False: standard errors and signals alone, without ``overlap`` and its like.

    Raises:
        CropiError: a fraction that chooses nothing, no training prompt with a score, or a validation set of one prompt.
    """
    how, given = comparing or Influence(), selecting or Selecting()
    metric, minus, weight = how.metric, how.minus, how.minus_weight
    usable = _usable(pairs, how, given, noise)
    rule = Rule(pairs.rows, usable, given, least)
    sets: list[ResampledSet] = [
        NearestSet(pairs, name, usable, metric)
        if how.aggregate == "nearest"
        else MeanSet(pairs, name, usable, metric, how.mean)
        for name in pairs.sets
    ]
    kept = names_without(pairs.sets, minus)
    ranked = [one for one in sets if one.name in kept]

    def variances(of_sets: np.ndarray) -> np.ndarray:
        return without(of_sets, pairs.sets, minus, -(weight**2))

    shares = without(np.eye(len(sets)), pairs.sets, minus, weight)
    table = combined([one.score(one.base) for one in sets], shares)
    own, of_own = None, np.zeros(len(ranked))
    if noise is not None and len(noise.own):
        own = without(noise.own, pairs.sets, minus, weight)
        of_own = np.square(own).mean(axis=0)
    stderr = np.sqrt(variances(np.stack([one.stderr() for one in sets], axis=1) ** 2) + of_own)
    nothing = Moved(np.full(len(usable), math.nan), math.nan, {}, math.nan)
    moved = redrawn(sets, table, rule, shares, own, how.draws) if redraw else nothing
    near = rule.near_the_cut(table, BAND) if redraw else np.arange(len(usable))
    summary = [
        SetUncertainty(one.name, len(one.members), _rms(stderr[:, v]), _rms(stderr[near, v]), one.signal())
        for v, one in enumerate(ranked)
    ]
    if noise is not None:
        part = np.sqrt(variances(noise.valid)[usable[near]].mean(axis=0))
        summary = [replace(one, from_responses=float(part[v])) for v, one in enumerate(summary)]
    if own is not None:
        summary = [replace(one, own=math.sqrt(of_own[v])) for v, one in enumerate(summary)]
    scores, errors, p_selected = (
        _among(len(pairs.rows), usable, x) for x in (table, stderr, moved.p_selected)
    )
    return Uncertainty(
        summary, scores, errors, p_selected, moved.overlap, moved.of_set, moved.halves, how.draws, given.fraction,
        math.nan if noise is None else 1.0 - noise.share, metric, minus,
    )  # fmt: skip


def _usable(
    pairs: Pairwise, how: Influence, given: Selecting, noise: ResponseNoise | None
) -> NDArray[np.int64]:
    """The training prompts with a score, of pairs and options by which uncertainty can be told."""
    check_from_scores(given.method)
    if not how.draws:
        raise CropiError("draws must be at least 2, got 0")
    if noise is not None and how.aggregate == "nearest":
        raise CropiError(
            "noise is that of means of validation gradients: aggregate must be mean, got 'nearest'"
        )
    if alone := one_alone({name: len(pairs.members(name)) for name in pairs.sets}):
        raise CropiError(alone)
    usable = pairs.usable
    if not len(usable):
        raise CropiError("no training prompt has a usable sketch, so there is no score to resample")
    return usable


def _among(count: int, usable: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The usable rows' values among those of all ``count`` rows, which have NaN."""
    full = np.full((count, *values.shape[1:]), math.nan)
    full[usable] = values
    return full


def few_pairs(train: SketchStore, valid: Sequence[SketchStore], max_valid: int | None) -> bool:
    """Whether the products of all training and validation prompts that count are few enough to be resampled."""
    members = _members(valid, max_valid)
    return not one_alone(members) and not _too_many(len(train), sum(members.values()))


def _too_many(train: int, valid: int) -> str:
    """What of so many prompts is more than is resampled, or nothing: products are kept of every training prompt with
    every validation prompt, and of the validation prompts with one another."""
    if max(train, valid) * valid <= MOST_PAIRS:
        return ""
    return f"{train} x {valid} pairs" if train >= valid else f"{valid} x {valid} pairs of validation prompts"


def one_alone(members: Mapping[str, int], max_valid: int | None = None) -> str:
    """Which set has a single prompt that counts, by which nothing is known of others, or nothing."""
    if max_valid == 1:
        return "max_valid is 1, so that nothing shows how other validation prompts would move scores; give at least 8"
    alone = [name for name, count in members.items() if count < 2]
    return (
        f"the validation set {alone[0]!r} has 1 prompt, so that nothing shows how others would move its scores; give "
        "at least 8"
        if alone
        else ""
    )


def _members(valid: Sequence[SketchStore], max_valid: int | None) -> dict[str, int]:
    """How many prompts of every validation set count."""
    counts = Counter(row.set_name for store in valid for row in store.rows() if row.status == OK)
    return {name: min(count, max_valid or count) for name, count in counts.items()}


def with_uncertainty(
    scores: Scores,
    train: SketchStore,
    valid: Sequence[SketchStore],
    comparing: Influence,
    selecting: Selecting,
    noise: Sequence[SketchStore] = (),
    least: int = 0,
) -> Scores:
    """A score table with its standard errors and ``p_selected``, from the stores and options that it was made from;
    ``least`` is that of the choice (:func:`cropi.ranking.selection.select`).

    Left out, and said why in ``meta["uncertainty_missing"]``: with ``draws`` 0, where the fraction chooses none, and
    where a validation set has one prompt, and beyond :data:`MOST_PAIRS` pairs of a training and a validation prompt, or
    of two validation prompts; of a baseline's choice ``p_selected`` and the overlaps alone.
    """
    from cropi.ranking.pairwise import pairwise
    from cropi.ranking.response_noise import response_noise

    members, method = _members(valid, comparing.max_valid), selecting.method
    if method not in FROM_SCORES:
        selecting = replace(selecting, method="rrf")
    why = ""
    if not comparing.draws:
        check_noise(comparing.draws, noise)
        why = "resampling was switched off (draws)"
    elif nothing := _chooses_nothing(scores, selecting, least):
        why = nothing
    elif alone := one_alone(members, comparing.max_valid):
        why = alone
    elif many := _too_many(len(train), sum(members.values())):
        why = f"{many} are more than are resampled; --max-valid makes them fewer"
    if why:
        return replace(scores, meta=scores.meta | {"uncertainty_missing": why}, pairs=None)
    pairs = scores.pairs or pairwise(train, valid, max_valid=comparing.max_valid, seed=comparing.valid_seed)
    known = response_noise(train, valid, noise, comparing) if noise else None
    redraw = method not in BASELINES
    made = uncertainty(pairs, comparing, selecting, noise=known, least=least, redraw=redraw)
    held = made.to_dict()
    if redraw:
        meta = scores.meta | {"uncertainty": held}
    else:
        meta = scores.meta | {
            "uncertainty": {name: held[name] for name in OF_SCORES if name in held},
            "uncertainty_missing": f"the scores were made for {no_score(method)}",
        }
    drawn = made.p_selected if redraw else None
    return replace(scores, meta=meta, stderr=made.stderr, p_selected=drawn, pairs=None)


def check_noise(draws: int, noise: Any) -> None:
    """Refuse what would be sketched or read for nothing.

    Raises:
        CropiError: noise is given, and nothing is resampled.
    """
    if noise and draws < 2:
        raise CropiError(
            f"noise is drawn where scores are resampled, and draws is {draws}: give draws, or leave the noise out"
        )


def _chooses_nothing(scores: Scores, given: Selecting, least: int) -> str:
    """Why the options choose no prompt of a table, or nothing."""
    try:
        Rule(scores.rows, np.flatnonzero(scores.usable), given, least)
    except CropiError as error:
        return str(error)
    return ""


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
