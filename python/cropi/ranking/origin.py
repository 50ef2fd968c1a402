"""Of which model the sketches are that a `Selector` is given.

Weights change with every step, so that the sketches of one run are told from those of another model by what stays: the
names and shapes of the sketched parameters, the model's type, its vocabulary, its tokenizer's tokens and the estimator.
What one side does not say is not compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cropi.errors import shown
from cropi.form import wrong_form
from cropi.store.differences import first_difference

Origin = dict[str, Any]  # of JSON's types
_FORM = {
    "parameters?": {str: ([int], None)}, "model?": str, "vocabulary?": int, "tokens?": str,
    "estimator?": {str: (str, bool, float, None)},
}  # fmt: skip


@dataclass(frozen=True)
class Known:
    """Sketches, float ``[n, dim]``, with what is known of them."""

    sketches: torch.Tensor
    origin: Origin


def origin_of(given: Any) -> Origin:
    """What is said by what holds sketches: a `LiveSketch`, a `SketchedBatch`; a tensor says nothing."""
    if isinstance(given, torch.Tensor):  # whose `names`, in torch 2.11, are those of its axes
        return {}
    said = getattr(given, "origin", None)
    made: Origin = dict(said) if isinstance(said, Mapping) else {}
    if names := getattr(given, "names", None):
        made.setdefault("parameters", dict.fromkeys(names))  # of shapes that are not known
    return made


def differs(before: Origin, given: Origin) -> str:
    """How sketches differ from those before, in words that follow "they are of"; "" where both may be compared."""
    for check in (_names, _shapes, _model, _estimator):
        if words := check(before, given):
            return words
    return ""


def merged(before: Origin, given: Origin) -> Origin:
    """All that is known of sketches that do not differ."""
    made = {**before, **given}
    if shapes := before.get("parameters"):
        made["parameters"] = {name: shapes.get(name) or shape for name, shape in made["parameters"].items()}
    return made


def is_text(given: Any) -> bool:
    """Whether this is an :data:`Origin` in JSON."""
    try:
        return isinstance(given, str) and not wrong_form(json.loads(given), _FORM)
    except (ValueError, RecursionError):
        return False


def _both(before: Origin, given: Origin, field: str) -> tuple[Any, Any] | None:
    """Both values of a field where they differ; None where they agree, or one of them is not known."""
    pair = before.get(field), given.get(field)
    return None if None in pair or pair[0] == pair[1] else pair


def _names(before: Origin, given: Origin) -> str:
    there, here = before.get("parameters"), given.get("parameters")
    if not there or not here or there.keys() == here.keys():
        return ""
    new = sorted(here.keys() - there)
    return (
        f"another model: their {len(here)} parameters (the first is {min(here)!r}) are not those of the sketches "
        f"before, which have {f'no {new[0]!r}' if new else f'{min(there.keys() - here)!r} too'}"
    )


def _shapes(before: Origin, given: Origin) -> str:
    there, here = before.get("parameters", {}), given.get("parameters", {})
    for name in sorted(here):
        if pair := _both(there, here, name):
            return f"another model: {name} has the shape {pair[1]}, and {pair[0]} in the sketches before"
    return ""


def _model(before: Origin, given: Origin) -> str:
    if pair := _both(before, given, "model"):
        return (
            f"another model: its type is {shown(pair[1])}, and that of the sketches before {shown(pair[0])}"
        )
    if pair := _both(before, given, "vocabulary"):
        return f"another model: its vocabulary is {pair[1]} tokens, and that of the sketches before {pair[0]}"
    if _both(before, given, "tokens"):
        return "another tokenizer: its tokens are not those of the sketches before"
    return ""


def _estimator(before: Origin, given: Origin) -> str:
    # Two names may stand for one rule.
    sides = [dict(sorted((side.get("estimator") or {}).items())) for side in (before, given)]
    names = [side.pop("name", None) for side in sides]
    pair = first_difference(sides[0], sides[1]) if all(sides) else None
    if pair is None:
        return ""
    return (
        f"another estimator: {shown(names[1])} ({pair.field} = {shown(pair.right)}), and of {shown(names[0])} "
        f"({pair.field} = {shown(pair.left)}) before; sketch both by one, or give the tensor (`.sketches`) alone, of "
        "which no estimator is known"
    )
