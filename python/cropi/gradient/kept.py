"""Texts that have been tokenised, kept in a temporary file from the pass that checks them to the one that computes."""

from __future__ import annotations

from array import array
from typing import Any

from cropi.data.records import PromptGroup
from cropi.data.spilled import Spilled
from cropi.gradient.tokenize import TokenGroup, Tokenize


def _nothing() -> None:
    return None


class KeptTokens:
    """Tokens of prompt groups by their ids: four bytes a token on disk, some 100 bytes a prompt in memory.

    Args:
        tokens: the rules that they are made by; others find nothing here.
    """

    def __init__(self, tokens: Tokenize) -> None:
        self.tokens = tokens
        self._kept = Spilled()
        self._places: dict[str, int] = {}

    def __reduce__(self) -> Any:
        return _nothing, ()  # the file is not shared with other processes

    def put(self, made: TokenGroup) -> None:
        """Keep the tokens of a group."""
        masks = None if made.masks is None else [bytes(mask) for mask in made.masks]
        held = (
            array("i", made.prompt), [array("i", ids) for ids in made.responses], made.logprobs, made.temperature, masks
        )  # fmt: skip
        self._places[made.id] = self._kept.put(held)

    def get(self, group: PromptGroup, tokens: Tokenize) -> TokenGroup | None:
        """The tokens of a group by these rules, or None where they are not kept."""
        place = self._places.get(group.id)
        if place is None or tokens != self.tokens:
            return None
        prompt, responses, logprobs, temperature, masks = self._kept.get(place)
        return TokenGroup(
            group, prompt.tolist(), [ids.tolist() for ids in responses], logprobs, temperature,
            None if masks is None else [list(mask) for mask in masks],
        )  # fmt: skip
