"""The head of one policy-gradient pass: log-probs, weights, its own sketch, and which segments failed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ...adding import add_rows
from ...ops.linear_logprob.contract import Dlogits, Weigh
from ...ops.norm_grad import bias_grad
from ..attach.attachment import Attachment
from ..batch.segments import Segments
from .scale import SegmentScales
from .split import SplitModel


@dataclasses.dataclass(frozen=True, repr=False)
class PolicyGradient:
    """Result of `GradientSketcher.policy_gradient`.

    ``sketches`` float32 [segments, dim], a row of NaN where the segment has a NaN or an infinity (of a sketcher with
    groups of parameters [segments, groups * dim], side by side); ``logprobs`` and ``weights`` float32 [scored tokens];
    ``seconds``: forward, backward, and the part of both that was sketching (on a CUDA device measured in passes 1, 2,
    4, 8, ...; in others, the share that the latest of those had). To read them is to wait for the pass, which is when
    ``measure`` is called, once; ``more``: the sketches by other specs, where the sketcher was given some.

    >>> PolicyGradient(torch.zeros(2, 64), torch.zeros(5), torch.ones(5), lambda: {"forward": 0.5}).seconds
    {'forward': 0.5}
    """

    sketches: torch.Tensor
    logprobs: torch.Tensor
    weights: torch.Tensor
    measure: Callable[[], dict[str, float]]
    more: tuple[torch.Tensor, ...] = ()

    @functools.cached_property
    def seconds(self) -> dict[str, float]:
        return self.measure()

    def __getstate__(self) -> dict[str, Any]:
        """Pickled and copied with its times: events of a device cannot leave the process."""
        return {**vars(self), "measure": functools.partial(dict, self.seconds)}

    def __repr__(self) -> str:
        more = f", {len(self.more)} more" if self.more else ""
        return (
            f"PolicyGradient(sketches {list(self.sketches.shape)}{more}, {len(self.logprobs)} scored tokens)"
        )


def head_pass(
    split: SplitModel,
    plans: Sequence[Attachment],
    hidden: torch.Tensor,
    positions: torch.Tensor,
    targets: torch.Tensor,
    weigh: Weigh,
    temperature: float,
    scales: SegmentScales,
    whole: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, gradient of the hidden states, weights; the head's own sketch is added to the sums of ``plans``, chunk
    by chunk.

    ``scales``: made before the forward pass: a copy to a device makes the host wait for all that it has launched.
    ``whole``: ``weigh`` is asked once for all tokens, whose log-probs cost one more product with the head.
    The gradient and the sketches are those of scaled segments: `SegmentScales.restore` comes after the backward pass.
    """
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    picked = split.head_input(flat[positions])

    def sketch_head(begin: int, end: int, gradient: Dlogits) -> None:
        dz, factor = gradient
        for plan in plans:
            acc = plan.acc
            with acc.timed():
                offsets = scales.offsets.clamp(begin, end) - begin
                if plan.head_matrix is not None and plan.head_adds[0]:
                    matrix = plan.head_matrix
                    inputs = matrix.fold(picked[begin:end])
                    if factor is not None:
                        # A sketch is linear in its inputs, which have fewer numbers than dz.
                        inputs = (inputs * factor[:, None]).to(inputs.dtype)
                    matrix.add(dz, inputs, offsets, acc.engine_of(matrix.name).settle())
                if plan.head_bias is not None and plan.head_adds[1]:
                    gradient_of_bias = _placed(plan, split, bias_grad(dz, offsets))
                    acc.engine_of(plan.head_bias.name).add_vector(gradient_of_bias, plan.head_bias)
                for one in split.adapters:
                    one.sketch(plan.taps, acc, picked[begin:end], dz, offsets)

    with torch.no_grad():
        if whole:
            weigh = _asked_once(weigh, split.logprobs(picked, targets, temperature))
        own = plans[0]
        matrix, bias = (
            one is not None and adds
            for one, adds in zip((own.head_matrix, own.head_bias), own.head_adds, strict=True)
        )
        hook = sketch_head if matrix or bias or split.adapters else None
        logprobs, grad_picked, weights = split.logprob_and_grad(
            picked, targets, scales.weigh(weigh), temperature, hook, whole=bias
        )
        weights = scales.unscaled(weights)
        grad_picked = scales.normalise(grad_picked, *(out for plan in plans for out in plan.acc.outs))
        grad = add_rows(torch.zeros_like(flat), positions, grad_picked.to(flat.dtype))
    return logprobs, grad.view_as(hidden), weights


def _asked_once(weigh: Weigh, logprobs: torch.Tensor) -> Weigh:
    """The weights of all tokens, from one call of ``weigh``, as a function that gives parts of them."""
    made = weigh(logprobs.float(), 0, len(logprobs))
    return lambda _, start, stop: made[start:stop]


def _placed(plan: Attachment, split: SplitModel, gradients: torch.Tensor) -> torch.Tensor:
    """Gradients [segments, words] of the head's bias for this rank's words, at their places among all words."""
    if plan.ranks is None or gradients.shape[1] == split.head.weight.shape[0]:
        return gradients
    return plan.ranks.share(split.head.weight).placed(gradients, 1)


def failed_segments(logprobs: torch.Tensor, weights: torch.Tensor, scales: SegmentScales) -> torch.Tensor:
    """bool [segments, 1]: which have a log-prob or weight that is not finite. They fail even where the sum hides it.

    On the device, where the backward pass may still run: the host does not wait for it here.
    """
    bad = ~(logprobs.isfinite() & weights.isfinite())
    failed = torch.zeros(scales.count, dtype=torch.int32, device=bad.device)
    return failed.scatter_reduce_(0, scales.segment, bad.int(), "amax").bool()[:, None]


def scored_segments(where: Segments, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Range of scored tokens of each segment [segments + 1], and the segment of each of them, which is that of the
    token that predicts it; on the host.

    Raises:
        ValueError: the scored tokens are not sorted by segment.
    """
    # Of every token.
    bounds = where.offsets.numpy()
    owner = np.arange(where.count, dtype=np.int64).repeat(bounds[1:] - bounds[:-1])
    segment = owner.take(positions.numpy(force=True))
    if (segment[1:] < segment[:-1]).any():
        raise ValueError("positions jump back to an earlier segment: sort the scored tokens by segment")
    ranges = np.searchsorted(segment, np.arange(where.count + 1))
    return torch.from_numpy(ranges), torch.from_numpy(segment)
