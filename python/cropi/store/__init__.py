"""The store: a folder of safetensors shards with a manifest, resumable at any instant.

Its names are imported when they are first used: rows and manifests alone need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cropi.store.exporting import export
    from cropi.store.merging import merge
    from cropi.store.store import SketchStore

__all__ = ["SketchStore", "export", "merge"]

# No module has the name of a function: its import would put the module in the function's place.
_PLACES = {
    "SketchStore": "cropi.store.store",
    "export": "cropi.store.exporting",
    "merge": "cropi.store.merging",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_PLACES[name]), name)
    return value
