"""``cropi influence``: two stores to a table of scores."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cropi.amounts import counted
from cropi.cli import options
from cropi.cli.manners import tell
from cropi.cli.parser import count
from cropi.errors import CropiError
from cropi.options import Influence

if TYPE_CHECKING:
    from cropi.ranking.scores import Scores
    from cropi.ranking.selection import Selection

DEFAULT = 5  # neighbours of each kind
EXAMPLE = "cropi influence --train sketches/train --valid sketches/math sketches/code --out scores.parquet"


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    command.add_argument(
        "--train",
        required=True,
        nargs="+",
        metavar="FOLDER",
        help="store of the training prompts; several are read as one",
    )
    command.add_argument(
        "--valid", required=True, nargs="+", metavar="FOLDER", help="stores of the validation prompts"
    )
    command.add_argument(
        "--noise", nargs="+", metavar="FOLDER", default=[],
        help="stores that `cropi sketch --noise` made of the same prompts: the noise of scores from the finite number "
        "of responses (default: none)",
    )  # fmt: skip
    command.add_argument("--out", required=True, metavar="FILE.parquet", help="the score table")
    command.add_argument(
        "--neighbours", metavar="FILE.jsonl",
        help="write for every validation prompt, a line each, the training prompts with the highest cosines (helpful) "
        "and with the lowest (harmful); `cropi.neighbours` in Python (default: no such file)",
    )  # fmt: skip
    command.add_argument("-k", type=count, metavar="N", help="how many of each for --neighbours (default: 5)")
    options.add(command, Influence)


def run(args: argparse.Namespace) -> int:
    """Score one store against others, write the table, and say what was compared."""
    from cropi import pipeline
    from cropi.files import check_outputs
    from cropi.ranking.pairwise import neighbours, write_neighbours
    from cropi.ranking.table import write_scores
    from cropi.store.store import SketchStore

    given = options.made(Influence, args)
    if args.k is not None and args.neighbours is None:
        raise CropiError(f"-k {args.k} is for --neighbours FILE.jsonl; give that too, or leave it out")
    if args.neighbours is not None and not args.neighbours.endswith(".jsonl"):
        raise CropiError(f"neighbours: {args.neighbours}: give the path of JSON lines, which ends in .jsonl")
    check_outputs({"--out": args.out, "--neighbours": args.neighbours}, {}, {"--out": (".parquet",)})
    stores = [SketchStore.open(path) for path in args.train]
    train = stores[0] if len(stores) == 1 else SketchStore.join(stores)
    valid = [SketchStore.open(path) for path in args.valid]
    noise = [SketchStore.open(path) for path in args.noise]
    scores = pipeline.score(train, valid, given, noise=noise)
    # Both before a file is written: an error in the second leaves none.
    near = neighbours(train, valid, args.k or DEFAULT) if args.neighbours is not None else {}
    write_scores(args.out, scores)
    print(line(scores, given.metric, args.out))
    if args.neighbours is not None:
        write_neighbours(args.neighbours, near, valid)
        print(f"neighbours    of {counted(len(near), 'validation prompt')}: {args.neighbours}")
    print(sure(scores))
    if scores.meta.get("groups") is not None:
        print(f"groups        {groups(scores)}")
    tell(
        args, scores=args.out, prompts=len(scores.rows), usable=int(scores.usable.sum()), sets=scores.sets,
        metric=given.metric, uncertainty=scores.meta.get("uncertainty"), neighbours=args.neighbours,
    )  # fmt: skip
    return 0


def sure(scores: Scores, chosen: Selection | None = None) -> str:
    """The lines about the uncertainty of a table of scores, and of the choice that was made with it."""
    from cropi.ranking.uncertainty import Uncertainty, of_choice

    if chosen is None:
        uncertainty, missing = Uncertainty.of(scores), scores.meta.get("uncertainty_missing")
    else:
        uncertainty, missing = of_choice(scores, len(chosen), True, chosen.method)
    return f"choice        not resampled: {missing}" if uncertainty is None else str(uncertainty)


def groups(scores: Scores) -> str:
    """The line about the groups of parameters of the stores."""
    if scores.contributions is None:
        return "no contributions: with --aggregate nearest every prompt is compared with another one"
    return f"contribution[SET][GROUP] in the table, which add up to the score: {', '.join(scores.groups)}"


def line(scores: Scores, metric: str, out: object) -> str:
    """The line about a table of scores that was written."""
    sets = ", ".join(map(repr, scores.sets))
    return f"scores        {int(scores.usable.sum())} of {len(scores.rows)} prompts against {sets} ({metric}): {out}"
