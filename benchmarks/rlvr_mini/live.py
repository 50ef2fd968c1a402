"""The live arms: sketches of the training steps' own gradients, and the selector that they feed."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.rlvr_mini.config import Scale
from benchmarks.rlvr_mini.generate import generate
from benchmarks.rlvr_mini.rollouts import to_record
from benchmarks.rlvr_mini.scoring import sketched, summed
from benchmarks.rlvr_mini.tasks import Problem
from cropi import Selector
from cropi.data.records import PromptGroup
from cropi.data.rewards import no_gradient_reason
from cropi.gradient.batches import MicroBatch
from cropi.gradient.estimators import Estimator
from cropi.ranking.alike import prompt_features
from cropi.ranking.cut import affordable
from cropi.ranking.shares import how_many
from cropi_kernels import LiveSketcher

DIM = 1024
# Of the draws among prompts that share: seldom so wide, because a run has three stages.
EXPLORE = 0.5


class Live:
    """Taps on a model whose steps go on as they are, and what they have shown of the pool."""

    def __init__(
        self,
        model: Any,
        scale: Scale,
        seed: int,
        pool: Sequence[PromptGroup],
        *,
        alike: bool = False,
        within: int | None = None,
    ) -> None:
        self.sketcher = LiveSketcher(model, scale.spec(seed))
        among = sorted(
            (group for group in pool if not (alike and no_gradient_reason(group.rewards))), key=lambda g: g.id
        )
        # A visit counts half after two stages.
        self.selector = Selector(
            [group.id for group in among], self.sketcher.spec, dim=min(DIM, scale.dim),
            half_life=2.0 * scale.stage, seed=seed, within=within,
            explore=1.0 if not alike else EXPLORE if within is None else EXPLORE / 2,
            features=prompt_features([group.prompt_ids or [] for group in among]) if alike else None,
        )  # fmt: skip
        self._parts: list[tuple[list[int], torch.Tensor]] = []

    @contextlib.contextmanager
    def watching(self, batch: MicroBatch) -> Iterator[None]:
        """Forward and backward of a micro-batch whose groups are named by their places in the step; nothing is
        sketched that would not count."""
        if not self.selector.listens():
            yield
            return
        tokens = batch.segments[:, None].expand(batch.input_ids.shape)
        with self.sketcher.batch(tokens, num_segments=len(batch.groups)) as step:
            yield
        self._parts.append(([int(group.id) for group in batch.groups], step.sketches.cpu()))

    def end_step(self, names: Sequence[str], step: int) -> None:
        """The step's prompts have been visited, also those whose rewards were equal."""
        if not self.selector.listens(step):
            names = []
        places = [place for part, _ in self._parts for place in part]
        rows = [rows for _, rows in self._parts]
        flat = [place for place in range(len(names)) if place not in set(places)]
        self.selector.update(
            [names[place] for place in (*places, *flat)],
            torch.cat([*rows, torch.zeros(len(flat), self.sketcher.spec.dim)]),
            step,
        )
        self._parts = []


def choose_live(
    live: Live,
    scale: Scale,
    seed: int,
    step: int,
    model: Any,
    pool: Sequence[PromptGroup],
    valid: Sequence[PromptGroup],
    estimator: Estimator,
    *,
    budget: float | None,
    first: float,
    others: float,
    optimiser: torch.optim.Optimizer | None = None,
) -> list[str]:
    """The ids that are drawn next; with ``budget``, after some of the stored rollouts have been scored.

    Args:
        live: what the steps have shown.
        scale, seed, step, model, pool, valid, estimator: of the run.
        budget: the share of a stage's time that choosing may take.
        first: the share of the pool's tokens that the first stage scores.
        others: seconds that the last stage trained; NaN in the first.
        optimiser: validation gradients are scaled as its next step scales a gradient; None: as they are.
    """
    begun, spec = time.monotonic(), scale.spec(seed)
    names, rows, summary = sketched(model, valid, spec, estimator, scale.tokens, f"{step}", optimiser)
    sets = {group.id: str(group.set) for group in valid}
    live.selector.refresh(rows, [sets[name] for name in names])
    if budget is not None:
        flat = [group.id for group in pool if no_gradient_reason(group.rewards)] if step == 0 else []
        live.selector.update(flat, torch.zeros(len(flat), spec.dim), step)
        costs = {g.id: sum(map(len, g.response_ids or [])) for g in pool if not no_gradient_reason(g.rewards)}
        tokens = first * sum(costs.values())
        if not math.isnan(others) and summary.scored_tokens:
            spent = time.monotonic() - begun
            tokens = affordable(budget, others, spent, summary.wall / summary.scored_tokens)
        wanted = []
        for name in live.selector.next(len(live.selector), step):
            if name in costs:
                tokens -= costs[name]
                if tokens < 0:
                    break
                wanted.append(name)
        some = [group for group in pool if group.id in set(wanted)]
        if some:
            ids, found, _ = sketched(model, some, spec, estimator, scale.tokens, f"{step}")
            live.selector.update(ids, found, step)
    return list(live.selector.next(how_many(scale.fraction, len(pool)), step))


def sampled_anew(model: Any, valid: Sequence[PromptGroup], count: int, seed: int) -> list[PromptGroup]:
    """Validation prompts with ``count`` responses of the current policy to each."""
    if not valid:
        return []
    generator = torch.Generator(model.device).manual_seed(seed)
    ordered = sorted(valid, key=lambda group: (len(group.prompt or ""), group.id))
    rollouts = generate(model, [group.prompt_ids or [] for group in ordered], count, generator=generator)
    return [
        to_record(
            Problem(str(group.task), int(group.extra["difficulty"]), str(group.prompt), str(group.answer)),
            made, group.id, group.set,
        )
        for group, made in zip(ordered, rollouts, strict=True)
    ]  # fmt: skip


def choose_alike(
    live: Live,
    scale: Scale,
    seed: int,
    step: int,
    model: Any,
    pool: int,
    valid: Sequence[PromptGroup],
    estimator: Estimator,
    optimiser: torch.optim.Optimizer | None = None,
) -> list[str]:
    """The ids that are drawn next; ``pool``: how many prompts there are; ``valid``: what renews the validation mean, or
    nothing. The other arguments are those of :func:`choose_live`."""
    if valid:
        sets, rows = summed(model, valid, scale.spec(seed), estimator, scale.tokens, optimiser)
        live.selector.refresh(rows, sets)
    return list(live.selector.next(min(how_many(scale.fraction, pool), len(live.selector)), step))
