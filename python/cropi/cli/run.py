"""``cropi run``: sketch, influence and selection in one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cropi.cli import influence, options, select, sketch
from cropi.cli.config import apply_config
from cropi.errors import optional


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options. The files and the model may come from the config file, so none is required
    here."""
    command.add_argument(
        "--config", metavar="FILE",
        help=".toml or .yaml with any of these options, by their long names; the command line wins over it",
    )  # fmt: skip
    command.add_argument("--train", nargs="+", metavar="FILE", help="training trajectories")
    command.add_argument(
        "--valid",
        nargs="+",
        metavar="FILE",
        help="validation trajectories; records without a set get their file's name",
    )
    command.add_argument("--out", metavar="FOLDER", help="everything is written there")
    options.add_model_options(command)
    options.add_gradient_options(command)
    options.add_job_options(command)
    options.add_influence_options(command)
    options.add_select_options(command)


def run(args: argparse.Namespace) -> int:
    """Validation sketches first: a validation set that is no use should show before the long part."""
    if args.config:
        apply_config(args)
    missing = [f"--{name}" for name in ("model", "train", "valid", "out") if not getattr(args, name)]
    if missing:
        args.parser.error(f"the following arguments are required: {', '.join(missing)}")
    names = [file_stem(path) for path in args.valid]
    if len(set(names)) < len(names):
        args.parser.error(f"--valid: two files of one name ({', '.join(names)}), but each names a store")
    return _run_all(args, Path(args.out), names)


def _run_all(args: argparse.Namespace, out: Path, names: list[str]) -> int:
    from cropi.ranking.influence import validation_means
    from cropi.store.store import SketchStore

    # Everything is checked first: what is wrong with the last step must not show after hours of the first.
    for package in ("tqdm", "safetensors.torch", "pyarrow.parquet", "matplotlib"):
        optional(package)
    scans = [sketch.scan_files(args, [path]) for path in args.valid]
    train_scan = sketch.scan_files(args, args.train)
    _check_usable(args, scans, names, train_scan)
    models = sketch.load_models(args)
    for path, scan in zip(args.valid, scans, strict=True):
        sketch.check_files(args, models, scan, [path], None)
    sketch.check_files(args, models, train_scan, args.train, args.limit)
    folder, stores = out / "sketches", []
    limit, args.limit = args.limit, None  # --limit is for trying out the training files
    for path, name, scan in zip(args.valid, names, scans, strict=True):
        stores.append(str(folder / ("valid" if len(names) == 1 else f"valid-{name}")))
        print(f"== {path}")
        if status := sketch.sketch_files(args, models, scan, [path], stores[-1], name):
            return status
    validation_means([SketchStore.open(store) for store in stores])
    print(f"== {' '.join(args.train)}")
    args.limit = limit
    train = str(folder / "train")
    if status := sketch.sketch_files(args, models, train_scan, args.train, train, None):
        return status
    print("== results")
    scores: Any = influence.score(args, train, stores, str(out / "scores.parquet"))
    select.choose(
        args,
        scores,
        out=str(out / "selected.jsonl"),
        plot=str(out / "scores.png"),
        files=args.train,
        records=str(out / "selected_trajectories.jsonl"),
    )
    print(f"sketches      {train}, {', '.join(stores)}")
    return 0


def _check_usable(args: argparse.Namespace, scans: list[Any], names: list[str], train: Any) -> None:
    """Every validation set and the training files need a prompt with a gradient, and the fraction has to choose one."""
    from cropi.data.scan import NothingToSelect, check_covered
    from cropi.ranking.selection import how_many

    check_covered(dict(zip(names, scans, strict=True)), (), option="--valid")
    if not train.usable:
        raise NothingToSelect(train.prompts, train.without_gradient, before=f"{', '.join(args.train)}: ")
    size = train.usable if args.pool == "usable" else train.prompts
    how_many(args.fraction, min(size, args.limit or size))


def file_stem(path: str) -> str:
    """The name of a trajectory file without its endings."""
    return Path(path).name.removesuffix(".gz").removesuffix(".jsonl")
