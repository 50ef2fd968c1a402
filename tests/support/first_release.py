"""A store as the first release wrote it: no checksum in the manifest, no job and no checksum in the shards' headers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save


def as_first_release(store: Path, *without: str, **changes: Any) -> None:
    """Rewrite a store's files so; ``without`` names keys of the manifest to drop, ``changes`` those to set."""
    file = store / "manifest.json"
    manifest = json.loads(file.read_text()) | changes
    for key in ("checksum", *without):
        manifest.pop(key, None)
    file.write_text(json.dumps(manifest, indent=2))
    for shard in store.glob("shard-*.safetensors"):
        with safe_open(shard, framework="pt") as opened:
            rows = opened.metadata()["rows"]
        data = save(load_file(shard), metadata={"rows": rows})
        shard.write_bytes(data)
        shard.with_name(shard.name + ".sha256").write_text(
            f"{hashlib.sha256(data).hexdigest()}  {shard.name}\n"
        )
