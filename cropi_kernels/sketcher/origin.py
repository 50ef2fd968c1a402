"""What tells the sketches of one model from those of another, and stays as it is while its weights are trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from .coverage import Coverage
from .inputs import known_ids
from .precision import unwrapped


def origin_of(model: nn.Module, coverage: Coverage) -> dict[str, Any]:
    """Of which model and parameters sketches are, in JSON's types.

    Returns:
        ``parameters``: the shape of each sketched parameter, by its canonical name; of one that is spread over ranks,
        that of the whole. Where the model has them: ``model``, the type that its configuration names, and
        ``vocabulary``, the rows of its embedding of tokens.

    >>> from cropi_kernels import GradientSketcher, SketchSpec
    >>> GradientSketcher(nn.Linear(3, 2), SketchSpec(1024)).origin
    {'parameters': {'weight': [2, 3], 'bias': [2]}}
    """
    made: dict[str, Any] = {"parameters": {name: list(shape) for name, shape in coverage.shapes.items()}}
    inner = unwrapped(model)
    kind = getattr(getattr(inner, "config", None), "model_type", None)
    if isinstance(kind, str) and kind:
        made["model"] = kind
    rows = known_ids(inner)
    if rows is not None:
        made["vocabulary"] = rows
    return made
