"""Influence scores of the pool under the current policy, from trajectories of the base policy.

Two ways to the same table: sketches (any kind of :class:`SketchSpec`, through the library's store), or exact gradients,
formed one prompt at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rlvr_mini.grpo import layout_of, logprobs
from benchmarks.rlvr_mini.rollouts import to_tokens
from cropi import pipeline
from cropi.data.records import PromptGroup
from cropi.data.rewards import no_gradient_reason, pass_rate
from cropi.gradient.batches import MicroBatch, make_batches
from cropi.gradient.behaviour import Behaviour
from cropi.gradient.estimators import Estimator
from cropi.gradient.tokenize import TokenGroup
from cropi.model.moments import read_moments
from cropi.model.policy import Policy
from cropi.options import Rescoring
from cropi.pipeline import Setup
from cropi.pipeline.rescoring import Anew
from cropi.ranking.influence import influence
from cropi.ranking.scores import Scores
from cropi.ranking.selection import Selection
from cropi.sketching.groups import sketch_groups
from cropi.sketching.job import SketchJob
from cropi.sketching.job_store import manifest_of, open_store
from cropi.sketching.summary import Summary
from cropi.store.earlier import EARLIER
from cropi.store.rows import OK, SKIPPED, RowInfo
from cropi_kernels import SketchSpec
from cropi_kernels.sketcher.formed import FormedSketcher
from cropi_kernels.sketcher.policy.decoder import split_model


def sketched_scores(
    model: Any,
    pool: Sequence[PromptGroup],
    valid: Sequence[PromptGroup],
    spec: SketchSpec,
    estimator: Estimator,
    folder: Path,
    stage: int,
    *,
    mean: str = "plain",
    tokens: int = 2048,
    optimiser: torch.optim.Optimizer | None = None,
) -> Scores:
    """Scores by sketches. The stores in ``folder`` are continued; see :func:`cropi.ranking.influence`.

    With an ``optimiser``, which has made a step, validation gradients are scaled as its next step scales a gradient.
    """
    policy, behaviour, stores = Policy(model), Behaviour("file"), []
    scale = None if optimiser is None else read_moments(optimiser, model)
    for name, groups in (("pool", pool), ("valid", valid)):
        job = SketchJob(
            (), folder / name, spec, estimator=estimator, stage=str(stage), shard_rows=4096, layout="shared",
            tokens_per_batch=tokens,
        )  # fmt: skip
        moments = scale if name == "valid" else None
        with open_store(job, manifest_of(policy, job, behaviour, moments=moments)) as store:
            made = (to_tokens(group) for group in groups)
            sketch_groups(policy, made, store, job, behaviour, moments=moments)
        stores.append(store)
    return influence(stores[0], [stores[1]], mean=mean)


def sketched(
    model: Any,
    groups: Sequence[PromptGroup],
    spec: SketchSpec,
    estimator: Estimator,
    tokens: int,
    stage: str,
    optimiser: torch.optim.Optimizer | None = None,
) -> tuple[list[str], torch.Tensor, Summary]:
    """Sketches in memory: ids of the prompts with a gradient, float32 rows, and what it took.

    With an ``optimiser``, which has made a step, they are of gradients scaled as its next step scales a gradient.
    """
    policy, behaviour = Policy(model), Behaviour("file")
    job = SketchJob(
        (), None, spec, estimator=estimator, stage=stage, layout="shared", tokens_per_batch=tokens
    )
    moments = None if optimiser is None else read_moments(optimiser, model)
    with open_store(job, manifest_of(policy, job, behaviour, moments=moments)) as store:
        made = (to_tokens(group) for group in groups)
        summary = sketch_groups(policy, made, store, job, behaviour, moments=moments)
    parts = list(store.shards())
    rows = torch.cat([rows for _, rows in parts]) if parts else torch.zeros(0, spec.dim)
    return [row.id for kept, _ in parts for row in kept], rows, summary


def summed(
    model: Any,
    groups: Sequence[PromptGroup],
    spec: SketchSpec,
    estimator: Estimator,
    tokens: int,
    optimiser: torch.optim.Optimizer | None = None,
) -> tuple[list[str], torch.Tensor]:
    """The sets of validation prompts, and the sketch of each set's sum of gradients, float32 ``[sets, dim]``.

    All that a mean needs: the sum is formed by an ordinary backward pass, and sketched once. With an ``optimiser``,
    which has made a step, it is scaled as its next step scales a gradient.
    """
    change = None if optimiser is None else read_moments(optimiser, model).scaled
    sets = sorted({str(group.set) for group in groups})
    rows = torch.zeros(len(sets), spec.dim)
    with FormedSketcher(model, spec, change=change) as formed:
        for row, name in zip(rows, sets, strict=True):
            mine = [to_tokens(g) for g in groups if str(g.set) == name and not no_gradient_reason(g.rewards)]
            for batch in _batches(model, mine, estimator, tokens):
                here = batch.to(model.device)
                row += formed.policy_gradient(
                    here.input_ids, segments=torch.zeros_like(here.segments), num_segments=1,
                    positions=here.positions, targets=here.targets,
                    weigh=estimator.weigher(here.advantages, here.divisors, here.behaviour, here.responses),
                    attention_mask=here.attention_mask, position_ids=here.position_ids,
                ).sketches[0].cpu()  # fmt: skip
    return sets, rows


def bounded_choice(
    model: Any,
    pool: Sequence[PromptGroup],
    valid: Sequence[PromptGroup],
    setup: Setup,
    rescoring: Rescoring,
    folder: Path,
    last: Path | None,
    others: float,
) -> Selection:
    """The choice within a budget, by the library's own chain; ``others``: seconds that the last stage trained."""
    begun, stores = time.monotonic(), folder / "sketches"
    earlier = [] if last is None else [last / "sketches" / name for name in ("train", EARLIER)]
    anew = Anew(
        rescoring,
        folder,
        stores / EARLIER,
        last,
        earlier,
        others,
        lambda: time.monotonic() - begun,
        lambda line: None,
    )
    records = ([group.to_record() for group in groups] for groups in (pool, valid))
    return pipeline.choose(Policy(model), *records, setup, folder, anew=anew, progress=False)


def _batches(
    model: Any, groups: Sequence[TokenGroup], estimator: Estimator, tokens: int
) -> Iterator[MicroBatch]:
    return make_batches(groups, estimator, layout_of(model), budget=tokens, stored_behaviour=True)


def _info(group: PromptGroup, status: str, reason: str = "", norm: float = 0.0) -> RowInfo:
    scored = sum(map(len, group.response_ids or []))
    rate = pass_rate(group.rewards)
    return RowInfo(group.id, status, reason, group.set, group.task, rate, scored, norm)


def exact_scores(
    model: Any,
    pool: Sequence[PromptGroup],
    valid: Sequence[PromptGroup],
    estimator: Estimator,
    *,
    mean: str = "plain",
) -> Scores:
    """The same scores from exact float32 gradients: every one is formed, used and dropped."""
    means: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    for group, gradient in _gradients(model, valid, estimator):
        name = str(group.set)
        gradient = gradient / gradient.norm() if mean == "normalised" else gradient
        means[name] = means[name] + gradient if name in means else gradient
        counts[name] = counts.get(name, 0) + 1
    names = sorted(means)
    directions = torch.stack([means[name] / means[name].norm() for name in names])
    rows = {group.id: _info(group, SKIPPED, no_gradient_reason(group.rewards) or "") for group in pool}
    table = {group.id: np.full(len(names), math.nan) for group in pool}
    for group, gradient in _gradients(model, pool, estimator):
        norm = float(gradient.norm())
        table[group.id] = (directions @ gradient / norm).double().cpu().numpy()
        rows[group.id] = _info(group, OK, norm=norm)
    ids = sorted(rows)
    return Scores(
        [rows[i] for i in ids], names, np.stack([table[i] for i in ids]), {"metric": "cosine", "mean": mean}
    )


def _gradients(
    model: Any, groups: Sequence[PromptGroup], estimator: Estimator
) -> Iterator[tuple[PromptGroup, torch.Tensor]]:
    """Each prompt's gradient as one flat float32 vector; prompts without one are left out."""
    split = split_model(model)
    for group in groups:
        if no_gradient_reason(group.rewards):
            continue
        model.zero_grad(set_to_none=True)
        for batch in _batches(model, [to_tokens(group)], estimator, 1 << 20):
            here = batch.to(model.device)
            values = logprobs(split, here)
            weights = estimator.weights(values.detach(), here.behaviour, here.advantages, here.divisors)
            (weights * values).sum().backward()
        yield group, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)


def base_scores(pool: Sequence[PromptGroup], *, mixed_only: bool) -> Scores:
    """A score table without gradients, for the baselines: zero for prompts that may be chosen, NaN for others."""
    ordered = sorted(pool, key=lambda group: group.id)
    reasons = [no_gradient_reason(group.rewards) if mixed_only else None for group in ordered]
    rows = [_info(g, SKIPPED if why else OK, why or "") for g, why in zip(ordered, reasons, strict=True)]
    table = np.array([[math.nan if why else 0.0] for why in reasons])
    return Scores(rows, ["none"], table, {})
