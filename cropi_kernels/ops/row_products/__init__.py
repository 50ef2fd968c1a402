"""Products of stored rows with a few directions, and the rows' squared lengths."""

from __future__ import annotations

import torch

from ..._library import plain
from . import ops

__all__ = ["row_products"]


def row_products(
    rows: torch.Tensor,
    directions: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    bits: int | None = None,
    threads: int | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``products[b, v] = <x[b], directions[v]>`` and ``squares[b] = |x[b]|^2``, ``x[b, i] = scale[b, j] q[b, i]``.

    The stored numbers ``q`` are read once; the rows are never formed as float32. Sums are float32 within 512 entries
    and float64 beyond, so the error of a product is at most ``(512 / 8 + 6) 2^-24 sum_i |x_i d_i|``. They are taken in
    one order, whatever the number of threads and whichever rows lie beside: equal rows have equal products.

    Args:
        rows: ``q``, [n, dim]: float32, bfloat16, float16 or int8, or uint8 with ``bits``.
        directions: float32 [v, dim].
        scale: float32 [n, blocks], one for every ``dim / blocks`` entries; None is 1.
        bits: 4 or 1 for packed uint8 rows [n, dim bits / 8], the first entry in the lowest bits: 4 bits hold ``q + 8``,
            one bit is set for 1 and clear for -1.
        threads: of the C++ kernel; None: torch's. 1 where several threads of the caller multiply a block each.
        backend: ``"cpu"``, ``"reference"`` or None for the best.

    Returns float64 [n, v] and [n].

    >>> row_products(torch.tensor([[3, -4]], dtype=torch.int8), torch.tensor([[1.0, 1.0]]), torch.tensor([[0.5]]))
    (tensor([[-0.5000]], dtype=torch.float64), tensor([6.2500], dtype=torch.float64))

    Raises:
        ValueError: names the operand whose shape, dtype or device is wrong, or the number of threads.
        RuntimeError: the backend that was named cannot serve the call; says why.
    """
    scale = None if scale is None else plain(scale)
    if threads is not None:
        ops.check_threads(threads, least=1)
    made = ops.ROWS(plain(rows), plain(directions), scale, bits or 0, threads or 0, backend)
    return made[:, :-1], made[:, -1]
