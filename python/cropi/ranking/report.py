"""What a person looks at: a plot of the scores, and a table of the best and the worst prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cropi.data.chat import text_of
from cropi.data.readers import read
from cropi.errors import CropiError, optional, printable
from cropi.files import replacing
from cropi.ranking.influence import Scores
from cropi.ranking.selection import Selection

PLOTS = ("png", "pdf", "svg")


def plot_scores(path: str | Path, scores: Scores, selection: Selection) -> None:
    """Write a plot (.png, .pdf or .svg): for every validation set, the prompts' scores in order (left) and against the
    pass rate (right)."""
    kind = Path(path).suffix[1:].lower()
    if kind not in PLOTS:
        raise CropiError(f"plot: {path} should end in one of .{', .'.join(PLOTS)}")
    optional("matplotlib").use("Agg")
    plt = optional("matplotlib.pyplot")
    usable = np.flatnonzero(scores.usable)
    chosen = np.isin(usable, selection.chosen)
    rates = np.array([scores.rows[i].pass_rate for i in usable.tolist()])
    metric = scores.meta.get("metric", "score")
    height = 2.6 * len(scores.sets) + 0.6
    figure, axes = plt.subplots(
        len(scores.sets), 2, figsize=(10, height), squeeze=False, layout="constrained"
    )
    for v, name in enumerate(scores.sets):
        column = scores.table[usable, v]
        order = np.argsort(-column, kind="stable")
        ranked, spread = axes[v]
        for mask, colour, label in ((~chosen, "0.7", "not selected"), (chosen, "tab:red", "selected")):
            places = np.flatnonzero(mask[order])
            ranked.scatter(places + 1, column[order][places], s=14, c=colour, label=label)
            spread.scatter(rates[mask], column[mask], s=14, c=colour)
        ranked.axhline(0, color="0.85", zorder=0)
        spread.axhline(0, color="0.85", zorder=0)
        ranked.set(ylabel=f"{metric} with {name!r}", xlabel="rank of the prompt")
        spread.set(xlabel="pass rate of the stored rollouts", xlim=(-0.03, 1.03))
    axes[0][0].legend(frameon=False)
    figure.suptitle(f"{len(selection.chosen)} of {len(usable)} usable prompts selected by {selection.method}")
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format=kind, dpi=120)
    plt.close(figure)


def best_and_worst(
    scores: Scores, selection: Selection, *, count: int = 5, texts: dict[str, str] | None = None
) -> str:
    """A table of the ``count`` best and worst usable prompts by the selection's order."""
    order = selection.order
    best = order[:count]
    worst = [i for i in order[-count:] if i not in best]
    width = max([6, *(len(printable(scores.rows[i].id)) for i in best + worst)])
    task_width = max([4, *(len(printable(scores.rows[i].task or "-")) for i in best + worst)])
    names = [printable(name) for name in scores.sets]
    set_widths = [max(8, len(name)) for name in names]

    def line(rank: str, name: str, task: str, rate: str, fused: str, values: Sequence[str], text: str) -> str:
        columns = " ".join(f"{value:>{size}}" for value, size in zip(values, set_widths, strict=True))
        return f"{rank:>5}  {name:<{width}}  {task:<{task_width}}  {rate:>5}  {fused:>6}  {columns}  {text}".rstrip()

    lines = [line("rank", "prompt", "task", "pass", "fused", names, "text" if texts else "")]
    for group in (best, worst):
        for i in group:
            row, values = scores.rows[i], [f"{value:.4f}" for value in scores.table[i]]
            lines.append(
                line(
                    str(order.index(i) + 1),
                    printable(row.id),
                    printable(row.task or "-"),
                    f"{row.pass_rate:.2f}",
                    f"{selection.fused[i]:.3f}",
                    values,
                    (texts or {}).get(row.id, ""),
                )
            )
        if group is best and worst:
            lines.append(f"{'...':>5}")
    return "\n".join(lines)


def prompt_texts(trajectories: Any, ids: Sequence[str], width: int = 60) -> dict[str, str]:
    """The beginning of the prompts with these ids, on one line each.

    ``trajectories`` is what :func:`cropi.data.readers.read` takes or gave.
    """
    texts = {}
    for group in read(trajectories, skip_bad=True).take(ids, missing_ok=True):
        prompt = group.prompt if isinstance(group.prompt, str) else last_message(group.prompt)
        text = " ".join("".join(c if c.isprintable() else " " for c in prompt).split())
        texts[group.id] = text if len(text) <= width else text[: width - 3] + "..."
    return texts


def last_message(messages: list[dict[str, object]] | None) -> str:
    """The text of the last message of a conversation."""
    return text_of(messages or [])
