"""The chunk loop: logits exist for one chunk of tokens at a time, and never for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from .contract import Dlogits, Kernels, OnGradient, RowMath, Stats, Weigh

# Measured (float32 and bfloat16, 49152 and 151936 words): fewer tokens leave the products waiting for the head, more
# push the logits out of the cache. Full speed is reached at 96 to 128 tokens.
LOGITS_BYTES = 24 << 20
MIN_TOKENS = 96
DEVICE_LOGITS_BYTES = 1 << 30  # on a GPU a product wants thousands of rows
TILE = 32  # tokens


class Rows(Protocol):
    """The logits of one chunk at a time, in whatever form; `compute` comes first, then the two others, once or not."""

    def compute(self, hidden: torch.Tensor, target: torch.Tensor) -> None:
        """The product of ``hidden`` [n, D] with the head; ``target`` [n] is negative where there is none."""

    def forward(self, target: torch.Tensor, stats: Stats) -> None:
        """Fills ``stats``."""

    def backward(self, target: torch.Tensor, grad: torch.Tensor, stats: Stats, whole: bool) -> Dlogits:
        """As `Kernels.backward`; ``whole``: without a factor."""

    def times_head(self, gradient: Dlogits, target: torch.Tensor, out: torch.Tensor) -> None:
        """As `Kernels.times_head`."""


class Call(NamedTuple):
    """A checked call: what the loop needs beside the tokens themselves."""

    head: torch.Tensor  # [V, D], dtype of hidden
    bias: torch.Tensor | None  # [V], compute dtype
    target: torch.Tensor  # int64 [N], contiguous, -1 where ignored
    math: RowMath
    kernels: Kernels
    chunk: int  # tokens
    dtype: torch.dtype  # of the arithmetic
    # (call, tokens, whether a gradient follows, whether entropies are asked for): where a kernel makes its own product
    tiles: Callable[[Call, int, bool, bool], Rows] | None = None

    def rows(self, tokens: int, *, keep: bool, entropy: bool = False) -> Rows:
        """For up to ``tokens`` tokens a chunk; ``keep``: `Rows.backward` will be called."""
        return Logits(self, tokens) if self.tiles is None else self.tiles(self, tokens, keep, entropy)

    def numbers(self) -> torch.Tensor:
        """A zero per token."""
        return torch.zeros(self.target.shape[0], dtype=self.dtype, device=self.target.device)


class Logits:
    """A buffer for the logits of up to ``tokens`` tokens."""

    def __init__(self, call: Call, tokens: int) -> None:
        self.call, self.vocab = call, call.head.shape[0]
        # Rows aligned to cache lines, at a stride off the powers of two: they would compete for the same cache sets.
        width = -(-self.vocab // 16) * 16 + 16
        self.buffer = torch.empty(tokens, width, dtype=call.dtype, device=call.head.device)

    def of(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, V] logits of ``hidden`` [n, D]; valid until the next call."""
        z = self.buffer[: hidden.shape[0], : self.vocab]
        self.call.kernels.logits(hidden, self.call.head, self.call.bias, z)
        return z

    def compute(self, hidden: torch.Tensor, target: torch.Tensor) -> None:
        self.z = self.of(hidden)

    def forward(self, target: torch.Tensor, stats: Stats) -> None:
        self.call.kernels.forward(self.z, target, self.call.math, stats)

    def backward(self, target: torch.Tensor, grad: torch.Tensor, stats: Stats, whole: bool) -> Dlogits:
        return Dlogits(self.call.kernels.backward(self.z, target, grad, self.call.math, stats))

    def times_head(self, gradient: Dlogits, target: torch.Tensor, out: torch.Tensor) -> None:
        self.call.kernels.times_head(gradient.dz, self.call.head, out)


def default_chunk(
    n_tokens: int, vocab: int, itemsize: int = 4, on_device: bool = False, tile: int = TILE
) -> int:
    """Tokens per chunk: near `LOGITS_BYTES` of logits (a GPU: below its own), at least `MIN_TOKENS`, about equal."""
    budget = max(
        MIN_TOKENS, (DEVICE_LOGITS_BYTES if on_device else LOGITS_BYTES) // (max(1, vocab) * itemsize)
    )
    n_chunks = max(1, -(-n_tokens // budget) if on_device else round(n_tokens / budget))
    return max(1, -(-n_tokens // n_chunks // tile) * tile)


def forward(hidden: torch.Tensor, call: Call, entropy: bool) -> Stats:
    """Statistics per token; ignored tokens cost nothing and hold 0."""
    stats = Stats(call.numbers(), call.numbers(), call.numbers(), call.numbers() if entropy else None)
    parts, size = _parts(call.target >= 0, call.chunk)
    rows = call.rows(size, keep=False, entropy=entropy)
    for part in parts:
        piece, target = stats.rows(part), call.target[part]
        rows.compute(hidden[part], target)
        rows.forward(target, piece)
        if not isinstance(part, slice):  # `piece` is a copy
            for whole, values in zip(stats, piece):
                if whole is not None and values is not None:
                    whole[part] = values
    return stats


def backward(grad: torch.Tensor, hidden: torch.Tensor, call: Call, stats: Stats) -> torch.Tensor:
    """Gradient to ``hidden`` of ``sum_n grad_n logp_n``; the logits of tokens with a gradient are computed again."""
    parts, size = _parts((call.target >= 0) & (grad != 0), call.chunk)
    out = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    rows = call.rows(size, keep=True)
    for part in parts:
        target = call.target[part]
        rows.compute(hidden[part], target)
        gradient = rows.backward(target, grad[part], stats.rows(part), whole=False)
        piece = out[part]
        rows.times_head(gradient, target, piece)
        if not isinstance(part, slice):
            out[part] = piece
    return out


def one_pass(
    hidden: torch.Tensor,
    call: Call,
    weigh: Weigh,
    on_gradient: OnGradient | None,
    whole: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, gradient to ``hidden`` of ``sum_n w_n logp_n`` and weights ``w``, from one product for the logits.

    ``whole``: ``on_gradient`` gets the gradient of the logits without a factor.
    """
    n = call.target.shape[0]
    stats, weights = Stats(call.numbers(), call.numbers(), call.numbers(), None), call.numbers()
    out = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    rows = call.rows(min(call.chunk, n), keep=True)
    for start in range(0, n, call.chunk):
        stop = min(start + call.chunk, n)
        part = slice(start, stop)
        target, piece = call.target[part], stats.rows(part)
        rows.compute(hidden[part], target)
        rows.forward(target, piece)
        weights[part] = weigh(piece.logp.clone(), start, stop)  # a copy: the caller may compute in it
        gradient = rows.backward(target, weights[part], piece, whole)
        if on_gradient is not None:
            on_gradient(start, stop, gradient)
        rows.times_head(gradient, target, out[part])
    return stats.logp, out, weights


def _parts(wanted: torch.Tensor, chunk: int) -> tuple[list[slice] | list[torch.Tensor], int]:
    """The wanted tokens in runs of ``chunk``, and the length of the longest: slices where nothing is left out."""
    n = wanted.shape[0]
    # To count them the host would have to wait for a device: there the others are computed too.
    index = None if wanted.is_cuda else wanted.nonzero()[:, 0]
    if index is None or index.shape[0] == n:
        return [slice(i, min(i + chunk, n)) for i in range(0, n, chunk)], min(chunk, n)
    size = min(chunk, index.shape[0])
    return list(index.split(chunk)) if size else [], size
