"""``cropi select``: a table of scores to the chosen prompts."""

from __future__ import annotations

import argparse
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cropi.amounts import counted
from cropi.cli import exporting, options
from cropi.cli.manners import tell
from cropi.cli.parser import Parser
from cropi.errors import printable
from cropi.options import Reading, Selecting

if TYPE_CHECKING:
    from cropi.data.readers import PromptGroups
    from cropi.ranking.scores import Scores
    from cropi.ranking.selection import Selection

LONGEST = 80  # characters of a name in the table of the best and worst prompts
EXAMPLE = "cropi select --scores scores.parquet --fraction 0.1 --out selected.jsonl"


def add_options(command: Parser) -> None:
    """Declare the options."""
    command.add_argument(
        "--scores", required=True, metavar="FILE.parquet", help="what `cropi influence` wrote"
    )
    command.add_argument("--out", required=True, metavar="FILE.jsonl", help="the chosen prompts, best first")
    command.add_argument(
        "--sketches",
        nargs="+",
        metavar="FOLDER",
        help="stores of the training prompts, for --dedup and --diversity (default: that of the scores)",
    )
    command.add_argument("--plot", metavar="FILE.png", help="plot the scores")
    command.add_argument(
        "--trajectories", nargs="+", metavar="FILE", help="the training files, to show prompts' text"
    )
    command.add_argument(
        "--out-trajectories",
        metavar="FILE.jsonl",
        help="copy the chosen records there (needs --trajectories)",
    )
    command.add_argument(
        "--columns",
        metavar="NAME=COLUMN,...",
        help="columns of --trajectories under other names, as for cropi sketch",
    )
    exporting.add_options(command)
    options.add(command, Reading, Selecting)
    add_table(command)


def add_table(command: argparse.ArgumentParser) -> None:
    """How much of the selection is shown."""
    command.add_argument(
        "--table", type=int, default=5, metavar="N", help="show the N best and worst prompts (default: 5)"
    )


def run(args: argparse.Namespace) -> int:
    """Choose, write, and show."""
    from cropi.data.export import known_of
    from cropi.files import LINES, check_outputs
    from cropi.ranking.plot import check_plot
    from cropi.ranking.selection import select
    from cropi.ranking.selection_files import write_selection
    from cropi.ranking.table import read_scores

    if args.out_trajectories and not args.trajectories:
        args.parser.error(
            "--out-trajectories needs --trajectories, the files that the records are copied from"
        )
    if not args.trajectories and (args.columns or args.source != "auto"):
        args.parser.error("--columns and --source say how --trajectories are read; give them too")
    check_outputs(
        {
            "--out": args.out,
            "--plot": args.plot,
            "--out-trajectories": args.out_trajectories,
            "--export": args.export,
        },
        {
            "--scores": [args.scores],
            "--trajectories": args.trajectories or [],
            "--dataset": [args.dataset],
        },
        {"--out": LINES, "--out-trajectories": LINES},
    )
    if args.plot:
        check_plot(args.plot)
    groups = _groups(args)
    exporting.check_options(args, groups)
    given = options.made(Selecting, args)
    if args.sketches and not given.needs_sketches:
        args.parser.error("--sketches are for --dedup and --diversity; give one of them too")
    # What is shown and ranked by, of a million prompts perhaps.
    errors = given.confidence is not None or args.plot is not None
    scores = read_scores(args.scores, only=("task", "pass_rate", given.per), errors=errors)
    chosen = select(scores, given, sketches=_sketches(args))
    # Only now: a dataset need not have those that are not chosen.
    known = known_of(chosen.ids, () if groups is None else groups) if args.dataset else []
    exporting.check_rows(args, groups, known)
    exporting.check_chosen(args, chosen, groups, bool(args.out_trajectories))
    write_selection(args.out, chosen.scores, chosen)
    written = Written(args.out, args.plot, args.out_trajectories, args.table)
    show(chosen, written, groups)
    exporting.write(args, chosen, groups)
    tell(
        args, out=args.out, selected=chosen.ids, prompts=len(chosen.scores.rows), method=chosen.method,
        export=args.export, records=args.out_trajectories, plot=args.plot,
    )  # fmt: skip
    return 0


def _sketches(args: argparse.Namespace) -> Any:
    """The store of the training prompts, where it was given. Opening one imports torch."""
    if not args.sketches:
        return None
    from cropi.store.store import SketchStore

    return SketchStore.join([SketchStore.open(path) for path in args.sketches])


def _groups(args: argparse.Namespace) -> Any:
    """The training records, under the names that they were sketched with."""
    from cropi.data.readers import read

    if not args.trajectories:
        return None
    opened = options.opened(args, args.trajectories, skip_bad=True)
    return read(opened, skip_bad=True, columns=args.columns, rewards=None)


@dataclass(frozen=True)
class Written:
    """Where a selection goes: the ids; and, where they are wanted, a plot, the records, and a table of so many rows."""

    out: str | Path
    plot: str | Path | None = None
    records: str | Path | None = None
    table: int = 5


def show(selection: Selection, written: Written, groups: PromptGroups | None) -> None:
    """Write the plot and the records, and print the table; ``groups`` are the training prompts, or None."""
    from cropi.ranking.contributions import lines
    from cropi.ranking.plot import plot_scores
    from cropi.ranking.selection_files import write_selected_records

    scores = selection.scores
    if written.records and groups is not None:
        write_selected_records(written.records, groups, scores, selection)
    if written.plot:
        plot_scores(written.plot, scores, selection)
    if written.table > 0:
        shown = selection.order[: written.table] + selection.order[-written.table :]
        ids = list(dict.fromkeys(scores.rows[i].id for i in shown))
        texts = None if groups is None else prompt_texts(groups, ids)
        print("\n" + best_and_worst(scores, selection, count=written.table, texts=texts) + "\n")
    print(
        f"selected      {len(selection.chosen)} of {len(scores.rows)} prompts by {selection.method}: {written.out}"
    )
    if selection.copies:
        print(f"copies        {counted(len(selection.copies), 'prompt')} left out, near to a chosen one")
    for line in lines(scores, selection.chosen) if scores.contributions is not None else ():
        print(f"groups        {line}")
    if written.records:
        print(f"records       {written.records}")
    if written.plot:
        print(f"plot          {written.plot}")


def best_and_worst(
    scores: Scores, selection: Selection, *, count: int = 5, texts: dict[str, str] | None = None
) -> str:
    """A table of the ``count`` best and worst usable prompts by the selection's order."""
    order = selection.order
    best = order[:count]
    worst = [i for i in order[-count:] if i not in best]
    width = max([6, *(_columns(_begun(scores.rows[i].id)) for i in best + worst)])
    task_width = max([4, *(_columns(_begun(scores.rows[i].task or "-")) for i in best + worst)])
    names = [_begun(name) for name in scores.sets]
    set_widths = [max(8, _columns(name)) for name in names]

    def line(rank: str, name: str, task: str, rate: str, fused: str, values: Sequence[str], text: str) -> str:
        columns = " ".join(
            " " * (size - _columns(value)) + value for value, size in zip(values, set_widths, strict=True)
        )
        name += " " * (width - _columns(name))
        task += " " * (task_width - _columns(task))
        return f"{rank:>5}  {name}  {task}  {rate:>5}  {fused:>6}  {columns}  {text}".rstrip()

    lines = [line("rank", "prompt", "task", "pass", "fused", names, "text" if texts else "")]
    for group in (best, worst):
        for i in group:
            row, values = scores.rows[i], [f"{value:.4f}" for value in scores.table[i]]
            # A pass rate of 1/8 is 0.13, as on the report's page: Python rounds it to 0.12, and 3/8 to 0.38.
            lines.append(
                line(
                    str(order.index(i) + 1),
                    _begun(row.id),
                    _begun(row.task or "-"),
                    f"{row.pass_rate + 1e-9:.2f}",
                    f"{selection.fused[i]:.3f}",
                    values,
                    (texts or {}).get(row.id, ""),
                )
            )
        if group is best and worst:
            lines.append(f"{'...':>5}")
    return "\n".join(lines)


def _columns(text: str) -> int:
    """How many columns of a terminal a text takes: letters of Chinese, Japanese and Korean take two each, and marks
    upon another letter none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def _begun(name: str) -> str:
    """A name in a column: an id may have 4096 characters."""
    text = printable(name)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def prompt_texts(trajectories: Any, ids: Sequence[str], width: int = 60) -> dict[str, str]:
    """The beginning of the prompts with these ids, on one line each; where all begin alike, as behind a template's
    system message, what follows.

    ``trajectories`` is what :func:`cropi.data.readers.read` takes or gave.
    """
    from os.path import commonprefix

    from cropi.data.chat import last_text
    from cropi.data.readers import read

    texts = {}
    for group in read(trajectories, skip_bad=True, rewards=None).take(ids, missing_ok=True):
        prompt = last_text(group.prompt)
        texts[group.id] = " ".join("".join(c if c.isprintable() else " " for c in prompt).split())
    alike = commonprefix(list(texts.values())).rfind(" ") + 1 if len(texts) > 1 else 0
    for name, text in texts.items():
        text = f"...{text[alike:]}" if alike > width // 2 else text
        texts[name] = text if len(text) <= width else text[: width - 3] + "..."
    return texts
