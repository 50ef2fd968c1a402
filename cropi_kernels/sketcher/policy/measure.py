"""What a model does to ``h W^T + b`` on the way to its logits, measured from the logits themselves.

Configurations name factors and caps in many ways, and some name what their model does not use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..model.precision import product_eps
from ..model.spread import laid_like

SMALL, LARGE = 0.05, 1500.0  # largest logits to try: far below every cap, and far above


@torch.no_grad()
def measure_head(
    model: Any,
    decoder: nn.Module,
    products: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    ids: torch.Tensor,
) -> tuple[float, float | None] | str:
    """(scale, softcap) of ``logits = softcap * tanh(scale * (h W^T + b) / softcap)``; softcap None: no cap.

    ``products(h)`` is ``h W^T + b`` of the head's weights; ``hidden`` what the decoder gives for ``ids`` [1, tokens].
    The decoder's output is made smaller and larger on its way to the head, so that the whole curve is seen. A string
    says why there is no such scale and cap.
    """

    def logits(factor: float) -> tuple[torch.Tensor, torch.Tensor] | None:
        h = hidden[0] * factor
        with _handed_on(decoder, None if factor == 1.0 else hidden * factor) as seen:
            out = model(input_ids=ids, use_cache=False).logits[0]
        if factor != 1.0 and not seen:
            return None  # the model does not call its decoder as a module
        dtypes.add((z := products(h)).dtype)
        return z.float(), out.float()

    dtypes = {hidden.dtype}
    first = logits(1.0)
    assert first is not None
    z, given = first
    if z.shape != given.shape:
        return f"they give {list(z.shape)} for {ids.shape[1]} tokens, the model {list(given.shape)}"
    # Narrow dtypes, or a GPU that rounds operands in float32 to tf32.
    half = bool(dtypes & {torch.bfloat16, torch.float16}) or product_eps(hidden) > 1e-5
    tolerance = 3e-2 if half else 1e-4
    if not bool(z.isfinite().all()) or not float(z.abs().max()):
        # A model that has diverged fails segment by segment later; NaN in both counts as equal.
        return (1.0, None) if bool((z.isnan() == given.isnan()).all()) else _differ(z, given)
    known, near = _numbers(getattr(model, "config", None)), 3e-3 if half else 1e-5
    top = float(z.abs().max())
    low = logits(SMALL / top)
    if low is not None and not low[1].isfinite().all():
        return _differ(*low)
    scale = _snapped(_slope(*(low or first)), known, near)
    if scale <= 0.0:
        return f"they are multiplied by {scale:g} on the way to its logits"
    runs = [first] if low is None else [first, low]
    curves: list[tuple[float, float | None]] = [(scale, None)]
    if low is None:
        curves += [(scale, value) for value in known if value > 0.5 * float(given.abs().max())]
    else:
        high = logits(LARGE / (top * scale))
        if high is not None and bool(high[1].isfinite().all()):
            runs.append(high)
            reached = float(high[1].abs().max())
            if reached < 0.98 * scale * float(high[0].abs().max()):
                bound = _snapped(reached, known, 2e-2)
                # A bias keeps the low logits large enough to be bent.
                bent = low[1].double().clamp(-0.5 * bound, 0.5 * bound) / bound
                curves = [(_snapped(_slope(low[0], bound * torch.atanh(bent)), known, near), bound)]
    for scale, cap in curves:
        off = [_error(*run, scale, cap) for run in runs]
        if all(error <= tolerance * max(size, 1.0) for error, size in off):
            return scale, cap
    return _differ(z, given)


def _error(z: torch.Tensor, given: torch.Tensor, scale: float, cap: float | None) -> tuple[float, float]:
    got = z * scale if cap is None else cap * torch.tanh(z * scale / cap)
    return float((got - given).abs().nan_to_num(torch.inf).max()), float(given.abs().max())


def _differ(z: torch.Tensor, given: torch.Tensor) -> str:
    off = (z - given).abs().masked_fill_(z.isnan() & given.isnan() | (z == given), 0.0)
    size = float(given.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return f"largest difference {float(off.nan_to_num(torch.inf).max()):.2g} at logits up to {size:.2g}"


def _slope(z: torch.Tensor, given: torch.Tensor) -> float:
    return float((z.double() * given.double()).sum() / z.double().square().sum())


def _snapped(value: float, known: Sequence[float], relative: float) -> float:
    """The exact number that a measured ``value`` stands for, if one is near; else ``value``.

    Candidates, in this order: 1; a number of the configuration or its reciprocal; a ratio of two such numbers.
    """
    ratios = [a / b for a in known for b in known if a != b]
    for candidates in ([1.0], [*known, *(1.0 / k for k in known)], ratios):
        best = min(candidates, key=lambda c: abs(c - value), default=value)
        if abs(best - value) <= relative * abs(value):
            return best
    return value


def _numbers(config: Any) -> list[float]:
    values = vars(config).values() if hasattr(config, "__dict__") else ()
    return sorted(
        {float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0}
    )


@contextlib.contextmanager
def _handed_on(decoder: nn.Module, hidden: torch.Tensor | None) -> Iterator[list[bool]]:
    """Inside, the decoder's output is ``hidden`` (if any); the list is not empty once the decoder was called."""
    seen: list[bool] = []

    def swap(module: nn.Module, args: Any, out: Any) -> Any:
        seen.append(True)
        if hidden is None:
            return out
        if isinstance(out, tuple):
            return (laid_like(hidden, out[0]), *out[1:])
        out["last_hidden_state"] = laid_like(hidden, out["last_hidden_state"])
        return out

    with decoder.register_forward_hook(swap):
        yield seen
