"""The current selection, as row numbers of verl's dataset, read again when its file has been replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cropi.errors import CropiError

ID_KEY = "extra_info.index"


def prompt_ids(rows: Any, id_key: str = ID_KEY, name: str = "the dataset") -> list[str]:
    """The stable id of every row.

    Args:
        rows: a ``datasets.Dataset``, or a sequence of dictionaries.
        id_key: where the id stands; dots lead into nested columns.
        name: of the dataset, for messages.

    Raises:
        CropiError: a row has none, or two rows have the same.
    """
    first, *rest = id_key.split(".")
    columns = getattr(rows, "column_names", None)
    if columns is not None and first not in columns:
        raise CropiError(_no_id(name, id_key, 0))
    values: Iterable[Any] = rows[first] if columns is not None else (row.get(first) for row in rows)
    ids: list[str] = []
    place: dict[str, int] = {}
    for number, value in enumerate(values):
        for key in rest:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            raise CropiError(_no_id(name, id_key, number))
        ids.append(str(value))
        if ids[-1] in place:
            raise CropiError(
                f"{name}: rows {place[ids[-1]]} and {number} have the same {id_key} {ids[-1]!r}; where several files "
                "are joined, number their prompts through, or name another column as the prompt id"
            )
        place[ids[-1]] = number
    return ids


def _no_id(name: str, id_key: str, row: int) -> str:
    return (
        f"{name}: row {row} has no {id_key}, so the prompts that were selected cannot be found again; add a stable id "
        "to every row (an integer or a string that no other row has)"
    )


class Selected:
    """The selection in a file, for a dataset whose rows have the given ids.

    Args:
        path: ``selected.jsonl`` of ``cropi select``, or one prompt id a line.
        ids: the id of every row of the dataset.
        least: how many prompts a training batch takes; a selection of fewer is refused.
    """

    def __init__(self, path: str | os.PathLike[str], ids: Sequence[str], least: int = 1) -> None:
        self.path, self.least = Path(path), least
        self.row_of = {name: row for row, name in enumerate(ids)}
        self._seen: tuple[int, ...] = ()
        self.ids: list[str] = []
        self.refresh()

    @property
    def places(self) -> list[int]:
        """Row numbers, best prompt first."""
        return [self.row_of[name] for name in self.ids]

    def refresh(self) -> bool:
        """Read the file again if it is another one than before; returns whether it was.

        Raises:
            CropiError: there is no file, it is not a selection, too small, or names prompts that no row has.
        """
        try:
            found = os.stat(self.path)
        except OSError:
            raise CropiError(
                f"selection: there is no file {self.path}; make the first one with `cropi run` or `cropi select --out "
                f"{self.path}`"
            ) from None
        seen = (found.st_ino, found.st_size, found.st_mtime_ns)
        if seen == self._seen:
            return False
        ids = read_ids(self.path)
        missing = [name for name in ids if name not in self.row_of]
        if missing:
            raise CropiError(
                f"selection: {len(missing)} of {len(ids)} prompts of {self.path} are not in the dataset, for example "
                f"{missing[0]!r} (its rows have ids like {next(iter(self.row_of), None)!r}); "
                "select from trajectories of the dataset that is trained on, and mind that verl leaves out prompts "
                "longer than data.max_prompt_length"
            )
        if len(ids) < self.least:
            raise CropiError(
                f"selection: {self.path} names {len(ids)} prompts, fewer than one training batch of {self.least}, "
                "which would be dropped; select a larger fraction, or lower data.train_batch_size"
            )
        self._seen, self.ids = seen, ids
        return True


def read_ids(path: Path) -> list[str]:
    """The prompt ids in a selection file, best first.

    Raises:
        CropiError: the file is empty, or a line is not an id.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise CropiError(f"selection: {path} is empty")
    if not lines[0].lstrip().startswith("{"):
        return [line.strip() for line in lines]
    try:
        return [str(json.loads(line)["id"]) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise CropiError(f"selection: {path} is not what `cropi select` writes ({error})") from error
