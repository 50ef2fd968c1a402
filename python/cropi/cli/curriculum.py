"""``cropi curriculum``: stages of selecting and training, from one config file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cropi.cli import options
from cropi.cli.config import apply_config
from cropi.cli.manners import tell
from cropi.cli.parser import Parser, option_group
from cropi.cli.sketch import notes
from cropi.errors import CropiError
from cropi.options import Influence, Reading, Rescoring, Selecting, Sketching

EXAMPLE = "cropi curriculum examples/curriculum.yaml"


def add_options(command: Parser) -> None:
    """Declare the options. Most come from the config file, so few are required here."""
    command.add_argument(
        "config", metavar="CONFIG.yaml",
        help=".yaml or .toml with any of these options, by their long names; the command line comes first",
    )  # fmt: skip
    own = option_group(command, "curriculum")
    own.add_argument(
        "--out",
        metavar="FOLDER",
        help="where everything is written; a curriculum that was begun there is continued",
    )
    own.add_argument("--stages", type=int, metavar="N", help="how many stages; may be raised later")
    own.add_argument("--steps", type=int, metavar="N", help="training steps per stage, for the trainer")
    own.add_argument(
        "--trainer", metavar="COMMAND|trl",
        help="a shell command with {model} {selected} {records} {dataset} {stage} {steps} {total_steps} {rollouts} "
        "{out} {python}, or trl to train in this process",
    )  # fmt: skip
    own.add_argument(
        "--trained-model", metavar="PATH", default="{out}",
        help="where the trainer's command leaves the new policy (default: {out})",
    )  # fmt: skip
    own.add_argument(
        "--accept-changes", action="store_true",
        help="go on with settings, trajectories or models that differ from those of finished stages; a training in "
        "this process that was cut short under other options begins anew",
    )  # fmt: skip
    files = option_group(command, "trajectories")
    files.add_argument("--train", nargs="+", default=[], metavar="FILE", help="training trajectories")
    files.add_argument(
        "--valid", nargs="+", default=[], metavar="FILE",
        help="validation trajectories; records without a set get their file's name",
    )  # fmt: skip
    files.add_argument(
        "--sets", nargs="+", default=[], metavar="NAME", help="validation sets that must be covered"
    )
    files.add_argument(
        "--rollouts", metavar="COMMAND",
        help="a shell command that makes trajectories of {model} and writes {train}, {valid} or both",
    )  # fmt: skip
    files.add_argument(
        "--rollouts-when", default="first", choices=("first", "every"),
        help="before the first stage only, or at every stage with the current policy (default: first)",
    )  # fmt: skip
    options.add_export_options(command)
    # Later stages read folders that training wrote, never a model of the hub or an adapter.
    options.add_model(command, leave=("revision", "adapter", "quantize", "attn_implementation"))
    options.add(command, Reading, Sketching, leave=("stage", "optimizer_state"))
    options.add(command, Rescoring, Influence, Selecting)
    options.add_progress(command)


def run(args: argparse.Namespace) -> int:
    """Read the config, and do the steps that are not finished."""
    args.trl = {}
    apply_config(args, tables=("trl",))
    missing = [
        f"--{name}" for name in ("model", "out", "stages", "steps", "trainer") if getattr(args, name) is None
    ]
    if missing:
        raise CropiError(f"{args.config}: the following options are required: {', '.join(missing)}")
    from cropi import curriculum

    plan = make_plan(args)
    curriculum.run(plan)
    tell(args, out=plan.out, stages=plan.stages)
    return 0


def make_plan(args: argparse.Namespace) -> Any:
    """The Plan of the options that were given."""
    from cropi.curriculum import Plan
    from cropi.model.placing import placed_device
    from cropi.sketching.job import make_job

    exported = None
    if args.dataset or args.format:
        exported = {"dataset": args.dataset, "id_key": args.id_key, "format": options.export_format(args)}
        if args.data_source:
            exported["data_source"] = args.data_source
    given = options.selection(args)
    device = str(placed_device(args.device)) if args.device == "auto" else args.device
    return Plan(
        model=args.model, out=Path(args.out), stages=args.stages, steps=args.steps, trainer=args.trainer,
        train=args.train, valid=args.valid, sets=args.sets, rollouts=args.rollouts,
        rollouts_when=args.rollouts_when, trained_model=args.trained_model,
        job=make_job(given.sketching, (), "", notes=notes(args)), behaviour_model=args.behaviour_model,
        dtype="float32" if args.dtype == "auto" and device == "cpu" else args.dtype, device=device,
        trust_remote_code=args.trust_remote_code,
        influence=given.influence, select=given.selecting,
        rescoring=options.made(Rescoring, args), export=exported, trl=args.trl,
        accept_changes=args.accept_changes, progress=args.progress, source=args.source,
    )  # fmt: skip
