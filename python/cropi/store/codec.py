"""How the numbers of a sketch are stored: float32, float16, bfloat16, or 8, 4 or 1 bit with a scale per block.

A row ``x`` is kept as integers ``q`` and a scale ``s`` for every block of :data:`BLOCK` entries: ``x = s q``. One scale
a row would not do: a few coordinates that many tokens share hold up to half of a policy gradient's norm, and the others
would be rounded away (a relative error of 0.1 instead of 0.015 with 8 bits).

============  =========================================  ==================================
dtype         stored                                      largest error of an entry
============  =========================================  ==================================
float32       the number                                  0
float16       ``x / s``, s a power of two for the row     2^-11 \\|x\\| + 2^-25 max \\|x\\|
bfloat16      the number                                  2^-8 \\|x\\|
int8          ``round(x / s)``, ``s = max|x| / 127``      s / 2
int4          ``round(x / s)``, ``s = max|x| / 7``        s / 2
int1          the sign, ``s = mean|x|``                   max(\\|x\\|, s)
============  =========================================  ==================================

4 and 1 bit are packed into bytes, the first entry in the lowest bits; 4 bits hold ``q + 8``. One bit is the sign with
the scale of least squares (QLESS, arXiv 2502.01703); docs/store.md says what it costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from cropi.errors import CropiError
from cropi_kernels import QuantizedRows, quantize_rows
from cropi_kernels.quantize import BLOCK

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "int4": torch.uint8,
    "int1": torch.uint8,
}
PACKED = {"int4": 4, "int1": 1}  # bits an entry
_TINY = torch.finfo(torch.float32).tiny


def check_dtype(dtype: str, dim: int) -> None:
    """Check that rows of ``dim`` numbers can be stored so.

    Raises:
        CropiError: an unknown dtype, or packed entries that do not fill bytes.
    """
    if dtype not in DTYPES:
        raise CropiError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype in PACKED and dim % 8:
        raise CropiError(f"dtype {dtype} needs a dim that is a multiple of 8, got {dim}; take int8")


def row_bytes(dtype: str, dim: int) -> int:
    """Bytes of the ``dim`` numbers of a row; its scales come to 3 % more at most."""
    return dim * (PACKED.get(dtype) or 8 * DTYPES[dtype].itemsize) // 8


def encode(rows: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
    """Float32 rows ``[n, dim]`` in a store's dtype: the tensors of a shard, by name."""
    rows = rows.to(torch.float32).contiguous()
    if dtype in ("float32", "bfloat16"):
        return {"sketch": rows.to(DTYPES[dtype])}
    if dtype in ("int8", "float16"):
        held = quantize_rows(rows, DTYPES[dtype])
        return {"sketch": held.values, "scale": held.scale}
    block = math.gcd(rows.shape[1], BLOCK)
    blocks = rows.view(len(rows), rows.shape[1] // block, block)
    if dtype == "int1":
        scale = blocks.abs().mean(dim=2)
        bits = (blocks >= 0).view(len(rows), rows.shape[1] // 8, 8).to(torch.uint8)
        packed = (bits << torch.arange(8, dtype=torch.uint8, device="cpu")).sum(dim=2, dtype=torch.uint8)
        return {"int1": packed, "scale": scale}
    scale = (blocks.abs().amax(dim=2) / 7).clamp_min(_TINY)
    values = (blocks / scale[..., None]).round().to(torch.int8).view_as(rows)
    nibbles = (values + 8).to(torch.uint8).view(len(rows), rows.shape[1] // 2, 2)
    return {"int4": nibbles[..., 0] | (nibbles[..., 1] << 4), "scale": scale}


def decode(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The float32 rows of a shard's tensors."""
    if "int4" in tensors:
        packed = tensors["int4"]
        pairs = torch.stack([packed & 15, packed >> 4], dim=-1)
        rows = pairs.view(len(packed), 2 * packed.shape[1]).to(torch.float32) - 8
    elif "int1" in tensors:
        packed = tensors["int1"]
        bits = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1
        rows = bits.view(len(packed), 8 * packed.shape[1]).to(torch.float32) * 2 - 1
    else:
        rows = tensors["sketch"].to(torch.float32)
    return QuantizedRows(rows, tensors["scale"]).float() if "scale" in tensors else rows
