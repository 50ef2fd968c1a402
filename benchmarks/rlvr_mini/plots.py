"""Plots of the finished runs: accuracy over steps and processor time."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.rlvr_mini.arms import ARMS, LEVERS
from benchmarks.rlvr_mini.config import Scale
from benchmarks.rlvr_mini.summary import Finished, evaluated_at

# Each of these on the pool and on the larger one, beside each other.
POOLS = ("full", "full_pool3", "random", "random_pool3", "static", "static_pool3", "cropi", "cropi_pool3")
# Few passes, beside full data and CROPI of the same pool.
FEW = (
    "full_pool3", "cropi_pool3", "then_long_pool3", "then_long_cut_pool3", "fresh_pool3", "alike_pool3", "live_pool3",
    "budget_pool3", "live_budget_pool3",
)  # fmt: skip


def write_plots(scale: Scale, by_arm: dict[str, list[Finished]], out: Path) -> None:
    """Of what was tried: ``targeted.png`` (the arms), ``pool.png`` (the larger pool) and ``live.png`` (few passes)."""
    import matplotlib

    matplotlib.use("Agg")
    for file, names, asked in (
        ("targeted.png", tuple(ARMS), tuple(ARMS)),
        ("pool.png", POOLS, ("random_pool3", "static_pool3")),
        ("live.png", FEW, FEW[2:]),
    ):
        if any(by_arm[name] for name in asked):
            _curves(scale, {name: by_arm[name] for name in names if by_arm[name]}, out / file)


def _curves(scale: Scale, shown: dict[str, list[Finished]], path: Path) -> None:
    import matplotlib.pyplot as plt

    known = {**ARMS, **LEVERS}
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.8), sharey=True)
    for i, (name, found) in enumerate(shown.items()):
        longest = max(run.curve[-1][0] for run in found)
        steps = sorted({point[0] for run in evaluated_at(found, longest) for point in run.curve})
        values = [[run.targeted_at(step) for run in evaluated_at(found, step)] for step in steps]
        middle = [statistics.fmean(v) for v in values]
        error = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        cpu = [
            statistics.fmean(at[2] for run in found for at in run.curve if at[0] == step) for step in steps
        ]
        style = "-" if "cropi" in name else "--"
        at = [step + 0.4 * (i - len(shown) / 2) for step in steps]  # error bars stand side by side
        options = {"ls": style, "color": f"C{i}", "marker": "o", "ms": 3}
        axes[0].errorbar(at, middle, error, elinewidth=0.7, **options)
        axes[1].plot(cpu, middle, label=known[name].label, **options)
    axes[0].set(
        xlabel="GRPO steps", ylabel=f"accuracy on {' and '.join(scale.targeted)} (mean, ± sd over seeds)"
    )
    axes[1].set(xlabel="processor seconds, selection included")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
