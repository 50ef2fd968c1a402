"""What a verifiable task family is: distinct questions in a fixed order, and a verifier.

The answer is first extracted from the response by a strict, simple rule. Then reasoning-gym's families are judged by
reasoning-gym's own ``score_answer``, the others by equality.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

LIMIT = 400  # questions drawn per family, before repetitions are dropped


def last_number(response: str) -> str:
    """The last number: ``2 + 3 = 5`` and ``The answer is 5.`` both say 5."""
    return (re.findall(r"-?\d+(?:\.\d+)?", response.replace(",", "")) or [""])[-1]


def last_word(response: str) -> str:
    """The last word, in lower case: ``The longer word is "stone".`` says stone."""
    return (re.findall(r"[a-z]+", response.lower()) or [""])[-1]


def only_choice(*choices: str) -> Callable[[str], str]:
    """The one of the choices that the response names; a response that names two of them has no answer."""

    def extract(response: str) -> str:
        named = [c for c in choices if re.search(rf"\b{c}\b", response, re.IGNORECASE)]
        return named[0] if len(named) == 1 else ""

    return extract


@dataclass(frozen=True)
class Family:
    """One kind of task: where its questions come from, a solved example, and how an answer is read."""

    name: str
    # A generator, or reasoning-gym's settings.
    source: Callable[[random.Random], tuple[str, str]] | dict[str, int]
    extract: Callable[[str], str]
    example: tuple[str, str]

    def questions(self, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Distinct questions in a fixed order, each with its entry (``entry["answer"]`` is the right answer)."""
        seen = {self.example[0]}
        for question, entry in self._draw(seed):
            if question not in seen:
                seen.add(question)
                yield question, entry

    def _draw(self, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(self.source, dict):
            for entry in _gym(self, LIMIT, seed):
                yield entry["question"].strip(), entry
        else:
            rng = random.Random(f"{self.name}/{seed}")
            for _ in range(LIMIT):
                question, answer = self.source(rng)
                yield question, {"answer": answer}

    def reward(self, response: str, entry: dict[str, Any]) -> float:
        """1.0 if the response says the answer, else 0.0."""
        said = self.extract(response)
        if isinstance(self.source, dict):
            return float(said != "" and _gym(self, 1, 0).score_answer(said, entry) >= 1.0)
        return float(said.lower() == entry["answer"].lower())


@functools.cache
def _gym_dataset(name: str, size: int, seed: int, settings: tuple[tuple[str, int], ...]) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=size, seed=seed, **dict(settings))


def _gym(family: Family, size: int, seed: int) -> Any:
    assert isinstance(family.source, dict)
    return _gym_dataset(family.name, size, seed, tuple(family.source.items()))
