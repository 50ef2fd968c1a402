"""Policy-gradient estimators: the weight of every token's log-prob gradient.

Every estimator is a choice of three things, and nothing else::

    g(s) = sum_{k,t} w_{k,t} * grad log pi(x_{k,t} | x_{<t}),      w_{k,t} = rho_{k,t} * m_{k,t} * A_k / d_k

- the advantage A_k of a response (``rewards.py``),
- the ratio rho = pi / beta of the token, or of the response (1 without a ratio), and the clipping mask m in {0, 1},
- the divisor d_k, which is how tokens are averaged.

A_k and d_k come from the whole prompt group before it is split, so the weights do not depend on
micro-batching. g is the gradient of the objective, not of a loss: a step along g increases the objective.

``rho * grad log pi = grad rho``, so these weights are exactly the gradients of the surrogate objectives, with

===========  ====================================  ============  =================  ===========
name         objective of one prompt               advantage     clipping           divisor d_k
===========  ====================================  ============  =================  ===========
cropi        mean_k mean_t rho A                   mean, sd      none               K |tau_k|
grpo, ppo    mean_k mean_t C(rho, A)               mean, sd      l = h = 0.2        K |tau_k|
gspo         mean_k C(s_k, A)                      mean, sd      l, h = 3e-4, 4e-4  K |tau_k|
reinforce    mean_k sum_t log pi A                 mean          no ratio at all    K
rloo         mean_k sum_t log pi A                 leave one out no ratio at all    K
dr_grpo      (1/c) mean_k sum_t C(rho, A)          mean          l = h = 0.2        K c
bnpo         (1/c) mean_k sum_t C(rho, A)          mean, sd      l = h = 0.2        K c
dapo         (1/sum_k |tau_k|) sum_{k,t} C(rho,A)  mean, sd      l = 0.2, h = 0.28  sum |tau_k|
cispo        (1/sum_k |tau_k|) sum_{k,t}           mean, sd      rho counts as at   sum |tau_k|
             stop(min(rho, 5)) log pi A                          most 5
sft          mean_k mean_t log pi R                the reward    no ratio at all    K |tau_k|
===========  ====================================  ============  =================  ===========

C(rho, A) = min(rho A, clip(rho, 1 - l, 1 + h) A) is PPO's clipped objective; s_k = exp(mean_t log rho) is the ratio of
a response; the advantage that leaves one out is R_k minus the mean of the other rewards, K / (K - 1) (R_k - mean).
sft is for demonstrations, which are records without rewards: each response counts with R = 1, so that g is minus the
gradient of the loss of supervised fine-tuning, averaged over the tokens of each response.
bnpo's c is the number of tokens in a batch, one for all of its prompts, so that it changes no cosine.

Sources: CROPI arXiv 2510.26491; PPO arXiv 1707.06347 with GRPO's averaging (arXiv 2402.03300); GSPO arXiv 2507.18071;
REINFORCE (Williams 1992) with the group mean as baseline; RLOO arXiv 2402.14740; Dr. GRPO arXiv 2503.20783; BNPO as in
TRL's ``loss_type="bnpo"``; DAPO arXiv 2503.14476; CISPO arXiv 2506.13585, with the bound of arXiv 2510.13786; data for
supervised fine-tuning chosen by such gradients: LESS arXiv 2402.04333.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from cropi.data.rewards import LARGEST_REWARD
from cropi.gradient.equal import sum_of_equals

LENGTHS = ("response", "group", "constant")
LEVELS = ("token", "sequence")
# Fields that the first manifests did not have: they are written where they say something.
LATER = {"level": "token", "cap": None, "delta": None, "loo": False, "centred": True}


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
        level: "token" (a ratio for each token) or "sequence" (that of its response, for each of its tokens).
        cap: a larger ratio counts as this one, and the token keeps its gradient; None: no bound.
        delta: bounds the unclipped term of the clipped objective: min(min(rho, delta) A, clip(rho) A), so that a
            token with A < 0 has no gradient above both bounds (INTELLECT-2, arXiv 2505.07291); None: no bound.
        loo: the advantage's mean leaves the response itself out.
        centred: subtract the mean of the rewards; False: the reward itself is the advantage, and records have none (1).

    >>> Estimator("mine", clip_low=0.2, clip_high=0.28, length="group").divisors([3, 5])
    array([8., 8.])
    """

    name: str
    ratio: bool = True
    clip_low: float | None = None
    clip_high: float | None = None
    std: bool = True
    eps: float = 1e-4
    length: str = "response"
    constant: float = 1.0
    level: str = "token"
    cap: float | None = None
    delta: float | None = None
    loo: bool = False
    centred: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name must be a name for the manifest, got {self.name!r}")
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
        if self.level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {self.level!r}")
        for field in ("cap", "delta"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{field} must be a finite number above 0, got {value}")
        if (self.cap is not None or self.level == "sequence") and not self.ratio:
            raise ValueError(f"cap and level: the estimator {self.name!r} has no ratio; leave them out")
        if self.cap is not None and (self.clip_low is not None or self.delta is not None):
            raise ValueError(
                f"cap={self.cap}: the ratio is bounded or clipped, not both; leave cap or the clips out"
            )
        if self.delta is not None and self.clip_low is None:
            raise ValueError(
                f"delta={self.delta}: it bounds a clipped ratio; give clip_low and clip_high too"
            )
        if self.loo and self.std:
            raise ValueError(
                "loo: an advantage that leaves one out is not divided by the standard deviation; std=False"
            )
        if not self.centred and (self.std or self.loo or self.ratio):
            raise ValueError(
                "centred=False: demonstrations have no ratio and no other advantage; give ratio=False, std=False and "
                "loo=False"
            )
        if not 0 < self.constant < math.inf:
            raise ValueError(f"constant must be a finite number above 0, got {self.constant}")

    def advantages(self, rewards: Sequence[float]) -> np.ndarray:
        """Advantages of one prompt's K responses, float64 ``[K]``."""
        if not self.centred:
            return np.asarray(rewards, dtype=np.float64)
        values = group_advantages(rewards, std=self.std, eps=self.eps)
        return values * (len(values) / (len(values) - 1)) if self.loo else values

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
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Per-token weights ``w``.

        Args:
            logprobs: float32 ``[n]``, log pi of the tokens under the current policy.
            behaviour: float32 ``[n]``, log beta; None takes the current policy as its own behaviour (rho =
                1).
            advantages, divisors: float32 ``[n]``, A_k and d_k of the response that each token belongs to; ``[n, R]``
                where a token stands for those of up to R equal responses (A = 0 where it stands for fewer), and
                ``behaviour`` then likewise, or ``[n]`` for all of them.
            noise: shaped like ``advantages``: what is multiplied in their place, while they decide what is clipped
                (:mod:`cropi.gradient.noise`); None: they themselves.

        Raises:
            ValueError: a ratio of responses, of which a part of the tokens does not tell: see :meth:`of_sequences`.

        Returns:
            float32 ``[n]``; of R equal responses the sum: see :func:`cropi.gradient.equal.sum_of_equals`.
        """
        if self.level == "sequence" and behaviour is not None:
            raise ValueError(
                f"the estimator {self.name!r} has a ratio of responses: give it sequence_behaviour(...) as "
                "behaviour, and call of_sequences().weights(...)"
            )
        scale = (advantages if noise is None else noise) / divisors
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
        if self.cap is not None:
            ratio = ratio.clamp(max=self.cap)
        return torch.where(self.clipped(ratio, advantages), torch.zeros_like(scale), ratio * scale)

    def of_sequences(self) -> Estimator:
        """The same estimator, for log-ratios of whole responses (:func:`sequence_behaviour`)."""
        return replace(self, level="token")

    def ratio_behaviour(
        self,
        logprobs: torch.Tensor,
        behaviour: torch.Tensor | None,
        responses: torch.Tensor | None,
        count: int | None = None,
    ) -> torch.Tensor | None:
        """Behaviour log-probs with which each token has this estimator's ratio: its own, or that of its response.

        Args:
            logprobs, behaviour, responses: as for :func:`sequence_behaviour`.
            count: more than the largest of ``responses``; None: it is looked up.

        Raises:
            ValueError: the ratio is one of responses, and they are not given.
        """
        if behaviour is None or self.level == "token":
            return behaviour
        if responses is None:
            raise ValueError(
                f"the estimator {self.name!r} has a ratio of responses: give each token's response"
            )
        return sequence_behaviour(logprobs, behaviour, responses, count)

    def weigher(
        self,
        advantages: torch.Tensor,
        divisors: torch.Tensor,
        behaviour: torch.Tensor | None,
        responses: torch.Tensor | None,
        noise: torch.Tensor | None = None,
    ) -> Callable[[torch.Tensor, int, int], torch.Tensor]:
        """The function that gives the weights of the tokens ``start`` to ``stop`` from their log-probs.

        Args:
            advantages, divisors, behaviour, noise: of all tokens; see :meth:`weights`.
            responses: the response that each token belongs to. An estimator with a ratio of responses wants them, and
                tokens of whole responses at a time.
        """
        by_token, count = self.of_sequences(), None
        if behaviour is not None and responses is not None and self.level != "token":
            count = _count(responses)

        def weigh(logprobs: torch.Tensor, start: int, stop: int) -> torch.Tensor:
            old, members, spread = (
                None if table is None else table[start:stop] for table in (behaviour, responses, noise)
            )
            old = self.ratio_behaviour(logprobs, old, members, count)
            return by_token.weights(logprobs, old, advantages[start:stop], divisors[start:stop], spread)

        return weigh

    def clipped(self, ratio: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        """True where min(min(rho, delta) A, clip(rho) A) is flat in rho, so that the token has no gradient."""
        if self.clip_low is None or self.clip_high is None:
            return torch.zeros_like(ratio, dtype=torch.bool)
        high, delta = 1 + self.clip_high, math.inf if self.delta is None else self.delta
        # Where A < 0 the minimum takes the larger of the two ratios: both must have ended.
        below = (ratio < 1 - self.clip_low) | (ratio > max(high, delta))
        return torch.where(advantages > 0, ratio > min(high, delta), below)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {key: value for key, value in asdict(self).items() if key not in LATER or value != LATER[key]}


def group_advantages(rewards: Sequence[float], *, std: bool = True, eps: float = 1e-4) -> np.ndarray:
    """Advantages of the K responses of one prompt: float64 ``[K]``.

    ``std=True``:  A_k = (R_k - mean) / (sd + eps), with the unbiased sd (divided by K - 1), as CROPI and GRPO
    do. ``std=False``: A_k = R_k - mean, as in Dr. GRPO (arXiv 2503.20783), which does not favour prompts of
    small spread.

    Raises:
        ValueError: fewer than two rewards, or one that is not finite or beyond `cropi.data.rewards.LARGEST_REWARD`.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim != 1 or values.size < 2:
        raise ValueError(f"rewards: at least two are needed for an advantage, got {values.size}")
    if not (np.abs(values) <= LARGEST_REWARD).all():
        raise ValueError(
            f"rewards: {list(rewards)}: their size must be at most {LARGEST_REWARD:g}; scale them down"
        )
    centred = values - values.mean()
    return centred / (values.std(ddof=1) + eps) if std else centred


def _count(responses: torch.Tensor) -> int:
    """One more than the largest number of a response. A device is not asked for what was sent to it: it may still have
    passes to do."""
    # The command line lists the estimators before it needs a sketcher.
    from cropi_kernels.sketcher.batch.host import on_host

    (here,) = on_host(responses)
    return int(here.max()) + 1 if here.numel() else 0


def sequence_behaviour(
    logprobs: torch.Tensor, behaviour: torch.Tensor, responses: torch.Tensor, count: int | None = None
) -> torch.Tensor:
    """Behaviour log-probs with which every token has the log-ratio of its response, ``mean_t (log pi - log beta)``.

    Args:
        logprobs: float ``[n]``, log pi of all scored tokens of whole responses.
        behaviour: float ``[n]`` or ``[n, R]``, log beta.
        responses: int64 ``[n]``, the response that each token belongs to.
        count: more than the largest of them; None: it is looked up.
    """
    log_ratio = (logprobs[:, None] if behaviour.ndim == 2 else logprobs).double() - behaviour.double()
    if count is None:
        count = _count(responses)
    # The command line lists the estimators before it needs kernels.
    from cropi_kernels.adding import add_rows

    sums = add_rows(log_ratio.new_zeros(count, *log_ratio.shape[1:]), responses, log_ratio)
    sizes = add_rows(torch.zeros_like(sums), responses, torch.ones_like(log_ratio))
    mean = (sums / sizes.clamp_(min=1))[responses]
    return ((logprobs[:, None] if behaviour.ndim == 2 else logprobs) - mean).to(behaviour.dtype)


ESTIMATORS = {
    "cropi": Estimator("cropi"),
    "grpo": Estimator("grpo", clip_low=0.2, clip_high=0.2),
    "ppo": Estimator("ppo", clip_low=0.2, clip_high=0.2),
    "gspo": Estimator("gspo", clip_low=3e-4, clip_high=4e-4, level="sequence"),
    "reinforce": Estimator("reinforce", ratio=False, std=False, length="constant"),
    "rloo": Estimator("rloo", ratio=False, std=False, length="constant", loo=True),
    "dr_grpo": Estimator("dr_grpo", clip_low=0.2, clip_high=0.2, std=False, length="constant"),
    "bnpo": Estimator("bnpo", clip_low=0.2, clip_high=0.2, length="constant"),
    "dapo": Estimator("dapo", clip_low=0.2, clip_high=0.28, length="group"),
    "cispo": Estimator("cispo", length="group", cap=5.0),
    "sft": Estimator("sft", ratio=False, std=False, centred=False),
}


def make_estimator(name: str, **changes: Any) -> Estimator:
    """The estimator called ``name``, with the fields that are not None in ``changes`` replaced.

    Args:
        name: "cropi", "grpo", "ppo", "gspo", "reinforce", "rloo", "dr_grpo", "bnpo", "dapo", "cispo" or "sft";
            docs/method.md has the formula of each.
        changes: fields of :class:`Estimator`.

    >>> make_estimator("ppo", clip_low=0.1).clip_low
    0.1

    Raises:
        ValueError: no such estimator, a field that it does not use, or fields that contradict each other.
    """
    if not isinstance(name, str) or name not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {name!r}")
    given = {key: value for key, value in changes.items() if value is not None}
    known = [field.name for field in fields(Estimator) if field.name != "name"]
    for key, value in given.items():
        if key not in known:
            raise ValueError(
                f"{key}={value!r} is not a field of an estimator: give one of {', '.join(known)}"
            )
    made = replace(ESTIMATORS[name], **given)
    capped = ESTIMATORS[name].cap is not None
    for field, used in (("eps", made.std), ("constant", made.length == "constant"), ("cap", capped)):
        if field in given and not used:
            raise ValueError(f"{field}={given[field]}: the estimator {name!r} does not use it; leave it out")
    return made
