"""The plot of a selection: every prompt as a point while they can be told apart, densities and bands beyond."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cropi.atomic import replacing
from cropi.errors import CropiError, optional
from cropi.ranking.scores import Scores
from cropi.ranking.selection import Selection

PLOTS = ("png", "pdf", "svg")
MOST_POINTS = 2000  # more of them on 5 inches are one grey block
BINS = 80
GREY, RED = "0.7", "tab:red"


def plot_scores(path: str | Path, scores: Scores, selection: Selection) -> None:
    """Write a plot (.png, .pdf or .svg), a row a validation set.

    Up to :data:`MOST_POINTS` usable prompts: their scores in order (left) and against the pass rate (right). Beyond:
    how many prompts have a score, all and chosen, with the end of the set's own first n and its standard error
    (left); by pass rate the median score with the middle 90 % of them, and the share that is chosen (right).

    Raises:
        CropiError: the path ends in something else.
    """
    kind = check_plot(path)
    optional("matplotlib").use("Agg")
    plt = optional("matplotlib.pyplot")
    usable = np.flatnonzero(scores.usable)
    chosen = np.isin(usable, selection.chosen)
    rates = np.array([scores.rows[i].pass_rate for i in usable.tolist()])
    height = 2.6 * len(scores.sets) + 0.6
    names, fonts = _labels(scores.sets)
    figure, axes = plt.subplots(
        len(scores.sets), 2, figsize=(10, height), squeeze=False, layout="constrained"
    )
    draw = _points if len(usable) <= MOST_POINTS else _densities
    for v, name in enumerate(names):
        error = None if scores.stderr is None else scores.stderr[usable, v]
        left, right = axes[v]
        draw(left, right, scores.table[usable, v], rates, chosen, error)
        label = f"{scores.meta.get('metric', 'score')} with {name}"
        (left.set_ylabel if draw is _points else left.set_xlabel)(label, family=fonts, parse_math=False)
        right.set(xlabel="pass rate of the stored rollouts", xlim=(-0.03, 1.03))
    axes[0][0].legend(frameon=False, loc="best" if draw is _points else "upper left", fontsize="small")
    figure.suptitle(f"{len(selection.chosen)} of {len(usable)} usable prompts selected by {selection.method}")
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format=kind, dpi=120)
    plt.close(figure)


def _labels(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names in quotes, and the fonts for them: matplotlib's own, and of those that are installed one with the
    letters that it lacks. A name that neither has is escaped: it would be empty boxes."""
    manager = optional("matplotlib.font_manager")
    usual = manager.FontProperties().get_name()

    def lacking(font: str, letters: set[str]) -> set[str]:
        # matplotlib's list is kept in a file, and may name fonts that are gone.
        try:
            held = manager.get_font(font).get_charmap()
        except (OSError, RuntimeError):
            return letters
        return {letter for letter in letters if ord(letter) not in held}

    shown = [repr(name) for name in names]
    rest = lacking(manager.findfont(usual), set("".join(shown)))
    if not rest:
        return shown, [usual]
    # One that has a box for every letter is no help.
    others = sorted({(f.name, f.fname) for f in manager.fontManager.ttflist if "Last Resort" not in f.name})
    missing, name = min((len(lacking(path, rest)), name) for name, path in others)
    if missing:
        rest = lacking(manager.findfont(name), rest)
        shown = [ascii(name) if rest & set(text) else text for name, text in zip(names, shown, strict=True)]
    return shown, [usual, name]


def check_plot(path: str | Path) -> str:
    """Check that a plot can be written, before the work; returns what it is, one of :data:`PLOTS`.

    Raises:
        CropiError: the path ends in something else.
        ModuleNotFoundError: matplotlib is not installed.
    """
    kind = Path(path).suffix[1:].lower()
    if kind not in PLOTS:
        raise CropiError(f"plot: {path} should end in one of .{', .'.join(PLOTS)}")
    optional("matplotlib")
    return kind


def _points(
    left: Any, right: Any, column: np.ndarray, rates: np.ndarray, chosen: np.ndarray, error: Any
) -> None:
    order = np.argsort(-column, kind="stable")
    for mask, colour, label in ((~chosen, GREY, "not selected"), (chosen, RED, "selected")):
        places = np.flatnonzero(mask[order])
        left.scatter(places + 1, column[order][places], s=14, c=colour, label=label)
        right.scatter(rates[mask], column[mask], s=14, c=colour)
    left.axhline(0, color="0.85", zorder=0)
    right.axhline(0, color="0.85", zorder=0)
    left.set(xlabel="rank of the prompt")


def _densities(
    left: Any, right: Any, column: np.ndarray, rates: np.ndarray, chosen: np.ndarray, error: np.ndarray | None
) -> None:
    edges = np.histogram_bin_edges(column, BINS)
    for mask, colour, label in ((np.ones_like(chosen), GREY, "all usable"), (chosen, RED, "selected")):
        left.stairs(
            np.histogram(column[mask], edges)[0], edges, fill=True, color=colour, alpha=0.8, label=label
        )
    left.set(yscale="symlog", ylabel="prompts")
    if n := int(chosen.sum()):
        cut = np.argsort(-column, kind="stable")[n - 1]
        left.axvline(column[cut], color="black", linestyle="--", linewidth=1, label=f"its first {n} end here")
        if error is not None and np.isfinite(error[cut]):
            low, high = column[cut] - error[cut], column[cut] + error[cut]
            left.axvspan(low, high, color="black", alpha=0.12, label="standard error there")
    bins = np.clip((rates * 20).astype(int), 0, 19)
    held = [b for b in range(20) if (bins == b).any()]
    centres = [(b + 0.5) / 20 for b in held]
    low, middle, high = np.array([np.quantile(column[bins == b], (0.05, 0.5, 0.95)) for b in held]).T
    right.fill_between(centres, low, high, color=GREY, alpha=0.5)
    right.plot(centres, middle, color="0.3", marker="o", markersize=3)
    right.set_ylabel("median score, middle 90 %")
    share = right.twinx()
    share.plot(centres, [chosen[bins == b].mean() for b in held], color=RED, marker="o", markersize=3)
    share.set_ylabel("share selected", color=RED)
    share.set_ylim(bottom=0)
