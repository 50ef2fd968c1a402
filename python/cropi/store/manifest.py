"""The manifest of a sketch store: what its rows are sketches of. :mod:`cropi.store.differences` compares two."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cropi.errors import CropiError, shown
from cropi.files import reading
from cropi.sealed import digest, sealed, unsealed

FORMAT = 1
MANIFEST = "manifest.json"
GROUPS = "groups"  # a list of {"name", "patterns"}: the groups of parameters whose sketches make up a row, in order
NOISE = "noise"  # true: rows are draws of gradients' noise (cropi.gradient.noise)
# What two runs of one job may differ in: notes, the number of prompts that the store is to hold (--limit), and which
# share of the job's prompts these are (--shard).
NOTES = ("notes", "prompts", "share")
SCALED = "preconditioner"  # which moments the gradients were divided by
MERGED = "merged"  # the trajectories of the stores that were merged to this one
# What is read of a manifest by name; a field that is missing here or there is an earlier release's.
_FORM: dict[str, type | tuple[type, ...]] = {
    "spec": dict, "spec.dim": int, "dtype": (str, type(None)), "stage": (str, type(None)), "notes": (dict, type(None)),
    "prompts": (int, type(None)), "model": (dict, str, type(None)), "share": (dict, type(None)),
    GROUPS: (list, type(None)),
}  # fmt: skip
_SHARES = 1_000_000  # of a job, at most


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        CropiError: there is no store, its manifest is damaged, or a newer release wrote it.
    """
    file = path / MANIFEST
    if path.is_file():
        raise CropiError(f"{path} is a file; give the folder that `cropi sketch --out` wrote")
    if not file.is_file():
        raise CropiError(
            f"{path}: there is no sketch store (no {MANIFEST}); make one with `cropi sketch --out {path}`"
        )
    try:
        with reading(file):
            manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CropiError(f"{file} is damaged ({error}); make the store again") from error
    if version != FORMAT:
        raise CropiError(f"{path} has the store format {shown(version)}; this release reads format {FORMAT}")
    remedy = "what the rows are sketches of is not known; put the file back, or make the store again"
    manifest = unsealed(manifest, file, remedy)
    if (wrong := _out_of_form(manifest)) is not None:
        raise CropiError(f"{file} is damaged: {wrong[0]} is {shown(wrong[1])}; {remedy}")
    return manifest


def _out_of_form(manifest: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The first field that is not of the form in which it is written, and its value."""
    for field, kinds in _FORM.items():
        value = get_field(manifest, field)
        if not isinstance(value, kinds) or isinstance(value, bool):
            return field, value
    dim = manifest["spec"]["dim"]
    if not 0 < dim < 2**31:
        return "spec.dim", dim
    for group in manifest.get(GROUPS) or ():
        own = group.get("patterns") if isinstance(group, dict) else None
        if not isinstance(own, list) or not isinstance(group.get("name"), str):
            return GROUPS, group
    share = manifest.get("share")
    if share and not all(type(share.get(key)) is int for key in ("number", "count", "prompts")):
        return "share", share
    if share and not 1 <= share["number"] <= share["count"] <= _SHARES:
        return "share", share
    return None


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


def get_field(manifest: Mapping[str, Any], field: str, missing: Any = None) -> Any:
    """A field by its dotted name."""
    value: Any = manifest
    for key in field.split("."):
        value = value.get(key, missing) if isinstance(value, Mapping) else missing
    return value
