"""The store: a folder of safetensors shards with a manifest, resumable at any instant."""

from cropi.store.store import SketchStore

__all__ = ["SketchStore"]
