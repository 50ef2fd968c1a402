"""Log-probs whose logits leave the tensor cores as statistics, a tile of tokens x words at a time: Hopper, 16 bits.

Of a tile, with the largest of its logits m_t in a row and x = (z - m_t) / T, without the target's:

    s_t = sum exp(x),    w_t = sum exp(x) x,    e = exp(x)

s_t and w_t are float32 sums over float32 logits. `combine_kernel` makes a row's log-prob of its tiles:
log_sum = log(sum_t s_t exp((m_t - top) / T) + exp(x_target)). Where a gradient follows, e is kept, in the head's dtype,
and `rescale_kernel` turns it into that of the logits in place: exp((m_t - top) / T - log_sum) times e. It is rounded
twice, where a product that keeps float32 logits rounds once, and half as many bytes are written and read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import _gpu, _triton
from .chunks import Call
from .contract import RowMath, Stats
from .triton import _expm1, finish_rows

TOKENS, WORDS, FEATURES = 128, 256, 64  # of a tile; of the product's inner step
STAGES, WARPS = 4, 8
COMBINED_TILES, COMBINED_ROWS = 64, 16
RESCALED_TILES = 16
LOG2_E = 1.4426950408889634
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
LIFT = 2.0**15  # of e in float16, whose small numbers lose their digits


@triton.jit(do_not_specialize=["n_tokens"])
def tiles_kernel(
    hidden,  # descriptor of [n_tokens, features], tiles of TOKENS x FEATURES
    head,  # descriptor of [vocabulary, features], tiles of WORDS x FEATURES
    bias,  # float32 [vocabulary]
    target,  # int64 [n_tokens]
    own,  # float32 [n_tokens]: the target's logit, written where there is one
    tops,  # float32 [tiles of words, n_tokens], as are rests and weighted
    rests,
    weighted,
    e,  # [n_tokens, vocabulary], rows stride apart
    n_tokens,
    vocabulary,
    features,
    stride,
    scale,  # log2(e) / temperature
    lift,
    BIAS: tl.constexpr,
    ENTROPY: tl.constexpr,
    KEEP: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    # Programs that run together share tiles of the head: it is read once.
    across = tl.cdiv(n_tokens, TOKENS)
    i, t = tl.program_id(0) % across, tl.program_id(0) // across
    z = tl.zeros((TOKENS, WORDS), tl.float32)
    for k in range(0, features, FEATURES):
        z = tl.dot(hidden.load([i * TOKENS, k]), head.load([t * WORDS, k]).T, z)
    row = i * TOKENS + tl.arange(0, TOKENS)
    word = t * WORDS + tl.arange(0, WORDS)
    there, inside = row < n_tokens, word < vocabulary
    if BIAS:
        z += tl.load(bias + word, mask=inside, other=0.0)[None, :]
    y = tl.load(target + row, mask=there, other=-1)
    mine = word[None, :] == y[:, None]
    own_z = tl.sum(tl.where(mine, z, 0.0), 1)
    has_target = there & (y >= t * WORDS) & (y < (t + 1) * WORDS) & (y < vocabulary)
    tl.store(own + row, own_z, mask=has_target)
    # One array of the tile's size at a time: a second one would not fit into the registers.
    z = tl.where(mine | ~inside[None, :], float("-inf"), z)
    top = tl.maximum(tl.max(z, 1), tl.where(has_target, own_z, float("-inf")))
    anchor = tl.where(top == float("-inf"), 0.0, top)
    x = (z - anchor[:, None]) * scale  # to the base of 2
    p = tl.exp2(x)
    at = t.to(tl.int64) * n_tokens + row
    tl.store(tops + at, top, mask=there)
    tl.store(rests + at, tl.sum(p, 1), mask=there)
    if ENTROPY:
        tl.store(weighted + at, tl.sum(p * tl.maximum(x, -1000.0), 1) * LN_2, mask=there)
    if KEEP:
        place = e + row.to(tl.int64)[:, None] * stride + word[None, :]
        tl.store(place, (p * lift).to(e.dtype.element_ty), mask=there[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["n_tokens"])
def combine_kernel(
    own,
    tops,
    rests,
    weighted,
    target,
    logp,  # float32 [n_tokens], as are top, log_sum and entropy
    top,
    log_sum,
    entropy,
    n_tokens,
    vocabulary,
    tiles,
    scale,  # 1 / temperature
    ENTROPY: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < n_tokens
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in range(0, tiles, TILES):
        t = start + tl.arange(0, TILES)
        mask = (t < tiles)[:, None] & there[None, :]
        at = t.to(tl.int64)[:, None] * n_tokens + row[None, :]
        best = tl.maximum(best, tl.max(tl.load(tops + at, mask=mask, other=float("-inf")), 0))
    anchor = tl.where(best == float("-inf"), 0.0, best)
    rest = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    for start in range(0, tiles, TILES):
        t = start + tl.arange(0, TILES)
        mask = (t < tiles)[:, None] & there[None, :]
        at = t.to(tl.int64)[:, None] * n_tokens + row[None, :]
        shift = (tl.load(tops + at, mask=mask, other=float("-inf")) - anchor[None, :]) * scale
        share = tl.exp(shift)
        part = tl.load(rests + at, mask=mask, other=0.0)
        rest += tl.sum(part * share, 0)
        if ENTROPY:  # every x of a tile moves by its shift
            moved = tl.where(part > 0, tl.maximum(shift, -1000.0), 0.0)
            sums += tl.sum((tl.load(weighted + at, mask=mask, other=0.0) + part * moved) * share, 0)
    y = tl.load(target + row, mask=there, other=-1)
    exists = (y >= 0) & (y < vocabulary)
    own_z = tl.load(own + row, mask=there & exists, other=float("-inf"))
    finish_rows(
        row, y, exists, own_z, best, rest, sums, logp, top, log_sum, entropy, scale, there, ENTROPY=ENTROPY
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_tokens"])
def rescale_kernel(
    e,  # [n_tokens, vocabulary], rows stride apart: of `tiles_kernel`, and the gradient of the logits afterwards
    tops,
    target,
    grad,  # float32 [n_tokens]
    logp,
    top,
    log_sum,
    n_tokens,
    vocabulary,
    stride,
    scale,  # 1 / temperature
    lift,
    TILES: tl.constexpr,
    WORDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    g, y = tl.load(grad + row), tl.load(target + row)
    counts = (g != 0) & (y >= 0)  # a row that does not count is 0, also where its logits are NaN
    highest, log_total = tl.load(top + row), tl.load(log_sum + row)
    of_target = -_expm1(tl.load(logp + row)) * scale * g
    tiles = tl.cdiv(vocabulary, WORDS)
    for start in range(0, tiles, TILES):
        t = start + tl.arange(0, TILES)
        of_tile = tl.load(tops + t.to(tl.int64) * n_tokens + row, mask=t < tiles, other=float("-inf"))
        factor = -g * scale / lift * tl.exp((of_tile - highest) * scale - log_total)
        v = t[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
        place = e + row * stride + v
        value = tl.load(place, mask=v < vocabulary, other=0.0).to(tl.float32) * factor[:, None]
        value = tl.where(counts, tl.where(v == y, of_target, value), 0.0)
        tl.store(place, value.to(e.dtype.element_ty), mask=v < vocabulary)


def serves(hidden: torch.Tensor, head: torch.Tensor, math: RowMath) -> bool:
    """Whether the fused product takes these operands: 16 bits, rows that the copy engine can read, a Hopper GPU, and no
    soft-cap, whose slopes would not fit into the registers beside the logits.

    Other generations have not been measured: there the vendor's product keeps float32 logits.
    """
    if (
        math.softcap
        or hidden.dtype not in (torch.bfloat16, torch.float16)
        or not all(map(_readable, (hidden, head)))
    ):
        return False
    return _gpu.interpreting() or torch.cuda.get_device_capability(hidden.device)[0] == 9


def _readable(x: torch.Tensor) -> bool:
    """Whether the copy engine reads the rows of ``x``: it wants multiples of 16 bytes."""
    return x.numel() > 0 and x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0


class Tiles:
    """The logits of up to ``tokens`` tokens as tiles (see `chunks.Rows`); ``keep``: a gradient is asked for."""

    def __init__(self, call: Call, tokens: int, keep: bool, entropy: bool) -> None:
        self.call, self.entropy = call, entropy
        vocab, device = call.head.shape[0], call.head.device
        self.tiles = _triton.ceil_div(vocab, WORDS)
        self.own = torch.empty(tokens, device=device)
        shape = 2 + entropy, self.tiles * tokens
        self.sums = torch.empty(shape, device=device)
        self.e = torch.empty(
            tokens if keep else 0, _triton.ceil_div(vocab, 8) * 8, dtype=call.head.dtype, device=device
        )
        self.keep, self.lift = keep, LIFT if call.head.dtype == torch.float16 else 1.0
        self.temperature = call.math.temperature

    def _sums(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.sums[0], self.sums[1], self.sums[-1]

    def compute(self, hidden: torch.Tensor, target: torch.Tensor) -> None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        n, head, bias = hidden.shape[0], self.call.head, self.call.bias
        if n == 0:
            return
        grid = (_triton.ceil_div(n, TOKENS) * self.tiles,)
        with _gpu.on(hidden):
            tiles_kernel[grid](
                TensorDescriptor.from_tensor(hidden, [TOKENS, FEATURES]),
                TensorDescriptor.from_tensor(head, [WORDS, FEATURES]),
                self.own if bias is None else bias, target, self.own, *self._sums(), self.e,
                n, head.shape[0], head.shape[1], self.e.stride(0), LOG2_E / self.temperature, self.lift,
                BIAS=bias is not None, ENTROPY=self.entropy, KEEP=self.keep,
                TOKENS=TOKENS, WORDS=WORDS, FEATURES=FEATURES, num_warps=WARPS, num_stages=STAGES,
            )  # fmt: skip

    def forward(self, target: torch.Tensor, stats: Stats) -> None:
        n = target.shape[0]
        if n == 0:
            return
        with _gpu.on(target):
            combine_kernel[(_triton.ceil_div(n, COMBINED_ROWS),)](
                self.own, *self._sums(), target, stats.logp, stats.top, stats.log_sum,
                stats.logp if stats.entropy is None else stats.entropy,  # not written where it is not wanted
                n, self.call.head.shape[0], self.tiles, 1.0 / self.temperature,
                ENTROPY=stats.entropy is not None, TILES=COMBINED_TILES, ROWS=COMBINED_ROWS, num_warps=4,
            )  # fmt: skip

    def backward(self, target: torch.Tensor, grad: torch.Tensor, stats: Stats) -> torch.Tensor:
        n, vocab = target.shape[0], self.call.head.shape[0]
        dz = self.e[:n, :vocab]
        if n == 0:
            return dz
        with _gpu.on(dz):
            rescale_kernel[(n,)](
                self.e, self.sums[0], target, grad, stats.logp, stats.top, stats.log_sum,
                n, vocab, self.e.stride(0), 1.0 / self.temperature, self.lift,
                TILES=RESCALED_TILES, WORDS=WORDS, num_warps=8,
            )  # fmt: skip
        return dz
