"""Rows of sketches in one or two bytes a number: the codec of stores, and of whoever keeps many rows in memory."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ._fork import one_thread_after_fork
from ._native import not_plain

BLOCK = 128  # numbers that share an int8 scale; costs 3 % of the space
_TINY = torch.finfo(torch.float32).tiny


class QuantizedRows(NamedTuple):
    """Row b in blocks of equal length: block j is ``scale[b, j]`` times its part of ``values[b]``."""

    values: torch.Tensor  # int8 or float16 [B, dim]
    scale: torch.Tensor  # float32 [B, blocks]

    def float(self) -> torch.Tensor:
        """The rows as float32 [B, dim]."""
        values = self.values.float()
        if values.numel() == 0:
            return values
        return (values.view(*self.scale.shape, -1) * self.scale[..., None]).view_as(values)


def quantize_rows(y: torch.Tensor, dtype: torch.dtype) -> QuantizedRows:
    """Rows of ``y`` [B, dim] as int8 or float16 with scales.

    int8: a scale for every ``gcd(dim, 128)`` numbers, ``scale = max|y| / 127`` over them, rounded to nearest: an error
    of at most ``scale / 2`` a number. One scale for a whole row is not enough: a few coordinates that many tokens share
    hold up to half of a policy gradient's norm, and the others would be rounded away (a relative error of 0.1 instead
    of 0.015). float16: one scale a row, the power of two at or below its largest magnitude, because unscaled gradients
    fall below float16's range. Scaling by it is exact: an error of at most ``|y| 2^-11 + scale 2^-25``.

    A block that holds NaN or infinity has scale NaN and values 0: it comes back as NaN.

    >>> quantize_rows(torch.tensor([[0.25, -1.0, 0.0]]), torch.float16).float()
    tensor([[ 0.2500, -1.0000,  0.0000]])

    Raises:
        ValueError: ``dtype`` is another one, or ``y`` is not a dense matrix of floating-point numbers.
    """
    if dtype not in (torch.int8, torch.float16):
        raise ValueError(f"dtype={dtype}: rows can be held as torch.int8 or torch.float16")
    if (reason := not_plain(y)) is not None:
        raise ValueError(f"y: {reason}")
    if y.ndim != 2 or not y.dtype.is_floating_point:
        raise ValueError(f"y is {y.dtype} {tuple(y.shape)}: give floating-point rows [B, dim]")
    one_thread_after_fork()
    n, dim = y.shape
    block = max(1, math.gcd(dim, BLOCK) if dtype == torch.int8 else dim)
    blocks = y.float().contiguous().view(n, dim // block, block)
    largest = blocks.abs().amax(dim=2)
    if dtype == torch.int8:
        scale = (largest / 127).clamp_min(_TINY)
        values = (blocks / scale[..., None]).round()
    else:
        scale = torch.exp2(torch.floor(torch.log2(largest.clamp_min(_TINY))))
        values = blocks / scale[..., None]
    bad = ~torch.isfinite(largest)
    if bad.is_meta or bool(bad.any()):  # on meta there is nothing to see
        values, scale = values.masked_fill(bad[..., None], 0), scale.masked_fill(bad, torch.nan)
    return QuantizedRows(values.to(dtype).view(n, dim), scale)
