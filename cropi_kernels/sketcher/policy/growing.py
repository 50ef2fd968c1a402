"""Resets what a model keeps of its longest batch so far: with it, a row's results would depend on earlier calls."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

_GROWING: weakref.WeakKeyDictionary[nn.Module, list[tuple[weakref.ref[nn.Module], str]]] = (
    weakref.WeakKeyDictionary()
)
_CACHED = "max_seq_len_cached"


def forget_longest(decoder: nn.Module) -> None:
    """Put the original frequencies of the positions back.

    The dynamic NTK of transformers keeps the frequencies of the longest batch for every later batch that is longer than
    the original context, until a shorter one comes. Before 5.13 it keeps them for shorter ones too, and its length
    under a name that begins with ``None_``.
    """
    if decoder not in _GROWING:
        _GROWING[decoder] = [
            (weakref.ref(module), name.removesuffix(_CACHED))
            for module in decoder.modules()
            if hasattr(module, "original_max_seq_len")
            for name in list(vars(module))
            if name.endswith(_CACHED) and not name.startswith("None_")
        ]
    for reference, prefix in _GROWING[decoder]:
        module: Any = reference()
        original = getattr(module, f"{prefix}original_inv_freq", None)
        longest = max(getattr(module, prefix + _CACHED), vars(module).pop(f"None_{_CACHED}", 0))
        if original is not None and longest > module.original_max_seq_len:
            current = module._buffers.get(f"{prefix}inv_freq")
            moved = original if current is None else original.to(current.device)
            module._buffers[f"{prefix}inv_freq"] = moved
            setattr(module, prefix + _CACHED, module.original_max_seq_len)
