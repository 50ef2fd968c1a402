"""The manifest of a sketch store: what its rows are sketches of, and when two stores agree."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cropi.errors import CropiError, shown
from cropi.files import reading
from cropi.sealed import digest, sealed, unsealed

FORMAT = 1
MANIFEST = "manifest.json"
GROUPS = "groups"  # a list of {"name", "patterns"}: the groups of parameters whose sketches make up a row, in order
NOISE = "noise"  # true: rows are draws of gradients' noise (cropi.gradient.noise)
# What must agree for sketches to be comparable; the rest of the manifest may differ between two stores.
COMPARABLE = ("format", "spec", "hash_version", "stage", "model", "parameters", GROUPS, NOISE)
# What two stores may differ in, but seldom mean to: scores between them compare gradients of two kinds. Where the
# trajectories come from may well differ between training and validation, and so may behaviour, lengths and dtypes.
ALIKE = ("estimator", "temperature", "tokenizer", "tokens.eos", "tokens.chat_template")
# What two runs of one job may differ in: notes, the number of prompts that the store is to hold (--limit), and which
# share of the job's prompts these are (--shard).
NOTES = ("notes", "prompts", "share")
SCALED = "preconditioner"  # which moments the gradients were divided by
MERGED = "merged"  # the trajectories of the stores that were merged to this one
_UNKNOWN = object()
# What is read of a manifest by name; a field that is missing here or there is an earlier release's.
_FORM: dict[str, type | tuple[type, ...]] = {
    "spec": dict, "spec.dim": int, "dtype": (str, type(None)), "stage": (str, type(None)), "notes": (dict, type(None)),
    "prompts": (int, type(None)), "model": (dict, str, type(None)), "share": (dict, type(None)),
    GROUPS: (list, type(None)),
}  # fmt: skip
_SHARES = 1_000_000  # of a job, at most
_MOST = 300  # characters of a value in a message


class UnlikeStores(UserWarning):
    """Stores are compared that were made with different settings."""


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
        value = get_field(manifest, field, None)
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


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """What stands in the file: the manifest and the SHA-256 of everything else in it."""
    return json.dumps(sealed(manifest), indent=2, ensure_ascii=False) + "\n"


def job_fingerprint(manifest: Mapping[str, Any]) -> str:
    """What a shard carries to say which store it belongs to: the SHA-256 of all that two runs of a job share."""
    return digest({key: value for key, value in manifest.items() if key not in NOTES})


def groups_in(manifest: Mapping[str, Any]) -> dict[str, list[str]] | None:
    """The patterns of each group of parameters whose sketches make up a row; None: a row is one sketch."""
    return {one["name"]: one["patterns"] for one in manifest.get(GROUPS) or ()} or None


def check_comparable(
    a: Mapping[str, Any], b: Mapping[str, Any], names: tuple[str, str], leave: Sequence[str] = ()
) -> None:
    """Refuse to compare sketches of different maps, models, parameters or stages, from their manifests.

    Args:
        a, b: the manifests.
        names: of the stores.
        leave: fields that may differ.

    Raises:
        CropiError: naming the first differing field and both values.
    """
    fields = [key for key in COMPARABLE if key not in leave]
    left, right = ({key: manifest.get(key) for key in fields} for manifest in (a, b))
    differs = first_difference(left, right)
    if differs and differs[0] == "model.weights" and _is_xxh3(differs[1]) != _is_xxh3(differs[2]):
        earlier = names[0] if _is_xxh3(differs[2]) else names[1]
        raise CropiError(
            f"{names[0]} and {names[1]} cannot be compared: an earlier release made {earlier}, and named its model by "
            "another hash; run the command that made it once more (it checks the model, computes nothing again, and "
            "adds the new hash), or sketch both with this release"
        )
    if differs:
        raise CropiError(
            f"{names[0]} and {names[1]} cannot be compared: {differs[0]} = {_brief(differs[1])} in the first"
            f"{_model_of(a, differs[0])}, {_brief(differs[2])} in the second{_model_of(b, differs[0])}; "
            "sketch both with the same settings"
        )


def check_scaled(train: Mapping[str, Any], valid: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Check that an optimiser's moments scale the validation prompts' gradients alone, and all of them alike.

    Args:
        train: the manifest of the training prompts' store.
        valid: those of the validation stores.
        names: of the stores, the training one first.

    Raises:
        CropiError: names the store.
    """
    if train.get(SCALED):
        raise CropiError(
            f"{names[0]} holds gradients that are scaled by an optimiser's moments (--optimizer-state): that belongs "
            "to the validation side alone; sketch the training prompts without it"
        )
    for manifest, name in zip(valid[1:], names[2:]):
        differs = first_difference({SCALED: valid[0].get(SCALED)}, {SCALED: manifest.get(SCALED)})
        if differs:
            raise CropiError(
                f"{names[1]} and {name} cannot be used together: {differs[0]} = {_brief(differs[1])} in the first, "
                f"{_brief(differs[2])} in the second; give both the same --optimizer-state, or neither"
            )


def warn_unlike(a: Mapping[str, Any], b: Mapping[str, Any], names: tuple[str, str]) -> None:
    """Say where two stores that can be compared were made with other estimators, tokens or temperatures.

    Every field of :data:`ALIKE` is named with its first difference; one that a store does not have is not known.
    """
    differences = []
    for field in ALIKE:
        left, right = (get_field(manifest, field) for manifest in (a, b))
        differs = None if _UNKNOWN in (left, right) else first_difference(left, right, field)
        if differs:
            differences.append(
                f"{differs[0]} = {_cut(differs[1])} in the first, {_cut(differs[2])} in the second"
            )
    if differences:
        warnings.warn(
            f"{names[0]} and {names[1]} were made with different settings: {'; '.join(differences)}; scores "
            "between them compare gradients of two kinds; sketch both with the same settings, unless this is meant",
            UnlikeStores,
            stacklevel=4,
        )


def _is_xxh3(weights: Any) -> bool:
    return str(weights).startswith("xxh3:")


def of_earlier_release(manifest: Mapping[str, Any]) -> bool:
    """Whether the manifest names its model by the hash of earlier releases (SHA-256)."""
    weights = (manifest.get("model") or {}).get("weights")
    return isinstance(weights, str) and not _is_xxh3(weights)


def get_field(manifest: Mapping[str, Any], field: str, missing: Any = _UNKNOWN) -> Any:
    """A field by its dotted name."""
    value: Any = manifest
    for key in field.split("."):
        value = value.get(key, missing) if isinstance(value, Mapping) else missing
    return value


def _cut(value: Any) -> str:
    """A value in a message; a whole chat template would be too much."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _brief(value: Any) -> str:
    """As ``str``, but no longer than a message may be."""
    text = str(value)
    return text if len(text) <= _MOST else f"{text[:_MOST]}..."


def _model_of(manifest: Mapping[str, Any], field: str) -> str:
    """Whose weights these are: a hash alone tells nobody which of two stores is the wrong one."""
    name = manifest.get("notes", {}).get("model") if field.startswith("model.") else None
    return f" (model {shown(name, 200)})" if name else ""


def first_difference(a: Any, b: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The dotted name and the two values of the first place where two JSON values differ, or None."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            inner = first_difference(a.get(key), b.get(key), f"{name}.{key}" if name else key)
            if inner:
                return inner
        return None
    return None if a == b else (name, a, b)


def check_same_job(path: Path, made: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to continue a store under other settings.

    Raises:
        CropiError: naming the first differing field and both values.
    """
    left, right = ({key: value for key, value in side.items() if key not in NOTES} for side in (made, wanted))
    differs = first_difference(left, right)
    if differs:
        raise CropiError(
            f"the store {path} was made with {differs[0]} = {_brief(differs[1])}{_model_of(made, differs[0])}, but "
            f"this run has {_brief(differs[2])}{_model_of(wanted, differs[0])}; give another --out, or run with the "
            "same " + ("files" if differs[0] == "trajectories" else "settings")
        )


def share_text(manifest: Mapping[str, Any]) -> str:
    """The share of a job's prompts that a store holds, as it was asked for: ``2/4``; "" for all of them."""
    share = manifest.get("share")
    return f"{share['number']}/{share['count']}" if share else ""


def joined_share(manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The share that some stores hold together: None where they are all shares of their jobs, else one that is not
    whole, with the numbers that are ``missing``."""
    jobs: dict[str, dict[int, Mapping[str, Any]]] = {}
    for manifest in manifests:
        if manifest.get("share"):
            cut = {name: value for name, value in manifest["share"].items() if name != "number"}
            key = f"{job_fingerprint(manifest)} {digest(cut)}"
            jobs.setdefault(key, {})[int(manifest["share"]["number"])] = manifest
    for parts in jobs.values():
        share = dict(next(iter(parts.values()))["share"])
        missing = [number for number in range(1, share["count"] + 1) if number not in parts]
        held = sum(int(manifest["prompts"]) for manifest in parts.values())
        if missing or held < share["prompts"]:
            return share | {"missing": missing or sorted(parts)}
    return None
