"""Policy-gradient estimators: the weight of every token's log-prob gradient.

Every estimator is a choice of three things, and nothing else::

    g(s) = sum_{k,t} w_{k,t} * grad log pi(x_{k,t} | x_{<t}),      w_{k,t} = rho_{k,t} * m_{k,t} * A_k / d_k

- the advantage A_k of a response (``advantages.py``),
- the token ratio rho = pi / beta (1 without a ratio) and the clipping mask m in {0, 1},
- the divisor d_k, which is how tokens are averaged.

A_k and d_k come from the whole prompt group before it is split, so the weights do not depend on
micro-batching. g points uphill (it is the gradient of the objective, not of a loss).

``rho * grad log pi = grad rho``, so these weights are exactly the gradients of the surrogate objectives, with

===========  ====================================  =========  =================  ===========
name         objective of one prompt               advantage  clipping           divisor d_k
===========  ====================================  =========  =================  ===========
cropi        mean_k mean_t rho A                   mean, sd   none               K |tau_k|
ppo          mean_k mean_t C(rho, A)               mean, sd   l = h = 0.2        K |tau_k|
reinforce    mean_k sum_t log pi A                 mean       no ratio at all    K
dr_grpo      (1/c) mean_k sum_t C(rho, A)          mean       l = h = 0.2        K c
dapo         (1/sum_k |tau_k|) sum_{k,t} C(rho,A)  mean, sd   l = 0.2, h = 0.28  sum |tau_k|
===========  ====================================  =========  =================  ===========

C(rho, A) = min(rho A, clip(rho, 1 - l, 1 + h) A) is PPO's clipped objective.

Sources: CROPI arXiv 2510.26491; PPO arXiv 1707.06347 with GRPO's averaging (arXiv 2402.03300); REINFORCE
(Williams 1992) with the group mean as baseline; Dr. GRPO arXiv 2503.20783; DAPO arXiv 2503.14476.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from cropi.data.rewards import group_advantages
from cropi.gradient.equal import sum_of_equals

LENGTHS = ("response", "group", "constant")


@dataclass(frozen=True)
class Estimator:
    """One estimator. Use :func:`make_estimator` for the named ones.

    Attributes:
        name: what the store's manifest calls it.
        ratio: weight tokens by pi / beta; without it the behaviour log-probs are not used.
        clip_low, clip_high: the ratio counts only inside [1 - clip_low, 1 + clip_high]; None: no clipping.
        std: divide the advantages by the rewards' standard deviation.
        eps: added to that standard deviation.
        length: "response" (mean over a response, then over responses), "group" (mean over all tokens of the
            group) or "constant" (sum over tokens divided by ``constant``, mean over responses).
        constant: the divisor c of ``length="constant"``. One c for all prompts changes no cosine.
    """

    name: str
    ratio: bool = True
    clip_low: float | None = None
    clip_high: float | None = None
    std: bool = True
    eps: float = 1e-4
    length: str = "response"
    constant: float = 1.0

    def __post_init__(self) -> None:
        if self.length not in LENGTHS:
            raise ValueError(f"length must be one of {', '.join(LENGTHS)}, got {self.length!r}")
        limits = f"clip_low={self.clip_low}, clip_high={self.clip_high}"
        if limits != "clip_low=None, clip_high=None" and not self.ratio:
            raise ValueError(f"{limits}: the estimator {self.name!r} has no ratio to clip; leave them out")
        if (self.clip_low is None) != (self.clip_high is None):
            raise ValueError(f"{limits}: the estimator {self.name!r} needs both or none; give both")
        for field in ("clip_low", "clip_high", "eps"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{field} must be a finite number >= 0, got {value}")
        if not 0 < self.constant < math.inf:
            raise ValueError(f"constant must be a finite number above 0, got {self.constant}")

    def advantages(self, rewards: Sequence[float]) -> np.ndarray:
        """Advantages of one prompt's K responses, float64 ``[K]``."""
        return group_advantages(rewards, std=self.std, eps=self.eps)

    def divisors(self, lengths: Sequence[int]) -> np.ndarray:
        """The divisor d_k of every response of one prompt from their token counts, float64 ``[K]``."""
        counts = np.asarray(lengths, dtype=np.float64)
        if self.length == "response":
            return counts.size * counts
        if self.length == "group":
            return np.full(counts.size, counts.sum())
        return np.full(counts.size, counts.size * self.constant)

    def weights(
        self,
        logprobs: torch.Tensor,
        behaviour: torch.Tensor | None,
        advantages: torch.Tensor,
        divisors: torch.Tensor,
    ) -> torch.Tensor:
        """Per-token weights ``w``.

        Args:
            logprobs: float32 ``[n]``, log pi of the tokens under the current policy.
            behaviour: float32 ``[n]``, log beta; None takes the current policy as its own behaviour (rho =
                1).
            advantages, divisors: float32 ``[n]``, A_k and d_k of the response that each token belongs to; ``[n, R]``
                where a token stands for those of up to R equal responses (A = 0 where it stands for fewer), and
                ``behaviour`` then likewise, or ``[n]`` for all of them.

        Returns:
            float32 ``[n]``; of R equal responses the sum: see :func:`cropi.gradient.equal.sum_of_equals`.
        """
        scale = advantages / divisors
        if advantages.ndim == 2:
            each = scale if behaviour is None else self._each(logprobs[:, None], behaviour, advantages, scale)
            return sum_of_equals(each).to(scale.dtype)
        return self._each(logprobs, behaviour, advantages, scale)

    def _each(
        self,
        logprobs: torch.Tensor,
        behaviour: torch.Tensor | None,
        advantages: torch.Tensor,
        scale: torch.Tensor,
    ) -> torch.Tensor:
        if not self.ratio or behaviour is None:
            return scale
        ratio = torch.exp(logprobs - (behaviour[:, None] if behaviour.ndim < scale.ndim else behaviour))
        return torch.where(self.clipped(ratio, advantages), torch.zeros_like(scale), ratio * scale)

    def clipped(self, ratio: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        """True where min(rho A, clip(rho) A) is flat in rho, so that the token has no gradient."""
        if self.clip_low is None or self.clip_high is None:
            return torch.zeros_like(ratio, dtype=torch.bool)
        return torch.where(advantages > 0, ratio > 1 + self.clip_high, ratio < 1 - self.clip_low)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return asdict(self)


ESTIMATORS = {
    "cropi": Estimator("cropi"),
    "ppo": Estimator("ppo", clip_low=0.2, clip_high=0.2),
    "reinforce": Estimator("reinforce", ratio=False, std=False, length="constant"),
    "dr_grpo": Estimator("dr_grpo", clip_low=0.2, clip_high=0.2, std=False, length="constant"),
    "dapo": Estimator("dapo", clip_low=0.2, clip_high=0.28, length="group"),
}


def make_estimator(name: str, **changes: Any) -> Estimator:
    """The estimator called ``name``, with the fields that are not None in ``changes`` replaced.

    Raises:
        ValueError: no such estimator, a field that it does not use, or fields that contradict each other.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {name!r}")
    given = {key: value for key, value in changes.items() if value is not None}
    made = replace(ESTIMATORS[name], **given)
    for field, used in (("eps", made.std), ("constant", made.length == "constant")):
        if field in given and not used:
            raise ValueError(f"{field}={given[field]}: the estimator {name!r} does not use it; leave it out")
    return made
