"""CountSketch of a gradient that exists, one hash per coordinate, with CROPI's dropout before it.

The yardstick of fidelity and the baseline of `SketchSpec(kind="countsketch")` and `kind="dropout"`.
"""

from __future__ import annotations

import torch

from ..._library import plain
from ...spec import SketchSpec
from . import ops

__all__ = ["flat_sketch"]


def flat_sketch(
    x: torch.Tensor,
    spec: SketchSpec,
    name: str,
    out: torch.Tensor,
    *,
    offset: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """``out[bucket(p)] += sign(p) * x[p] / sqrt(keep)`` for the coordinates p that are kept.

    ``word = philox(key(name), p // 4)[p % 4]``; ``bucket = word mod dim``, ``sign = -1 if word >= 2^31``; with
    ``keep < 1`` a second draw keeps p with that probability, the same coordinates for every prompt. Unbiased:
    the kept coordinates' inner product is divided by ``keep``. (Charikar, Chen and Farach-Colton, 2002; dropout before
    it: CROPI, arXiv 2510.26491.)

    >>> spec = SketchSpec(kind="countsketch", dim=1024)
    >>> out = flat_sketch(torch.ones(3, 5), spec, "lm_head.weight", torch.zeros(1024))
    >>> int(out.abs().sum())
    15

    Args:
        x: float32 contiguous, any shape, read flat in row-major order; ``offset`` is its first coordinate.
        spec: its dim, keep, seed and version count.
        name: the parameter's, as in `plan_matrix`.
        out: float32 [spec.dim], contiguous, added to in place and returned. float64 only on the reference.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or None for the best.

    The order of the sums is fixed on a CPU; a GPU sums in 64-bit fixed point, which has no order. There one NaN or
    infinity in ``x`` makes all of ``out`` NaN, elsewhere the number that it falls on.

    Raises:
        ValueError: names the argument, its value and the remedy.
        RuntimeError: the backend that was named cannot serve the call.
    """
    ops.SKETCH(plain(x), out, spec.recipe, name, offset, backend)
    return out
