"""The stores of the processes that share a job, and how their rows become those of the job's store.

While a job runs, every process writes to a store of its own in ``OUT/part-00000``, ``OUT/part-00001``, ... At its end,
or when it goes on after it was ended, the rows are moved to ``OUT``, which then is a store like any other. A process
that is killed while it moves them loses nothing: a part is removed only after all of its rows are in ``OUT``, and rows
that are there already are not taken again.
"""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path

from cropi.errors import CropiError
from cropi.files import entries, is_folder, is_there, writing
from cropi.locks import LOCK
from cropi.store.loading import remove
from cropi.store.manifest import MANIFEST
from cropi.store.merging import copy_rows
from cropi.store.shards import shard_number
from cropi.store.store import SketchStore

PART = "part-"


def part_path(out: Path, number: int) -> Path:
    """The folder of one process's store."""
    return out / f"{PART}{number:05d}"


def next_part(out: Path, number: int) -> int:
    """A number from ``number`` on that no part has."""
    taken = {path.name for path in part_paths(out)}
    return next(n for n in range(number, number + len(taken) + 1) if part_path(out, n).name not in taken)


def part_paths(out: Path) -> list[Path]:
    """The parts that are there, in order."""
    return [path for path in entries(out, f"{PART}*") if is_folder(path)]


def take_parts(store: SketchStore) -> int:
    """Move all rows of the parts of a store into it; gives the number of rows that it did not have.

    Args:
        store: open for writing.

    Raises:
        CropiError: a process still writes to a part, a part was made with other settings, or it is damaged.
    """
    before = len(store)
    for path in part_paths(store.folder):
        if is_there(path / MANIFEST):  # else its process was killed before it wrote anything
            with SketchStore.create(path, store.manifest) as part:  # removes what was not finished
                copy_rows(store, part.files())
                with writing(path):
                    _remove_shards(path)
        with writing(path):
            _remove(path)
    return len(store) - before


def _remove_shards(path: Path) -> None:
    """The last one first: a part that is left half removed can be read."""
    for shard in sorted(entries(path, "shard-*.safetensors"), key=shard_number, reverse=True):
        remove(shard)


def _remove(path: Path) -> None:
    for name in (MANIFEST, LOCK):
        (path / name).unlink(missing_ok=True)
    for left in entries(path, ".*.tmp"):
        left.unlink()
    with contextlib.suppress(FileNotFoundError):
        try:
            path.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            held = ", ".join(held.name for held in entries(path)[:3])
            raise CropiError(
                f"the folder {path} holds what no process of a job wrote ({held}); take it out, and run the same "
                "command again"
            ) from error
