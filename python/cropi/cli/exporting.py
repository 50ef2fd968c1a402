"""``--export`` and ``--push-to-hub`` of ``cropi select`` and ``cropi run``: checked before the work, then written."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cropi.amounts import counted
from cropi.cli import options
from cropi.cli.parser import Parser

if TYPE_CHECKING:
    from cropi.data.readers import PromptGroups
    from cropi.data.records import PromptGroup
    from cropi.ranking.selection import Selection


OF_EXPORT = ("format", "dataset", "id-key", "data-source")


def add_options(command: Parser) -> None:
    """Declare the options."""
    command.add_argument("--export", metavar="FILE", help="write the chosen prompts there for a trainer")
    options.add_export_options(command)
    options.add_push_options(command)


def check(args: argparse.Namespace, groups: PromptGroups | None, alone: str = "") -> None:
    """Check before the work that the wanted forms of a selection can be written, whichever prompts it will hold.

    Args:
        args: the command's.
        groups: the training records, or None where there are none.
        alone: why scores will not be resampled, or nothing.

    Raises:
        CropiError: as :func:`cropi.data.export.check_export`; nobody is logged in to the hub.
    """
    from itertools import islice

    from cropi.data.export import check_lines
    from cropi.data.places import kept_places

    check_options(args, groups, alone)
    if args.export and groups is not None and options.export_format(args) == "ids":
        # Any of them may be chosen.
        places = kept_places(groups.sources, groups.columns)
        check_lines(list(places.ids()) if places is not None else [])
    check_rows(args, groups, list(islice(groups, 200)) if args.dataset and groups is not None else [])


def check_options(args: argparse.Namespace, groups: PromptGroups | None, alone: str = "") -> None:
    """The first part of :func:`check`, which reads no file."""
    from cropi.data.export import BY_PLACE, check_format
    from cropi.data.saved import check_hub_name
    from cropi.errors import CropiError
    from cropi.options import BASELINES
    from cropi.ranking.selection import check_resampled
    from cropi.ranking.values import no_score

    given = [f"--{name}" for name in OF_EXPORT if getattr(args, name.replace("-", "_"))]
    if given and not (args.export or args.push_to_hub):
        more = "; ids of a dump: `cropi convert --id-key`" if given == ["--id-key"] else ""
        args.parser.error(f"what --export FILE holds is said by {' and '.join(given)}; give it too{more}")
    of_file = [name for name in given if name in ("--format", "--data-source")]
    if of_file and not args.export:
        args.parser.error(
            f"{' and '.join(of_file)} is for --export FILE, and the hub gets rows; give that too"
        )
    if args.private and not args.push_to_hub:
        args.parser.error("--private is for --push-to-hub; give it too")

    def needs_rows(option: str) -> None:
        if not args.dataset and groups is None:
            args.parser.error(
                f"{option} needs the prompts' rows: give the trainer's own --dataset, or --trajectories"
            )

    if args.export:
        form = options.export_format(args)
        if form in BY_PLACE and not args.dataset:
            args.parser.error(f"--format {form} needs --dataset, whose rows it numbers")
        if form == "weights" and args.method in BASELINES:
            raise CropiError(
                f"--format weights has chances, and this is {no_score(args.method)}; give another format"
            )
        if form == "weights":
            check_resampled("--format weights", getattr(args, "draws", 2), alone)
        if form != "ids":
            needs_rows(f"--format {form}")
        dataset, id_key = _of_rows(args, form)
        check_format(form, dataset, None, id_key, args.data_source)
    if args.push_to_hub:
        check_hub_name(args.push_to_hub)
        needs_rows("--push-to-hub")


def _of_rows(args: argparse.Namespace, form: str) -> tuple[str | None, str | None]:
    """The dataset and the column of ids for a file of some form; beside a file of ids alone they are for the hub."""
    for_hub = form == "ids" and args.push_to_hub
    return (None, None) if for_hub else (args.dataset, args.id_key)


def check_rows(args: argparse.Namespace, groups: PromptGroups | None, some: Sequence[PromptGroup]) -> None:
    """The second part of :func:`check`; ``some``: prompts that ``--dataset`` has to have a row of."""
    from cropi.data.export import check_export

    form, records = options.export_format(args), () if groups is None else groups
    if args.export:
        dataset, id_key = _of_rows(args, form)
        check_export(
            form, trajectories=records, dataset=dataset, id_key=id_key, records=some, data_source=args.data_source,
            out=args.export,
        )  # fmt: skip
    if args.push_to_hub and (not args.export or form != "save_to_disk"):
        check_export(
            "save_to_disk", trajectories=records, dataset=args.dataset, id_key=args.id_key, records=some
        )


def check_chosen(
    args: argparse.Namespace, selection: Selection, groups: PromptGroups | None, records: bool
) -> None:
    """Whether a selection can be written in all the wanted forms, before any file of it is: all or none are.

    Args:
        args: the command's.
        selection: what was chosen.
        groups: the training records, or None where there are none.
        records: whether the records of the chosen prompts are copied.

    Raises:
        CropiError: the scores lack what ``--format weights`` writes, an id is no line of a file, or the records of a
            chosen prompt are missing.
    """
    from cropi.data.export import check_lines

    form = options.export_format(args) if args.export else None
    if form == "weights":
        selection.weights  # noqa: B018  (raises where they do not)
    if form == "ids":
        check_lines(selection.ids)
    rows = form not in (None, "ids") or args.push_to_hub
    if groups is not None and (records or (rows and not args.dataset)):
        groups.check_holds(selection.ids)


def write(args: argparse.Namespace, selection: Selection, groups: PromptGroups | None) -> None:
    """Write the wanted forms of a selection, and print where they are."""
    from contextlib import nullcontext

    from cropi.data.saved import without_bars

    saves = args.push_to_hub or (args.export and options.export_format(args) == "save_to_disk")
    with without_bars() if saves and not getattr(args, "progress", True) else nullcontext():
        _write(args, selection, groups)


def _write(args: argparse.Namespace, selection: Selection, groups: PromptGroups | None) -> None:
    if args.export:
        from cropi.data.export import export

        form = options.export_format(args)
        dataset, id_key = _of_rows(args, form)
        count = export(
            args.export, selection.ids, format=form, trajectories=groups if groups is not None else (),
            dataset=dataset, id_key=id_key, data_source=args.data_source,
            weights=selection.weights if form == "weights" else None,
        )  # fmt: skip
        print(
            f"export        {counted(count, 'weight' if form == 'weights' else 'prompt')} as {form}: {args.export}"
        )
    if args.push_to_hub:
        from cropi.data.export import chosen_dataset
        from cropi.data.saved import push

        records = groups if groups is not None else ()
        rows = chosen_dataset(selection.ids, trajectories=records, dataset=args.dataset, id_key=args.id_key)
        place = push(rows, args.push_to_hub, private=args.private or None)
        print(f"pushed        {counted(len(rows), 'prompt')}: {place}")
