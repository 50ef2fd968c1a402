"""Which checkpoint to go on from: one that was written to its end."""

from __future__ import annotations

import json
import re
from pathlib import Path

from cropi.files import entries, is_file, reading


def newest_whole(folder: str | Path, last: str) -> Path | None:
    """The newest ``checkpoint-<step>`` below ``folder`` that is complete, or None.

    The trainer writes a checkpoint file by file into its place; a kill in between leaves a folder that looks like the
    newest checkpoint and cannot be loaded.

    Args:
        folder: the trainer's ``output_dir``.
        last: the JSON file that is written last; where it is whole, everything before it is there.

    Raises:
        CropiError: the folder, or a file that is there, cannot be read.
    """
    steps = {
        int(match[1]): path
        for path in entries(folder, "checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and _readable(path / last)
    }
    return steps[max(steps)] if steps else None


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
