"""Masks of rows in which several responses share a prompt, as a model's attention takes them."""

from __future__ import annotations

import torch

# Torch's memory-efficient attention copies a mask whose rows do not begin at a multiple of so many numbers.
ALIGNED = 8
# Added to the scores of tokens that are not attended to. Not minus infinity, which torch keeps from cuDNN's attention
# up to 2.10 (NaN where a tile of keys is masked whole); nor a dtype's smallest number, which kernels multiply by
# log2(e): beyond float32.
HIDDEN = -1e30
# Pairs of tokens in one batch's mask: 256 MiB of bool, and 512 MiB of 16-bit numbers. Of one row: 16,384 tokens.
MOST_PAIRS = 1 << 28


def prefix_mask(blocks: torch.Tensor) -> torch.Tensor:
    """The shared layout's mask from each token's block: 0 = prompt, r = r-th response, -1 = padding.

    Args:
        blocks: int64 ``[B, L]``.

    Returns:
        bool ``[B, 1, L, L]``: True where the token of the row (dim 2) attends to that of the column (dim 3).
        Padding attends to itself alone, so that no softmax runs over nothing.
    """
    query, key = blocks[:, :, None], blocks[:, None, :]
    # In place: a mask of 8 rows of 4096 tokens has 128 MiB.
    seen = (key == query).logical_or_(key == 0).logical_and_(query >= 0).tril_()
    seen.diagonal(dim1=1, dim2=2).fill_(True)
    return seen[:, None]


def handed(mask: torch.Tensor, added: torch.dtype | None) -> torch.Tensor:
    """A mask as a model is handed it: of a bool ``[B, 1, L, L]`` the numbers that attention adds to its scores, 0 where
    it is True and :data:`HIDDEN` (in float16 its lowest) elsewhere; the mask itself if ``added``, their dtype, is None.

    Torch's ``scaled_dot_product_attention`` makes the same of a bool mask, but in every layer anew, and keeps each for
    the backward pass: two bytes for every pair of tokens and layer.
    """
    if added is None or mask.ndim != 4:
        return mask
    length = mask.shape[-1]
    room = torch.zeros(*mask.shape[:-1], -(-length // ALIGNED) * ALIGNED, dtype=added, device=mask.device)
    return room[..., :length].masked_fill_(mask.logical_not(), max(HIDDEN, torch.finfo(added).min))
