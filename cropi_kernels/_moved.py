"""Names of the first release that went: they work for one more release, with a warning."""

from __future__ import annotations

import torch

from .ops.project import project, projection_of
from .spec import SketchSpec


def flat_sketch(
    x: torch.Tensor,
    spec: SketchSpec,
    name: str,
    out: torch.Tensor,
    *,
    offset: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """``out += S x`` under ``spec`` (kind ``countsketch`` or ``dropout``), from coordinate ``offset`` of parameter
    ``name`` on: `project` by `projection_of`."""
    project(
        x.reshape(1, -1),
        projection_of(spec, name),
        offset,
        out=out[None],
        nonfinite="ignore",
        backend=backend,
    )
    return out


MOVED = {"flat_sketch": "project(x, projection_of(spec, name), offset, out=...)"}
