"""Whose line a warning names."""

from __future__ import annotations

import sys

# A trainer's callbacks and its model's forward are called by the trainer's own code, by PEFT's, or by that of a model,
# which transformers imports as transformers_modules.
_NOT_THE_USERS = (
    "cropi_kernels", "cropi", "contextlib", "torch", "accelerate", "transformers", "transformers_modules", "peft",
    "trl",
)  # fmt: skip


def level_of_caller() -> int:
    """``stacklevel``, for the function that asks, of the first frame outside of these packages, torch and trainers."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    return level
