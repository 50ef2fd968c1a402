"""``cropi influence``: two stores to a table of scores."""

from __future__ import annotations

import argparse
from typing import Any

from cropi.cli import options


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    command.add_argument("--train", required=True, metavar="FOLDER", help="store of the training prompts")
    command.add_argument(
        "--valid", required=True, nargs="+", metavar="FOLDER", help="stores of the validation prompts"
    )
    command.add_argument("--out", required=True, metavar="FILE.parquet", help="the score table")
    options.add_influence_options(command)


def run(args: argparse.Namespace) -> int:
    """Score, and say what was compared."""
    score(args, args.train, args.valid, args.out)
    return 0


def score(args: argparse.Namespace, train: str, valid: list[str], out: str) -> Any:
    """Score one store against others and write the table; returns the scores."""
    from cropi.ranking.influence import influence, write_scores
    from cropi.store.store import SketchStore

    scores = influence(
        SketchStore.open(train), [SketchStore.open(path) for path in valid],
        metric=args.metric, mean=args.mean, max_valid=args.max_valid, seed=args.valid_seed,
    )  # fmt: skip
    write_scores(out, scores)
    print(
        f"scores        {int(scores.usable.sum())} of {len(scores.rows)} prompts against "
        f"{', '.join(map(repr, scores.sets))} ({args.metric}): {out}"
    )
    return scores
