"""The chunk loop: logits exist for one chunk of tokens at a time, and never for all of them.

Matrix products go to the vendor's GEMM, head panel by head panel: a panel of the head stays in the cache, one in
another dtype is converted once per chunk, and the products run 10 % faster than on the whole head.

Shapes are padded to multiples of 8 rows and 16 features or words. Outside them, the vendor's GEMM changes the order
of its sums with the number of threads (seen with MKL 2024.2), and with it the last bits of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .rows import RowMath, Rows, Stats

PANEL = 2048  # words of the head per product
LOGITS_BYTES = 32 << 20  # per chunk; measured, see benchmarks/bench_linear_logprob.py
_ROWS, _FEATURES, _WORDS = 8, 16, 16


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def default_chunk(n_tokens: int, vocab: int, itemsize: int = 4) -> int:
    """Tokens per chunk: near `LOGITS_BYTES` of logits, at least 64, all chunks about equal."""
    budget = max(64, LOGITS_BYTES // (max(1, vocab) * itemsize))
    n_chunks = max(1, round(n_tokens / budget))
    return max(1, _up(-(-n_tokens // n_chunks), _ROWS))


class Head(NamedTuple):
    """A linear head: weight [V, D], bias [V] or None, and the dtype that products are summed in."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype

    def panels(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first word, words, panel [words up to 16, features up to 16]); padding is zero. Valid until the next."""
        vocab, features = self.weight.shape
        spare: torch.Tensor | None = None
        for start in range(0, vocab, PANEL):
            part = self.weight[start : start + PANEL]
            words = part.shape[0]
            whole = words % _WORDS == 0 and features % _FEATURES == 0
            if whole and part.dtype == self.dtype and part.stride(1) == 1:
                yield start, words, part
                continue
            if spare is None:
                spare = part.new_zeros(
                    _up(min(PANEL, vocab), _WORDS), _up(features, _FEATURES), dtype=self.dtype
                )
            panel = spare[: _up(words, _WORDS)]
            panel[:words, :features].copy_(part)
            panel[words:].zero_()
            yield start, words, panel


class Chunk:
    """Buffers for up to ``rows`` tokens: hidden states and their logits, both padded."""

    def __init__(self, head: Head, rows: int) -> None:
        vocab, features = head.weight.shape
        self.head, self.vocab, self.features = head, vocab, features
        self.hidden = head.weight.new_zeros(_up(rows, _ROWS), _up(features, _FEATURES), dtype=head.dtype)
        # A row stride off the powers of two: rows would otherwise compete for the same cache sets.
        width = _up(vocab, _WORDS) + _WORDS
        self.buffer = torch.empty(_up(rows, _ROWS), width, dtype=head.dtype, device=head.weight.device)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, V] logits of ``hidden`` [n, D], in the chunk's buffer: valid until the next call."""
        n = hidden.shape[0]
        padded = _up(n, _ROWS)
        self.hidden[:n, : self.features].copy_(hidden)
        self.hidden[n:padded].zero_()
        for start, _, panel in self.head.panels():
            out = self.buffer[:padded, start : start + panel.shape[0]]
            torch.mm(self.hidden[:padded], panel.t(), out=out)
        z = self.buffer[:n, : self.vocab]
        return z if self.head.bias is None else z.add_(self.head.bias)

    def times_head(self, n: int) -> torch.Tensor:
        """The buffer's first ``n`` rows (by now the logits' gradient) times the head: [n, D] in the chunk's dtype."""
        padded = _up(n, _ROWS)
        self.buffer[n:padded].zero_()
        self.buffer[:n, self.vocab :].zero_()  # a NaN logit left one here, and NaN * 0 is not 0
        total: torch.Tensor | None = None
        for start, _, panel in self.head.panels():
            part = self.buffer[:padded, start : start + panel.shape[0]]
            total = torch.mm(part, panel) if total is None else total.addmm_(part, panel)
        assert total is not None
        return total[:n, : self.features]


def forward(
    hidden: torch.Tensor,
    head: Head,
    target: torch.Tensor,
    math: RowMath,
    rows: Rows,
    chunk: int,
    entropy: bool,
) -> Stats:
    """Statistics per token; ``target`` [N] is negative for ignored tokens, which cost nothing and hold 0."""
    n = target.shape[0]
    stats = Stats(_zeros(head, n), _zeros(head, n), _zeros(head, n), _zeros(head, n) if entropy else None)
    parts, size = _parts(target >= 0, chunk)
    work = Chunk(head, size)
    for part in parts:
        piece = stats.rows(part)
        rows.forward(work.logits(hidden[part]), target[part], math, piece)
        if not isinstance(part, slice):
            for whole, values in zip(stats, piece):
                if whole is not None and values is not None:
                    whole[part] = values
    return stats


def backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    head: Head,
    target: torch.Tensor,
    math: RowMath,
    rows: Rows,
    chunk: int,
    stats: Stats,
) -> torch.Tensor:
    """Gradient to ``hidden`` of ``sum_n grad_n logp_n``; the logits of tokens with a gradient are computed again."""
    parts, size = _parts((target >= 0) & (grad != 0), chunk)
    out = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    work = Chunk(head, size)
    for part in parts:
        z = work.logits(hidden[part])
        rows.backward(z, target[part], grad[part], math, stats.rows(part))
        out[part] = work.times_head(z.shape[0]).to(out.dtype)
    return out


def one_pass(
    hidden: torch.Tensor,
    head: Head,
    target: torch.Tensor,
    math: RowMath,
    rows: Rows,
    chunk: int,
    weigh: Callable[[torch.Tensor, int, int], torch.Tensor],
    on_dlogits: Callable[[int, int, torch.Tensor], None] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, gradient to ``hidden`` of ``sum_n w_n logp_n`` and weights ``w``, from one product for the logits."""
    n = target.shape[0]
    stats = Stats(_zeros(head, n), _zeros(head, n), _zeros(head, n), None)
    weights = _zeros(head, n)
    out = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    work = Chunk(head, min(chunk, n))
    for start in range(0, n, chunk):
        part = slice(start, min(start + chunk, n))
        piece = stats.rows(part)
        z = work.logits(hidden[part])
        rows.forward(z, target[part], math, piece)
        weights[part] = weigh(piece.logp, start, part.stop)
        rows.backward(z, target[part], weights[part], math, piece)
        if on_dlogits is not None:
            on_dlogits(start, part.stop, z)
        out[part] = work.times_head(z.shape[0]).to(out.dtype)
    return stats.logp, out, weights


def _parts(wanted: torch.Tensor, chunk: int) -> tuple[list[slice] | list[torch.Tensor], int]:
    """The wanted tokens in runs of ``chunk``, and the length of the longest: slices where nothing is left out."""
    n = wanted.shape[0]
    index = wanted.nonzero()[:, 0]
    size = min(chunk, index.shape[0])
    if index.shape[0] == n:
        return [slice(i, min(i + chunk, n)) for i in range(0, n, chunk)], size
    return list(index.split(chunk)) if size else [], size


def _zeros(head: Head, n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=head.dtype, device=head.weight.device)
