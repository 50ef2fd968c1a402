"""CountSketch of a gradient that exists, one hash per coordinate, with CROPI's dropout before it.

The yardstick of fidelity and the baseline of `SketchSpec(kind="countsketch")` and `kind="dropout"`.
"""

from __future__ import annotations

import torch

from ... import _native, dispatch
from ...philox import key_of
from ...spec import SketchSpec
from .reference import flat_sketch as flat_sketch_reference

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
    the kept coordinates' inner product is divided by ``keep``.

    Args:
        x: float32 contiguous, any shape, read flat in row-major order; ``offset`` is its first coordinate.
        out: float32 [spec.dim], added to in place. float64 only on the reference.
    """
    if x.dtype not in (torch.float32, torch.float64) or not x.is_contiguous():
        raise ValueError(f"x is {x.dtype}, contiguous={x.is_contiguous()}: give a contiguous float32 tensor")
    if out.shape != (spec.dim,) or not out.is_contiguous():
        raise ValueError(f"out has shape {tuple(out.shape)}: it must be a contiguous [{spec.dim}]")
    if out.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"out is {out.dtype}: give a float32 tensor, sums are never narrower")
    if offset < 0 or offset + x.numel() > 1 << 62:
        raise ValueError(f"offset={offset}: coordinates must stay between 0 and 2^62")
    key = key_of(spec.version, spec.seed, name)
    keep_below = 0 if spec.keep >= 1.0 else max(1, int(spec.keep * 2.0**32))
    scale = spec.keep**-0.5
    without = {"triton": "it has no Triton kernel"}
    if dispatch.choose("flat_sketch", x, out, backend=backend, without=without) != "cpu":
        return flat_sketch_reference(x, key, keep_below, scale, out, offset)
    _native.native().flat_sketch(
        x.data_ptr(), x.numel(), offset, *key, keep_below, scale, spec.dim, out.data_ptr(), _native.threads()
    )
    return out
