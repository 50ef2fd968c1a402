"""Gluon's copies to and from shared memory, which Triton 3.9 has named anew."""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma


def _named(module: Any, now: str, before: str) -> Any:
    return getattr(module, now, None) or getattr(module, before)


load_by_threads = _named(async_copy, "async_load", "async_copy_global_to_shared")  # cp.async
# By the copy engine.
load_tile = _named(tma, "async_load", "async_copy_global_to_shared")
store_tile = _named(tma, "async_store", "async_copy_shared_to_global")
