"""Which prompts to draw next: those with the best estimates, and those with uncertain estimates.

The rule is Thompson sampling with forgetting (Raj and Kalyani, arXiv 1707.09727; Thompson 1933). The usefulness of a
prompt is taken for a normal number with the prior N(m, t^2) over prompts; one visit shows it with an error of variance
e^2, and a visit counts ``2^(-age / half_life)``. After visits that count w in all and show x on average, it is known as

    N( (m / t^2 + w x / e^2) / (1 / t^2 + w / e^2),  1 / (1 / t^2 + w / e^2) ).

m, t and e are measured. Over the n prompts that were visited, i of them w_i and x_i, and over the J visits of a prompt
that had earlier ones, which counted w_j and were d_j away on average::

    m   = sum_i c_i x_i / sum_i c_i,   c_i = w_i / (w_i + 1)                       (0 before any visit)
    t^2 = max(var(x) - mean_i(e^2 / w_i), f^2 / 16),   var with n - 1              (f^2 while n < 2)
    e^2 = (sum_j d_j^2 / (1 + 1 / w_j) + 10 f^2) / (J + 10),   f = 0.2

Where most visits are old, t is f / 4, and less is drawn at random: on simulated streams that drift this loses less than
an estimate that leaves the visits' ages out.

A number is drawn for every prompt from what is known of it, and the largest are taken. So a prompt that was never seen,
or long ago, is drawn as often as it is likely to be among the best; one that is known to be poor is not.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
FIRST = 0.2  # standard deviations, before anything is known: what cosines of prompts differ by


@dataclasses.dataclass
class Noise:
    """How far one visit is from the average of the earlier ones: a running estimate of e^2."""

    total: float = 0.0
    count: float = 0.0

    def note(self, off: Values, weight: Values) -> None:
        """Squares of what visits are off from averages that count ``weight``: e^2 (1 + 1 / weight) on average."""
        self.total += float((off**2 / (1.0 + 1.0 / weight)).sum())
        self.count += float(len(off))

    @property
    def variance(self) -> float:
        """The variance. `FIRST` squared counts as ten visits, so that the first few visits do not decide."""
        return (self.total + 10 * FIRST**2) / (self.count + 10)


def known(values: Values, weight: Values, noise: float) -> tuple[Values, Values]:
    """Means and standard deviations of the usefulness of every prompt.

    Args:
        values: the average that visits showed; anything where ``weight`` is 0.
        weight: what those visits count.
        noise: e^2.
    """
    seen = weight > 0
    mean, spread = 0.0, FIRST**2
    if seen.any():
        x, w = values[seen], weight[seen]
        mean = float(np.average(x, weights=w / (w + 1.0)))
        if len(x) > 1:
            # What the averages differ by is the prompts' own spread and the noise of averages.
            spread = max(float(x.var(ddof=1)) - float((noise / w).mean()), (0.25 * FIRST) ** 2)
    precision = 1.0 / spread + weight / noise
    means = (mean / spread + np.where(seen, weight * values, 0.0) / noise) / precision
    return means, 1.0 / np.sqrt(precision)


def draw(
    means: Values, deviations: Values, n: int, explore: float, seed: tuple[int, ...]
) -> npt.NDArray[np.int64]:
    """Places of ``n`` prompts, best draw first; ``explore`` times the deviations (0: the best known)."""
    normal = np.random.default_rng(seed).standard_normal(len(means))
    drawn = means + explore * deviations * normal
    # A stable order: equal draws (explore 0, nothing known) come in a random order, and the same in every process.
    shuffled = np.random.default_rng((*seed, 1)).permutation(len(means))
    best = shuffled[np.argsort(-drawn[shuffled], kind="stable")[:n]]
    return best.astype(np.int64)
