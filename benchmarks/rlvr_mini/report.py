"""Table, raw rows and plots of the finished runs."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

from benchmarks.lib.environment import describe
from benchmarks.rlvr_mini.arms import ARMS, LEVERS, Arm
from benchmarks.rlvr_mini.config import Scale
from benchmarks.rlvr_mini.summary import Curve, Finished, mean_curve, reach, read_runs, spread
from cropi.errors import CropiError
from cropi.files import write_atomic

HEAD = (
    "| arm | seeds | targeted | untargeted | selection's share | prompts with a gradient |"
    "\n|---|---|---|---|---|---|"
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
    lines = [_about(scale, runs), "", HEAD]
    last = max((r.curve[-1][0] for r in by_arm["full"]), default=scale.steps)
    for name, found in by_arm.items():
        for at in sorted({scale.steps, last}):
            lines += [_row(known[name].label, _with(found, at), at)] if _with(found, at) else []
    for goal in sorted({scale.steps, last}):
        lines += ["", *_speed(known, by_arm, goal)]
    lines += ["", _paired(by_arm, scale.steps), "", _overlap(by_arm)]
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "table.md", "\n".join(lines) + "\n")
    with open(out / "runs.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arm", "seed", "step", "targeted_smoothed", "cpu_seconds", "selected_targeted"])
        for run in runs:
            for step, accuracy, cpu in run.curve:
                share = [s["targeted"] for s in run.selections if s["step"] <= step][-1]
                writer.writerow([run.arm, run.seed, step, f"{accuracy:.4f}", f"{cpu:.1f}", f"{share:.3f}"])
    _plots(scale, by_arm, out)
    print(f"wrote {out}/table.md, runs.csv and plots: {len(runs)} finished runs")


def _with(found: list[Finished], step: int) -> list[Finished]:
    """The runs that were evaluated at a step: seeds may have gone on for different times."""
    return [run for run in found if any(point[0] == step for point in run.curve)]


def _about(scale: Scale, runs: list[Finished]) -> str:
    seeds = {r.seed: r for r in runs}.values()
    base = spread([r.start for r in seeds])
    others = spread([r.untargeted_at(0) for r in seeds])
    collect = statistics.fmean(r.collect_cpu for r in seeds)
    return (
        f"Scale `{scale.name}`: {scale.steps} steps of {scale.prompts} prompts x {scale.group} responses, stages of "
        f"{scale.stage}; targeted: {', '.join(scale.targeted)}. Base policy: targeted {base}, untargeted {others}. "
        f"Means ± standard deviation over seeds. Collecting the stored rollouts took {collect:.0f} s of processor "
        f"time per seed, which is in no row below. {describe()}."
    )


def _row(label: str, found: list[Finished], at: int) -> str:
    columns = [
        f"{label}, step {at}",
        str(len(found)),
        spread([r.targeted_at(at) for r in found]),
        spread([r.untargeted_at(at) for r in found]),
        f"{statistics.fmean(r.share for r in found):.1%}",
        f"{statistics.fmean(r.mixed for r in found):.2f}",
    ]
    return "| " + " | ".join(columns) + " |"


def _speed(known: dict[str, Arm], by_arm: dict[str, list[Finished]], at: int) -> list[str]:
    """How much sooner each arm has the accuracy that full data has at step ``at``, in steps and processor time.

    Seed by seed, and for the mean curves over the seeds that both have; these give the speed-ups.
    """
    lines = [
        f"| to full data's targeted accuracy at step {at} | steps, per seed | steps, mean curves "
        "| speed-up in steps | speed-up in processor time |",
        "|---|---|---|---|---|",
    ]
    full = {r.seed: r for r in _with(by_arm["full"], at)}
    for name, found in by_arm.items():
        both = [r for r in found if r.seed in full]
        if not both:
            continue
        cells = [_steps(r.curve, full[r.seed].curve, at) for r in both]
        mine, goal = mean_curve(both), mean_curve([full[r.seed] for r in both])
        reached = _reached(mine, goal, at)
        gains = ["-", "-"]
        if reached is not None:
            end = next(p for p in goal if p[0] == at)
            gains = [f"{end[0] / max(reached[0], 1):.2f}", f"{end[2] / max(reached[1], 1e-9):.2f}"]
        row = [known[name].label, ", ".join(cells), _steps(mine, goal, at), *gains]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _reached(mine: Curve, goal: Curve, at: int) -> tuple[float, float] | None:
    target = next(p[1] for p in goal if p[0] == at)
    return reach(mine, target) if target > goal[0][1] else None


def _steps(mine: Curve, goal: Curve, at: int) -> str:
    if next(p[1] for p in goal if p[0] == at) <= goal[0][1]:
        return "full data gained nothing"
    reached = _reached(mine, goal, at)
    return f"> {mine[-1][0]}" if reached is None else f"{reached[0]:.0f}"


def _paired(by_arm: dict[str, list[Finished]], at: int) -> str:
    """Differences to CROPI with sketches, seed by seed: the seeds share pool, rollouts and test problems."""
    base = {r.seed: r.targeted_at(at) for r in by_arm["cropi"]}
    lines = [
        f"| targeted accuracy at step {at} minus that of CROPI with sketches | per seed | mean ± sd |",
        "|---|---|---|",
    ]
    for name, found in by_arm.items():
        differences = [r.targeted_at(at) - base[r.seed] for r in found if r.seed in base]
        if name != "cropi" and differences:
            each = ", ".join(f"{d:+.3f}" for d in differences)
            lines.append(f"| {name} | {each} | {spread(differences)} |")
    return "\n".join(lines)


def _overlap(by_arm: dict[str, list[Finished]]) -> str:
    """How many of the exact gradients' choices the sketches share at step 0, where all arms score the same policy."""
    exact = {r.seed: set(r.selections[0]["chosen"]) for r in by_arm["cropi_exact"]}
    lines = ["| first choice shared with exact gradients' | per seed |", "|---|---|"]
    for name, found in by_arm.items():
        if name in ("full", "cropi_exact"):
            continue
        shares = [
            len(exact[r.seed] & set(r.selections[0]["chosen"])) / len(exact[r.seed])
            for r in found
            if r.seed in exact
        ]
        if shares:
            lines.append(f"| {name} | {', '.join(f'{s:.2f}' for s in shares)} |")
    return "\n".join(lines)


def _plots(scale: Scale, by_arm: dict[str, list[Finished]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {name: found for name, found in by_arm.items() if found and name in ARMS}
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.8), sharey=True)
    for i, (name, found) in enumerate(shown.items()):
        longest = max(run.curve[-1][0] for run in found)
        steps = sorted({point[0] for run in _with(found, longest) for point in run.curve})
        values = [[run.targeted_at(step) for run in _with(found, step)] for step in steps]
        middle = [statistics.fmean(v) for v in values]
        error = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        cpu = [
            statistics.fmean(at[2] for run in found for at in run.curve if at[0] == step) for step in steps
        ]
        style = "-" if "cropi" in name else "--"
        at = [step + 0.4 * (i - len(shown) / 2) for step in steps]  # error bars stand side by side
        options = {"ls": style, "color": f"C{i}", "marker": "o", "ms": 3}
        axes[0].errorbar(at, middle, error, elinewidth=0.7, **options)
        axes[1].plot(cpu, middle, label=ARMS[name].label, **options)
    axes[0].set(
        xlabel="GRPO steps", ylabel=f"accuracy on {' and '.join(scale.targeted)} (mean, ± sd over seeds)"
    )
    axes[1].set(xlabel="processor seconds, selection included")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(out / "targeted.png", dpi=130)
    plt.close(figure)
    _composition(by_arm, out)


def _composition(by_arm: dict[str, list[Finished]], out: Path) -> None:
    """Which families each stage of CROPI chose, first seed."""
    import matplotlib.pyplot as plt

    if not by_arm["cropi"]:
        return
    run = by_arm["cropi"][0]
    families = sorted({cell.split()[0] for s in run.selections for cell in s["cells"]})
    figure, axis = plt.subplots(figsize=(6, 4))
    bottom = [0.0] * len(run.selections)
    for family in families:
        counts = [
            sum(n for cell, n in s["cells"].items() if cell.split()[0] == family) for s in run.selections
        ]
        axis.bar([str(s["step"]) for s in run.selections], counts, bottom=bottom, label=family)
        bottom = [a + b for a, b in zip(bottom, counts)]
    axis.set(xlabel="chosen at step", ylabel="prompts", title=f"CROPI, sketch, seed {run.seed}")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "composition.png", dpi=130)
    plt.close(figure)
