"""The reward of the example prompts, as TRL calls it: for `trl_grpo.py` and `curriculum_trl.yaml`."""

from __future__ import annotations

from typing import Any

from rollout_families import FAMILIES

EXTRACT = {family.name: family.extract for family in FAMILIES}


def is_right(completions: list[Any], answer: list[str], task: list[str], **columns: Any) -> list[float]:
    """1 if the response says the answer, read by its family's rule."""
    said = [EXTRACT[name](message[-1]["content"]) for message, name in zip(completions, task)]
    return [float(a.lower() == b.lower()) for a, b in zip(said, answer)]
