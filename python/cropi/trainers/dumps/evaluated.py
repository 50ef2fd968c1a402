"""At which steps a run of transformers' Trainer was evaluated, as its ``trainer_state.json`` says.

TRL and ms-swift write the completions of an evaluation into the file of its step, and mark none of them.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from cropi.data.records import parse_json
from cropi.errors import warn
from cropi.files import entries, is_file, size_of, text_of
from cropi.trainers.dumps.fields import Left

STATE = "trainer_state.json"
LARGEST = 2**26  # bytes; a step takes some hundred


class EvaluatedStep(UserWarning):
    """A file of completions is of a step at which an evaluation wrote its own into it."""


def warn_evaluated(path: Path, steps: Collection[int], left: Left) -> None:
    """Say, once for all files of a run that ``left`` is of, that completions are of steps with an evaluation.

    Args:
        path: the completions; the run's state is beside them, above them, or in its newest checkpoint there.
        steps: theirs.
    """
    try:
        state = _state(path.absolute())
        if state is None:
            return
        if state not in left.evaluated:
            left.evaluated[state] = set()
            left.evaluated[state] = _evaluated(state)
    # A file that is not asked for, and cannot be read, says nothing.
    except (OSError, ValueError):
        return
    found = left.evaluated[state]
    if found.isdisjoint(steps):
        return
    left.evaluated[state] = set()
    shown = ", ".join(map(str, sorted(found)[:20])) + (", ..." if len(found) > 20 else "")
    warn(
        f"{path}: the run was evaluated at the steps {shown} ({state}), and an evaluation writes its completions into "
        "the file of its step, where they look like the training's: leave the completions of these steps out, or "
        "evaluate in a run of its own",
        EvaluatedStep,
    )


def _state(path: Path) -> Path | None:
    for folder in (path.parent, path.parent.parent):
        numbered = {
            int(number): one
            for one in entries(folder, "checkpoint-*")
            if (number := one.name.partition("-")[2]).isdecimal() and number.isascii() and len(number) < 19
        }
        for held in (folder, *(numbered[number] for number in sorted(numbered, reverse=True))):
            if is_file(held / STATE):
                return held / STATE
    return None


def _evaluated(state: Path) -> set[int]:
    """The steps whose entry in the log holds figures of an evaluation."""
    log = (
        parse_json(text_of(state).encode(), str(state)).get("log_history")
        if size_of(state) < LARGEST
        else None
    )
    rows = [row for row in log if isinstance(row, dict)] if isinstance(log, list) else []
    return {
        row["step"]
        for row in rows
        if isinstance(row.get("step"), int) and any(key.startswith("eval_") for key in row)
    }
