"""The current selection, as row numbers of a trainer's dataset, read again when its file has been replaced."""

from __future__ import annotations

import os
from pathlib import Path

from cropi.data.prompt_ids import PromptIds
from cropi.errors import CropiError
from cropi.files import meant, reading
from cropi.ranking.selection_files import read_selection


class Selected:
    """The selection in a file, for a dataset whose rows have the given ids.

    Args:
        path: ``selected.jsonl`` of ``cropi select``, or one prompt id a line.
        rows: the ids of the dataset's rows.
        least: how many prompts a training batch takes; a selection of fewer is refused.
        trainer: what messages say of the trainer: which prompts it leaves out, and which option sets the batch.
    """

    def __init__(
        self, path: str | os.PathLike[str], rows: PromptIds, least: int = 1, *, trainer: tuple[str, str]
    ) -> None:
        self.path, self.least = Path(path), least
        self._leaves_out, self._batch = trainer
        self.rows = rows
        self._seen: tuple[int, ...] = ()
        self.ids: list[str] = []
        self.refresh()

    @property
    def places(self) -> list[int]:
        """Row numbers, best prompt first."""
        return self.rows.places(self.ids)

    def refresh(self) -> bool:
        """Read the file again if it is another one than before; returns whether it was.

        Raises:
            CropiError: the file does not exist, is not a selection, is too small, or names prompts that no row has.
        """
        try:
            with reading(self.path):
                state = os.stat(self.path)
        except FileNotFoundError:
            raise CropiError(
                f"selection: there is no file {self.path}; {meant(self.path)}make the first one with `cropi run` or "
                f"`cropi select --out {self.path}`"
            ) from None
        seen = (state.st_ino, state.st_size, state.st_mtime_ns)
        if seen == self._seen:
            return False
        ids = read_selection(self.path)
        missing = [name for name in ids if name not in self.rows]
        if missing:
            raise CropiError(
                f"selection: {len(missing)} of {len(ids)} prompts of {self.path} are not in the dataset, for example "
                f"{missing[0]!r} (its ids are like {self.rows.names[:1]}); "
                f"select from trajectories of the dataset that is trained on, and mind that {self._leaves_out}"
            )
        if len(ids) < self.least:
            raise CropiError(
                f"selection: {self.path} names {len(ids)} prompts, fewer than one training batch of {self.least}, "
                f"which would be dropped; select a larger fraction, or lower {self._batch}"
            )
        self._seen, self.ids = seen, ids
        return True
