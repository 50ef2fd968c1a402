"""Refuses rows that hold several sequences where the caller gave one segment for each row, or where nothing keeps the
sequences apart."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from .host import values
from .labels import Batch
from .row_segments import Runs

BOUNDS = ("cu_seq_lens_q", "cu_seqlens", "cu_seq_lens", "cu_seqlens_q")  # as models take them
# Inputs of a model that sees or hears: what its towers are called on are no rows of the batch.
OTHERS = re.compile("pixel|image|video|audio|speech|input_features|input_values")
SQUARE = "a bool attention_mask [batch, 1, length, length], True where to attend"
APART = f"give position_ids that begin anew with each sequence, or {SQUARE}"
REMEDY = "give segments per token [batch, length] (equal numbers, where they are responses to one prompt)"


@contextlib.contextmanager
def one_sequence_a_row(model: nn.Module, runs: Runs) -> Iterator[None]:
    """Check the calls of ``model`` inside, where segments were given per row.

    Raises (from the call):
        ValueError: positions restart within a row, the mask numbers its sequences, or bounds of more sequences than
            rows were given.
    """
    if not runs.rows:
        yield
        return

    output: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = output()

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            check_call(runs.segments.batch, kwargs)
            if any(OTHERS.search(name) and isinstance(kwargs[name], torch.Tensor) for name in kwargs):
                runs.only_heads([name for name, part in model.named_modules() if part is head])

    with model.register_forward_pre_hook(look, with_kwargs=True):
        yield


def check_call(batch: int, kwargs: dict[str, Any]) -> None:
    for name in BOUNDS:
        bounds = kwargs.get(name)
        if isinstance(bounds, torch.Tensor) and bounds.numel() - 1 > batch:
            raise ValueError(
                f"{name} names {bounds.numel() - 1} sequences in {batch} rows, but segments holds one number a row: "
                f"{REMEDY}"
            )
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    why = ""
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[0] == batch:
        if (at := numbered(mask)) is not None:
            row, why = at[0], f"attention_mask is {mask[at].item():g} in column {at[1]}"
    if not why and isinstance(positions, torch.Tensor) and positions.ndim == 2:
        same = isinstance(mask, torch.Tensor) and mask.shape == positions.shape
        if (at := restart(positions, mask if same else None)) is not None:
            row, why = at[0], f"position_ids restart in column {at[1]}"
    if why:
        raise ValueError(
            f"row {row} holds several sequences ({why}), but segments holds one number a row: {REMEDY}"
        )


def check_apart(here: Batch, packing: str | None) -> None:
    """Check that no token attends to one of another sequence of its row; ``here``: a batch on the host, without a mask
    that says for each token what it attends to. Padding, and what stands behind a row's last scored token, may be of
    any segment and position.

    Args:
        packing: `Probe.packing`, or None where that is not measured.

    Raises:
        ValueError: a row holds several segments and no positions that begin anew, or several sequences that the model
            does not keep apart; names the row and the column.
    """
    shape, positions = here.input_ids.shape, here.position_ids
    several = here.segments.ndim == 2 and bool((here.segments[:, 1:] != here.segments[:, :-1]).any())
    if positions is None and not several:
        return
    read = _read(here)
    where = None if positions is None else positions.reshape(-1, *positions.shape[-2:])[0].expand(shape)
    if several:
        segments, numbers = values(here.segments), None if where is None else values(where)
        mixed = (segments[:, 1:] != segments[:, :-1]) & read[:, 1:] & read[:, :-1]
        if numbers is not None:
            mixed &= numbers[:, 1:] > numbers[:, :-1]
        if (at := _first(mixed)) is not None:
            raise ValueError(
                f"another segment begins in row {at[0]}, column {at[1] + 1}, and its tokens attend to those before: "
                f"{APART}"
            )
    if where is None or (at := restart(where, torch.from_numpy(read))) is None:
        return
    if packing == "wrong" or packing == "without a mask" and here.attention_mask is not None:
        beside = "" if packing == "wrong" else " beside an attention_mask [batch, length]: leave that out, or"
        raise ValueError(
            f"row {at[0]} holds several sequences (position_ids restart in column {at[1]}), which the model does not "
            f"keep apart by position_ids{beside or ':'} give {SQUARE}, or one sequence a row"
        )


def _read(here: Batch) -> np.ndarray:
    """bool [batch, length]: no padding, and not behind the last token of its row that predicts a scored one."""
    assert here.positions is not None
    batch, length = here.input_ids.shape
    rows, columns = np.divmod(values(here.positions), length)
    last = np.full(batch, -1)
    np.maximum.at(last, rows, columns)
    read = np.arange(length) <= last[:, None]
    return read if here.attention_mask is None else read & (values(here.attention_mask) != 0)


def numbered(mask: torch.Tensor) -> tuple[int, int] | None:
    """The row and column of the first number of a mask [batch, length] other than 0 and 1: there are trainers that
    number the sequences of a row in it."""
    if mask.dtype == torch.bool:
        return None
    numbers = _numbers(mask)
    return _first((numbers != 0) & (numbers != 1))


def restart(positions: torch.Tensor, mask: torch.Tensor | None) -> tuple[int, int] | None:
    """The row and column of the first token whose position is below that of the token before; ``mask`` is 0 for
    padding, whose positions say nothing."""
    numbers = _numbers(positions)
    back = numbers[:, 1:] < numbers[:, :-1]
    if mask is not None:
        kept = _numbers(mask) != 0
        back = back & kept[:, 1:] & kept[:, :-1]
    at = _first(back)
    return None if at is None else (at[0], at[1] + 1)


def _numbers(x: torch.Tensor) -> Any:
    """Of a tensor on the host as numpy has them, whose operators take a fraction of torch's time."""
    return values(x) if x.is_cpu else x


def _first(marks: Any) -> tuple[int, int] | None:
    if not bool(marks.any()):
        return None
    row, column = torch.as_tensor(marks).nonzero()[0].tolist()
    return row, column
