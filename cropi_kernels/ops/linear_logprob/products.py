"""Heads whose product with the hidden states is not one with a whole matrix: kernels around a backend's own.

`Adapted`: ``z = h W^T + b + sum_i s_i (h A_i^T) B_i^T``, low-rank adapters that are never merged into W.
`CutInputs`: a rank has the columns of W that go with some of the features of h; the logits of all ranks add up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ... import _native, memory
from ..._library import no_autocast
from . import chunks, ops
from .contract import Kernels, OnGradient, Settings, Weigh
from .slices import Reduce


class LowRank(NamedTuple):
    """An adapter ``scale B A``: ``a`` [r, D], ``b`` [V, r], ``bias`` [V] of B's product."""

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    scale: float


class Features(NamedTuple):
    """The features that a rank has of the head's inputs: ``part(h)`` [n, D] -> [n, here], ``placed`` the way back, in
    zeros; ``sum`` over the ranks, in place."""

    part: Callable[[torch.Tensor], torch.Tensor]
    placed: Callable[[torch.Tensor], torch.Tensor]
    sum: Reduce


class _Around:
    """The row work of a backend; its products are another's."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels, self.forward, self.backward = kernels, kernels.forward, kernels.backward


class Adapted(_Around):
    """Kernels of a head with low-rank adapters, which multiply in ``dtype``."""

    def __init__(self, kernels: Kernels, adapters: tuple[LowRank, ...], dtype: torch.dtype) -> None:
        super().__init__(kernels)
        self.adapters = [
            LowRank(a.to(dtype), b.to(dtype), None if bias is None else bias.to(dtype), scale)
            for a, b, bias, scale in adapters
        ]

    def logits(
        self, hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, z: torch.Tensor
    ) -> None:
        self.kernels.logits(hidden, head, bias, z)
        for one in self.adapters:
            z.addmm_(hidden.to(z.dtype) @ one.a.T, one.b.T, alpha=one.scale)
            if one.bias is not None:
                z.add_(one.bias, alpha=one.scale)

    def times_head(self, dz: torch.Tensor, head: torch.Tensor, out: torch.Tensor) -> None:
        self.kernels.times_head(dz, head, out)
        for one in self.adapters:
            out += (dz.to(one.b.dtype) @ one.b @ one.a).mul_(one.scale).to(out.dtype)


class CutInputs(_Around):
    """Kernels of a head of which this rank has columns; on all ranks of the group at once, with the same tokens."""

    def __init__(self, kernels: Kernels, features: Features) -> None:
        super().__init__(kernels)
        self.features = features

    def logits(
        self, hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, z: torch.Tensor
    ) -> None:
        self.kernels.logits(_native.aligned(self.features.part(hidden)), head, None, z)
        z.copy_(self.features.sum(z.contiguous()))  # a collective wants numbers without gaps
        if bias is not None:  # once, not once a rank
            z += bias

    def times_head(self, dz: torch.Tensor, head: torch.Tensor, out: torch.Tensor) -> None:
        here = out.new_empty(len(out), head.shape[1])
        self.kernels.times_head(dz, head, here)
        # No two ranks have a feature, so that nothing is rounded; not every backend sums 16-bit numbers.
        wide = self.features.placed(here.to(torch.promote_types(here.dtype, torch.float32)))
        out.copy_(self.features.sum(wide))


@torch.no_grad()
def logprob_and_grad_by(
    around: Callable[[chunks.Call], Kernels],
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    weigh: Weigh | None,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    on_gradient: OnGradient | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`logprob_and_grad` with other kernels than the backend's: ``around`` is given those of the call.

    ``weigh`` None: log-probs alone, the rest are zeros. Targets are not checked, and none may be ignored.
    """
    settings = Settings(float(temperature), float(softcap or 0.0), -1, 0, None)
    with memory.explained("logprob_and_grad", ops.REMEDY, hidden, head):
        call = ops.prepare(hidden, head, targets, bias, settings, whole=True)
        call = call._replace(kernels=around(call))
        hidden = _native.aligned(hidden.detach())
        with no_autocast(hidden):
            if weigh is None:
                logprobs = chunks.forward(hidden, call, entropy=False).logp
                return logprobs, torch.zeros_like(hidden), torch.zeros_like(logprobs)
            return chunks.one_pass(hidden, call, weigh, on_gradient)
