"""What a stage's training did: the reward before and after it, and whether anything could be learnt."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cropi.errors import warn
from cropi.form import wrong_form
from cropi.report.forms import TRAINED
from cropi.sealed import CHECKSUM, digest

TRAINING = "training.json"
# Above this share of prompts whose responses have equal rewards, a step has next to no gradient.
FLAT = 0.95


def read_training(folder: Path) -> dict[str, Any]:
    """``{"training": ...}`` of a trainer's folder, or nothing where the trainer left no :data:`TRAINING`, or, with a
    warning, another one than :func:`cropi.trainers.trl.in_process.training_summary` makes: the training is done all the
    same."""
    try:
        summary = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
        checksum = summary.pop(CHECKSUM, None) if isinstance(summary, dict) else None
        wrong = wrong_form(summary, TRAINED) or ("" if "reward" in summary else "it has no reward")
        if checksum is not None and checksum != digest(summary):  # other trainers write none
            wrong = "it is damaged: its checksum does not match"
    except FileNotFoundError:
        return {}
    except OSError as error:
        wrong = f"it cannot be read: {os.strerror(error.errno or 0).lower()}"
    except (ValueError, RecursionError) as error:
        wrong = f"it is no JSON ({error})"
    if wrong:
        warn(f"{folder / TRAINING} is left out of the report: {wrong}")
        return {}
    return {"training": summary}


def nothing_learnt(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences about stages in which nothing seems to have been learnt, from the rows of a report."""
    said = []
    for row, later in zip(table, [*table[1:], {}]):
        stage = f"Stage {row['stage']}"
        if row.get("weights") is not None and row.get("weights") == later.get("weights"):
            said.append(
                f"{stage}: the policy is the same before and after training, weight by weight; check that the trainer "
                "saves what it trained, and its learning rate."
            )
        training = row.get("training") or {}
        equal = [share for share in training.get("equal_rewards", ()) if share is not None]
        if equal and min(equal) > FLAT:
            said.append(
                f"{stage}: all responses had equal rewards for {min(equal):.0%} of the prompts or more, so there was "
                "next to nothing to learn from; check the reward function, the temperature and the prompts."
            )
        before, after = training.get("reward") or (None, None)
        first, last = training.get("steps") or (0, 1)
        if before is not None and after is not None and after <= before and first < last:
            said.append(f"{stage}: the reward did not rise: {before:.4g} before, {after:.4g} after.")
    return said
