"""Prompts whose gradients are not finite: how long the selector leaves them out.

After f failures with no finite visit between them, the last one at step t, a prompt rests: it is not drawn before step
t + 2^f, unless fewer others are left than are asked for. A prompt that always fails is so drawn at most log2(T) + 1
times in T steps; one finite visit ends its rest. Failures that follow each other in steps of which nothing was finite
count as one: under loss scaling a run begins with such steps, and they say nothing of a prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

MOST = 40  # doublings


class Failing:
    """The failures in a row of each prompt that has any, and the step of the last one."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[int, int]] = {}

    def note(self, places: npt.NDArray[np.int64], step: int, finite: int) -> None:
        """The prompts in ``places`` have failed at a step; ``finite`` is the last step of which anything was finite."""
        for place in places.tolist():
            count, last = self._held.get(place, (0, -1))
            self._held[place] = max(1, count + (last <= finite)), step

    def end(self, places: npt.NDArray[np.int64]) -> None:
        """The prompts in ``places`` had finite visits."""
        for place in places.tolist() if self._held else ():
            self._held.pop(place, None)

    def resting(self, step: int) -> list[int]:
        """The places of prompts that are left out at a step."""
        return [place for place, (count, last) in self._held.items() if step < last + (1 << min(count, MOST))]

    def state(self) -> list[list[int]]:
        """``[place, failures, step of the last]`` of each."""
        return [[place, *held] for place, held in sorted(self._held.items())]

    def load(self, state: Any, places: dict[int, int]) -> None:
        """Take what :meth:`state` gave; ``places`` are those of now, by those of then."""
        self._held = {places[place]: (count, last) for place, count, last in state}
