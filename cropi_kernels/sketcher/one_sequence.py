"""Refuses rows that hold several sequences where the caller gave one segment for each row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .row_segments import Runs

BOUNDS = ("cu_seq_lens_q", "cu_seqlens", "cu_seq_lens", "cu_seqlens_q")  # as models take them
REMEDY = "give segments per token [batch, length] (equal numbers, where they are responses to one prompt)"


@contextlib.contextmanager
def one_sequence_a_row(model: nn.Module, runs: Runs) -> Iterator[None]:
    """Check the calls of ``model`` inside, where segments were given per row.

    Raises (from the call):
        ValueError: positions restart within a row, or bounds of more sequences than rows were given.
    """
    if not runs.rows:
        yield
        return

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            check_call(runs.segments.batch, kwargs)

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def check_call(batch: int, kwargs: dict[str, Any]) -> None:
    for name in BOUNDS:
        bounds = kwargs.get(name)
        if isinstance(bounds, torch.Tensor) and bounds.numel() - 1 > batch:
            raise ValueError(
                f"{name} names {bounds.numel() - 1} sequences in {batch} rows, but segments holds one number a row: "
                f"{REMEDY}"
            )
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if not isinstance(positions, torch.Tensor) or positions.ndim != 2 or positions.shape[1] < 2:
        return
    back = positions[:, 1:] < positions[:, :-1]
    if isinstance(mask, torch.Tensor) and mask.shape == positions.shape:
        back = back & mask[:, 1:].bool() & mask[:, :-1].bool()
    if bool(back.any()):
        row, column = (int(i) for i in back.nonzero()[0])
        raise ValueError(
            f"row {row} holds several sequences (position_ids restart in column {column + 1}), but segments holds one "
            f"number a row: {REMEDY}"
        )
