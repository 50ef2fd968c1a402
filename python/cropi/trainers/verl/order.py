"""The order in which the selected prompts are trained on: a sampler that survives checkpoints and new selections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from cropi.trainers.verl.selected import Selected


class SelectionOrder:
    """Row numbers of the selected prompts, epoch by epoch: all of them, in an order drawn anew or best first.

    The order is a function of the selection, the seed and the epoch alone. After :meth:`refresh` has found a new
    selection, the epoch that is under way starts again with the new prompts.

    Args:
        selected: the selection.
        shuffle: draw the order; otherwise the best prompt comes first.
        seed: of the draws.
    """

    def __init__(self, selected: Selected, *, shuffle: bool, seed: int) -> None:
        self.selected, self.shuffle, self.seed = selected, shuffle, seed
        self.epoch = self.yielded = 0
        self._order: list[int] = []
        self._loaded = False

    def __len__(self) -> int:
        return len(self.selected.ids)

    def __iter__(self) -> Iterator[int]:
        if not self._loaded:
            self._begin()
        self._loaded = False
        while self.yielded < len(self._order):
            self.yielded += 1
            yield self._order[self.yielded - 1]
        self.epoch += 1

    def _begin(self) -> None:
        places = self.selected.places
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            places = [
                places[i] for i in torch.randperm(len(places), generator=generator, device="cpu").tolist()
            ]
        self.yielded, self._order = 0, places

    def refresh(self) -> bool:
        """Look whether the selection has been replaced, and go on with the new one; returns whether it was."""
        changed = self.selected.refresh()
        if changed:
            self._begin()
        return changed

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"epoch": self.epoch, "yielded": self.yielded, "order": list(self._order)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was made; where the selection has changed since, with the new one."""
        self.epoch, self.yielded, self._order = state["epoch"], state["yielded"], list(state["order"])
        if sorted(self._order) != sorted(self.selected.places):
            self._begin()
        self._loaded = True
