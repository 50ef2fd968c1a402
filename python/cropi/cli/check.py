"""``cropi check``: is the sketch right on this model and these prompts, and what will the pool cost?"""

from __future__ import annotations

import argparse
import json
import sys

from cropi.cli import options, sketch
from cropi.cli.manners import tell
from cropi.cli.parser import count
from cropi.options import Reading, Sketching

EXAMPLE = "cropi check --model Qwen/Qwen2.5-0.5B-Instruct --trajectories train.jsonl --out out/check.json"


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    command.add_argument(
        "--trajectories", nargs="+", required=True, metavar="FILE", help="trajectories (docs/trajectories.md)"
    )
    command.add_argument(
        "-n", type=count, default=16, metavar="N", help="prompts to try, at least 4 (default: 16)"
    )
    command.add_argument(
        "--sample-seed", type=int, default=0, metavar="N", help="seed of the draw (default: 0)"
    )
    command.add_argument(
        "--against", choices=("auto", "exact", "seeds"), default="auto",
        help="what to compare with: exact gradients (two bytes a parameter and prompt), or eight other seeds of the "
        "sketch, in the same pass (default: auto, exact below 4 GB)",
    )  # fmt: skip
    command.add_argument("--out", metavar="FILE.json", help="write the figures there")
    options.add_model(command, required=True)
    options.add(
        command,
        Reading,
        Sketching,
        leave=("store_dtype", "shard_bytes", "stage", "limit", "layer_groups", "groups"),
    )
    options.add_progress(command)


def run(args: argparse.Namespace) -> int:
    """Check, and print the verdict; 1 if something failed."""
    from pathlib import Path

    from cropi.atomic import write_atomic
    from cropi.files import check_outputs
    from cropi.report.check import check_job
    from cropi.sealed import sealed
    from cropi.sketching.job import make_job

    check_outputs({"--out": args.out}, {"--trajectories": args.trajectories}, {"--out": (".json",)})
    policy, behaviour_model = sketch.policies(args)
    trajectories = options.opened(args, args.trajectories, policy)
    job = make_job(options.made(Sketching, args), trajectories, None, behaviour_model=behaviour_model)
    if args.progress:
        print(sketch.placed(args, policy), file=sys.stderr)
    report = check_job(
        policy,
        job,
        n=args.n,
        seed=args.sample_seed,
        exact={"auto": None, "exact": True, "seeds": False}[args.against],
        say=(lambda text: print(text, file=sys.stderr)) if args.progress else lambda text: None,
    )
    if args.out:
        write_atomic(Path(args.out), json.dumps(sealed(report.to_dict()), indent=2) + "\n")
    print(report)
    tell(args, **report.to_dict())
    return 0 if report.ok else 1
