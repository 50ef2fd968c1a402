"""The keys and values of a batch that is decoded: room is made in larger steps, not by a copy at every token."""

from __future__ import annotations

import functools
from typing import Any

import torch

from cropi.errors import optional

ROOM = 32  # columns that are added at a time, at least
SHARE = 4  # a quarter of those in use is added


def make_cache(model: Any) -> Any:
    """An empty cache for a model, as ``transformers`` has it; layers that keep all tokens are :func:`roomy_layer`'s."""
    utils = optional("transformers.cache_utils")
    cache, kind = utils.DynamicCache(config=model.config), roomy_layer()
    cache.layers = [kind() if type(layer) is utils.DynamicLayer else layer for layer in cache.layers]
    if not cache.layers:
        cache.layer_class_to_replicate = kind
    return cache


def keeps_all(cache: Any) -> bool:
    """Whether every layer keeps every token, so that a token's distance may be another one than that of its column."""
    return all(type(layer) is roomy_layer() for layer in cache.layers)


def bytes_of(cache: Any) -> int:
    """Bytes of the keys, values and states in use."""
    total = 0
    for layer in cache.layers:
        for name, part in vars(layer).items():
            for tensor in part if isinstance(part, list) and name != "_held" else [part]:
                if isinstance(tensor, torch.Tensor):
                    total += tensor.numel() * tensor.element_size()
    return total


@functools.cache
def roomy_layer() -> Any:
    """A layer of a ``DynamicCache`` whose ``keys`` and ``values`` are the columns in use of larger tensors."""
    base: Any = optional("transformers.cache_utils").DynamicLayer

    class RoomyLayer(base):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self._held: list[torch.Tensor] = []

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            new, used = (key_states, value_states), self.get_seq_length()
            end, rows = used + key_states.shape[-2], key_states.shape[0]
            if not self._held:
                self._held = [part.new_empty(rows, part.shape[1], _wide(end), part.shape[3]) for part in new]
            elif end > self._held[0].shape[2]:
                self._grow(rows, used, rows, _wide(end))
            for held, part in zip(self._held, new):
                held[:rows, :, used:end] = part
            return self._use(rows, end)

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            """Row ``indices[i]`` in the place of row i: only rows that change are copied."""
            if not self._held:
                return
            used, before, rows = self.get_seq_length(), self.keys.shape[0], len(indices)
            if rows > self._held[0].shape[0]:
                self._grow(
                    before, used, max(rows, min(2 * before, rows + rows // SHARE)), self._held[0].shape[2]
                )
            place = torch.arange(rows, device=indices.device)
            moved = (indices != place).nonzero()[:, 0]
            if len(moved):
                source = indices[moved]
                for held in self._held:  # twice as fast as by an index in brackets
                    part = held[:, :, :used]
                    part.index_copy_(0, moved, part.index_select(0, source))
            self._use(rows, used)

        reorder_cache = batch_select_indices

        def _grow(self, rows: int, used: int, more_rows: int, columns: int) -> None:
            for i, part in enumerate(self._held):
                self._held[i] = part.new_empty(more_rows, part.shape[1], columns, part.shape[3])
                self._held[i][:rows, :, :used] = part[:rows, :, :used]

        def _use(self, rows: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
            self.keys, self.values = (held[:rows, :, :end] for held in self._held)
            return self.keys, self.values

    return RoomyLayer


def _wide(columns: int) -> int:
    return columns + max(ROOM, columns // SHARE)
