"""The parts of one policy-gradient pass: what may go in, the head's log-probs and sketch, what counts as failed."""

from __future__ import annotations

import dataclasses

import torch

from ..ops.linear_logprob import logprob_and_grad
from ..ops.linear_logprob.contract import Weigh
from ..ops.norm_grad import bias_grad
from ..ops.sketch_vector import sketch_vector
from .accumulator import Accumulator
from .batch import Segments
from .coverage import Plan
from .decoder import SplitModel


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
    """Result of `GradientSketcher.policy_gradient`.

    ``sketches`` float32 [segments, dim], a row of NaN where the segment met a NaN or an infinity; ``logprobs`` and
    ``weights`` float32 [scored tokens]; ``seconds``: forward, backward, and the part of both that was sketching.
    """

    sketches: torch.Tensor
    logprobs: torch.Tensor
    weights: torch.Tensor
    seconds: dict[str, float]


# ------------------------------------------------------------------------------------------ what goes in
def check_tensors(**given: object) -> None:
    for name, x in given.items():
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} is of type {type(x).__name__}: give a tensor (torch.as_tensor({name}))")


def check_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> None:
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: give a non-empty [batch, length]")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids is {input_ids.dtype}: give int64 token ids (input_ids.long())")
    batch, length = input_ids.shape
    optional = {"attention_mask": attention_mask, "position_ids": position_ids}
    check_tensors(**{name: x for name, x in optional.items() if x is not None})
    # Torch would broadcast some wrong shapes of a mask, and the wrong tokens be attended to.
    if attention_mask is not None:
        shape = tuple(attention_mask.shape)
        square = len(shape) == 4 and shape[0] in (1, batch) and shape[2:] == (length, length)
        if shape != (batch, length) and not square:
            raise ValueError(
                f"attention_mask has shape {shape}: give [{batch}, {length}], 1 for tokens and 0 for padding, or bool "
                f"[{batch}, 1, {length}, {length}], True where to attend"
            )
    if position_ids is not None and tuple(position_ids.shape[-2:]) not in ((batch, length), (1, length)):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}: give int64 [{batch}, {length}], as input_ids"
        )


def check_positions(input_ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor) -> None:
    if positions.shape != targets.shape or positions.ndim != 1 or positions.dtype != torch.int64:
        raise ValueError(
            f"positions {tuple(positions.shape)} {positions.dtype} and targets {tuple(targets.shape)} "
            f"{targets.dtype} must be int64 of one length: a position and a token id per scored token"
        )
    if positions.numel():
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= input_ids.numel():
            last = input_ids.numel() - 1
            raise ValueError(f"positions run from {low} to {high}: input_ids holds 0 .. {last}")


def check_vocabulary(input_ids: torch.Tensor, targets: torch.Tensor, vocab: int) -> None:
    for name, ids in (("input_ids", input_ids), ("targets", targets)):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
            low, high = int(ids.min()), int(ids.max())
            raise ValueError(f"{name} runs from {low} to {high}: the vocabulary is 0 .. {vocab - 1}")


def scored_offsets(where: Segments, positions: torch.Tensor) -> torch.Tensor:
    """Range of scored tokens of each segment, from the segment of the token that predicts them."""
    segment = torch.searchsorted(where.offsets, positions.cpu().contiguous(), right=True) - 1
    if bool((segment[1:] < segment[:-1]).any()):
        raise ValueError("positions jump back to an earlier segment: sort the scored tokens by segment")
    return torch.searchsorted(segment, torch.arange(where.count + 1, device="cpu"))


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask (True where to attend) as eager attention wants it, which adds what it is given."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(dtype).min
    )


# ---------------------------------------------------------------------------------------------- the head
def head_pass(
    split: SplitModel,
    plan: Plan,
    acc: Accumulator,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    targets: torch.Tensor,
    weigh: Weigh,
    temperature: float,
    scored: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, gradient of the hidden states, weights; the head's own sketch rides along chunk by chunk."""
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    picked = flat[positions]
    matrix, bias = plan.head_matrix, plan.head_bias
    scored = scored.to(flat.device)

    def sketch_head(begin: int, end: int, dz: torch.Tensor) -> None:
        with acc.timed():
            offsets = scored.clamp(begin, end) - begin
            if matrix is not None:
                matrix.add(dz, matrix.keep(picked[begin:end]), offsets, acc.out)
            if bias is not None:
                sketch_vector(bias_grad(dz, offsets), bias, acc.out)

    with torch.no_grad():
        logprobs, grad_picked, weights = logprob_and_grad(
            picked,
            split.head.weight,
            targets,
            weigh,
            bias=split.head.bias,
            temperature=temperature / split.scale,
            softcap=split.softcap,
            on_dlogits=sketch_head if matrix is not None or bias is not None else None,
        )
        grad = _add_rows(torch.zeros_like(flat), positions, grad_picked.to(flat.dtype))
    return logprobs, grad.view_as(hidden), weights


def _add_rows(out: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``out[positions] += rows`` in a fixed order: on a GPU `index_add_` adds in the order of arrival."""
    if out.is_cuda:
        return out.index_put_((positions,), rows, accumulate=True)  # sorts the positions first
    return out.index_add_(0, positions, rows)


def failed_segments(logprobs: torch.Tensor, weights: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Segments with a log-prob or weight that is not finite: they fail even where the sum would hide it."""
    bad = (~(logprobs.isfinite() & weights.isfinite())).nonzero().flatten().cpu()
    return (torch.searchsorted(scored, bad, right=True) - 1).unique()
