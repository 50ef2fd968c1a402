"""Table and raw rows of the finished runs."""

from __future__ import annotations

import csv
import math
import statistics
from dataclasses import replace
from pathlib import Path

from benchmarks.lib.environment import describe
from benchmarks.rlvr_mini.arms import ARMS, LEVERS, Arm
from benchmarks.rlvr_mini.config import Scale
from benchmarks.rlvr_mini.plots import write_plots
from benchmarks.rlvr_mini.summary import (
    Curve,
    Finished,
    evaluated_at,
    mean_curve,
    reach,
    read_runs,
    resampled_gains,
    spread,
)
from cropi.atomic import write_atomic
from cropi.errors import CropiError

HEAD = (
    "| arm | seeds | targeted | untargeted | selection's share | prompts with a gradient | an evaluation, s |"
    "\n|---|---|---|---|---|---|---|"
)


def write_report(scale: Scale, work: Path, out: Path) -> None:
    """Write ``table.md``, ``runs.csv`` and the plots into ``out``.

    Raises:
        CropiError: no run is finished.
    """
    runs = read_runs(scale, work)
    if not runs:
        raise CropiError(f"{work}: no run is finished; run without --report-only first")
    known = {**ARMS, **LEVERS}
    by_arm = {name: [r for r in runs if r.arm == name] for name in known}
    lines = [_about(scale, runs, known), "", HEAD]
    last = max(
        (r.curve[-1][0] for name, arm in known.items() if arm.method == "full" for r in by_arm[name]),
        default=scale.steps,
    )
    for name, found in by_arm.items():
        for at in sorted({scale.steps, last}):
            lines += [_row(known[name].label, evaluated_at(found, at), at)] if evaluated_at(found, at) else []
    for goal in sorted({scale.steps, last}):
        lines += ["", *_speed(known, by_arm, goal)]
    lines += ["", *_late(known, by_arm, scale.steps), "", *_times(scale, known, by_arm)]
    lines += ["", *_paired(known, by_arm, scale.steps), "", *_overlap(known, by_arm)]
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "table.md", "\n".join(lines) + "\n")
    with open(out / "runs.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arm", "seed", "step", "targeted_smoothed", "cpu_seconds", "selected_targeted"])
        for run in runs:
            for step, accuracy, cpu in run.curve:
                share = [s["targeted"] for s in run.selections if s["step"] <= step][-1]
                writer.writerow([run.arm, run.seed, step, f"{accuracy:.4f}", f"{cpu:.1f}", f"{share:.3f}"])
    write_plots(scale, by_arm, out)
    print(f"wrote {out}/table.md, runs.csv and plots: {len(runs)} finished runs")


def _about(scale: Scale, runs: list[Finished], known: dict[str, Arm]) -> str:
    pool = min(known[r.arm].pool for r in runs)
    seeds = {r.seed: r for r in runs if known[r.arm].pool == pool}.values()
    base = spread([r.start for r in seeds])
    others = spread([r.untargeted_at(0) for r in seeds])
    collect = statistics.fmean(r.collect_cpu for r in seeds)
    return (
        f"Scale `{scale.name}`: {scale.steps} steps of {scale.prompts} prompts x {scale.group} responses, stages of "
        f"{scale.stage}; targeted: {', '.join(scale.targeted)}. Base policy: targeted {base}, untargeted {others}. "
        f"Means ± standard deviation over seeds. An evaluation is much the same work in every run: its processor "
        f"seconds tell how busy the machine was. Collecting the stored rollouts took {collect:.0f} s of processor time "
        f"per seed, which is in no row below. {describe()}."
    )


def _row(label: str, found: list[Finished], at: int) -> str:
    columns = [
        f"{label}, step {at}",
        str(len(found)),
        spread([r.targeted_at(at) for r in found]),
        spread([r.untargeted_at(at) for r in found]),
        f"{statistics.fmean(r.until[at][0] for r in found):.1%}",
        f"{statistics.fmean(r.until[at][1] for r in found):.2f}",
        f"{statistics.fmean(r.yardstick for r in found):.2f}",
    ]
    return "| " + " | ".join(columns) + " |"


def _speed(known: dict[str, Arm], by_arm: dict[str, list[Finished]], at: int) -> list[str]:
    """How much sooner each arm has the accuracy that full data of its pool has at step ``at``, in steps and time.

    Seed by seed, and for the mean curves over the seeds that both have; these give the speed-ups. The interval is that
    of the mean curves of seeds drawn anew. Time is in processor seconds, and in evaluations of the run itself, which
    takes the load of the machine out.
    """
    lines = [
        f"| to full data's targeted accuracy at step {at} | steps, per seed | steps, mean curves "
        "| speed-up in steps | of 68 % of resampled seeds | in processor time | of 68 % "
        "| in evaluations' time | of 68 % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in by_arm.items():
        full = {r.seed: r for r in evaluated_at(reference(known, by_arm, name), at)}
        both = [r for r in found if r.seed in full]
        if not both:
            continue
        goals = [full[r.seed] for r in both]
        row = [known[name].label, ", ".join(_steps(r.curve, full[r.seed].curve, at) for r in both)]
        row += [_steps(mean_curve(both), mean_curve(goals), at), *_gains(both, goals, at)]
        row += _gains([_in_evaluations(r) for r in both], [_in_evaluations(r) for r in goals], at)[2:]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _in_evaluations(run: Finished) -> Finished:
    return replace(run, curve=[(step, value, cpu / run.yardstick) for step, value, cpu in run.curve])


def reference(known: dict[str, Arm], by_arm: dict[str, list[Finished]], name: str) -> list[Finished]:
    """The full-data runs on the pool of an arm, with the scale's micro-batches: what it is measured against."""
    full = [a.name for a in known.values() if a.method == "full" and a.pool == known[name].pool and not a.cut]
    return [run for other in full for run in by_arm[other]]


def _gains(mine: list[Finished], goals: list[Finished], at: int) -> list[str]:
    """The speed-up in steps and its interval, and those in time."""
    curve, goal = mean_curve(mine), mean_curve(goals)
    reached, end = _reached(curve, goal, at), next(p for p in goal if p[0] == at)
    gains = ["-", "-"]
    if reached is not None:
        gains = [f"{end[0] / max(reached[0], 1):.2f}", f"{end[2] / max(reached[1], 1e-9):.2f}"]
    if len(mine) < 2:
        return [gains[0], "-", gains[1], "-"]
    steps, time = resampled_gains(mine, goals, at)
    # Of a curve that does not reach the goal it is known only that its gain is below that of its last step.
    least = at / curve[-1][0], end[2] / curve[-1][2]
    return [gains[0], _interval(steps, least[0]), gains[1], _interval(time, least[1])]


def _interval(gains: tuple[float, float], least: float) -> str:
    return " to ".join(f"< {least:.1f}" if gain == 0 else f"{gain:.1f}" for gain in gains)


def _reached(mine: Curve, goal: Curve, at: int) -> tuple[float, float] | None:
    target = next(p[1] for p in goal if p[0] == at)
    return reach(mine, target) if target > goal[0][1] else None


def _steps(mine: Curve, goal: Curve, at: int) -> str:
    if next(p[1] for p in goal if p[0] == at) <= goal[0][1]:
        return "full data gained nothing"
    reached = _reached(mine, goal, at)
    return f"> {mine[-1][0]}" if reached is None else f"{reached[0]:.0f}"


def _late(known: dict[str, Arm], by_arm: dict[str, list[Finished]], at: int) -> list[str]:
    """The other way round: when full data gets to where each arm is at step ``at``."""
    lines = [f"| full data's steps to the arm's targeted accuracy at step {at} | per seed |", "|---|---|"]
    for name, found in by_arm.items():
        full = {r.seed: r.curve for r in reference(known, by_arm, name)}
        cells = []
        for run in (r for r in found if r.seed in full and known[name].method != "full"):
            reached = reach(full[run.seed], run.targeted_at(at))
            cells.append(f"> {full[run.seed][-1][0]}" if reached is None else f"{reached[0]:.0f}")
        lines += [f"| {known[name].label} | {', '.join(cells)} |"] if cells else []
    return lines


def _times(scale: Scale, known: dict[str, Arm], by_arm: dict[str, list[Finished]]) -> list[str]:
    """Processor seconds of the selections, one by one, beside those of a stage's training."""
    lines = [
        "| processor seconds, means over seeds | each selection | training, a stage | selection's share | "
        "of it after the first stage |",
        "|---|---|---|---|---|",
    ]
    for name, found in by_arm.items():
        if not found or not known[name].influence:
            continue
        each = [statistics.fmean(seconds) for seconds in zip(*(r.stages for r in found), strict=True)]
        steps = max(s["step"] for s in found[0].selections) + (known[name].stage or scale.stage)
        train = statistics.fmean(r.train_cpu for r in found) / (steps / (known[name].stage or scale.stage))
        share = statistics.fmean(r.share for r in found)
        late = statistics.fmean(each[1:]) if len(each) > 1 else math.nan
        cells = [
            known[name].label,
            ", ".join(f"{seconds:.2f}" for seconds in each),
            f"{train:.1f}",
            f"{share:.1%}",
            "-" if math.isnan(late) else f"{late / (late + train):.1%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _paired(known: dict[str, Arm], by_arm: dict[str, list[Finished]], at: int) -> list[str]:
    """Differences to CROPI with sketches of the same pool, seed by seed: the seeds share rollouts and test problems."""
    lines = [
        f"| targeted accuracy at step {at} minus that of CROPI with sketches, same pool | per seed | mean ± sd |",
        "|---|---|---|",
    ]
    for name, found in by_arm.items():
        pool = known[name].pool
        other = "cropi" if pool == 1 else f"cropi_pool{pool}"
        base = {r.seed: r.targeted_at(at) for r in by_arm.get(other, [])}
        differences = [r.targeted_at(at) - base[r.seed] for r in found if r.seed in base]
        if name != other and differences:
            each = ", ".join(f"{d:+.3f}" for d in differences)
            lines.append(f"| {known[name].label} | {each} | {spread(differences)} |")
    return lines if len(lines) > 2 else []


def _overlap(known: dict[str, Arm], by_arm: dict[str, list[Finished]]) -> list[str]:
    """How many of the exact gradients' choices the sketches share at step 0, where all arms score the same policy."""
    exact = {r.seed: set(r.selections[0]["chosen"]) for r in by_arm["cropi_exact"]}
    lines = ["| first choice shared with exact gradients' | per seed |", "|---|---|"]
    for name, found in by_arm.items():
        if name in ("full", "cropi_exact") or known[name].pool != known["cropi_exact"].pool:
            continue
        shares = [
            len(exact[r.seed] & set(r.selections[0]["chosen"])) / len(exact[r.seed])
            for r in found
            if r.seed in exact
        ]
        if shares:
            lines.append(f"| {name} | {', '.join(f'{s:.2f}' for s in shares)} |")
    return lines if len(lines) > 2 else []
