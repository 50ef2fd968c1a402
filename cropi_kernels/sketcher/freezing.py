"""Parameters that sketchers keep frozen: the last sketcher to leave a model makes them trainable again."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

_holders = WeakIdKeyDictionary()  # how many sketchers keep a parameter frozen


def freeze(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Freeze what is trainable, or would be without other sketchers; gives these parameters, for `thaw`."""
    held = [p for p in parameters if p.requires_grad or p in _holders]
    for p in held:
        _holders[p] = _holders.get(p, 0) + 1
        p.requires_grad_(False)
    return held


def thaw(held: Iterable[nn.Parameter]) -> None:
    """Make parameters trainable that no other sketcher keeps frozen."""
    for p in held:
        others = _holders.pop(p, 1) - 1
        if others:
            _holders[p] = others
        else:
            p.requires_grad_(True)
