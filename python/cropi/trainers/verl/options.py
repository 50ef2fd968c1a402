"""The options of the trainer that selects inside a run of verl: checked without verl, before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cropi.commands import check_template
from cropi.errors import CropiError, did_you_mean
from cropi.files import check_room

KNOWN = ("selection", "stage_steps", "command", "record", "id_key")
# What the command may name in braces.
NAMES = ("checkpoint", "stage", "step", "selection", "rollouts")


def check_options(options: Any, trainer: Any) -> Any:
    """Check ``trainer.cropi`` when verl builds its data loaders, before anything is trained.

    Args:
        options: the table ``trainer.cropi``.
        trainer: the table ``trainer``, of which ``save_freq`` is read.

    Returns:
        The options.

    Raises:
        CropiError: an option is missing, unknown or of another type, the folder of the record cannot be written, the
            command does not replace the selection, or stages end without a checkpoint.
    """
    if not options.get("selection"):
        raise CropiError(
            "trainer_mode cropi_sync: +trainer.cropi.selection=FILE is missing, the selection to train on"
        )
    for key, value in options.items():
        if key not in KNOWN:
            raise CropiError(
                f"trainer.cropi.{key} is not known; {did_you_mean(key, KNOWN)}known are {', '.join(KNOWN)}"
            )
        kind = int if key == "stage_steps" else str
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise CropiError(
                f"trainer.cropi.{key} must be {'an integer' if kind is int else 'text'}, got {value!r}; hydra reads "
                f"+trainer.cropi.{key}={'200' if kind is int else chr(39) + 'VALUE' + chr(39)} so"
            )
    if options.get("record"):
        check_room(Path(options["record"]), 0, "rollouts")
    if options.get("command"):
        used = check_template("trainer.cropi.command", options["command"], NAMES)
        every, saved = options.get("stage_steps") or 0, trainer.save_freq
        if every < 1:
            raise CropiError(f"trainer.cropi.stage_steps must be at least 1 for the command, got {every}")
        if saved < 1 or every % saved:
            raise CropiError(
                f"trainer.cropi.stage_steps is {every} and trainer.save_freq {saved}: every stage has to end with a "
                f"checkpoint, which the command scores; set trainer.save_freq={every}"
            )
        if "selection" not in used:
            raise CropiError(
                f"trainer.cropi.command: {options['command']!r} does not name {{selection}}, the file that it is to "
                "replace, so that every stage would train on the first selection"
            )
        if "rollouts" in used and not options.get("record"):
            raise CropiError(
                "trainer.cropi.command names {rollouts}, so +trainer.cropi.record=FOLDER is needed too"
            )
    return options
