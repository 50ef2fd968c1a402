"""Log-probs whose logits leave the tensor cores as statistics, a tile of tokens x words at a time: Hopper, 16 bits.

Of a tile, with an anchor a_t for each row, x = (z - a_t) / T, and the target left out:

    s_t = sum exp(x),    w_t = sum exp(x) x,    e = exp(x)

s_t and w_t are float32 sums over float32 logits. `combine_kernel` makes a row's log-prob of its tiles: with the
largest of its anchors, top, log_sum = log(sum_t s_t exp((a_t - top) / T) + exp((z_target - top) / T)). Where a
gradient follows, e is kept, in the head's dtype.

bfloat16 reaches as far as float32. There the anchor is the target's logit (`own_kernel`), one for all tiles of a row,
so that e is the gradient of the logits up to a factor of the row, which is applied to results with fewer numbers
(`Dlogits`, `scale_kernel`). Where a tile's sum is beyond FAR, `again_kernel` computes it once more, with its largest
logit as the anchor of such rows; `rescale_kernel` puts these rows to one anchor.

In float16 the anchor is always a tile's largest logit, and `rescale_kernel` turns e into the gradient in place. So it
does in bfloat16 for a caller who reads the gradient itself. Then e is rounded twice, where a product that keeps
float32 logits rounds once, and half as many bytes are written and read.

The products are `turns_kernel`'s where this Triton's Gluon is known (`takes_turns`), else `tiles_kernel`'s: same bits.
"""

from __future__ import annotations

import functools

import torch

from ... import _gpu, _triton
from ..._launch import OPTIONS
from ..._triton import takes_turns
from .chunks import Call
from .contract import Dlogits, RowMath, Stats
from .triton_tile_kernels import (
    again_kernel,
    combine_kernel,
    own_kernel,
    rescale_kernel,
    scale_kernel,
    tiles_kernel,
)

TOKENS, WORDS, FEATURES = 128, 256, 64  # of a tile; of the product's inner step
STAGES, WARPS = 4, 8
OWN_ROWS, OWN_FEATURES = 4, 256  # of a program of `own_kernel`
FLAGS = 64  # marks that a program of `again_kernel` looks at
COMBINED_TILES, COMBINED_ROWS = 64, 16
RESCALED_TILES = 16
SCALED = 1024  # features of a program of `scale_kernel`
LOG2_E = 1.4426950408889634
LIFT = 2.0**15  # factor of e in float16, whose small numbers lose their digits


def by_row(dtype: torch.dtype) -> bool:
    """Whether e has one anchor a row: bfloat16 reaches as far as float32 does."""
    return dtype == torch.bfloat16


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
    return _gpu.interpreting() or _triton.is_hopper(hidden.device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _readable(x: torch.Tensor) -> bool:
    """Whether the copy engine reads the rows of ``x``: it wants multiples of 16 bytes, and no row within another."""
    rows = x.stride(0) % 8 == 0 and x.stride(0) >= x.shape[1]
    return x.numel() > 0 and x.stride(1) == 1 and rows and x.data_ptr() % 16 == 0


class Tiles:
    """The logits of up to ``tokens`` tokens as tiles (see `chunks.Rows`); ``keep``: a gradient is asked for."""

    def __init__(self, call: Call, tokens: int, keep: bool, entropy: bool) -> None:
        self.call, self.keep, self.entropy = call, keep, entropy
        (vocab, _), device, dtype = call.head.shape, call.head.device, call.head.dtype
        self.by_row = by_row(dtype)
        self.lift = 1.0 if self.by_row else LIFT
        self.tiles = _triton.ceil_div(vocab, WORDS)
        self.own, self.factor, self.missing = torch.empty(3, tokens, dtype=torch.float32, device=device)
        self.sums = torch.empty(2 + entropy, self.tiles * tokens, dtype=torch.float32, device=device)
        self.far = torch.empty(
            self.tiles * _triton.ceil_div(tokens, TOKENS), dtype=torch.int32, device=device
        )
        width = _triton.ceil_div(vocab, 8) * 8
        self.e = torch.empty(tokens if keep else 0, width, dtype=dtype, device=device)
        self.scale = 1.0 / call.math.temperature

    def compute(self, hidden: torch.Tensor, target: torch.Tensor) -> None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        n, head, bias = hidden.shape[0], self.call.head, self.call.bias
        if n == 0:
            return
        across = _triton.ceil_div(n, TOKENS)
        vector = self.own if bias is None else bias
        with _gpu.on(hidden):
            own_kernel[(_triton.ceil_div(n, OWN_ROWS),)](
                hidden, head, vector, target, self.own, n, *head.shape, hidden.stride(0), head.stride(0),
                BIAS=bias is not None, ROWS=OWN_ROWS, FEATURES=OWN_FEATURES, num_warps=4, **OPTIONS,
            )  # fmt: skip
            tiled = (
                TensorDescriptor.from_tensor(hidden, [TOKENS, FEATURES]),
                TensorDescriptor.from_tensor(head, [WORDS, FEATURES]),
            )
            given = vector, target, self.own, self.sums[0], self.sums[1], self.sums[-1]
            sizes, scale = (n, *head.shape), LOG2_E * self.scale
            kinds = dict(LIFT=self.lift, BIAS=bias is not None, ENTROPY=self.entropy, KEEP=self.keep)
            kinds |= dict(TOKENS=TOKENS, WORDS=WORDS, FEATURES=FEATURES)
            pipelined = dict(num_stages=STAGES, num_warps=WARPS)
            others = (*given, self.e, self.far, *sizes, self.e.stride(0), scale)
            if self.by_row:
                self.far.zero_()
            if self.by_row and takes_turns(hidden.device):
                from .triton_turns import GROUPS, PIECES, described, turns_kernel
                from .triton_turns import WARPS as GROUP_WARPS

                rows = TOKENS // GROUPS.value
                kept = described(self.e[:n, : sizes[1]], rows, WORDS // PIECES.value) if self.keep else self.e
                turns_kernel[(min(_multiprocessors(hidden.device), across * self.tiles),)](
                    described(hidden, rows, FEATURES), described(head, WORDS, FEATURES), *given, kept, self.far, *sizes,
                    scale, BY_ROW=self.by_row, STAGES=STAGES, **kinds, num_warps=GROUP_WARPS.value, **OPTIONS,
                )  # fmt: skip
            else:
                tiles_kernel[(across * self.tiles,)](
                    *tiled, *others, BY_ROW=self.by_row, **kinds, **pipelined, **OPTIONS
                )
            if self.by_row:
                again_kernel[(self.tiles, _triton.ceil_div(across, FLAGS))](
                    *tiled, *others, **kinds, FLAGS=FLAGS, **pipelined, **OPTIONS
                )

    def forward(self, target: torch.Tensor, stats: Stats) -> None:
        n = target.shape[0]
        if n == 0:
            return
        with _gpu.on(target):
            combine_kernel[(_triton.ceil_div(n, COMBINED_ROWS),)](
                self.own, self.sums[0], self.sums[1], self.sums[-1], target, stats.logp, stats.top, stats.log_sum,
                stats.logp if stats.entropy is None else stats.entropy,  # without ENTROPY nothing is written there
                n, self.call.head.shape[0], self.tiles, self.scale,
                ENTROPY=stats.entropy is not None, TILES=COMBINED_TILES, ROWS=COMBINED_ROWS, num_warps=4, **OPTIONS,
            )  # fmt: skip

    def backward(self, target: torch.Tensor, grad: torch.Tensor, stats: Stats, whole: bool) -> Dlogits:
        n, vocab = target.shape[0], self.call.head.shape[0]
        whole = whole or not self.by_row
        dz = self.e[:n, :vocab]
        if n:
            with _gpu.on(dz):
                rescale_kernel[(n,)](
                    self.e, self.sums[0], self.own, target, grad, stats.logp, stats.top, stats.log_sum, self.factor,
                    self.missing, n, vocab, self.e.stride(0), self.scale,
                    LIFT=self.lift, WHOLE=whole, TILES=RESCALED_TILES, WORDS=WORDS, num_warps=8, **OPTIONS,
                )  # fmt: skip
        return Dlogits(dz, None if whole else self.factor[:n])

    def times_head(self, gradient: Dlogits, target: torch.Tensor, out: torch.Tensor) -> None:
        kernels, head, (n, features) = self.call.kernels, self.call.head, out.shape
        if gradient.factor is None:
            return kernels.times_head(gradient.dz, head, out)
        product = torch.empty(n, features, dtype=torch.float32, device=out.device)
        kernels.times_head(gradient.dz, head, product)
        with _gpu.on(out):
            scale_kernel[(n, _triton.ceil_div(features, SCALED))](
                product, head, target, gradient.factor, self.missing, out, head.shape[0], features, head.stride(0),
                out.stride(0), FEATURES=SCALED, num_warps=4, **OPTIONS,
            )  # fmt: skip
