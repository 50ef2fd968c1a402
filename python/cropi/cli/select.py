"""``cropi select``: a table of scores to the chosen prompts."""

from __future__ import annotations

import argparse
from typing import Any

from cropi.cli import options


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    command.add_argument(
        "--scores", required=True, metavar="FILE.parquet", help="what `cropi influence` wrote"
    )
    command.add_argument("--out", required=True, metavar="FILE.jsonl", help="the chosen prompts, best first")
    command.add_argument("--plot", metavar="FILE.png", help="plot the scores")
    command.add_argument(
        "--trajectories", nargs="+", metavar="FILE", help="the training files, to show prompts' text"
    )
    command.add_argument(
        "--out-trajectories",
        metavar="FILE.jsonl",
        help="copy the chosen records there (needs --trajectories)",
    )
    command.add_argument("--export", metavar="FILE", help="write the chosen prompts there for a trainer")
    options.add_export_options(command)
    options.add_select_options(command)


def run(args: argparse.Namespace) -> int:
    """Choose, write, and show."""
    from cropi.files import check_outputs
    from cropi.ranking.influence import read_scores

    if args.out_trajectories and not args.trajectories:
        args.parser.error(
            "--out-trajectories needs --trajectories, the files that the records are copied from"
        )
    if args.export:
        _check_export(args)
    elif args.format or args.dataset:
        args.parser.error("--format and --dataset say what --export FILE holds; give it too")
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
    )
    ids = choose(
        args, read_scores(args.scores), args.out, args.plot, args.trajectories, args.out_trajectories
    )
    if args.export:
        from cropi.data.export import export

        count = export(
            args.export, ids, format=options.export_format(args), trajectories=args.trajectories or (),
            dataset=args.dataset, id_key=args.dataset_id,
        )  # fmt: skip
        print(f"export        {count} prompts as {options.export_format(args)}: {args.export}")
    return 0


def _check_export(args: argparse.Namespace) -> None:
    form = options.export_format(args)
    if form == "indices" and not args.dataset:
        args.parser.error("--format indices needs --dataset, whose rows it numbers")
    if form in ("jsonl", "parquet") and not (args.dataset or args.trajectories):
        args.parser.error(
            f"--format {form} needs the prompts' rows: give the trainer's own --dataset, or --trajectories"
        )


def choose(
    args: argparse.Namespace,
    scores: Any,
    out: str,
    plot: str | None,
    files: list[str] | None,
    records: str | None,
) -> list[str]:
    """Select from the scores, write everything that was asked for, and print the table; the chosen ids, best first."""
    from cropi.ranking.report import best_and_worst, plot_scores, prompt_texts
    from cropi.ranking.selection import select, write_selected_records, write_selection

    selection = select(
        scores, fraction=args.fraction, method=args.method, pool=args.pool, seed=args.select_seed
    )  # fmt: skip
    write_selection(out, scores, selection)
    if records and files:
        write_selected_records(records, files, scores, selection)
    if plot:
        plot_scores(plot, scores, selection)
    if args.table > 0:
        shown = selection.order[: args.table] + selection.order[-args.table :]
        texts = prompt_texts(files, {scores.rows[i].id for i in shown}) if files else None
        print("\n" + best_and_worst(scores, selection, count=args.table, texts=texts) + "\n")
    print(f"selected      {len(selection.chosen)} of {len(scores.rows)} prompts by {args.method}: {out}")
    if records:
        print(f"records       {records}")
    if plot:
        print(f"plot          {plot}")
    return [scores.rows[i].id for i in selection.chosen]
