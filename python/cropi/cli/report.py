"""``cropi report``: one page that shows what was chosen, why, and whether to believe it."""

from __future__ import annotations

import argparse
from typing import Any

from cropi.cli.manners import tell

EXAMPLE = "cropi report out"


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    command.add_argument(
        "folder",
        help="what `cropi run --out` or `cropi curriculum` wrote, or the folder of one stage",
    )
    command.add_argument("--out", metavar="FILE.html", help="the page (default: report.html in the folder)")
    command.add_argument(
        "--check",
        metavar="FILE.json",
        help="figures of `cropi check --out` (default: check.json in the folder, if it is there)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page, and say where it is."""
    from cropi.files import check_outputs
    from cropi.report.folder import report_folder

    check_outputs({"--out": args.out}, {"--check": [args.check]}, {"--out": (".html",)})
    made = report_folder(args.folder, args.out, check=args.check, records=_records)
    print(f"report        {made}")
    tell(args, report=made)
    return 0


def _records(store: Any) -> Any:
    """The files that a store was made from, dumps of trainers among them; None where they are not there any more."""
    from cropi.report.folder import noted_files
    from cropi.trainers.dumps import auto

    files, columns = noted_files(store), (store.manifest.get("tokens") or {}).get("columns")
    return files and auto.opened(files, skip_bad=True, columns=columns)
