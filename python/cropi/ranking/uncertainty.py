"""What a score table holds of its uncertainty: how far a score, and a choice, would move with other validation prompts.

:mod:`cropi.ranking.resampling` makes it. The length of a sample mean is too large by its noise:
E|m|^2 = |mu|^2 + tr(C)/n. So scores are smaller than the cosine with the mean gradient mu of all validation prompts
that might have been drawn, by one factor for all training prompts of a set, which moves no rank. ``signal`` estimates
|mu|^2 / E|m|^2 without bias in the numerator (the mean of <g_i, g_j> over i != j); :meth:`Uncertainty.interval` takes
the factor out of cosines.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cropi.errors import CropiError
from cropi.options import BASELINES
from cropi.ranking.scores import Scores
from cropi.ranking.values import no_score, students_quantile

# Of fewer validation prompts their gradients span too little of what others would move: docs/trust.md has figures.
FEW = 5


@dataclass(frozen=True)
class SetUncertainty:
    """The uncertainty that comes from one validation set."""

    name: str
    prompts: int
    stderr: float  # rms over the usable training prompts
    stderr_at_cut: float  # rms over those near the cut; over all where nothing is chosen by scores
    # |mu|^2 / E|m|^2, at most 1; 0 or less: the mean is not told from noise; NaN: no mean is used.
    signal: float
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
