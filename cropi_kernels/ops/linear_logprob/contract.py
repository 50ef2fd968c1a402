"""What the operators, the chunk loop and the kernels of a backend agree on."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import NamedTuple, Protocol

import torch

# What a caller hands in, for the tokens from ``start`` to ``stop``: (logp, start, stop) to weights; (start, stop, dz).
Weigh = Callable[[torch.Tensor, int, int], torch.Tensor]
OnDlogits = Callable[[int, int, torch.Tensor], None]
OnGradient = Callable[[int, int, "Dlogits"], None]  # the same, with dz as the kernels leave it


class Settings(NamedTuple):
    """What a call is told beside its tensors, in the order of the operators' arguments."""

    temperature: float
    softcap: float  # 0: none
    ignore_index: int
    chunk_size: int  # 0: the default
    backend: str | None  # None: the best


class RowMath(NamedTuple):
    """What turns a logit into the exponent of a probability; ``softcap`` 0 means no cap."""

    temperature: float
    softcap: float


class Dlogits(NamedTuple):
    """The gradient of logits, ``factor[:, None] * dz``, or ``dz`` itself: [rows, V]; [rows] in the compute dtype."""

    dz: torch.Tensor
    factor: torch.Tensor | None = None


class Stats(NamedTuple):
    """Per row, in the compute dtype: log-prob of the target, largest (soft-capped) logit, log sum exp(z - top)."""

    logp: torch.Tensor
    top: torch.Tensor
    log_sum: torch.Tensor
    entropy: torch.Tensor | None

    def rows(self, index: slice | torch.Tensor) -> Stats:
        entropy = None if self.entropy is None else self.entropy[index]
        return Stats(self.logp[index], self.top[index], self.log_sum[index], entropy)


class Kernels(Protocol):
    """A backend: two products with the head, and the row work on logits ``z`` [rows, V] with contiguous columns.

    ``z``, ``bias`` and all statistics have the compute dtype (float32, or float64 for float64 input), whatever the
    dtype of ``hidden`` and ``head``; ``dz`` as `backward` returned it. ``target`` is negative for a row that has none.
    """

    def logits(
        self, hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, z: torch.Tensor
    ) -> None:
        """``z = hidden head^T + bias``."""

    def forward(self, z: torch.Tensor, target: torch.Tensor, math: RowMath, stats: Stats) -> None:
        """Fills ``stats`` from logits ``z``."""

    def backward(
        self, z: torch.Tensor, target: torch.Tensor, grad: torch.Tensor, math: RowMath, stats: Stats
    ) -> torch.Tensor:
        """The gradient of ``sum_n grad_n logp_n`` in the memory of ``z``: zero where grad is 0 or there is no target.

        Returns it as [rows, V] with contiguous columns: ``z`` itself, or a view of its memory in the dtype that
        `times_head` multiplies (a GPU's tensor cores want the head's).
        """

    def times_head(self, dz: torch.Tensor, head: torch.Tensor, out: torch.Tensor) -> None:
        """``out = dz head``, summed in the compute dtype; ``dz`` may be rounded to the head's dtype first."""


def check_temperature(temperature: object) -> None:
    """Log-probs are those of softmax(logits / temperature)."""
    if not _divides(temperature):
        raise ValueError(
            f"temperature={temperature!r}: give a finite number above 0 (greedy decoding has no log-probs), {_BOUNDS}"
        )


def check_softcap(softcap: object) -> None:
    """Of logits that are capped."""
    if not _divides(softcap) or float(softcap) > _MOST_CAP:  # type: ignore[arg-type]
        raise ValueError(
            f"softcap={softcap!r}: give a finite number above 0, from {_FLOAT32.tiny:.4g} to {_MOST_CAP:.4g} (a larger "
            "one caps nothing), or None for no soft-cap"
        )


# Kernels take both in float32: there a smaller number may be 0, which stands for no cap, and a larger one is infinite.
_FLOAT32 = torch.finfo(torch.float32)
# Logits beside a larger one are subnormal, which a CPU may take for 0 (torch.set_flush_denormal): all would be equal.
_MOST_CAP = 1e30
_BOUNDS = f"from {_FLOAT32.tiny:.4g} to {_FLOAT32.max:.4g}"


def _divides(number: object) -> bool:
    return isinstance(number, (float, Real)) and _FLOAT32.tiny <= float(number) <= _FLOAT32.max
