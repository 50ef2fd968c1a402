"""Which checkpoint to go on from: one that was written to its end."""

from __future__ import annotations

import json
import re
from pathlib import Path

from cropi.errors import warn
from cropi.files import entries, is_file, reading


def newest_whole(folder: str | Path, last: str) -> Path | None:
    """The newest ``checkpoint-<step>`` below ``folder`` that is complete, or None.

    The trainer writes a checkpoint file by file into its place; a kill in between leaves a folder that looks like the
    newest checkpoint and cannot be loaded. A warning names those that are passed over.

    Args:
        folder: the trainer's ``output_dir``.
        last: the JSON file that is written last; where it is whole, everything before it is there.

    Raises:
        CropiError: the folder, or a file that is there, cannot be read.
    """
    steps = {
        int(match[1]): path
        for path in entries(folder, "checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    passed: list[Path] = []
    for step in sorted(steps, reverse=True):
        if _readable(steps[step] / last):
            if passed:
                warn(
                    f"{passed[0]} was not written to its end ({last} is missing or damaged): going on from "
                    f"{steps[step].name}",
                )
            return steps[step]
        passed.append(steps[step])
    return None


def _readable(path: Path) -> bool:
    if not is_file(path):
        return False
    with reading(path, missing=True):
        text = path.read_bytes()
    try:
        json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return False
    return True
