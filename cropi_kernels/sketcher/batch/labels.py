"""Hugging Face labels and tensors of weights, as the pass takes them: positions, targets, and a function of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from ...ops.linear_logprob.contract import Weigh
from .host import on_host, on_this_host, values, waits
from .inputs import check_tensors, of_ones

IGNORED = -100  # a label of a token that is not scored
# The function of weights, from the positions of the scored tokens where the weights are.
Weighing = Callable[[torch.Tensor], Weigh]


class Batch(NamedTuple):
    """The tensors of a batch of which values are checked: as they were given, or in the host's memory."""

    input_ids: torch.Tensor
    segments: torch.Tensor
    labels: torch.Tensor | None
    positions: torch.Tensor | None
    targets: torch.Tensor | None
    attention_mask: torch.Tensor | None  # on the host [batch, length] alone
    position_ids: torch.Tensor | None
    # On the host: an attention_mask of four axes, which is not copied there.
    pairs: torch.Tensor | None = None

    def on_host(self) -> Batch:
        """The batch in the host's memory.

        Raises:
            ValueError: a mask of pairs that attention adds holds ones. One on a device is looked at where the host
                waits for the batch all the same: not in a job, which makes its masks itself.
        """
        mask, ones = self.attention_mask, None
        pairs = mask if mask is not None and mask.ndim == 4 else None
        *given, _ = self if pairs is None else self._replace(attention_mask=None)
        if pairs is not None and pairs.is_floating_point() and (on_this_host(pairs) or waits(*given)):
            ones = (pairs.diagonal(dim1=2, dim2=3) > 0).any().view(1)
        *here, ones = on_host(*given, ones)
        if pairs is not None and ones is not None and bool(ones):
            raise of_ones(pairs)
        return Batch(*here)._replace(pairs=pairs)


def scored_tokens(
    given: Batch, weights: torch.Tensor | Weigh | None, weigh: Weigh | None
) -> tuple[Batch, torch.Tensor, torch.Tensor, Weighing]:
    """What `GradientSketcher.policy_gradient` was given, in the host's memory; the positions and targets of the scored
    tokens (where they were given; those of labels on the host), and their weights.

    Raises:
        ValueError: too much or too little was given, or it does not fit; names which.
    """
    if (weights is None) == (weigh is None):
        raise ValueError("give weights, a tensor or a function (weigh is its older name); one of both")
    chosen = weights if weights is not None else weigh
    assert chosen is not None
    labels, positions, targets = given.labels, given.positions, given.targets
    shape, device = (int(given.input_ids.shape[0]), int(given.input_ids.shape[1])), given.input_ids.device
    if labels is not None:
        if positions is not None or targets is not None:
            raise ValueError("labels say which tokens are scored: leave positions and targets out, or labels")
        _check_labels(labels, given.input_ids)
        here = given.on_host()
        assert here.labels is not None
        positions, targets = from_labels(here.labels, here.input_ids)
        here = here._replace(positions=positions, targets=targets)
        _check_places(positions.numpy(), here.segments, here.attention_mask, shape[1])
    elif positions is None or targets is None:
        raise ValueError("which tokens are scored is not said: give labels, or positions and targets")
    else:
        check_tensors(positions=positions, targets=targets)
        here, device = given.on_host(), positions.device
    weighing = weigher(chosen, positions.numel(), shape, labels is not None, device)
    return here, positions, targets, weighing


def _check_places(
    positions: np.ndarray, segments: torch.Tensor, attention_mask: torch.Tensor | None, length: int
) -> None:
    """A scored token and the one that predicts it belong together, and neither is padding."""
    if attention_mask is not None and not (kept := values(attention_mask).reshape(-1) != 0).all():
        for place, what in ((positions + 1, "is"), (positions, "is predicted from")):
            if not kept[place].all():
                row, column = divmod(int((positions + 1)[~kept[place]][0]), length)
                raise ValueError(
                    f"labels[{row}, {column}] is scored, but {what} padding (attention_mask is 0 there): make it -100"
                )
    if segments.ndim == 2 and segments.numel() > (int(positions.max()) if positions.size else 0) + 1:
        flat = values(segments).reshape(-1)
        other = flat[positions] != flat[positions + 1]
        if other.any():
            row, column = divmod(int((positions + 1)[other][0]), length)
            raise ValueError(
                f"labels[{row}, {column}] is scored, but predicted from a token of another segment: make it -100"
            )


def _check_labels(labels: torch.Tensor, input_ids: torch.Tensor) -> None:
    """All but the values, which are not on the host yet."""
    check_tensors(labels=labels)
    if labels.shape != input_ids.shape or labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"labels is {labels.dtype} {tuple(labels.shape)}: give int64 {tuple(input_ids.shape)}, as input_ids, with "
            "-100 where a token is not scored"
        )
    if labels.device != input_ids.device:
        raise ValueError(
            f"labels is on {labels.device} and input_ids on {input_ids.device}: move one of them"
        )


def from_labels(labels: torch.Tensor, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and targets of the scored tokens, row by row, each row from left to right; all on the host.

    ``labels[i, t]`` is predicted by the hidden state of column t - 1, as Hugging Face models shift them: the first
    column is never scored, and -100 marks a token that is not.

    Raises:
        ValueError: a negative id of a scored token, a negative label other than -100, one that is not the token in its
            place (labels that were shifted before), or a row without a scored token.
    """
    tokens, ids = values(labels), values(input_ids)
    scored = tokens != IGNORED
    first = tokens[:, 0][scored[:, 0]]
    scored[:, 0] = False
    places = scored.reshape(-1).nonzero()[0]
    targets = tokens[scored]
    # Of tokens that are not scored the model itself decides: places of images have negative ids in some.
    if (odd := (ids < 0) & (tokens == ids) & (tokens != IGNORED)).any():
        row, column = (int(at[0]) for at in odd.nonzero())
        raise ValueError(
            f"input_ids[{row}, {column}] is {ids[row, column]}: the id of a scored token is 0 or more (of another, "
            "such as padding, labels are -100)"
        )
    if (low := min(first.min(initial=0), targets.min(initial=0))) < 0:
        raise ValueError(f"labels holds {low}: only -100 marks a token that is not scored")
    if (other := (tokens != ids) & scored).any():
        row, column = (int(at[0]) for at in other.nonzero())
        raise ValueError(
            f"labels[{row}, {column}] is {tokens[row, column]}, and the token there {ids[row, column]}: labels are the "
            "tokens in their own places (not shifted), or -100; other tokens are scored by positions and targets"
        )
    if (none := ~scored.any(axis=1)).any():
        raise ValueError(
            f"labels: nothing of row {int(np.flatnonzero(none)[0])} is scored (-100 everywhere but in column 0): "
            "leave the row out, or mend its labels; a pass that is to score nothing is asked for by positions and "
            "targets of no numbers"
        )
    places -= 1
    return torch.from_numpy(places), torch.from_numpy(targets.astype(np.int64, copy=False))


def weigher(
    weights: torch.Tensor | Weigh, count: int, shape: tuple[int, int], by_labels: bool, device: torch.device
) -> Weighing:
    """The function that gives the weights of scored tokens start .. stop, once their positions are on ``device``.

    Args:
        weights: a function, or a tensor: [batch, length], the weight of the token in each place; [batch], one for all
            scored tokens of a row; or [n], one for each scored token, in order.
        count: of scored tokens.
        shape: (batch, length).
        by_labels: every scored token stands in its row, one place behind its position. Otherwise a row and a place are
            not known (K responses share a prompt), and weights are [n].
        device: of the scored tokens.

    Raises:
        ValueError: another type, shape or device.
    """
    if not isinstance(weights, torch.Tensor):
        if not callable(weights):
            raise ValueError(
                f"weights is of type {type(weights).__name__}: give a tensor (torch.as_tensor(weights)), or a function "
                "weights(logprobs, start, stop)"
            )
        function = weights
        return lambda positions: function
    if weights.device != device:
        raise ValueError(
            f"weights is on {weights.device} and the scored tokens on {device}: move weights there"
        )
    if weights.is_complex():
        raise ValueError(f"weights is {weights.dtype}: give real numbers")
    batch, length = shape
    of, given = tuple(weights.shape), weights.detach()
    if by_labels and of == (batch, length):
        return lambda positions: _slices(given.reshape(-1)[positions + 1])
    if of == (count,):  # by labels every row has a token: if as many, then one of each
        return lambda positions: _slices(given)
    if by_labels and of == (batch,):
        return lambda positions: _slices(given[positions // length])
    shapes = f"[{batch}, {length}] (a token's place), [{batch}] (a row) or " if by_labels else ""
    raise ValueError(f"weights has shape {list(of)}: give {shapes}[{count}] (a scored token, in order)")


def _slices(flat: torch.Tensor) -> Callable[[torch.Tensor, int, int], torch.Tensor]:
    return lambda logprobs, start, stop: flat[start:stop].to(logprobs.dtype)
