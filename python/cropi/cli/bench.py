"""``cropi bench``: what the kernels take on this machine, beside its floors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cropi.cli.manners import tell

EXAMPLE = "cropi bench --out before.json"


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    command.add_argument(
        "--device",
        default="cpu",
        metavar="DEVICE",
        help="where the kernels run: cpu, cuda, cuda:1, ... (default: cpu)",
    )
    command.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of activations (default: float32)",
    )
    command.add_argument(
        "--rounds",
        type=int,
        default=7,
        metavar="N",
        help="how many rounds the medians are taken over (default: 7)",
    )
    command.add_argument(
        "--out", metavar="FILE.json", help="write the figures there, with machine and versions"
    )
    command.add_argument(
        "--compare", metavar="FILE", help="figures that --out wrote earlier, to print beside the new ones"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, and keep."""
    from cropi.atomic import write_atomic
    from cropi.bench.machine import machine, versions
    from cropi.bench.table import FORM, Table, measure
    from cropi.errors import CropiError
    from cropi.files import check_outputs
    from cropi.sealed import read_sealed, sealed

    if args.rounds < 1:
        args.parser.error(f"--rounds must be at least 1, got {args.rounds}")
    check_outputs(
        {"--out": args.out}, {"--compare": [args.compare] if args.compare else []}, {"--out": (".json",)}
    )
    before = None
    if args.compare:
        try:
            before = read_sealed(Path(args.compare), FORM, "measure again")["table"]
            of = before["device"], before["dtype"]
        except (CropiError, KeyError) as error:
            raise CropiError(
                f"--compare: {args.compare} is not what `cropi bench --out` wrote ({error})"
            ) from error
        if of != (args.device, args.dtype):
            raise CropiError(
                f"--compare: {args.compare} is of {of[0]} in {of[1]}, and this run of {args.device} in {args.dtype}; "
                "measure the same"
            )
    about = machine()
    print(about["processor"], flush=True)
    said = 0

    def say(table: Table) -> None:
        nonlocal said
        new = table.lines(before)[said:]
        print("\n".join(new), flush=True)
        said += len(new)

    table = measure(args.device, args.dtype, rounds=args.rounds, on_row=say)
    held = {"machine": about, "versions": versions(), "table": table.to_dict()}
    tell(args, **held)
    if args.out:
        write_atomic(Path(args.out), json.dumps(sealed(held), indent=2) + "\n")
        print(f"figures       {args.out}")
    return 0
