"""The table of the best and the worst prompts; the plot is in :mod:`cropi.ranking.plot`."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

from cropi.data.chat import last_text
from cropi.data.readers import read
from cropi.errors import printable
from cropi.ranking.scores import Scores
from cropi.ranking.selection import Selection

LONGEST = 80  # characters of a name in the table


def best_and_worst(
    scores: Scores, selection: Selection, *, count: int = 5, texts: dict[str, str] | None = None
) -> str:
    """A table of the ``count`` best and worst usable prompts by the selection's order."""
    order = selection.order
    best = order[:count]
    worst = [i for i in order[-count:] if i not in best]
    width = max([6, *(len(_begun(scores.rows[i].id)) for i in best + worst)])
    task_width = max([4, *(len(_begun(scores.rows[i].task or "-")) for i in best + worst)])
    names = [_begun(name) for name in scores.sets]
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
                    _begun(row.id),
                    _begun(row.task or "-"),
                    f"{row.pass_rate:.2f}",
                    f"{selection.fused[i]:.3f}",
                    values,
                    (texts or {}).get(row.id, ""),
                )
            )
        if group is best and worst:
            lines.append(f"{'...':>5}")
    return "\n".join(lines)


def _begun(name: str) -> str:
    """A name in a column: an id may have 4096 characters."""
    text = printable(name)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def prompt_texts(trajectories: Any, ids: Sequence[str], width: int = 60) -> dict[str, str]:
    """The beginning of the prompts with these ids, on one line each; where all begin alike, as behind a template's
    system message, what follows.

    ``trajectories`` is what :func:`cropi.data.readers.read` takes or gave.
    """
    texts = {}
    for group in read(trajectories, skip_bad=True, rewards=None).take(ids, missing_ok=True):
        prompt = last_text(group.prompt)
        texts[group.id] = " ".join("".join(c if c.isprintable() else " " for c in prompt).split())
    alike = commonprefix(list(texts.values())).rfind(" ") + 1 if len(texts) > 1 else 0
    for name, text in texts.items():
        text = f"...{text[alike:]}" if alike > width // 2 else text
        texts[name] = text if len(text) <= width else text[: width - 3] + "..."
    return texts
