"""The store: a folder of safetensors shards with a manifest, resumable at any instant."""

from cropi.store.export import export
from cropi.store.merge import merge
from cropi.store.store import SketchStore

__all__ = ["SketchStore", "export", "merge"]
