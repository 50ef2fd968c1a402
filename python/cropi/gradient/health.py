"""How far the policy is from the one that made the rollouts: token ratios, effective sample size, clipped share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from cropi.gradient.batches import MicroBatch
from cropi.gradient.estimators import Estimator
from cropi_kernels.adding import add_rows


@dataclass
class Health:
    """Sums over scored tokens; equal responses count each on its own.

    With rho = pi / beta of a token: ``ratio`` is the mean of rho, 1 in expectation for tokens that beta sampled;
    ``ess`` the effective share of the tokens, ``(sum rho)^2 / (n sum rho^2)``, which is 1 for equal policies and
    ``1 / (1 + var rho)`` for large n; ``clipped`` the share of tokens that clipping leaves without a gradient.

    >>> some = Health.of_ratios(torch.tensor([1.0, 1.0, 2.0, 4.0])); some.ratio, round(some.ess, 4)
    (2.0, 0.7273)
    """

    tokens: float = 0.0
    sum: float = 0.0
    squares: float = 0.0
    out: float = 0.0

    @classmethod
    def of_ratios(cls, ratios: torch.Tensor, clipped: torch.Tensor | None = None) -> Health:
        """From ratios ``[n]``, and which tokens are clipped."""
        wide = ratios.double()
        return cls(
            float(wide.numel()),
            float(wide.sum()),
            float((wide * wide).sum()),
            0.0 if clipped is None else float(clipped.sum()),
        )

    def __iadd__(self, other: Health) -> Health:
        self.tokens += other.tokens
        self.sum += other.sum
        self.squares += other.squares
        self.out += other.out
        return self

    @property
    def ratio(self) -> float:
        return self.sum / self.tokens if self.tokens else math.nan

    @property
    def ess(self) -> float:
        return self.sum**2 / (self.tokens * self.squares) if self.squares > 0 else math.nan

    @property
    def clipped(self) -> float:
        return self.out / self.tokens if self.tokens else math.nan

    def to_dict(self) -> dict[str, Any]:
        """For a row of a store: numbers that are not finite are left out, JSON has none."""
        named = {"ratio": self.ratio, "ess": self.ess, "clipped": self.clipped}
        return {name: value for name, value in named.items() if math.isfinite(value)}


def health_sums(
    estimator: Estimator, batch: MicroBatch, logprobs: torch.Tensor, behaviour: torch.Tensor | None
) -> torch.Tensor:
    """The numbers of :class:`Health` of each segment of a batch, float64 ``[S, 4]`` on its device, from the log-probs
    ``[N]`` of the policy and of the behaviour."""
    ratio = torch.ones_like(batch.advantages)
    if behaviour is not None:
        wide = ratio.ndim == 2
        old = behaviour[:, None] if wide and behaviour.ndim == 1 else behaviour
        ratio = torch.exp((logprobs[:, None] if wide else logprobs) - old).expand_as(ratio)
    clipped = estimator.clipped(ratio, batch.advantages)
    each = torch.stack(
        [torch.ones_like(ratio), ratio, ratio * ratio, clipped]
    ).double()  # [4, N] or [4, N, R]
    if batch.members is not None:
        counted = torch.arange(ratio.shape[1], device=ratio.device) < batch.members[:, None]
        each = torch.where(counted, each, 0.0).sum(dim=2)
    sums = torch.zeros(len(batch.groups), 4, dtype=torch.float64, device=each.device)
    return add_rows(sums, batch.token_segments, each.T.contiguous())
