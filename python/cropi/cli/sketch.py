"""``cropi sketch``: trajectories to a store of sketches."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from cropi.cli import options
from cropi.options import Reading, Sketching


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    command.add_argument(
        "--trajectories", nargs="+", required=True, metavar="FILE", help="trajectories (docs/trajectories.md)"
    )
    command.add_argument("--out", required=True, metavar="FOLDER", help="the store; continued if it is there")
    command.add_argument("--set", help="validation set of records that carry none (default: none)")
    options.add_model(command)
    options.add(command, Reading, Sketching)
    options.add_progress(command)


def run(args: argparse.Namespace) -> int:
    """Sketch, and print the summary."""
    from cropi.sketching.interrupt import Interrupted
    from cropi.sketching.job import make_job
    from cropi.sketching.run import scan_groups, sketch

    if not args.model:
        args.parser.error("the following arguments are required: --model")
    given = options.made(Sketching, args)
    policy, behaviour_model = policies(args)
    job = make_job(
        given,
        options.opened(args, args.trajectories, policy),
        args.out,
        set=args.set,
        behaviour_model=behaviour_model,
        notes=notes(args),
    )
    scan = scan_groups(policy, job)  # before the time that loading the weights takes is spent
    print(placed(args, policy))
    summary = sketch(policy, job, scan=scan, progress=args.progress)
    print(summary.text())
    if summary.interrupted:
        return stopped(args, Interrupted(args.out, summary))
    print(f"sketches      {args.out}")
    return 0


def policies(args: argparse.Namespace) -> tuple[Any, Any]:
    """The policy, and the behaviour model or None; weights are loaded when they are first needed."""
    from cropi.errors import optional
    from cropi.model.policy import Policy

    if not args.progress:
        optional("transformers").utils.logging.disable_progress_bar()  # it shows one for a model's weights
    named = {
        "dtype": args.dtype, "device": args.device, "eos": args.eos, "trust_remote_code": args.trust_remote_code,
        "attn_implementation": args.attn_implementation,
    }  # fmt: skip
    behaviour = Policy(args.behaviour_model, **named) if args.behaviour_model else None
    own = {name: getattr(args, name) for name in ("quantize", "adapter", "revision")}  # of the policy alone
    return Policy(args.model, **named, **own), behaviour


def placed(args: argparse.Namespace, policy: Any) -> str:
    """One line that says where the policy runs, in which dtype, and how many tokens at once."""
    from cropi.model.placing import tokens_at_once

    device, dtype = policy.plan
    more = "".join(f", {name} {value}" for name in ("quantize", "adapter") if (value := getattr(args, name)))
    tokens = tokens_at_once(policy, args.tokens_per_batch)
    return (
        f"running on    {device}, {str(dtype).removeprefix('torch.')} weights{more}, {tokens} tokens a batch"
    )


def notes(args: argparse.Namespace) -> dict[str, str]:
    """What a store notes of the command that made it."""
    return {"model": args.model, "command": _words(args)}


def stopped(args: argparse.Namespace, error: Any) -> int:
    """Say how to go on after Ctrl-C; the exit status."""
    print(
        f"stopped by Ctrl-C; {error.out} keeps the finished prompts. To go on with the rest:", file=sys.stderr
    )
    print(f"  {_words(args)}", file=sys.stderr)
    return 130


def _words(args: argparse.Namespace) -> str:
    return shlex.join(["cropi", args.command, *args.words])
