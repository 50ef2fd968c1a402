"""Table, raw rows and plots of the finished runs."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

from benchmarks.lib.environment import describe
from benchmarks.rlvr_mini.arms import ARMS, LEVERS
from benchmarks.rlvr_mini.config import Scale
from benchmarks.rlvr_mini.summary import Finished, reach, read_runs, spread
from cropi.errors import CropiError
from cropi.files import write_atomic

HEAD = (
    "| arm | seeds | targeted | untargeted | steps to full data's accuracy | speed-up, steps "
    "| speed-up, processor time | selection's share | prompts with a gradient |\n|---|---|---|---|---|---|---|---|---|"
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
    full = {r.seed: r for r in by_arm["full"]}
    lines = [_about(scale, runs), "", HEAD]
    lines += [_row(known[name].label, found, full) for name, found in by_arm.items() if found]
    lines += ["", _paired(by_arm), "", _overlap(by_arm)]
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


def _about(scale: Scale, runs: list[Finished]) -> str:
    base, others = (sorted({getattr(r, k) for r in runs}) for k in ("start", "untargeted_start"))
    collect = statistics.fmean(r.collect_cpu for r in runs)
    return (
        f"Scale `{scale.name}`: {scale.steps} steps of {scale.prompts} prompts x {scale.group} responses, stages of "
        f"{scale.stage}; targeted: {', '.join(scale.targeted)}. Base policy: targeted {statistics.fmean(base):.3f}, "
        f"untargeted {statistics.fmean(others):.3f}. Collecting the stored rollouts: {collect:.0f} s of processor "
        f"time, once per seed, in no row below. {describe()}."
    )


def _row(label: str, found: list[Finished], full: dict[int, Finished]) -> str:
    reached, steps, times = [], [], []
    for run in found:
        goal = full.get(run.seed)
        if goal is None:
            reached.append("no full-data run")
            continue
        base = reach(goal, goal.targeted)
        if (
            base is None or goal.targeted <= goal.start
        ):  # nothing was learnt that another arm could reach sooner
            reached.append("full data gained nothing")
            continue
        at = reach(run, goal.targeted)
        reached.append("not reached" if at is None else f"{at[0]:.0f}")
        if at is not None:
            # To the end of the full-data run, whose smoothed curve may have met its last value before.
            last = goal.curve[-1]
            steps.append(last[0] / max(at[0], 1.0))
            times.append(last[2] / max(at[1], 1e-9))
    some = f" ({len(steps)} of {len(reached)})" if len(steps) < len(reached) else ""
    columns = [
        label,
        str(len(found)),
        spread([r.targeted for r in found]),
        spread([r.untargeted for r in found]),
        ", ".join(reached),
        f"{statistics.fmean(steps):.2f}{some}" if steps else "-",
        f"{statistics.fmean(times):.2f}{some}" if times else "-",
        f"{statistics.fmean(r.share for r in found):.1%}",
        f"{statistics.fmean(r.mixed for r in found):.2f}",
    ]
    return "| " + " | ".join(columns) + " |"


def _paired(by_arm: dict[str, list[Finished]]) -> str:
    """Differences to CROPI with sketches, seed by seed: the seeds share pool, rollouts and test problems."""
    base = {r.seed: r.targeted for r in by_arm["cropi"]}
    lines = [
        "| targeted accuracy minus that of CROPI with sketches, same seed | per seed | mean ± sd |",
        "|---|---|---|",
    ]
    for name, found in by_arm.items():
        differences = [r.targeted - base[r.seed] for r in found if r.seed in base]
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
        steps = [point[0] for point in found[0].curve]
        values = [[run.curve[k][1] for run in found] for k in range(len(steps))]
        middle = [statistics.fmean(v) for v in values]
        error = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        cpu = [statistics.fmean(run.curve[k][2] for run in found) for k in range(len(steps))]
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
