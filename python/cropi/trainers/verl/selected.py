"""The selection of verl's dataset: see :mod:`cropi.trainers.selected`."""

from __future__ import annotations

import os

from cropi.data.prompt_ids import PromptIds
from cropi.trainers import selected

ID_KEY = "extra_info.index"
WORDS = ("verl leaves out prompts longer than data.max_prompt_length", "data.train_batch_size")


class Selected(selected.Selected):
    """As :class:`cropi.trainers.selected.Selected`, with verl's words in its messages."""

    def __init__(self, path: str | os.PathLike[str], rows: PromptIds, least: int = 1) -> None:
        super().__init__(path, rows, least, trainer=WORDS)
