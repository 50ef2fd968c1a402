"""Training in this process, by an adapter of :mod:`cropi.trainers`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from cropi.errors import CropiError

ADAPTER = "cropi.trainers.trl"


def train_stage(options: Mapping[str, Any], model: str, records: Path, steps: int, out: Path) -> Path:
    """Train one stage with TRL.

    The adapter provides ``train_stage(options, model, records, steps, out) -> Path`` with the same arguments:

    Args:
        options: the ``trl`` table of the config, checked by the adapter.
        model: folder or hub id of the current policy.
        records: the trajectory records of the selected prompts, best first, as JSON lines.
        steps: optimizer steps.
        out: a folder for checkpoints and the new policy. It may hold the checkpoints of an attempt that was cut
            short, which the adapter continues.

    Returns:
        The folder of the new policy in Hugging Face form.
    """
    try:
        adapter = import_module(ADAPTER)
    except ModuleNotFoundError as error:
        if error.name is None or not ADAPTER.startswith(error.name):
            raise
        raise CropiError(f"trainer: this release has no {ADAPTER}; give the trainer as a command") from error
    return Path(adapter.train_stage(options, model, records, steps, out))
