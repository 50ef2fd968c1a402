"""What is written of the stages of a run: their state in every checkpoint, and a note of each beside its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cropi.atomic import write_atomic
from cropi.errors import CropiError, shown
from cropi.files import entries, is_file, is_there, writing
from cropi.sealed import read_sealed, sealed
from cropi.store.differences import first_difference
from cropi.trainers.trl.rollout_log import cut_unfinished_line

STATE, NOTES = "cropi_state.json", "stages.jsonl"
_FORM = {
    "stage": int, "selected": list[str] | None, "logs": {str: int}, "settings": dict, "seconds?": float | None,
}  # fmt: skip


def write_state(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Keep the stages' state in a checkpoint."""
    write_atomic(checkpoint / STATE, json.dumps(sealed(state), ensure_ascii=False) + "\n")


def read_state(file: Path) -> dict[str, Any]:
    """What a checkpoint keeps of the stages.

    Raises:
        CropiError: it is damaged, or of a newer release.
    """
    remedy = "go on from another checkpoint"
    return read_sealed(file, _FORM, remedy, version=("version", "version", 1))


def state_to_go_on(checkpoint: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The state in a checkpoint, for a run with these settings.

    Raises:
        CropiError: it was saved without a curriculum or with other settings.
    """
    if not is_file(checkpoint / STATE):
        raise CropiError(
            f"{checkpoint} holds no {STATE}: it was saved without a curriculum; load its weights as the model and "
            "start a new run"
        )
    state = read_state(checkpoint / STATE)
    differs = first_difference(state["settings"], json.loads(json.dumps(settings)))
    if differs:
        raise CropiError(
            f"{checkpoint} was saved with {differs.field} = {shown(differs.left)}, but this run has "
            f"{shown(differs.right)}: prompts would come in another order; use the same settings, or load the "
            "checkpoint's weights as the model of a new run"
        )
    return state


def saved_stages(folder: str | Path) -> set[int]:
    """The stages to which the checkpoints in a folder lead back."""
    files = [path / STATE for path in entries(folder, "checkpoint-*")]
    return {int(read_state(file)["stage"]) for file in files if is_there(file)}


def add_note(folder: Path, note: Mapping[str, Any]) -> None:
    """Add what happened in a stage to the notes."""
    with writing(folder / NOTES):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / NOTES, "a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")


def forget_notes(folder: Path, last: int) -> None:
    """Remove the notes of stages after the ``last`` one."""
    notes = folder / NOTES
    if is_there(notes):
        cut_unfinished_line(notes)
        lines = notes.read_text(encoding="utf-8").splitlines(keepends=True)
        write_atomic(notes, "".join(line for line in lines if _stage_of(line, notes) <= last))


def _stage_of(line: str, notes: Path) -> int:
    try:
        return int(json.loads(line)["stage"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CropiError(f"{notes}: a line is not a note of a stage ({error}); remove it") from error
