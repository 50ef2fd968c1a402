"""Before a job, a few prompts show whether the stored log-probs can be those of the policy that sampled the responses.

With rho = pi / beta of a token that beta sampled, pi the policy and beta as stored:

- ``E[rho] = sum_x beta(x) pi(x) / beta(x) = 1``, whatever the two policies are. So (Markov) rho exceeds 2 for half of
  the tokens at most: a median above 2 cannot be, and the log-probs are of another policy or of other tokens.
- The sample's mean is the share of that expectation which the sampled tokens carry. Below 1/2 (1/10) more than half
(nine tenths) of the weight belongs to tokens that were never drawn, and the estimate does not contain it.
- The effective sample size is ``n / (1 + var rho)``. Below 1/2 (1/10) the ratios more than double (make ten times) the
  variance of an estimate.

The first of each pair is a warning, the second and an impossible median are errors.

Two mistakes have a signature, and are named where it fits: log-probs of another temperature (raw ones beside the
temperature of the rollouts, as vLLM stores them by default), and logarithms to base 2 or 10. They fit where the mean
difference to this policy's own is at most 0.1 nats, which a policy keeps that was trained a little from the one that
sampled, and a quarter or less of what it is as stated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import tee

import torch

from cropi.errors import CropiError, warn
from cropi.gradient.batches import MicroBatch, make_batches
from cropi.gradient.estimators import Estimator, make_estimator
from cropi.gradient.health import Health
from cropi.gradient.layout import Layout
from cropi.gradient.tokenize import TokenGroup
from cropi.model.policy import Policy
from cropi_kernels.sketcher.batch.inputs import model_inputs
from cropi_kernels.sketcher.model.precision import own_precision
from cropi_kernels.sketcher.policy.logprobs import measured_split

# Scored tokens to ask for, batches to read at most, tokens to judge by.
ENOUGH, MOST_BATCHES, FEWEST = 256, 4, 16
FAR, TOO_FAR, IMPOSSIBLE = 0.5, 0.1, 2.0
CLEAR = 0.02  # a mean difference in nats that engines' rounding explains
BETTER, CLOSE = 4.0, 0.1
BASES = {2: math.log(2), 10: math.log(10)}
LARGEST = 5.0  # nats; a single token counts no more


class BehaviourMismatch(UserWarning):
    """Stored log-probs that are far from the policy, or cannot be those of the sampler."""


@dataclass(frozen=True)
class Finding:
    """How well the stored log-probs of a few prompts fit the policy.

    Attributes:
        tokens: how many were looked at; equal responses count each.
        median: of the ratio pi / beta.
        health: mean ratio, effective sample size, clipped share.
        level: "" (nothing wrong), "warn" or "error".
        problem: what is wrong, and the remedy.
    """

    tokens: int
    median: float
    health: Health
    level: str = ""
    problem: str = ""

    def __str__(self) -> str:
        """One line."""
        return (
            f"file; ratio median {self.median:.3g}, mean {self.health.ratio:.3g}, effective sample size "
            f"{self.health.ess:.0%} of {self.tokens} tokens, clipped {self.health.clipped:.0%}"
        )


def check_behaviour(
    policy: Policy,
    groups: Iterable[TokenGroup],
    estimator: Estimator,
    *,
    layout: Layout,
    budget: int = 1024,
    level: str = "error",
) -> Finding | None:
    """Look at the stored log-probs of a few prompts: one pass, without a gradient.

    Rows are laid out as the job's, but are not tried in both layouts first, as the job's are, which would cost more
    than the pass. Where something seems wrong in shared rows, it is judged in rows of one response each.

    Args:
        policy: the current policy.
        groups: prompts with log-probs; read until there are enough tokens.
        estimator: its clipping is reported.
        layout: of the job.
        budget: tokens of a forward.
        level: "warn" or "error": what happens beyond the bounds that are errors; beyond the others there is a warning.

    Returns:
        The finding; None without a token to look at.

    Raises:
        CropiError: the log-probs cannot be those of the policy that sampled, or are too far from this one; names what
            they fit, and the remedy.
    """
    first, again = tee(groups)
    shared = layout.shared and not (layout.trial is not None and layout.trial.problem)
    parts = _parts(policy, first, estimator, replace(layout, shared=shared, trial=None), budget)
    if not parts:
        return None
    finding = examine(parts, estimator)
    if finding.level and any(part.batch.blocks is not None for part in parts):
        parts = _parts(policy, again, estimator, replace(layout, shared=False), budget)
        finding = examine(parts, estimator)
    if finding.level == "error" and level == "error":
        raise CropiError(f"{finding.problem}; --behaviour-check warn goes on all the same")
    if finding.level:
        warn(finding.problem, BehaviourMismatch)
    return finding


def _parts(
    policy: Policy, groups: Iterable[TokenGroup], estimator: Estimator, layout: Layout, budget: int
) -> list[_Part]:
    """Micro-batches with enough tokens to judge by; no more groups are read."""
    parts, seen = [], 0
    for batch in make_batches(groups, estimator, layout, budget=budget, window=8, stored_behaviour=True):
        parts.append(_Part(policy, batch))
        seen += len(batch.targets)
        if seen >= ENOUGH or len(parts) == MOST_BATCHES:
            break
    return parts if seen else []


class _Part:
    """A micro-batch, and the policy's hidden states of its scored tokens."""

    @torch.no_grad()
    def __init__(self, policy: Policy, batch: MicroBatch) -> None:
        model = policy.model
        self.batch = batch.to(policy.device)
        self.split = measured_split(model)
        inputs = model_inputs(model, self.batch.attention_mask, self.batch.position_ids, None)
        with own_precision(model):
            hidden = self.split.hidden(self.batch.input_ids, **inputs)
            self.hidden = self.split.head_input(hidden.flatten(0, 1)[self.batch.positions])

    @torch.no_grad()
    def logprobs(self, temperature: float | None = None) -> torch.Tensor:
        """The policy's log-probs ``[N]`` of the scored tokens, at a temperature (None: that of the batch)."""
        given = self.batch.temperature if temperature is None else temperature
        with self.split.whole_head():
            return self.split.logprobs(self.hidden, self.batch.targets, given)

    def each(self, values: torch.Tensor) -> torch.Tensor:
        """Values of tokens, ``[N]`` or ``[N, R]``, as flat float64: one for every response that a token stands for."""
        members = self.batch.members
        if members is None:
            return values.double().cpu()
        wide = values[:, None].expand_as(self.batch.advantages) if values.ndim == 1 else values
        counted = torch.arange(wide.shape[1], device=wide.device) < members[:, None]
        return wide[counted].double().cpu()


def examine(parts: list[_Part], estimator: Estimator) -> Finding:
    """Judge the stored log-probs by the prompts in ``parts``; raises nothing."""

    def policy_at(temperature: float | None) -> torch.Tensor:
        return torch.cat([part.each(part.logprobs(temperature)) for part in parts])

    stored = torch.cat([part.each(_behaviour(part)) for part in parts])
    own = policy_at(None)
    advantages = torch.cat([part.each(part.batch.advantages) for part in parts])
    ratio = torch.exp(own - stored)
    # A token whose ratio is not a number fails its prompt later, by name; it must not hide the others here.
    usable = ratio.isfinite()
    stored, own, ratio = stored[usable], own[usable], ratio[usable]
    # Ratios of responses are clipped response by response, of which single tokens do not tell.
    tokens = estimator if estimator.level == "token" else make_estimator("cropi")
    health = Health.of_ratios(ratio, tokens.clipped(ratio, advantages[usable]))
    median = float(ratio.median()) if len(ratio) else math.nan

    def usable_at(temperature: float | None) -> torch.Tensor:
        return policy_at(temperature)[usable]

    stated = sorted({part.batch.temperature for part in parts})
    level, problem = judge(stored, own, usable_at, stated, median, health)
    return Finding(len(stored), median, health, level, problem)


def judge(
    stored: torch.Tensor,
    own: torch.Tensor,
    policy_at: Callable[[float | None], torch.Tensor],
    stated: list[float],
    median: float,
    health: Health,
) -> tuple[str, str]:
    """How bad it is ("", "warn" or "error") and what; arguments as in :func:`examine`."""
    if len(stored) < FEWEST:
        return "", ""
    named = signature(stored, own, policy_at, stated)
    if named:
        return "error", named
    seen = (
        f"the stored log-probs are far from this policy's (ratio median {median:.3g}, mean {health.ratio:.3g}, "
        f"effective sample size {health.ess:.1%} of {len(stored)} tokens)"
    )
    other = (
        "use the policy that made the rollouts or one trained from it, make new rollouts, or leave the ratio out "
        "(--behaviour current)"
    )
    if median > IMPOSSIBLE:
        return "error", (
            f"{seen}: it gives half of the tokens more than {IMPOSSIBLE:g} times the probability that they are said to "
            "have been sampled with, which happens to half of a sampler's own tokens at most; the log-probs are of "
            f"another policy or of other tokens: {other}"
        )
    if health.ess < TOO_FAR or health.ratio < TOO_FAR:
        return "error", f"{seen}: next to nothing of the gradient is in these tokens; {other}"
    if health.ess < FAR or health.ratio < FAR:
        return "warn", f"{seen}: selections get noisy; {other}"
    return "", ""


def signature(
    stored: torch.Tensor,
    own: torch.Tensor,
    policy_at: Callable[[float | None], torch.Tensor],
    stated: list[float],
) -> str:
    """The base or temperature that the stored log-probs fit much better than the stated one, in words; else ""."""
    off = misfit(own, stored)
    if off <= CLEAR:
        return ""
    temperature, fit = best_temperature(stored, policy_at)
    base, by_base = min(
        ((base, misfit(own, stored * factor)) for base, factor in BASES.items()), key=lambda x: x[1]
    )
    if min(fit, by_base) > min(off / BETTER, CLOSE):
        return ""
    if by_base < fit:
        return (
            f"the stored log-probs are logarithms to base {base}: times {BASES[base]:.4f} they fit this policy (mean "
            f"difference {by_base:.2g} nats a token, as they are {off:.2g}); store natural logarithms"
        )
    said = " and ".join(f"{value:g}" for value in stated)
    fits = (
        f"the stored log-probs fit this policy at temperature {temperature:.3g} (mean difference {fit:.2g} nats a "
        f"token), not at the stated temperature {said} ({off:.2g})"
    )
    if temperature == 1.0:
        return (
            f"{fits}: they are raw ones, which engines store unless told otherwise (vLLM: "
            "logprobs_mode='processed_logprobs'); store those of the sampler, leave them out, or pass --behaviour "
            "current or --behaviour-model"
        )
    return f"{fits}: write the temperature into the records, or pass --temperature {temperature:.3g}"


def best_temperature(
    stored: torch.Tensor, policy_at: Callable[[float | None], torch.Tensor]
) -> tuple[float, float]:
    """The temperature that the log-probs fit best, in 0.05 .. 4, and the misfit there; 1 where that is as good."""
    grid = [0.05 * 1.25**k for k in range(20)]
    fits = [misfit(policy_at(value), stored) for value in grid]
    best = min(range(len(grid)), key=lambda i: fits[i])
    low, high = math.log(grid[max(best - 1, 0)]), math.log(grid[min(best + 1, len(grid) - 1)])
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(14):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if misfit(policy_at(math.exp(left)), stored) <= misfit(policy_at(math.exp(right)), stored):
            high = right
        else:
            low = left
    temperature = math.exp((low + high) / 2)
    fit, at_one = misfit(policy_at(temperature), stored), misfit(policy_at(1.0), stored)
    if abs(temperature - 1) < 0.05 and at_one <= max(2 * fit, CLEAR):
        return 1.0, at_one
    return temperature, fit


def misfit(own: torch.Tensor, stored: torch.Tensor) -> float:
    """Mean size of the difference of log-probs, in nats; no token counts more than :data:`LARGEST`."""
    return float((own - stored).abs().nan_to_num(LARGEST).clamp(max=LARGEST).mean())


def _behaviour(part: _Part) -> torch.Tensor:
    assert part.batch.behaviour is not None
    return part.batch.behaviour
