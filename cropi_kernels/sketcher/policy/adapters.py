"""Low-rank adapters on a head (PEFT's LoRA): ``z = h W^T + b + sum_i s_i (h A_i^T) B_i^T``.

The fused pass never calls the head, so it multiplies by these matrices itself, and their gradients are made of that of
the logits, ``dz``: ``s (dz B)^T h`` of A, ``dz^T (s h A^T)`` of B.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ...ops.linear_logprob.products import LowRank
from ...ops.norm_grad import bias_grad
from ..model.head import is_lora
from ..sums.accumulator import Accumulator
from ..taps.taps import LinearTap, Tap


class HeadAdapter(NamedTuple):
    """The modules of one adapter: what it adds is ``scale * b(a(dropout(h)))``."""

    name: str
    a: nn.Linear
    b: nn.Linear
    scale: float
    dropout: nn.Module

    def weights(self) -> LowRank:
        """The weights as they are now: a sharded model's are whole only for a while.

        Raises:
            ValueError: its dropout is active: the fused pass has none.
        """
        rate = getattr(self.dropout, "p", 0.0)
        if self.dropout.training and rate > 0.0:
            raise ValueError(
                f"the adapter {self.name!r} on the head is in training mode with dropout {rate}, which the fused head "
                "does not have: call model.eval(), or set lora_dropout to 0 where training mode is needed (gradient "
                "checkpointing)"
            )
        return LowRank(self.a.weight, self.b.weight, self.b.bias, self.scale)

    def size(self) -> float:
        """A bound of the norm of its gradients, in units of ``|dz| |h|``."""
        return abs(self.scale) * float(self.a.weight.norm() + self.b.weight.norm())

    def parameters(self) -> list[nn.Parameter]:
        return [*self.a.parameters(), *self.b.parameters()]

    def sketch(
        self,
        taps: dict[nn.Module, Tap],
        acc: Accumulator,
        h: torch.Tensor,
        dz: torch.Tensor,
        offsets: torch.Tensor,
    ) -> None:
        """Add its parameters' gradients, from hidden states ``h`` [n, D] and gradients of logits ``dz`` [n, V]."""
        a, b, _, scale = self.weights()
        a, b, h = a.to(dz.dtype), b.to(dz.dtype), h.to(dz.dtype)
        of_a, of_b = taps.get(self.a), taps.get(self.b)
        if isinstance(of_a, LinearTap) and of_a.matrix is not None:
            out = acc.engine_of(of_a.matrix.name).settle()
            of_a.matrix.add((dz @ b).mul_(scale), of_a.matrix.fold(h), offsets, out)
        if isinstance(of_b, LinearTap) and of_b.matrix is not None:
            out = acc.engine_of(of_b.matrix.name).settle()
            of_b.matrix.add(dz, of_b.matrix.fold((h @ a.T).mul_(scale)), offsets, out)
        if isinstance(of_b, LinearTap) and of_b.bias is not None:
            acc.engine_of(of_b.bias.name).add_vector(bias_grad(dz, offsets).mul_(scale), of_b.bias)


def adapters_of(head: Any) -> tuple[HeadAdapter, ...]:
    """The adapters of LoRA's wrapper that take part in its forward; none of any other module.

    Raises:
        ValueError: one is of a kind that multiplies in another way (DoRA); names it.
    """
    if not is_lora(head) or head.disable_adapters or head.merged:
        return ()
    names = [name for name in head.active_adapters if name in head.lora_A]
    for name in names:
        if name in getattr(head, "lora_variant", {}) or getattr(head, "use_dora", {}).get(name):
            raise ValueError(
                f"the adapter {name!r} on the head is not a plain LoRA (DoRA or another variant), for which no formula "
                "is known here"
            )
    return tuple(
        HeadAdapter(name, head.lora_A[name], head.lora_B[name], head.scaling[name], head.lora_dropout[name])
        for name in names
    )
