"""Whether two stores agree, by their manifests: where they differ, and what that forbids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cropi.errors import CropiError, shown, warn
from cropi.form import nested
from cropi.store.manifest import GROUPS, NOISE, NOTES, SCALED

# What must agree for sketches to be comparable; the rest of the manifest may differ between two stores.
COMPARABLE = ("format", "spec", "hash_version", "stage", "model", "parameters", GROUPS, NOISE)
# What two stores may differ in, but seldom mean to: scores between them compare gradients of two kinds. Where the
# trajectories come from may well differ between training and validation, and so may behaviour, lengths and dtypes.
ALIKE = ("estimator", "temperature", "tokenizer", "tokens.eos", "tokens.chat_template")
# Parts of a model's fingerprint of which releases of transformers and PEFT know other keys, and not every model has.
OPTIONAL = ("config", "buffers")
LONGEST_VALUE = 100  # characters of a value in a message; a chat template has thousands
_UNKNOWN = object()


class UnlikeStores(UserWarning):
    """Stores are compared that were made with different settings."""


class Difference(NamedTuple):
    """The first place where two JSON values differ: its dotted name, and what stands there in each."""

    field: str
    left: Any
    right: Any

    def text(self, left: str = "", right: str = "") -> str:
        """The difference in a message; ``left`` and ``right`` follow the values."""
        first, second = _shown(self.left), _shown(self.right)
        return f"{self.field} = {first} in the first{left}, {second} in the second{right}"


def first_difference(a: Any, b: Any, name: str = "") -> Difference | None:
    """Where two JSON values differ first, or None; ``name`` is that of the values themselves.

    A model's ``config`` and ``buffers`` (:func:`cropi.model.fingerprint.model_fingerprint`) are compared where both
    have them, and of two configurations the keys that both have: all of these that differ are one difference.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        of_model = name.rpartition(".")[2] == "model"
        for key in [*a, *(key for key in b if key not in a)]:
            if of_model and key in OPTIONAL:
                if differs := _of_model(a.get(key), b.get(key), f"{name}.{key}"):
                    return differs
                continue
            inner = first_difference(a.get(key), b.get(key), f"{name}.{key}" if name else key)
            if inner:
                return inner
        return None
    return None if a == b else Difference(name, a, b)


def _shown(value: Any) -> str:
    # Of settings, all that differ are named.
    return shown(value, LONGEST_VALUE if isinstance(value, str) else 5 * LONGEST_VALUE)


def _of_model(a: Any, b: Any, name: str) -> Difference | None:
    if a is None or b is None:
        return None
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in a if key in b and a[key] != b[key]]
        a, b = ({key: side[key] for key in keys} for side in (a, b))
    return None if a == b else Difference(name, a, b)


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
    if differs is None:
        return
    models = [_model_of(manifest, differs.field) for manifest in (a, b)]
    raise CropiError(
        f"{names[0]} and {names[1]} cannot be compared: {differs.text(*models)}; sketch both with the same settings"
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
                f"{names[1]} and {name} cannot be used together: {differs.text()}; give both the same "
                "--optimizer-state, or neither"
            )


def warn_unlike(a: Mapping[str, Any], b: Mapping[str, Any], names: tuple[str, str]) -> None:
    """Say where two stores that can be compared were made with other estimators, tokens or temperatures.

    Every field of :data:`ALIKE` is named with its first difference; one that a store does not have is not known.
    """
    differences = []
    for field in ALIKE:
        left, right = (nested(manifest, field, _UNKNOWN) for manifest in (a, b))
        differs = None if _UNKNOWN in (left, right) else first_difference(left, right, field)
        if differs:
            differences.append(differs.text())
    if differences:
        warn(
            f"{names[0]} and {names[1]} were made with different settings: {'; '.join(differences)}; scores "
            "between them compare gradients of two kinds; sketch both with the same settings, unless this is meant",
            UnlikeStores,
        )


def check_same_job(path: Path, made: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to continue a store under other settings.

    Raises:
        CropiError: naming the first differing field and both values.
    """
    left, right = ({key: value for key, value in side.items() if key not in NOTES} for side in (made, wanted))
    differs = first_difference(left, right)
    if differs:
        made_with, runs_with = (
            _shown(value) + _model_of(side, differs.field)
            for value, side in ((differs.left, made), (differs.right, wanted))
        )
        same = "the same settings"
        if differs.field == "trajectories":
            same = "the same files (new prompts go into a store of their own: `cropi influence --train A B` reads both)"
            # A run's other stores stay valid: of a changed validation file, another --out would sketch the pool again.
            same += f", or remove the folder {path}, to sketch these files' prompts again and nothing else"
        raise CropiError(
            f"the store {path} was made with {differs.field} = {made_with}, but this run has {runs_with}; give another "
            f"--out, or run with {same}"
        )


def _model_of(manifest: Mapping[str, Any], field: str) -> str:
    """The model's name, where ``field`` is a hash of it: hashes do not tell which of two stores is the wrong one."""
    name = nested(manifest, "notes.model") if field.startswith("model.") else None
    return f" (model {shown(name, 200)})" if name else ""
