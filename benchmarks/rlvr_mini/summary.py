"""What the finished runs say: curves, steps and processor time to the full-data run's accuracy, means over seeds."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.rlvr_mini.config import Scale
from benchmarks.rlvr_mini.tasks import FAMILIES

# Evaluation intervals that a trailing mean reaches back, as the published table averages neighbours.
SMOOTH = 2


Curve = list[tuple[int, float, float]]  # (step, targeted accuracy, processor seconds)


@dataclass(frozen=True)
class Finished:
    """One finished run.

    ``curve``: (step, smoothed targeted accuracy, processor seconds of training and selection); ``untargeted``: (step,
    accuracy), more rarely. ``start`` is the base policy's targeted accuracy; ``stages``: processor seconds of each
    selection; ``until``: of an evaluated step, selection's share of the processor time, and the share of the visited
    prompts that gave a gradient, up to it; ``yardstick``: processor seconds of a targeted evaluation, their median: it
    is much the same work in every run, and tells how busy the machine was.
    """

    arm: str
    seed: int
    curve: Curve
    untargeted: list[tuple[int, float]]
    start: float
    select_cpu: float
    train_cpu: float
    collect_cpu: float
    selections: list[dict[str, Any]]
    mixed: float
    stages: tuple[float, ...] = ()
    until: dict[int, tuple[float, float]] = field(default_factory=dict)
    yardstick: float = math.nan

    def targeted_at(self, step: int) -> float:
        """Smoothed targeted accuracy at an evaluated step."""
        return next(accuracy for at, accuracy, _ in self.curve if at == step)

    def untargeted_at(self, step: int) -> float:
        """Untargeted accuracy at a step where it was evaluated."""
        return next(accuracy for at, accuracy in self.untargeted if at == step)

    @property
    def share(self) -> float:
        """Selection's share of the processor time of selection and training; collecting the rollouts left out."""
        return self.select_cpu / (self.select_cpu + self.train_cpu)


def mean_of(accuracy: dict[str, float], families: Sequence[str]) -> float:
    """Mean accuracy over families."""
    return statistics.fmean(accuracy[family] for family in families)


def read_runs(scale: Scale, work: Path) -> list[Finished]:
    """Every finished run in the work folder."""
    found = []
    for path in sorted(work.glob("seed*/*/result.json")):
        run = json.loads(path.read_text())
        events = run["evaluations"]
        raw = {e["step"]: mean_of(e["accuracy"], scale.targeted) for e in events}
        curve = []
        for e in events:
            # The base policy's own accuracy is not mixed into the mean of what follows, and a mean of fewer
            # evaluations than the others would cross any line by chance, so the first ones have no point.
            if 0 < e["step"] <= SMOOTH * scale.evaluate_every:
                continue
            back = range(max(1, e["step"] - SMOOTH * scale.evaluate_every), e["step"] + 1)
            window = [raw[step] for step in back if step in raw] or [raw[0]]
            curve.append((e["step"], statistics.fmean(window), e["cpu"]["train"] + e["cpu"]["select"]))
        others = [f for f in FAMILIES if f not in scale.targeted]
        untargeted = [
            (e["step"], mean_of(e["accuracy"], others)) for e in events if others[0] in e["accuracy"]
        ]
        found.append(
            Finished(
                run["arm"], run["seed"], curve, untargeted, raw[0], run["cpu"]["select"], run["cpu"]["train"],
                run["collect_cpu"], run["selections"], statistics.fmean(s["mixed"] for s in run["steps"]),
                _selecting(run), _until(run), _yardstick(run, others[0]),
            )
        )  # fmt: skip
    return found


def _selecting(run: dict[str, Any]) -> tuple[float, ...]:
    """Processor seconds of each selection: what had been spent at the first evaluation after it, less those before."""
    total = [
        next(e["cpu"]["select"] for e in run["evaluations"] if e["step"] > made["step"])
        for made in run["selections"]
    ]
    return tuple(now - before for now, before in zip(total, [0.0, *total]))


def _until(run: dict[str, Any]) -> dict[int, tuple[float, float]]:
    mixed = [step["mixed"] for step in run["steps"]]
    return {
        e["step"]: (
            e["cpu"]["select"] / (e["cpu"]["select"] + e["cpu"]["train"]),
            statistics.fmean(mixed[: e["step"]]),
        )
        for e in run["evaluations"]
        if e["step"] > 0
    }


def _yardstick(run: dict[str, Any], other: str) -> float:
    """``other``: a family that is in the longer evaluations alone."""
    events = run["evaluations"]
    seconds = [
        now["cpu"]["evaluate"] - before["cpu"]["evaluate"]
        for before, now in zip(events, events[1:], strict=False)
        if other not in now["accuracy"]
    ]
    return statistics.median(seconds) if seconds else math.nan


def mean_curve(runs: Sequence[Finished]) -> Curve:
    """The mean over runs of accuracy and processor time, at the steps that all of them have."""
    steps = set.intersection(*({step for step, _, _ in run.curve} for run in runs))
    found = [{point[0]: point for point in run.curve} for run in runs]
    points = [[curve[step] for curve in found] for step in sorted(steps)]
    return [(p[0][0], statistics.fmean(x[1] for x in p), statistics.fmean(x[2] for x in p)) for p in points]


def reach(curve: Curve, target: float) -> tuple[float, float] | None:
    """Step and processor seconds at which a curve first meets ``target``, linearly between its points.

    None when it never does.
    """
    before = curve[0]
    for point in curve:
        if point[1] >= target:
            rise = point[1] - before[1]
            share = 1.0 if rise <= 0 else (target - before[1]) / rise
            return before[0] + share * (point[0] - before[0]), before[2] + share * (point[2] - before[2])
        before = point
    return None


def evaluated_at(found: list[Finished], step: int) -> list[Finished]:
    """The runs that were evaluated at a step: seeds may have gone on for different times."""
    return [run for run in found if any(point[0] == step for point in run.curve)]


def resampled_gains(
    mine: Sequence[Finished], goals: Sequence[Finished], at: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """16th and 84th percentile of the speed-ups, in steps and in processor time, of the mean curves of seeds drawn with
    replacement.

    ``mine`` and ``goals`` are the same seeds in the same order, and a drawn seed brings both of its runs. A draw whose
    curve never reaches the goal's accuracy at step ``at``, or whose goal gained nothing by then, counts as 0.
    """
    rng, steps, seconds = random.Random(0), [], []
    for _ in range(1000):
        drawn = [rng.randrange(len(mine)) for _ in mine]
        goal = mean_curve([goals[i] for i in drawn])
        _, target, spent = next(point for point in goal if point[0] == at)
        reached = reach(mean_curve([mine[i] for i in drawn]), target) if target > goal[0][1] else None
        steps.append(0.0 if reached is None else at / max(reached[0], 1))
        seconds.append(0.0 if reached is None else spent / max(reached[1], 1e-9))
    return _middle(steps), _middle(seconds)


def _middle(gains: list[float]) -> tuple[float, float]:
    gains, last = sorted(gains), len(gains) - 1
    return gains[round(0.16 * last)], gains[round(0.84 * last)]


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"
