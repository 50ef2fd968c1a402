"""The arms: how each chooses its prompts, and when it chooses again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.rlvr_mini.config import Scale
from benchmarks.rlvr_mini.live import Live, choose_alike, choose_live, sampled_anew
from benchmarks.rlvr_mini.rollouts import thinned
from benchmarks.rlvr_mini.scoring import base_scores, bounded_choice, exact_scores, sketched_scores
from cropi.data.records import PromptGroup
from cropi.errors import CropiError
from cropi.gradient.estimators import make_estimator
from cropi.options import Influence, Rescoring, Selecting
from cropi.pipeline import Setup
from cropi.ranking.selection import Selection, select
from cropi.sketching.job import SketchJob


@dataclass(frozen=True)
class Arm:
    """One way of choosing prompts.

    Attributes:
        name, label: for files and for people.
        method: "full" (the whole pool), a baseline of :func:`cropi.ranking.selection.select` ("random", "learnability",
            "pass_rate"), "family" (a random choice among the targeted families: it is told what the others must find
            out), or an influence rule ("rrf", "max").
        curriculum: choose again at every stage; otherwise once, under the base policy.
        scorer: "sketch", "dropout" (CROPI's: 10 % of the coordinates, then a random projection), or "exact".
        mean: of the validation gradients, "plain" or "normalised".
        ratio: weigh tokens by pi / beta; False takes the stored tokens as if the policy had just sampled them.
        width: of the sketch, in place of the scale's.
        stage: steps per stage, in place of the scale's.
        longer: steps are so many times the scale's: full data is run on, so that there is something to reach.
        pool: so many times the scale's problems per family and difficulty are in the pool.
        thin: scores come from one in so many of every prompt's stored responses, of validation prompts too.
        adam: validation gradients are scaled as the trainer's AdamW scales a gradient; before its first step, as they
            are.
        budget: the share of a stage's time that choosing may take, from the second stage on.
        first: with ``budget``, the share of the pool's tokens that a stage scores at most.
        live: choose by the sketches of the training steps; with ``budget`` after some stored rollouts are scored too.
        alike: with ``live``, expect of a prompt what the visits of those with like tokens showed; only prompts whose
            stored rewards differ are drawn, anew every ``stage`` steps, and the validation mean is renewed every stage
            of the scale.
        within: with ``alike``, a visit is compared with the validation mean of its time, which is at most so many steps
            old; it is renewed at draws 0, 1, 4, 16 and so on.
        cut: a training micro-batch has at most so many tokens, padding included, in place of the scale's: prompts of
            like lengths are trained together, and little is padded.
        sampled: with ``within``, the mean is renewed from so many responses that the current policy gives to each
            validation prompt, after draw 0; 0: from the stored ones.
    """

    name: str
    label: str
    method: str
    curriculum: bool = False
    scorer: str = "sketch"
    mean: str = "plain"
    ratio: bool = True
    width: int | None = None
    stage: int | None = None
    longer: int = 1
    pool: int = 1
    thin: int = 1
    adam: bool = False
    budget: float | None = None
    first: float = 1.0
    live: bool = False
    alike: bool = False
    within: int | None = None
    cut: int | None = None
    sampled: int = 0

    @property
    def influence(self) -> bool:
        """Whether it needs gradients to choose."""
        return self.method in ("rrf", "max")


ARMS = {
    arm.name: arm
    for arm in (
        Arm("full", "full data", "full", longer=3),
        Arm("random", "random 10 %", "random"),
        Arm("learnability", "learnability 10 %", "learnability"),
        Arm("pass_rate", "pass rate 10 %", "pass_rate"),
        Arm("static", "static influence 10 %", "rrf"),
        Arm("cropi", "CROPI, sketch", "rrf", curriculum=True),
        Arm("cropi_exact", "CROPI, exact gradients", "rrf", curriculum=True, scorer="exact"),
        Arm("cropi_dropout", "CROPI, 10 % dropout", "rrf", curriculum=True, scorer="dropout"),
    )
}
_WITHIN = Arm(
    "budget_pool3", "CROPI, 5 % of the time, pool x 3", "rrf", curriculum=True, pool=3, thin=4, budget=0.05, first=0.3
)  # fmt: skip
_LIVE = Arm("live_pool3", "live, pool x 3", "rrf", curriculum=True, pool=3, thin=4, live=True)
_ALIKE = replace(
    _LIVE, name="alike_pool3", label="live, prompts that are alike share, pool x 3", alike=True, stage=10
)
_THEN = replace(_ALIKE, name="then_pool3", label="live, visits at their time, pool x 3", thin=8, within=10)
_LONG = replace(
    _THEN, name="then_long_pool3", label="live, visits at their time, on to step 240, pool x 3", longer=2
)
# As many tokens as take least time: fewer pay for more passes, more for padding (docs/rlvr_mini.md has the seconds).
CUT = 160
_FULL = Arm("full_pool3", "full data, pool x 3", "full", longer=3, pool=3)
_CROPI = Arm("cropi_pool3", "CROPI, sketch, pool x 3", "rrf", curriculum=True, pool=3)
_FRESH = replace(_THEN, name="fresh_pool3", label="live, fresh validation rollouts, pool x 3", sampled=4)
_BOTH = replace(_WITHIN, name="live_budget_pool3", label="live, and 5 % of the time, pool x 3", live=True)


def _under_adamw(arm: Arm) -> Arm:
    """The arm, with validation gradients scaled as the trainer's AdamW scales a gradient."""
    name, label = (
        arm.name.replace("_pool3", "_adam_pool3"),
        arm.label.replace(", pool", ", under AdamW, pool"),
    )
    return replace(arm, name=name, label=label, adam=True)


def _cut(arm: Arm) -> Arm:
    """The arm, with training micro-batches of few tokens."""
    name, label = (
        arm.name.replace("_pool3", "_cut_pool3"),
        arm.label.replace(", pool", ", little padding, pool"),
    )
    return replace(arm, name=name, label=label, cut=CUT)


LEVERS = {
    arm.name: arm
    for arm in (
        Arm("family", "random among targeted families", "family", curriculum=True),
        Arm("cropi_nofold", "CROPI, no fold", "rrf", curriculum=True, width=0),
        Arm("cropi_width16", "CROPI, width 16", "rrf", curriculum=True, width=16),
        Arm("cropi_normalised", "CROPI, normalised mean", "rrf", curriculum=True, mean="normalised"),
        Arm("cropi_noratio", "CROPI, ratio 1", "rrf", curriculum=True, ratio=False),
        Arm("cropi_stage20", "CROPI, stages of 20", "rrf", curriculum=True, stage=20),
        Arm("cropi_max", "CROPI, max over sets", "max", curriculum=True),
        Arm("cropi_half", "CROPI, half of the stored responses", "rrf", curriculum=True, thin=2),
        Arm("cropi_quarter60", "CROPI, a quarter, stages of 60", "rrf", curriculum=True, thin=4, stage=60),
        Arm("cropi_adam", "CROPI, under AdamW", "rrf", curriculum=True, adam=True),
        _FULL,
        _cut(_FULL),
        Arm("random_pool3", "random 10 %, pool x 3", "random", pool=3),
        Arm("static_pool3", "static influence 10 %, pool x 3", "rrf", pool=3),
        _CROPI,
        _under_adamw(_CROPI),
        _cut(_CROPI),
        _LIVE,
        _under_adamw(_LIVE),
        _FRESH,
        _under_adamw(_FRESH),
        _ALIKE,
        _under_adamw(_ALIKE),
        _THEN,
        _under_adamw(_THEN),
        _LONG,
        _cut(_LONG),
        _under_adamw(_cut(_LONG)),
        _WITHIN,
        _under_adamw(_WITHIN),
        _BOTH,
        _under_adamw(_BOTH),
    )
}


def choose(
    arm: Arm,
    scale: Scale,
    seed: int,
    stage: int,
    model: Any,
    pool: Sequence[PromptGroup],
    valid: Sequence[PromptGroup],
    folder: Path,
    optimiser: torch.optim.Optimizer | None = None,
    *,
    live: Live | None = None,
    others: float = math.nan,
    last: Path | None = None,
) -> list[str]:
    """The ids of the prompts that ``arm`` trains on in this stage, best first.

    ``folder`` takes its sketches, ``optimiser`` is the trainer's; ``live``: what the steps so far have shown;
    ``others``: seconds that the last stage trained; ``last``: its folder.
    """
    if arm.method == "full":
        return sorted(group.id for group in pool)
    if not arm.influence:
        among = [g for g in pool if arm.method != "family" or g.task in scale.targeted]
        fraction = min(1.0, scale.fraction * len(pool) / len(among))
        scores = base_scores(among, mixed_only=arm.method != "random")
        method = "random" if arm.method == "family" else arm.method
        return _ids(arm, stage, select(scores, fraction=fraction, method=method, seed=1000 * stage + seed))
    estimator = make_estimator("cropi", ratio=arm.ratio)
    scaled_by = optimiser if arm.adam and optimiser is not None and optimiser.state else None
    step = stage * (arm.stage or scale.stage)
    if live is not None and arm.alike:
        renewed: Sequence[PromptGroup] = valid if _renews(arm, scale, stage) else []
        if stage and arm.sampled:
            renewed = sampled_anew(model, renewed, arm.sampled, 5_000_011 * (seed + 1) + step)
        else:
            renewed = _thinned(arm, renewed)
        return choose_alike(live, scale, seed, step, model, len(pool), renewed, estimator, scaled_by)
    pool, valid = _thinned(arm, pool), _thinned(arm, valid)
    if live is not None:
        return choose_live(
            live, scale, seed, step, model, pool, valid, estimator, budget=arm.budget, first=arm.first,
            others=others, optimiser=scaled_by,
        )  # fmt: skip
    if arm.budget is not None:
        job = SketchJob(
            (), None, scale.spec(seed), estimator=estimator, behaviour="file", behaviour_check="off",
            layout="shared", tokens_per_batch=scale.tokens, stage=str(stage), optimizer_state=scaled_by,
        )  # fmt: skip
        setup = Setup(job, Influence(draws=0), Selecting(fraction=scale.fraction, method=arm.method))
        bounds = Rescoring(budget=arm.budget, passes=arm.first)
        return bounded_choice(model, pool, valid, setup, bounds, folder, last, others).ids
    if arm.scorer == "exact":
        scores = exact_scores(model, pool, valid, estimator, mean=arm.mean)
    else:
        dropout = arm.scorer == "dropout"
        spec = scale.spec(seed, arm.width, "dropout" if dropout else "slab", 0.1 if dropout else 1.0)
        scores = sketched_scores(
            model, pool, valid, spec, estimator, folder, stage, mean=arm.mean, tokens=scale.tokens,
            optimiser=scaled_by,
        )  # fmt: skip
    return _ids(arm, stage, select(scores, fraction=scale.fraction, method=arm.method))


def _ids(arm: Arm, stage: int, selection: Selection) -> list[str]:
    if not selection.chosen:
        raise CropiError(
            f"arm {arm.name!r}, stage {stage}: no prompt of the pool has a gradient (each has equal rewards); "
            "train the base policy longer (base_steps), or collect more responses per prompt (train_rollouts)"
        )
    return selection.ids


def _thinned(arm: Arm, groups: Sequence[PromptGroup]) -> Sequence[PromptGroup]:
    return [thinned(g, max(2, len(g.rewards) // arm.thin)) for g in groups] if arm.thin > 1 else groups


def _renews(arm: Arm, scale: Scale, draw: int) -> bool:
    """Whether an arm whose prompts share renews the validation mean before a draw."""
    if arm.within is not None:
        return draw == 0 or (draw & (draw - 1) == 0 and draw.bit_length() % 2 == 1)  # powers of 4
    length = arm.stage or scale.stage
    return draw > 0 and (draw - 1) * length % scale.stage == 0
