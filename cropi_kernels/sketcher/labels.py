"""Hugging Face labels and tensors of weights, as the pass takes them: positions, targets, and a function of weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..ops.linear_logprob.contract import Weigh
from .inputs import check_tensors

IGNORED = -100  # a label of a token that is not scored


def scored_tokens(
    input_ids: torch.Tensor,
    segments: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    weights: torch.Tensor | Weigh | None,
    positions: torch.Tensor | None,
    targets: torch.Tensor | None,
    weigh: Weigh | None,
) -> tuple[torch.Tensor, torch.Tensor, Weigh]:
    """Positions, targets and the function of weights, from what `GradientSketcher.policy_gradient` was given.

    Raises:
        ValueError: too much or too little was given, or it does not fit; names which.
    """
    if (weights is None) == (weigh is None):
        raise ValueError("give weights, a tensor or a function (weigh is its older name); one of both")
    given = weights if weights is not None else weigh
    assert given is not None
    if labels is not None:
        if positions is not None or targets is not None:
            raise ValueError("labels say which tokens are scored: leave positions and targets out, or labels")
        positions, targets = from_labels(labels, input_ids)
        _check_places(positions, segments, attention_mask, input_ids.shape[1])
    elif positions is None or targets is None:
        raise ValueError("which tokens are scored is not said: give labels, or positions and targets")
    else:
        check_tensors(positions=positions, targets=targets)
    shape = int(input_ids.shape[0]), int(input_ids.shape[1])
    return positions, targets, weigher(given, positions, shape, labels is not None)


def _check_places(
    positions: torch.Tensor, segments: torch.Tensor, attention_mask: torch.Tensor | None, length: int
) -> None:
    """A scored token and the one that predicts it belong together, and neither is padding."""
    if attention_mask is not None and attention_mask.ndim == 2:
        kept = attention_mask.reshape(-1).to(positions.device) != 0
        for place, what in ((positions + 1, "is"), (positions, "is predicted from")):
            if not bool(kept[place].all()):
                row, column = divmod(int((positions + 1)[~kept[place]][0]), length)
                raise ValueError(
                    f"labels[{row}, {column}] is scored, but {what} padding (attention_mask is 0 there): make it -100"
                )
    if segments.ndim == 2 and segments.numel() > int(positions.max() if positions.numel() else 0) + 1:
        flat = segments.reshape(-1).to(positions.device)
        other = flat[positions] != flat[positions + 1]
        if bool(other.any()):
            row, column = divmod(int((positions + 1)[other][0]), length)
            raise ValueError(
                f"labels[{row}, {column}] is scored, but predicted from a token of another segment: make it -100"
            )


def from_labels(labels: torch.Tensor, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and targets of the scored tokens, row by row, each row from left to right.

    ``labels[i, t]`` is predicted by the hidden state of column t - 1, as Hugging Face models shift them: the first
    column is never scored, and -100 marks a token that is not.

    Raises:
        ValueError: no tensor of integers of ``input_ids``' shape, a negative label other than -100, one that is not
            the token in its place (labels that were shifted before), or a row without a scored token.
    """
    if not isinstance(labels, torch.Tensor):
        raise ValueError(
            f"labels is of type {type(labels).__name__}: give a tensor (torch.as_tensor(labels))"
        )
    if labels.shape != input_ids.shape or labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"labels is {labels.dtype} {tuple(labels.shape)}: give int64 {tuple(input_ids.shape)}, as input_ids, with "
            "-100 where a token is not scored"
        )
    if labels.device != input_ids.device:
        raise ValueError(
            f"labels is on {labels.device} and input_ids on {input_ids.device}: move one of them"
        )
    if bool(((labels < 0) & (labels != IGNORED)).any()):
        lowest = int(labels[labels != IGNORED].min())
        raise ValueError(f"labels holds {lowest}: only -100 marks a token that is not scored")
    if bool((other := (labels[:, 1:] != IGNORED) & (labels[:, 1:] != input_ids[:, 1:])).any()):
        row, column = other.nonzero()[0].tolist()
        column += 1
        raise ValueError(
            f"labels[{row}, {column}] is {int(labels[row, column])}, and the token there "
            f"{int(input_ids[row, column])}: labels are the tokens in their own places (not shifted), or -100; other "
            "tokens are scored by positions and targets"
        )
    shifted = labels[:, 1:].long()
    scored = shifted != IGNORED
    if bool((none := ~scored.any(dim=1)).any()):
        raise ValueError(
            f"labels: nothing of row {int(none.nonzero()[0])} is scored (-100 everywhere but in column 0): "
            "leave the row out, or mend its labels; a pass that is to score nothing is asked for by positions and "
            "targets of no numbers"
        )
    row, column = scored.nonzero(as_tuple=True)
    return row * labels.shape[1] + column, shifted[row, column]


def weigher(
    weights: torch.Tensor | Weigh, positions: torch.Tensor, shape: tuple[int, int], by_labels: bool
) -> Weigh:
    """The function that gives the weights of scored tokens start .. stop.

    Args:
        weights: a function, or a tensor: [batch, length], the weight of the token in each place; [batch], one for all
            scored tokens of a row; or [n], one for each scored token, in order.
        positions: int64 [n], where each scored token is predicted.
        shape: (batch, length).
        by_labels: every scored token stands in its row, one place behind its position. Otherwise a row and a place are
            not known (K responses share a prompt), and weights are [n].

    Raises:
        ValueError: another type, shape or device.
    """
    if not isinstance(weights, torch.Tensor):
        if not callable(weights):
            raise ValueError(
                f"weights is of type {type(weights).__name__}: give a tensor (torch.as_tensor(weights)), or a function "
                "weights(logprobs, start, stop)"
            )
        return weights
    if weights.device != positions.device:
        raise ValueError(
            f"weights is on {weights.device} and the scored tokens on {positions.device}: move weights there"
        )
    if weights.is_complex():
        raise ValueError(f"weights is {weights.dtype}: give real numbers")
    batch, length = shape
    values, count = weights.detach(), positions.numel()
    if not values.is_floating_point():
        values = values.float()
    if by_labels and tuple(values.shape) == (batch, length):
        flat = values.reshape(-1)[positions + 1]
    elif tuple(values.shape) == (count,):  # by labels every row has a token: if as many, then one of each
        flat = values
    elif by_labels and tuple(values.shape) == (batch,):
        flat = values[positions // length]
    else:
        shapes = f"[{batch}, {length}] (a token's place), [{batch}] (a row) or " if by_labels else ""
        raise ValueError(
            f"weights has shape {list(values.shape)}: give {shapes}[{count}] (a scored token, in order)"
        )
    return _slices(flat)


def _slices(flat: torch.Tensor) -> Callable[[torch.Tensor, int, int], torch.Tensor]:
    return lambda logprobs, start, stop: flat[start:stop].to(logprobs.dtype)
