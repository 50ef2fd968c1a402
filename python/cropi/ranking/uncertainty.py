"""How far a score, and a choice, would move with other validation prompts: from the stores alone, without a model.

The validation prompts are a sample. With n of them, weights w_i (1/n, or 1/(n |g_i|)), the mean m = sum_i w_i g_i and
the training prompt's direction u = g(s) / |g(s)|, the score is ``c = <u, m> / |m|``. Its standard error is that of the
mean of the influence values (the delta method; Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993)::

    z_i = n w_i [ <u, g_i> / |m|  -  c <m, g_i> / |m|^2 ]          se(c)^2 = sum_i (z_i - mean z)^2 / (n (n - 1))

The choice is made again from tables of scores that other validation prompts would give
(:mod:`cropi.ranking.redrawn`).

The length of a sample mean is too large by its noise: E|m|^2 = |mu|^2 + tr(C)/n. So scores are smaller than the cosine
with the mean gradient mu of all validation prompts that might have been drawn, by one factor for all training prompts
of a set, which moves no rank. ``signal`` estimates |mu|^2 / E|m|^2 without bias in the numerator (the mean of
<g_i, g_j> over i != j); :meth:`Uncertainty.interval` takes the factor out of cosines.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
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
from cropi.ranking.values import FROM_SCORES, check_from_scores, no_score, students_quantile
from cropi.store.rows import OK

if TYPE_CHECKING:  # what a table holds of it is read without torch
    from cropi.ranking.pairwise import Pairwise
    from cropi.ranking.response_noise import ResponseNoise
    from cropi.store.store import SketchStore

BAND = 0.1  # "at the cut": so many of the chosen prompts on each side of it
# Of fewer validation prompts their gradients span too little of what others would move: docs/trust.md has figures.
FEW = 5
OF_SCORES = ("sets", "own_signal")  # of what a table says of uncertainty: what no choice changes


@dataclass(frozen=True)
class SetUncertainty:
    """The uncertainty that comes from one validation set."""

    name: str
    prompts: int
    stderr: float  # rms over the usable training prompts
    stderr_at_cut: float  # rms over those near the cut; over all where nothing is chosen by scores
    signal: (
        float  # |mu|^2 / E|m|^2, at most 1; 0 or less: the mean is not told from noise; NaN: no mean is used
    )
    # Where noise was sketched (:mod:`cropi.ranking.response_noise`), else NaN: the part of stderr_at_cut that comes
    # from the validation prompts' finite number of responses, and what the training prompts' own add to it.
    from_responses: float = math.nan
    own: float = math.nan

    @property
    def few(self) -> bool:
        """Whether the prompts are too few to say what others would choose."""
        return self.prompts < FEW

    def advice(self, only: bool = False) -> str:
        """One sentence in words; ``only``: there is no other set, so that this one cannot be left out."""
        less = "fewer prompts stay chosen than is said here"
        if self.signal <= 0.2:
            few = f"; by fewer than {FEW}, {less}" if self.few else ""
            other = "" if only else " or leave the set out"
            return (
                f"{self.name}: {self.prompts} prompts; their mean gradient is mostly noise (signal "
                f"{max(self.signal, 0):.2f} of 1), give more prompts{other}{few}"
            )
        if self.few:
            return (
                f"{self.name}: {self.prompts} prompts, standard error {self.stderr_at_cut:.3f} at the cut; of fewer "
                f"than {FEW} it is rough, and {less}"
            )
        if math.isnan(self.signal):
            return (
                f"{self.name}: {self.prompts} prompts, standard error {self.stderr_at_cut:.3f} at the cut (of the "
                "nearest prompt)"
            )
        said = f"{self.name}: {self.prompts} prompts, standard error {self.stderr_at_cut:.3f} at the cut"
        halved = "it"
        if not math.isnan(self.own):  # which no validation prompt makes smaller
            halved = f"{math.sqrt(max(self.stderr_at_cut**2 - self.own**2, 0.0)):.3f}"
            said += f", {halved} without the noise of the training prompts' responses"
        if not math.isnan(self.from_responses):
            said += f" ({self.from_responses:.3f} by the validation prompts' responses alone)"
        return f"{said}; {4 * self.prompts} prompts would halve {halved}"


@dataclass(frozen=True)
class Uncertainty:
    """The uncertainty of a score table and of the choice that is made from it.

    ``stderr`` float64 ``[n, sets]``; ``p_selected`` float64 ``[n]``, NaN for prompts without a score; ``overlap`` is
    the share of the chosen prompts that a draw keeps, on average; ``overlap_of_set`` the same with only this set drawn
    anew; ``halves`` the agreement of the choices by two halves of every set; ``draws`` how many there were.

    With noise (:mod:`cropi.ranking.response_noise`), ``stderr``, ``p_selected`` and ``overlap`` are those of other
    validation prompts *and* other responses of the training prompts; ``own_signal`` is then the share of a training
    gradient's squared length that is not noise, on average.
    """

    sets: list[SetUncertainty]
    table: NDArray[np.float64]
    stderr: NDArray[np.float64]
    p_selected: NDArray[np.float64]
    overlap: float
    overlap_of_set: dict[str, float]
    halves: float
    draws: int
    fraction: float
    own_signal: float = math.nan
    metric: str = "cosine"
    minus: str | None = None

    def interval(self, level: float = 0.9) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Limits of the cosine (of the metric "dot": of the product) with each set's *population* mean, float64
        ``[n, sets]`` each.

        Student's t over n - 1 degrees of freedom times the standard error; of cosines divided by ``sqrt(signal)``, and
        by ``sqrt(own_signal)`` where that is known: then they are limits of the cosine of the two *population*
        gradients. NaN where a set's signal is not above 0.

        Raises:
            CropiError: a level that is not in (0, 1), or cosines less those of a contrast set, of which each has a
                factor of its own.
        """
        if not 0 < level < 1:
            raise CropiError(f"level must be in (0, 1), got {level}")
        if self.metric == "cosine" and self.minus is not None:
            raise CropiError(
                f"interval: these scores are differences of cosines (minus {self.minus!r}), whose limits are not "
                "known; score without minus, or with metric='dot'"
            )
        degrees = [s.prompts - 1 for s in self.sets]
        scale = np.ones(len(self.sets))
        if self.metric == "cosine":
            own = 1.0 if math.isnan(self.own_signal) else self.own_signal
            scale = np.array(
                [1 / math.sqrt(s.signal * own) if min(s.signal, own) > 0 else math.nan for s in self.sets]
            )
        half = students_quantile(0.5 + level / 2, degrees) * self.stderr
        return (self.table - half) * scale, (self.table + half) * scale

    @property
    def responses(self) -> str:
        """How far the training prompts' own responses move scores, in a sentence; "" if their noise is not known."""
        if math.isnan(self.own_signal):
            return ""
        own = ", ".join(f"{one.own:.3f} ({one.name})" for one in self.sets)
        return (
            f"other responses of the training prompts would move a score by {own}; "
            f"{min(max(1 - self.own_signal, 0), 1):.0%} of their gradients' squared length is noise"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: all but the tables, for the metadata of a score table."""
        return {
            "sets": [asdict(one) for one in self.sets], "overlap": self.overlap, "halves": self.halves,
            "overlap_of_set": self.overlap_of_set, "draws": self.draws, "fraction": self.fraction,
        } | ({} if math.isnan(self.own_signal) else {"own_signal": self.own_signal})  # fmt: skip

    @classmethod
    def of(cls, scores: Scores) -> Uncertainty | None:
        """The uncertainty that a score table holds, or None; None of one that was written with a baseline, too."""
        held = scores.meta.get("uncertainty")
        if held is None or scores.stderr is None or scores.p_selected is None:
            return None
        rest = {name: held[name] for name in ("overlap", "overlap_of_set", "halves", "draws", "fraction")}
        rest["own_signal"] = held.get("own_signal", math.nan)
        rest |= {"metric": scores.meta.get("metric", "cosine"), "minus": scores.meta.get("minus")}
        return cls(sets_of(scores), scores.table, scores.stderr, scores.p_selected, **rest)

    def __str__(self) -> str:
        lines = [
            f"choice        {self.overlap:.0%} of the chosen prompts stay chosen when the validation prompts"
            f"{'' if math.isnan(self.own_signal) else ' and all responses'} are drawn anew; two halves of them agree "
            f"on {self.halves:.0%}"
        ]
        lines += [f"              {one.advice(len(self.sets) == 1)}" for one in self.sets]
        if self.responses:
            lines.append(f"responses     {self.responses}")
        return "\n".join(lines)


def sets_of(scores: Scores) -> list[SetUncertainty]:
    """What a score table holds of each validation set; empty where it was not resampled."""
    known = [field.name for field in fields(SetUncertainty)]
    held = (scores.meta.get("uncertainty") or {}).get("sets", [])
    return [SetUncertainty(**{name: one[name] for name in known if name in one}) for one in held]


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
    usable: NDArray[np.int64] = np.flatnonzero(np.isfinite(pairs.dots).all(axis=1) & np.isfinite(pairs.norms))
    if not len(usable):
        raise CropiError("no training prompt has a usable sketch, so there is no score to resample")
    return usable


def _among(count: int, usable: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The usable rows' values among those of all ``count`` rows, which have NaN."""
    full = np.full((count, *values.shape[1:]), math.nan)
    full[usable] = values
    return full


# Products of this many pairs take 0.5 GB; resampling many more is a matter of minutes, too.
MOST_PAIRS = 1 << 27


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


def of_choice(
    scores: Scores, chosen: int, same: bool | None = None, method: str = ""
) -> tuple[Uncertainty | None, str]:
    """The uncertainty that a score table holds, if it is that of a choice, and else why there is none.

    Args:
        scores: the table.
        chosen: how many prompts the choice has.
        same: whether the table was written with this choice; None: not known, and the number alone decides, to which
            the chances in the table add up.
        method: by which it was chosen.
    """
    held = Uncertainty.of(scores)
    if method in BASELINES:
        return None, f"it is {no_score(method)}"
    if held is None:
        return None, str(scores.meta.get("uncertainty_missing", "the scores were not resampled"))
    drawn = round(float(np.nansum(held.p_selected)))
    if same is False or (same is None and drawn != chosen):
        sizes = f"{drawn} prompt{'s' * (drawn != 1)}, and this one has {chosen}"
        return None, (
            f"the draws are of another choice, of {'as many prompts' if drawn == chosen else sizes}; score again with "
            "the options of this one (`cropi run`, which sketches nothing again, or cropi.score)"
        )
    return held, ""


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
