"""``cropi sketch``: trajectories to a store of sketches."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from typing import Any

from cropi.cli import options


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    command.add_argument(
        "--trajectories", nargs="+", required=True, metavar="FILE", help=".jsonl or .jsonl.gz"
    )
    command.add_argument("--out", required=True, metavar="FOLDER", help="the store; continued if it is there")
    command.add_argument("--set", help="validation set name of records that carry none")
    options.add_model_options(command)
    options.add_gradient_options(command)
    options.add_job_options(command)


def run(args: argparse.Namespace) -> int:
    """Sketch, and print the summary."""
    if not args.model:
        args.parser.error("the following arguments are required: --model")
    found = scan_files(args, args.trajectories)
    status = sketch_files(args, load_models(args), found, args.trajectories, args.out, args.set)
    if status == 0:
        print(f"sketches      {args.out}")
    return status


def scan_files(args: argparse.Namespace, files: list[str]) -> Any:
    """Check the files, before the time that loading a model takes is spent."""
    from cropi.data.scan import scan

    return scan(files, skip_bad=args.skip_bad)


def load_models(args: argparse.Namespace) -> tuple[Any, Any]:
    """The policy, and the behaviour model or None."""
    from cropi.errors import optional
    from cropi.model.policy import Policy

    options.make_spec(args)  # a wrong option should not cost the time that loading takes
    options.make_estimator_of(args)
    if not args.progress:
        optional("transformers").utils.logging.disable_progress_bar()  # it shows one for a model's weights
    options_of = {"dtype": args.dtype, "device": args.device, "eos": args.eos}
    policy = Policy(args.model, **options_of)
    behaviour = Policy(args.behaviour_model, **options_of) if args.behaviour_model else None
    for needed in (policy, behaviour):
        if needed is not None:
            needed.model  # noqa: B018  (loaded here, before the long part)
    return policy, behaviour


def check_files(
    args: argparse.Namespace, models: tuple[Any, Any], found: Any, files: list[str], limit: int | None
) -> None:
    """What can be wrong with some files for these models, before any are sketched; ``found`` is their scan."""
    from cropi.gradient.behaviour import behaviour_source
    from cropi.sketching.job import check_tokens, make_tokenize

    policy, behaviour_model = models
    job = replace(make_job(args, files, "", behaviour_model=behaviour_model), limit=limit)
    behaviour_source(job.behaviour, found, job.estimator.ratio)
    check_tokens(make_tokenize(policy, job, found), job, found, args.progress)


def sketch_files(
    args: argparse.Namespace,
    models: tuple[Any, Any],
    found: Any,
    files: list[str],
    out: str,
    default_set: str | None,
) -> int:
    """Sketch some files, of which ``found`` is the scan, into one store; print the summary; the exit status."""
    from cropi.sketching.run import sketch

    policy, behaviour_model = models
    command = shlex.join(["cropi", args.command, *args.words])
    job = make_job(args, files, out, default_set, behaviour_model)
    summary = sketch(policy, job, scan=found, progress=args.progress)
    print(summary.text())
    if summary.interrupted:
        print(
            f"stopped by Ctrl-C; {out} keeps the finished prompts. To go on with the rest:", file=sys.stderr
        )
        print(f"  {command}", file=sys.stderr)
        return 130
    return 0


def make_job(
    args: argparse.Namespace,
    files: list[str],
    out: str,
    default_set: str | None = None,
    behaviour_model: Any = None,
) -> Any:
    """The SketchJob of the options that were given."""
    from cropi.sketching.job import SketchJob

    return SketchJob(
        trajectories=files, out=out, spec=options.make_spec(args), exclude=args.exclude,
        estimator=options.make_estimator_of(args),
        behaviour="model" if args.behaviour_model and args.behaviour == "auto" else args.behaviour,
        behaviour_model=behaviour_model, temperature=args.temperature, chat_template=args.chat_template,
        template_date=args.template_date,
        eos=args.eos, max_length=args.max_length, too_long=args.too_long, layout=args.layout,
        tokens_per_batch=args.tokens_per_batch, dtype=args.store_dtype, stage=args.stage, set=default_set,
        limit=args.limit, skip_bad=args.skip_bad,
        notes={"model": args.model, "command": shlex.join(["cropi", args.command, *args.words])},
    )  # fmt: skip
