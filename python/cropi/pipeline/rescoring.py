"""Scoring within a budget: which prompts a stage sketches anew, and what it keeps of the stages before.

    new validation sketches x training sketches of the stages before  ->  a score of every prompt, without a pass
    these scores, how old they are, and how far scores moved before   ->  how uncertain the choice of each prompt is
    the most uncertain ones, and some at random, while tokens last     ->  sketched anew
    the others                                                         ->  their rows, in a store beside (store/earlier)

:mod:`cropi.ranking.cut` has the rule. What was decided is written before anything is sketched, so that a stage which
goes on after a kill repeats it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cropi.agreement import Ranks
from cropi.atomic import write_atomic
from cropi.checked import fits
from cropi.data.records import PromptGroup
from cropi.data.share import without
from cropi.errors import CropiError
from cropi.files import is_file
from cropi.options import Influence, Rescoring
from cropi.pipeline.checks import Part, Setup
from cropi.pipeline.lost import on_first, usable_stores
from cropi.ranking.cut import Drift, affordable, anew, spreads
from cropi.ranking.influence import influence
from cropi.ranking.rule import Rule
from cropi.ranking.table import SCORES, read_scores
from cropi.ranking.values import FROM_SCORES
from cropi.sealed import read_sealed, sealed
from cropi.sketching.rows import cost_of, row_of
from cropi.sketching.summary import Summary
from cropi.store.earlier import EARLIER, keep_earlier, open_together, scored_at
from cropi.store.rows import OK, SKIPPED, RowInfo
from cropi.store.store import SketchStore

PLAN = "anew.json"
_FORM = {
    "for": {"stage": str, "model": Any}, "options": dict, "tokens": float | None, "spent": float,
    "ids": [str], "sets": [str], "before": [list[float] | None],
    "ages": lambda ages: _none_below_0(ages), "spread": lambda spread: _none_below_0(spread),
    "drift": lambda drift: _none_below_0(drift) and len(drift) == 2,
}  # fmt: skip
BEYOND = "beyond the budget"  # why a prompt that has never been sketched has no score yet


class Pool:
    """The training prompts, in order of id.

    Attributes:
        rows: what is known of each before it is sketched; ``tokens``: what it costs.
        usable: places of those with a gradient.
        ready: their rows.
        costs: their tokens, float64.
    """

    def __init__(self, rows: Sequence[RowInfo]) -> None:
        self.rows = sorted(rows, key=lambda row: row.id)
        self.usable = np.flatnonzero([row.status == OK for row in self.rows])
        self.ready = [self.rows[i] for i in self.usable]
        self.costs = np.array([row.tokens for row in self.ready], dtype=np.float64)


@dataclass
class Anew:
    """What one stage needs to decide which prompts it sketches, and after :meth:`settle` what was decided.

    Attributes:
        options: how much may be scored anew.
        folder: of the stage: :data:`PLAN` is written there.
        kept: the folder for the store of rows that are kept.
        last: the folder of the newest stage before that was scored within these bounds; None: there is none.
        earlier: that stage's training stores.
        others: seconds of a stage beside choosing, for ``options.budget``; the stage before shows them.
        spent: seconds that this stage's choosing takes beside the sketches of training prompts, asked once the
            validation prompts are sketched.
        say: takes a line for the user.
        seconds, passed: of sketches that were timed, in all, and their tokens, as the pool counts them: what a token
            costs.
        scored: prompts with a gradient that this stage sketches.
        left: those that keep an earlier sketch, or have none yet.
    """

    options: Rescoring
    folder: Path
    kept: Path
    last: Path | None
    earlier: Sequence[Path]
    others: float = math.nan
    spent: Callable[[], float] = lambda: 0.0
    say: Callable[[str], Any] = print
    seconds: float = 0.0
    passed: int = 0
    scored: int = field(default=0, init=False)
    left: int = field(default=0, init=False)

    def took(self, summary: Summary) -> None:
        """Sketches were timed."""
        self.seconds += summary.wall
        self.passed += summary.cost

    def settle(
        self,
        ranks: Ranks,
        part: Part,
        valid: Callable[[], Sequence[SketchStore]],
        setup: Setup,
    ) -> Part:
        """Decide, keep the rows of the others, and give this rank's prompts that are sketched.

        Args:
            ranks: the processes that share the work; every one calls.
            part: this rank's training prompts.
            valid: opens all validation stores of this stage, where rank 0 asks.
            setup: how prompts are sketched, compared and chosen.

        Raises:
            NothingToFollow: no validation set has a usable gradient, where ``setup.later``.
            CropiError: earlier sketches cannot be compared with those of this stage, or a plan of this very stage that
                was made under other options.
        """
        job, each = setup.job, part.groups.each
        mine = ranks.agree(lambda: [_row(group, job.responses) for group in islice(each(), job.limit)])
        pool = Pool([row for rows in ranks.gather(mine) for row in rows])
        left = on_first(ranks, lambda: self._unsketched(pool, valid(), setup, ranks.world))
        self.scored, self.left = len(pool.ready) - len(left), len(left)
        kept = ranks.agree(lambda: without(part.groups, part.scan, left, job.limit))
        return replace(part, groups=kept, scan=kept.scan)

    def _unsketched(
        self, pool: Pool, valid: Sequence[SketchStore], setup: Setup, world: int
    ) -> frozenset[str]:
        """The ids of the prompts that are not sketched; their rows are in the store of those."""
        earlier, present = open_together(self.earlier), valid[0].manifest
        if earlier is None and self.last is not None and is_file(self.last / PLAN):
            raise CropiError(
                f"the sketches of the stage before are gone from {self.last}, and this one is to keep some of them: "
                f"put them back, or remove {self.last / PLAN} to sketch all prompts anew"
            )
        key = json.loads(json.dumps({key: present[key] for key in ("stage", "model")}))
        path, options = self.folder / PLAN, vars(self.options)
        held = read_plan(path) if is_file(path) else {}
        if held.get("for") == key and held["options"] != options:
            raise CropiError(
                f"{path} was made with {held['options']}, but now they are {options}, and this stage has begun; put "
                "them back until it is done"
            )
        if held.get("for") != key:
            shutil.rmtree(self.kept, ignore_errors=True)
            made = self._decided(pool, earlier, valid, setup, world)
            held = {"for": key, "options": options, **made}
            write_atomic(path, json.dumps(sealed(held), ensure_ascii=False) + "\n")
        again = frozenset(held["ids"])
        left = {
            row.id: replace(row, status=SKIPPED, reason=BEYOND, tokens=0)
            for row in pool.ready
            if row.id not in again
        }
        if left:
            keep_earlier(self.kept, earlier, left, present)
        return frozenset(left)

    def _decided(
        self,
        pool: Pool,
        earlier: SketchStore | None,
        valid: Sequence[SketchStore],
        setup: Setup,
        world: int,
    ) -> dict[str, Any]:
        """The plan, as it is written."""
        total = float(pool.costs.sum())
        tokens = self._tokens(total, earlier is not None, world)
        given = setup.influence
        if setup.later:
            valid, given, _ = usable_stores(valid, given)
        table, ages, sets = _earlier_scores(pool.ready, earlier, valid, given)
        drift, known, rule = _drift_of(self.last), np.isfinite(table).all(axis=1), _rule(setup, pool)
        chosen = anew(
            table, ages, pool.costs, [row.id for row in pool.ready], rule, tokens=tokens, drift=drift,
            seed=setup.selecting.select_seed + _stage_of(valid[0]),
        )  # fmt: skip
        scored = len({*chosen, *np.flatnonzero(known).tolist()})
        if scored < rule.n:
            raise CropiError(
                f"{rule.n} prompts are to be chosen, but only {scored} would have a score: {tokens:,.0f} of "
                f"{total:,.0f} tokens are passed (passes, budget); raise them, or choose fewer"
            )
        spent = float(pool.costs[chosen].sum())
        self.say(
            f"anew          {len(chosen)} of {len(pool.ready)} prompts are sketched: {spent:,.0f} of {total:,.0f} "
            f"tokens; the budget pays for {'all' if math.isinf(tokens) else f'{tokens:,.0f}'}"
        )
        return {
            "tokens": None if math.isinf(tokens) else tokens, "spent": spent,
            "ids": [pool.ready[i].id for i in chosen], "sets": sets,
            "before": [table[i].tolist() if known[i] else None for i in chosen], "ages": ages[chosen].tolist(),
            "spread": spreads(table).tolist(), "drift": [drift.total, drift.count],
        }  # fmt: skip

    def _tokens(self, pool: float, known: bool, world: int) -> float:
        """How many tokens may be sketched. Until a stage has been timed, ``budget`` bounds nothing."""
        within = math.inf if self.options.passes is None else self.options.passes * pool
        if self.options.budget is None:
            return within
        if not known or math.isnan(self.others) or not self.passed:
            what = "no stage has been timed" if known else "there are no sketches of an earlier stage"
            self.say(f"anew          {what}: budget bounds the stages after this one")
            return within
        per_token = self.seconds / self.passed / world
        return min(within, affordable(self.options.budget, self.others, self.spent(), per_token))


def _rule(setup: Setup, pool: Pool) -> Rule:
    """The rule of the choice from a pool. Baselines look at no score: then it is CROPI's."""
    selecting = setup.selecting
    if selecting.method not in FROM_SCORES:
        selecting = replace(selecting, method="rrf")
    return Rule(pool.rows, pool.usable, selecting, setup.least)


def _none_below_0(values: Any) -> bool:
    return fits(values, list[float]) and min(values, default=0) >= 0


def read_plan(path: Path) -> dict[str, Any]:
    """The plan of a stage.

    Raises:
        CropiError: the file is damaged.
    """
    remedy = "put it back, or remove it to sketch all prompts of the next stage anew"
    held = read_sealed(path, _FORM, remedy)
    # Before there are sketches of an earlier stage, there are no sets.
    rows = [row for row in (held["spread"], *held["before"]) if row is not None] if held["sets"] else []
    lengths = {len(held["before"]), len(held["ages"])} - {len(held["ids"])}
    if lengths or any(len(row) != len(held["sets"]) for row in rows):
        raise CropiError(f"{path} is damaged: its lists are not of one length; {remedy}")
    return held


def _row(group: PromptGroup, responses: int | None) -> RowInfo:
    """A prompt's row before it is sketched; its ``tokens`` are :func:`cropi.sketching.rows.cost_of`."""
    reason = group.no_gradient
    if reason:
        return row_of(group, SKIPPED, reason, None)
    return row_of(group, OK, "", None, tokens=cost_of(group, responses))


def _earlier_scores(
    ready: Sequence[RowInfo], earlier: SketchStore | None, valid: Sequence[SketchStore], options: Influence
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Scores by earlier sketches ``[n, sets]`` (NaN without one), their ages ``[n]``, and the names of the sets."""
    if earlier is None or not any(row.status == OK for row in earlier.rows()):
        return np.full((len(ready), 1), math.nan), np.zeros(len(ready)), []
    scores = influence(earlier, valid, options, stages="any")
    stage, places = _stage_of(valid[0]), {row.id: i for i, row in enumerate(scores.rows)}
    table, ages = np.full((len(ready), len(scores.sets)), math.nan), np.zeros(len(ready))
    for i, row in enumerate(ready):
        if (place := places.get(row.id)) is not None:
            table[i] = scores.table[place]
            ages[i] = stage - int(scored_at(earlier, scores.rows[place]))
    return table, ages, scores.sets


def _stage_of(store: SketchStore) -> int:
    """The number of a store's stage."""
    return int(store.manifest["stage"])


def _drift_of(last: Path | None) -> Drift:
    """How far scores moved in the stages before: their sums, and the prompts that the last one scored anew."""
    if last is None or not is_file(last / PLAN) or not is_file(last / SCORES):
        return Drift()
    held, scores = read_plan(last / PLAN), read_scores(last / SCORES)
    drift = Drift(*held["drift"])
    if held["sets"] != scores.sets:
        return drift
    places = {row.id: i for i, row in enumerate(scores.rows)}
    pairs = [
        (before, scores.table[places[name]], age)
        for name, before, age in zip(held["ids"], held["before"], held["ages"], strict=True)
        if before is not None and name in places
    ]
    if not pairs:
        return drift
    before, after, ages = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    return drift.seen(before, after, ages, np.array(held["spread"]))


def training_store(folder: Path) -> SketchStore:
    """The training prompts' store of a stage: what it sketched itself, and what it kept of the stages before.

    Args:
        folder: the folder of the stage's stores.

    Raises:
        CropiError: no store exists, or one of them is unfinished.
    """
    store = open_together([folder / "train", folder / EARLIER])
    if store is None:
        raise CropiError(
            f"{folder} holds no store of training prompts; put the folder back, or start again "
            "with another --out"
        )
    return store
