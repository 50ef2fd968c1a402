"""What the chunk loop and the row kernels agree on."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class RowMath(NamedTuple):
    """What turns a logit into the exponent of a probability; ``softcap`` 0 is none."""

    temperature: float
    softcap: float


class Stats(NamedTuple):
    """Per row, in the compute dtype: log-prob of the target, largest (soft-capped) logit, log sum exp(z - top)."""

    logp: torch.Tensor
    top: torch.Tensor
    log_sum: torch.Tensor
    entropy: torch.Tensor | None

    def rows(self, index: slice | torch.Tensor) -> Stats:
        entropy = None if self.entropy is None else self.entropy[index]
        return Stats(self.logp[index], self.top[index], self.log_sum[index], entropy)


class Rows(Protocol):
    """A backend's row work on logits [rows, V] whose columns are contiguous."""

    def forward(self, z: torch.Tensor, target: torch.Tensor, math: RowMath, stats: Stats) -> None: ...

    def backward(
        self, z: torch.Tensor, target: torch.Tensor, grad: torch.Tensor, math: RowMath, stats: Stats
    ) -> None: ...
