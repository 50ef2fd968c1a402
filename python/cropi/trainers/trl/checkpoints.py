"""Which checkpoint to go on from: one that was written to its end."""

from __future__ import annotations

import json
import re
from pathlib import Path


def newest_whole(folder: str | Path, last: str) -> Path | None:
    """The newest ``checkpoint-<step>`` below ``folder`` that is complete, or None.

    The trainer writes a checkpoint file by file into its place; a kill in between leaves a folder that looks like the
    newest checkpoint and cannot be loaded.

    Args:
        folder: the trainer's ``output_dir``.
        last: the JSON file that is written last; where it can be read, everything before it is there.
    """
    steps = {
        int(match[1]): path
        for path in Path(folder).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and _readable(path / last)
    }
    return steps[max(steps)] if steps else None


def _readable(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return True
