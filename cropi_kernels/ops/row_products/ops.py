"""The operator ``cropi::row_products``: checks, choice of backend, shapes for tracing."""

from __future__ import annotations

import torch

from ... import dispatch
from ..._library import register
from .._checks import check_devices, check_plain
from . import cpu

REMEDY = "give fewer rows a call"
MOST_THREADS = 1024  # OpenMP takes any number, and ends the process where it cannot start them


def _rows(
    rows: torch.Tensor,
    directions: torch.Tensor,
    scale: torch.Tensor | None,
    bits: int,
    threads: int,
    backend: str | None,
) -> torch.Tensor:
    out = _rows_fake(rows, directions, scale, bits, threads, backend)
    against = None if rows.device.type == "cpu" else f"the rows are on {rows.device}"
    without = {"cpu": against, "triton": "no Triton kernel of this op exists"}
    chosen = dispatch.choose("row_products", directions, backend=backend, without=without)
    dispatch.kernels(__package__, chosen).row_products(rows, directions, scale, bits, threads, out)
    return out


def _rows_fake(
    rows: torch.Tensor,
    directions: torch.Tensor,
    scale: torch.Tensor | None,
    bits: int,
    threads: int,
    backend: str | None,
) -> torch.Tensor:
    _check(rows, directions, scale, bits)
    check_threads(threads)
    return rows.new_empty(rows.shape[0], directions.shape[0] + 1, dtype=torch.float64)


def check_threads(threads: int, least: int = 0) -> None:
    """Check a number of threads; the operator's 0 is torch's number."""
    if not least <= threads <= MOST_THREADS:
        raise ValueError(f"threads={threads}: give a number from 1 to {MOST_THREADS}, or None for torch's")


def _check(rows: torch.Tensor, directions: torch.Tensor, scale: torch.Tensor | None, bits: int) -> None:
    if directions.ndim != 2 or directions.dtype != torch.float32:
        raise ValueError(
            f"directions is {directions.dtype} {tuple(directions.shape)}: give float32 [directions, dim]"
        )
    if bits not in (0, 1, 4):
        raise ValueError(f"bits={bits}: rows are packed with 4 or 1 bits, or not (None)")
    wanted = (torch.uint8,) if bits else tuple(cpu.KINDS)
    if rows.ndim != 2 or rows.dtype not in wanted:
        names = "uint8" if bits else "float32, bfloat16, float16 or int8"
        raise ValueError(f"rows is {rows.dtype} {tuple(rows.shape)}: give {names} rows [n, dim]")
    dim = rows.shape[1] * (8 // bits if bits else 1)
    if dim != directions.shape[1]:
        raise ValueError(f"rows have {dim} entries, but directions has shape {tuple(directions.shape)}")
    check_plain("rows", rows)
    check_plain("directions", directions)
    check_devices("rows", rows, directions=directions)
    if scale is None:
        return
    if scale.ndim != 2 or scale.dtype != torch.float32 or scale.shape[0] != rows.shape[0]:
        raise ValueError(
            f"scale is {scale.dtype} {tuple(scale.shape)}: give float32 [{rows.shape[0]}, blocks]"
        )
    if scale.shape[1] == 0 or dim % scale.shape[1]:
        raise ValueError(f"scale has {scale.shape[1]} blocks, which do not divide {dim} entries")
    check_plain("scale", scale)
    check_devices("rows", rows, scale=scale)


ROWS = register(
    "row_products(Tensor rows, Tensor directions, Tensor? scale, int bits, int threads, str? backend) -> Tensor",
    _rows, _rows_fake, remedy=REMEDY,
)  # fmt: skip
