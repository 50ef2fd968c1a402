"""Drawing a token from logits by one uniform number, and the log-prob that is recorded for it.

Row (prompt, k) has its own stream of uniform numbers, ``default_rng([seed, crc32(id), k])``, one a token. So what a row
draws does not depend on the batch that it is in, except where the logits themselves do: by rounding.

The token is the first one at which the cumulative probability exceeds the number, in the order of the vocabulary. The
log-prob is ``z_i / T - log sum_j exp(z_j / T)`` over the *whole* vocabulary, also under ``top_k`` and ``top_p``: the
ratio of an estimator is taken between policies, which truncate nothing.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch

from cropi.rollouts.options import Sampling

# Tokens in a block of the first level. A cumulative sum over the vocabulary would be the slowest part of a step.
BLOCK = 512


def uniforms(seed: int, name: str, k: int, count: int) -> np.ndarray:
    """The uniform numbers of response ``k`` to the prompt ``name``: float64 ``[count]``."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), k]).random(count)


def draw(
    logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for every response, and its log-prob under the whole distribution.

    Args:
        logits: ``[R, V]``, any floating dtype; computed on in float32 (float64 stays float64).
        uniform: float64 ``[N]``, in [0, 1).
        rows: int64 ``[N]``, the row of ``logits`` that each response is drawn from.

    Returns:
        int64 ``[N]`` and float64 ``[N]``. The log-prob is NaN where the logits of a row hold a NaN or +infinity.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    scaled = wide if sampling.temperature == 1.0 else wide / sampling.temperature
    shifted = scaled - scaled.amax(1, keepdim=True)
    weights = shifted.exp()
    total = blocks(weights).sum(-1).double().sum(1)
    kept = truncated(shifted, weights, total, sampling) if sampling.truncates else weights
    tokens = pick(kept, uniform, rows)
    picked = shifted[rows, tokens].double() - total.log()[rows]
    return tokens, picked


def blocks(weights: torch.Tensor) -> torch.Tensor:
    """``[R, V]`` as ``[R, blocks, BLOCK]``, with zeros behind the end."""
    missing = -weights.shape[1] % BLOCK
    padded = torch.nn.functional.pad(weights, (0, missing)) if missing else weights
    return padded.view(len(weights), -1, BLOCK)


def pick(weights: torch.Tensor, uniform: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The first token at which the cumulative weight exceeds ``uniform`` times its sum; it has a weight above 0."""
    parts = blocks(weights)
    sums = parts.sum(-1).double()[rows]
    before = sums.cumsum(1)
    target = (uniform.to(before.device) * before[:, -1])[:, None]
    block = torch.searchsorted(before, target, right=True).clamp_max(before.shape[1] - 1)
    own = sums.gather(1, block)
    start = before.gather(1, block) - own
    inside = parts[rows, block[:, 0]].double().cumsum(1)
    # Relative to the block's own last entry: rounding may leave the sum of the block a hair beside it.
    share = ((target - start) / own).clamp(0.0, 1.0 - 2.0**-53)
    index = torch.searchsorted(inside, share * inside[:, -1:], right=True).clamp_max(BLOCK - 1)
    # A row of NaN has no such token; its log-prob says so.
    return (block * BLOCK + index)[:, 0].clamp_max(weights.shape[1] - 1)


def truncated(
    shifted: torch.Tensor, weights: torch.Tensor, total: torch.Tensor, sampling: Sampling
) -> torch.Tensor:
    """The weights, 0 at tokens that are not to be drawn; ``top_k`` first, then ``top_p`` of what it leaves."""
    kept = weights
    if 0 < sampling.top_k < weights.shape[1]:
        last = shifted.topk(sampling.top_k, dim=1).values[:, -1:]
        kept = kept.masked_fill(shifted < last, 0.0)
        total = kept.double().sum(1)
    if sampling.top_p < 1.0:
        ordered, order = kept.sort(dim=1, descending=True, stable=True)
        ahead = ordered.double().cumsum(1) - ordered.double()
        out = ahead >= sampling.top_p * total[:, None]  # the first token is always in
        kept = kept.masked_fill(torch.zeros_like(out).scatter(1, order, out), 0.0)
    return kept
