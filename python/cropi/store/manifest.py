"""The manifest of a sketch store: what its rows are sketches of. :mod:`cropi.store.differences` compares two."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cropi.checked import fits
from cropi.errors import CropiError
from cropi.files import check_name, entries, is_file
from cropi.form import wrong_form
from cropi.sealed import digest, read_sealed, sealed

FORMAT = 1
MANIFEST = "manifest.json"
GROUPS = "groups"  # a list of {"name", "patterns"}: the groups of parameters whose sketches make up a row, in order
NOISE = "noise"  # true: rows are draws of gradients' noise (cropi.gradient.noise)
# What two runs of one job may differ in: notes, the number of prompts that the store is to hold (--limit), and which
# share of the job's prompts these are (--shard).
NOTES = ("notes", "prompts", "share")
SCALED = "preconditioner"  # which moments the gradients were divided by
MERGED = "merged"  # the trajectories of the stores that were merged to this one
FOLDER = "folder"  # of the notes: where relative paths of the trajectories start
_SHARES = 1_000_000  # of a job, at most
# What is read of a manifest by name; a field that may be missing is one that earlier releases did not write.
_FORM = {
    "spec": {"dim": lambda dim: fits(dim, int) and 0 < dim < 2**31},
    "dtype?": str | None, "stage?": str | None, "prompts?": int | None,
    "model?": (str | None, {"weights?": str | None}),
    "notes?": (None, {"trajectories?": list[str] | None, f"{FOLDER}?": str | None}),
    "tokens?": (None, dict),
    "share?": lambda share: not share or _is_share(share),
    f"{GROUPS}?": (None, [{"name": str, "patterns": [str]}]),
}  # fmt: skip


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        CropiError: there is no store, its manifest is damaged, or a newer release wrote it.
    """
    file = path / MANIFEST
    if os.path.isfile(path):
        raise CropiError(f"{path} is a file; give the folder that `cropi sketch --out` wrote")
    if not os.path.isfile(file):
        check_name(path)
        if inside := [str(made) for made in entries(path / "sketches") if is_file(made / MANIFEST)]:
            raise CropiError(
                f"{path} is the folder of a run, and not a sketch store; give one that it holds: {', '.join(inside)}"
            )
        raise CropiError(
            f"{path}: there is no sketch store (no {MANIFEST}); make one with `cropi sketch --out {path}`"
        )
    remedy = "what the rows are sketches of is not known; put the file back, or make the store again"
    return read_sealed(file, _FORM, remedy, version=("store format", "format", FORMAT))


def _is_share(share: Any) -> bool:
    right = not wrong_form(share, {"number": int, "count": int, "prompts": int})
    return right and 1 <= share["number"] <= share["count"] <= _SHARES


def new_manifest(values: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a new store, as JSON gives it back: tuples have become lists."""
    made: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **values}))
    return made


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """What stands in the file: the manifest and the SHA-256 of everything else in it."""
    return json.dumps(sealed(manifest), indent=2, ensure_ascii=False) + "\n"


def job_fingerprint(manifest: Mapping[str, Any]) -> str:
    """What a shard carries to say which store it belongs to: the SHA-256 of all that two runs of a job share."""
    return digest({key: value for key, value in manifest.items() if key not in NOTES})


def groups_in(manifest: Mapping[str, Any]) -> dict[str, list[str]] | None:
    """The patterns of each group of parameters whose sketches make up a row; None: a row is one sketch."""
    return {one["name"]: one["patterns"] for one in manifest.get(GROUPS) or ()} or None
