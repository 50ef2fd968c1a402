"""Rows held in one or two bytes a number, with a scale per row."""

from __future__ import annotations

from typing import NamedTuple

import torch

_LARGEST = {torch.int8: 127.0, torch.float16: 32768.0}


class QuantizedRows(NamedTuple):
    """``values[b] * scale[b]`` stands for row b. A row that held NaN or infinity has scale NaN and values 0."""

    values: torch.Tensor  # int8 or float16 [B, dim]
    scale: torch.Tensor  # float32 [B]

    def float(self) -> torch.Tensor:
        """The rows as float32 [B, dim]."""
        return self.values.float() * self.scale[:, None]


def quantize_rows(y: torch.Tensor, dtype: torch.dtype) -> QuantizedRows:
    """Rows of ``y`` [B, dim] as int8 or float16, scaled by the row's largest magnitude.

    int8: ``scale = max|y| / 127``, rounded to nearest: an error of at most ``scale / 2`` per number. float16: the scale
    is a power of two that puts the row's largest number between 2^14 and 2^15, so the only loss is the 11-bit mantissa.

    >>> quantize_rows(torch.tensor([[0.25, -1.0, 0.0]]), torch.int8).values
    tensor([[  32, -127,    0]], dtype=torch.int8)

    Raises:
        ValueError: ``dtype`` is another one, or ``y`` is no matrix of floating-point numbers.
    """
    if dtype not in _LARGEST:
        raise ValueError(f"dtype={dtype}: rows can be held as torch.int8 or torch.float16")
    if y.ndim != 2 or not y.dtype.is_floating_point:
        raise ValueError(f"y is {y.dtype} {tuple(y.shape)}: give floating-point rows [B, dim]")
    y = y.float()
    largest = y.abs().amax(dim=1) if y.shape[1] else y.new_zeros(y.shape[0])
    finite = torch.isfinite(largest)
    largest = largest.where(finite & (largest > 0), torch.ones_like(largest))
    if dtype == torch.int8:
        scale = (largest / _LARGEST[dtype]).clamp_min(torch.finfo(torch.float32).tiny)
        values = torch.round(y / scale[:, None]).clamp_(-127, 127)
    else:
        exponent = torch.frexp(largest).exponent - 15
        scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(-126, 127))
        values = y / scale[:, None]
    values = values.where(finite[:, None], torch.zeros_like(values)).to(dtype)
    return QuantizedRows(values, scale.where(finite, torch.full_like(scale, torch.nan)))
