"""Smaller sketches from larger ones, after the fact: store 32768 numbers, compare with 4096."""

from __future__ import annotations

import torch

from . import philox as px
from ._fork import one_thread_after_fork
from ._spec_base import as_int, check_int
from .ops._checks import check_floating
from .spec import VERSION


def reduce_sketch(sketch: torch.Tensor, dim: int, *, seed: int = 0, version: int = VERSION) -> torch.Tensor:
    """Reduce sketches [..., n] to [..., dim] by signed halving; unbiased, as if sketched at ``dim``.

    One halving of n = 2 m numbers: ``out[j] = s(j) x[j] + s(m + (j ^ o)) x[m + (j ^ o)]`` with signs and offset of
    key ``"reduce/n"``. Nested: reducing to 8192 and then to 4096 equals reducing to 4096.

    >>> sketches = torch.randn(5, 32768)
    >>> small = reduce_sketch(sketches, 4096)
    >>> small.shape, torch.equal(reduce_sketch(small, 1024), reduce_sketch(sketches, 1024))
    (torch.Size([5, 4096]), True)

    Args:
        sketch: floating point, on any device; the result has its dtype and device.
        seed, version: those of the `SketchSpec`: sketches that are compared must be reduced alike.

    Raises:
        ValueError: ``sketch`` is no dense tensor of floating-point numbers, ``dim`` or the sketch's own size is not a
            power of two, or ``dim`` is the larger one.
    """
    check_floating("sketch", sketch)
    one_thread_after_fork()
    n = sketch.shape[-1] if sketch.ndim else 0
    if n < 1 or n & (n - 1):
        raise ValueError(f"sketch has {n} numbers per row: a sketch has a power of two")
    whole = as_int(dim, 1, n)
    if whole is None or whole & (whole - 1):
        raise ValueError(f"dim={dim}: give a power of two up to the sketch's own size {n}")
    dim, seed = whole, check_int("seed", seed, 0)
    while n > dim:
        key, half = px.key_of(version, seed, f"reduce/{n}"), n // 2
        sign = torch.from_numpy(px.signs(key, n, px.REDUCE_SIGN)).to(sketch)
        offset = int(px.offsets(key, 1, half, px.REDUCE_FOLD)[0])
        mate = torch.arange(half, device=sketch.device) ^ offset
        signed = sketch * sign
        sketch, n = signed[..., :half] + signed[..., half:][..., mate], half
    return sketch
