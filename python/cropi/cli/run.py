"""``cropi run``: sketch, influence and selection in one."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cropi.agreement import Alone, Ranks
from cropi.cli import dry, exporting, influence, options, ranks, select, sketch
from cropi.cli.config import CONFIG, apply_config, write_config
from cropi.cli.manners import tell
from cropi.cli.parser import Parser
from cropi.errors import CropiError, optional
from cropi.options import BASELINES, Influence, Reading, Selecting, Sketching

if TYPE_CHECKING:
    from cropi.cli.dry import Planned
    from cropi.distributed.team import Team
    from cropi.model.policy import Policy
    from cropi.pipeline import Checked, Setup
    from cropi.ranking.selection import Selection
    from cropi.sketching.job import SketchJob
    from cropi.store.store import SketchStore

EXAMPLE = (
    "cropi run --model Qwen/Qwen2.5-0.5B-Instruct --train train.jsonl --valid math.jsonl code.jsonl --out out"
)


def add_options(command: Parser) -> None:
    """Declare the options. The files and the model may come from the config file, so none is required
    here."""
    command.add_argument(
        "--config", metavar="FILE",
        help=".toml or .yaml with any of these options, by their long names; the command line comes first",
    )  # fmt: skip
    command.add_argument("--train", nargs="+", metavar="FILE", help="training trajectories")
    command.add_argument(
        "--valid",
        nargs="+",
        metavar="FILE",
        help="validation trajectories; records without a set get their file's name",
    )
    command.add_argument("--out", metavar="FOLDER", help="everything is written there")
    options.add_model(command)
    options.add(command, Reading, Sketching, Influence, Selecting)
    command.add_argument(
        "--noise", action="store_true",
        help="sketch the noise of gradients, too, from the finite number of responses: of all validation and of some "
        "training prompts, for the uncertainty of scores and choice (docs/trust.md)",
    )  # fmt: skip
    select.add_table(command)
    command.add_argument(
        "--no-report",
        dest="report",
        action="store_false",
        help="write no report.html (`cropi report` writes it later)",
    )
    exporting.add_options(command)
    options.add_dry_run(command)
    options.add_progress(command)


def run(args: argparse.Namespace) -> int:
    """Check every step first: a mistake in the last one must not show after hours of the first one."""
    from cropi.data.formats import stem
    from cropi.files import check_outputs

    if args.config:
        apply_config(args)
    missing = [f"--{name}" for name in ("model", "train", "valid", "out") if not getattr(args, name)]
    if missing:
        valid = " (scored responses to prompts like those that the policy is to learn; `cropi rollout` makes them)"
        hint = valid if missing == ["--valid"] else ""
        args.parser.error(f"the following arguments are required: {', '.join(missing)}{hint}")
    names = [stem(path) for path in args.valid]
    if len(set(names)) < len(names):
        args.parser.error(f"--valid: two files of one name ({', '.join(names)}), but each names a store")
    check_outputs(
        {"--export": args.export}, {"--train": args.train, "--valid": args.valid, "--dataset": [args.dataset]}
    )
    for package in ("tqdm", "safetensors.torch", "pyarrow.parquet", "matplotlib", "jinja2"):
        optional(package)
    with ranks.joined(args) as team, ExitStack() as held:
        return _run(args, team, names, held)


def _run(args: argparse.Namespace, team: Team | None, names: list[str], held: ExitStack) -> int:
    from cropi import pipeline
    from cropi.files import is_there
    from cropi.locks import locked_folder
    from cropi.ranking.resampling import check_noise
    from cropi.sketching.interrupt import Interrupted

    policy, behaviour_model = sketch.policies(args)
    setup = pipeline.Setup.of(
        options.selection(args), behaviour_model=behaviour_model, notes=sketch.notes(args)
    )
    if args.noise:
        replace(setup.job, noise=True)  # what does not go with it shows here
        check_noise(setup.influence.draws, True)
    train = options.opened(args, args.train, policy)
    valid = {name: options.opened(args, path, policy) for name, path in zip(names, args.valid, strict=True)}
    out = Path(args.out)
    who: Ranks = team or Alone()
    if args.dry_run and team is not None:
        raise CropiError("--dry-run is for one process: run it without a launcher")

    def check() -> Checked:
        parts = pipeline.check(policy, train, valid, setup)
        if who.first:
            exporting.check(args, parts.train.groups, parts.alone)
        return parts

    def lock() -> None:
        if who.first:  # a second run in the folder would mix its files with those of this one
            held.enter_context(locked_folder(out, "cropi run"))

    try:
        checked = who.agree(check)
        if who.first:
            print(sketch.placed(args, policy, who.world))
        if args.dry_run:
            return dry.show(args, policy, _dry_parts(checked, setup.job, out / "sketches", args.noise))
        who.agree(lock)
        if who.first and not is_there(out / CONFIG):
            write_config(args, out)
        stores, noise = _stores(args, team, policy, checked, setup)
        if not who.first:
            return 0
        # Now: stores of other settings have refused this run, and what says how their results were made is kept.
        write_config(args, out)
        chosen = pipeline.conclude(stores, setup, out, noise)
    except Interrupted as error:
        if not who.first:
            return 130
        print(error.summary.text())
        return sketch.stopped(args, error)
    _show(args, out, checked, chosen)
    return 0


def _dry_parts(checked: Checked, job: SketchJob, sketches: Path, noise: bool) -> list[Planned]:
    """What a run would sketch: name, prompts, job and store of every part, and of the noise beside it."""
    from cropi.sketching.noise import SAMPLE

    parts: list[Planned] = [
        (part.name, part.groups, job, sketches / part.name) for part in (*checked.valid, checked.train)
    ]
    if noise:
        some = replace(job, limit=SAMPLE)
        parts += [
            (f"noise-{name}", groups, some if name == "train" else job, sketches / f"noise-{name}")
            for name, groups, *_ in parts
        ]
    return parts


def _stores(
    args: argparse.Namespace, team: Team | None, policy: Policy, checked: Checked, setup: Setup
) -> tuple[dict[str, SketchStore], list[SketchStore]]:
    """The stores by the name of their part, and with ``--noise`` those of noise: of all validation prompts, and of the
    training prompts that one process draws for all."""
    from cropi import pipeline
    from cropi.sketching.noise import sampled

    how: dict[str, Any] = {
        "store_at": lambda name: Path(args.out) / "sketches" / name, "say": print, "progress": args.progress
    }  # fmt: skip
    if team is not None:
        from cropi.distributed import ranks as together

        how["by"] = partial(together.sketch, team)
    stores = pipeline.sketch_all(policy, checked, setup, **how)
    if not args.noise:
        return stores, []
    who: Ranks = team or Alone()
    drawn = who.share(sampled(stores["train"]) if who.first else None)
    return stores, pipeline.noise_stores(policy, checked, setup.job, drawn, **how)


def _show(args: argparse.Namespace, out: Path, checked: Checked, chosen: Selection) -> None:
    """Write the report and the other forms of the selection, and print the figures."""
    from cropi.files import is_there
    from cropi.ranking.selection_files import RECORDS, SELECTED
    from cropi.ranking.table import SCORES
    from cropi.report.folder import report_folder

    print("== results")
    print(influence.line(chosen.scores, args.metric, out / SCORES))
    print(influence.sure(chosen.scores, chosen))
    written = select.Written(
        out / SELECTED,
        plot=out / "scores.png",
        records=out / RECORDS,
        table=args.table,
    )
    select.show(chosen, written, checked.train.groups)
    exporting.write(args, chosen, checked.train.groups)
    if args.report:
        held = {part.name: part.groups for part in (checked.train, *checked.valid)}
        page = report_folder(out, every_text=False, records=lambda store: held.get(store.path.name))
        print(f"report        {page}")
    elif is_there(out / "report.html"):
        print(f"report        {out / 'report.html'} is of an earlier run, and perhaps of another selection")
    stores = [out / "sketches" / part.name for part in (checked.train, *checked.valid)]
    print(f"sketches      {', '.join(map(str, stores))}")
    tell(
        args, out=out, scores=out / SCORES, selected=chosen.ids, prompts=len(chosen.scores.rows),
        usable=int(chosen.scores.usable.sum()), sets=chosen.scores.sets, method=chosen.method, stores=stores,
        report=out / "report.html" if args.report else None, config=out / CONFIG,
        uncertainty=None if chosen.method in BASELINES else chosen.scores.meta.get("uncertainty"), export=args.export,
    )  # fmt: skip
