"""SwiGLU: the product of a gated MLP, and its gradients; what `fold_inputs` makes of the product comes with it."""

from __future__ import annotations

import torch

from ..._library import plain
from ...plan import MatrixPlan, recipe_of
from . import ops

__all__ = ["swiglu", "swiglu_backward"]


def swiglu(
    gate: torch.Tensor, up: torch.Tensor, plan: MatrixPlan | None = None, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``h = silu(gate) * up`` with ``silu(z) = z / (1 + exp(-z))``, element by element.

    Computed in float32 and rounded once (SwiGLU: Shazeer, arXiv 2002.05202). No gradient is recorded:
    `swiglu_backward` is it.

    Args:
        gate, up: [tokens, n] of one dtype: float32, bfloat16, float16 or float64.
        plan: of the linear layer that reads ``h``, one that folds its inputs: its ``fold_inputs(h, plan)`` is wanted
            too, and has the same bits. On a GPU it costs no read of ``h``.
        backend: ``"triton"``, ``"cpu"``, ``"reference"`` or None for the best.

    Returns ``h`` [tokens, n], contiguous, and the folded copy [tokens, plan.folded_cols] or None.

    Raises:
        ValueError: names the operand whose shape, dtype or device is wrong, or the plan that folds nothing.
        RuntimeError: the backend that was named cannot serve the call; says why.

    >>> swiglu(torch.tensor([[0.0, 100.0]]), torch.tensor([[5.0, 0.5]]))[0]
    tensor([[ 0., 50.]])
    """
    h, folded = ops.FORWARD(plain(gate), plain(up), None if plan is None else recipe_of(plan), backend)
    return h, None if plan is None else folded


def swiglu_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `swiglu`, from the gradient ``dh`` of its ``h``, in one pass over the three operands.

    ``dgate = dh * up * s (1 + gate (1 - s))`` and ``dup = dh * gate * s``, ``s = 1 / (1 + exp(-gate))``.

    Args:
        dh, gate, up: [tokens, n] of one dtype. backend: as of `swiglu`.

    Returns ``dgate`` and ``dup`` [tokens, n], contiguous.

    Raises:
        ValueError: names the operand whose shape, dtype or device is wrong.
        RuntimeError: the backend that was named cannot serve the call; says why.
    """
    dgate, dup = ops.BACKWARD(plain(dh), plain(gate), plain(up), backend)
    return dgate, dup
