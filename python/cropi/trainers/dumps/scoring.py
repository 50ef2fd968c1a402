"""Rewards for responses that a dump holds without any: by a reward function, as ``cropi rollout`` calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cropi.errors import RecordError
from cropi.rollouts.prompts import Prompt
from cropi.rollouts.rewards import Reward
from cropi.trainers.dumps.fields import BadSample


class Scorer:
    """A reward function (``FILE.py:function``, TRL's signature too, or a built-in verifier)."""

    def __init__(self, name: str) -> None:
        self.reward = Reward(name)

    def __call__(
        self, where: str, prompt: Any, response: str, ids: list[int] | None, row: Mapping[str, Any]
    ) -> float:
        """The reward of one response; ``row`` holds what the function may ask for, such as ``answer``.

        Raises:
            BadSample: the row lacks what the function needs, or the function raises or returns no finite number.
        """
        asked = Prompt(str(row.get("id", "")), {**row, "prompt": prompt}, [], where)
        try:
            self.reward.check(asked, closely=False)
            return self.reward(asked, [response], [ids or []])[0]
        except RecordError as error:
            raise BadSample(where, "reward", error.problem) from error
