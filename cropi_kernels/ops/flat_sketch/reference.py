"""Plain numpy / torch twin of the flat CountSketch."""

from __future__ import annotations

import numpy as np
import torch

from ...philox import FLAT_KEEP, FLAT_PLACE, philox


def words(key: tuple[int, int], first: int, n: int, purpose: int) -> np.ndarray:
    """uint32 word of coordinates ``first .. first + n``: word p % 4 of draw p // 4."""
    draw = np.arange(first // 4, (first + n - 1) // 4 + 1, dtype=np.uint64) if n else np.zeros(0, np.uint64)
    flat = philox(key, draw & np.uint64(0xFFFFFFFF), draw >> np.uint64(32), purpose).reshape(-1)
    return flat[first % 4 : first % 4 + n]


def flat_sketch(
    x: torch.Tensor, key: tuple[int, int], keep_below: int, scale: float, out: torch.Tensor, offset: int
) -> torch.Tensor:
    flat = x.reshape(-1)
    word = words(key, offset, flat.numel(), FLAT_PLACE)
    sign = torch.from_numpy(np.where(word >> 31, -scale, scale)).to(out)
    if keep_below:
        kept = words(key, offset, flat.numel(), FLAT_KEEP) < np.uint32(keep_below)
        sign = sign * torch.from_numpy(kept).to(out)
    bucket = torch.from_numpy((word & np.uint32(out.numel() - 1)).astype(np.int64)).to(out.device)
    return out.index_add_(0, bucket, flat.to(out) * sign)
