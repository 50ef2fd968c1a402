"""Which files of a folder are the dumps of a run."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cropi.data.hub import is_hub_name
from cropi.data.tables import is_saved
from cropi.errors import CropiError, printable, warn
from cropi.files import entries, is_file, is_folder
from cropi.sealed import SUMS

# What trainers write beside the rollouts that they train on: validation, figures, what was asked, what failed.
BESIDE = (
    "eval_*", "eval-*", "val_*", "val-*", "aggregated_results.jsonl", "meta.json", "*_metadata.jsonl",
    "*_materialized_inputs.jsonl", "*_failures.jsonl", "*_aggregate_metrics.json",
)  # fmt: skip
# Trainers write ``rollouts/{step}/{part}/file`` at the deepest.
DEPTH = 3
# What they call the folder of a step.
STEP = re.compile(r"^\d+$|(step|version|iter|iteration|epoch)[_-]?\d")
# What Spark, Databricks, Dask and pyarrow write beside the parts of a table.
MARK = re.compile(r"_SUCCESS|_metadata|_common_metadata|_(started|committed)_\d+")


def expanded(paths: Sequence[str | Path], say: Callable[[str], None] | None = None) -> list[str | Path]:
    """The paths, with the files of a folder in its place, steps in order of their numbers.

    A folder of folders alone (a step each) stands for the files in them. Files and folders in it that are called like
    :data:`BESIDE` are left out, unless there are no others; ``say`` (None: a warning) says so.
    """
    found: list[str | Path] = []
    for path in paths:
        if is_name(path) or not os.path.isdir(path) or is_saved(Path(path)):
            found.append(path)
            continue
        files = [file.relative_to(path) for file in files_of(path)]
        if not files:
            raise CropiError(
                f"{path} is a folder without files; give trajectories, or a folder of a trainer's dumps"
            )
        beside = [file for file in files if any(map(_is_beside, file.parts))]
        # What the TRL adapter records: logs of the ranks, and the newest of them, which counts where it was made.
        if logs := [file for file in files if fnmatch.fnmatch(str(file), "train-rank*.jsonl")]:
            count = [file for file in files if str(file) == "train.jsonl"] or logs
            beside = [file for file in files if file not in count]
        kept = [file for file in files if file not in beside] or files
        if len(kept) < len(files):
            shown = ", ".join(sorted(map(str, beside))[:3]) + (", ..." if len(beside) > 3 else "")
            (say or warn)(
                f"left out      {printable(f'{path}: {shown}')}, which by their names are of validation, or do not "
                "count"
            )
        found += [Path(path, file) for file in sorted(kept, key=_numbered)]
    return found


def files_of(folder: str | Path, depth: int = DEPTH) -> list[Path]:
    """The files of a folder but hidden ones, checksums, a README, and the marks of Spark and Dask (``_SUCCESS``,
    ``_metadata``); where there is none, those of the folders in it, down to ``depth``.

    Raises:
        CropiError: it holds folders that are not the steps of one run.
    """
    held = [path for path in entries(folder) if not path.name.startswith((".", "README."))]
    files = [path for path in held if is_file(path) and path.suffix != SUMS and not MARK.fullmatch(path.name)]
    if files or depth == 0:
        return files
    folders = [path for path in held if is_folder(path)]
    steps = [path for path in folders if not _is_beside(path.name)]
    if len(steps) > 1 and not all(STEP.search(path.name) for path in steps):
        names = ", ".join(printable(path.name) for path in steps[:6])
        raise CropiError(
            f"{folder} holds the folders {names:.200}, which are not the steps of one run; give one of them"
        )
    return [file for path in folders for file in files_of(path, depth - 1)]


def _is_beside(name: str) -> bool:
    return any(fnmatch.fnmatch(name, beside) for beside in BESIDE)


def _numbered(file: Path) -> list[Any]:
    """A sort key that puts ``2.jsonl`` before ``10.jsonl``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(file))]


def is_name(path: str | Path) -> bool:
    """Whether it is no path: standard input, or a data set of the hub."""
    return str(path) == "-" or (is_hub_name(path) and not os.path.exists(path))
