"""What the rules of `cropi.Selector` gain on simulated streams: the figures of docs/live.md.

    python -m benchmarks.live_streams

A line is a rule on a stream: the mean usefulness of the prompts that it chose, as a share of that of the best choice at
every step (of as many prompts as are drawn at once), and the standard error over seeds. Processor time: a minute.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from cropi import Selector
from cropi_kernels import SketchSpec

SPEC, DIM, KINDS = SketchSpec(256), 256, 8
SEEDS = range(12)


def turning(
    seed: int,
    *,
    n: int = 200,
    steps: int = 200,
    each: int = 6,
    stage: int = 1,
    refresh: int = 10,
    memory: float = 300.0,
    turn: float = math.inf,
    share: float = 0.0,
    features: str = "",
    **rule: Any,
) -> float:
    """All gradients lie along the validation mean, which turns with a memory of ``turn`` steps.

    A visit's gradient is ``u_i / 10`` along it, and noise of length 1. The u_i drift with a ``memory`` of steps;
    ``share`` of their variance is common to a kind. ``features``: "" for none, "kind" or "noise".
    """
    g, own_draws = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 99)
    kind = torch.randint(0, KINDS, (n,), generator=g)
    common, own = torch.randn(KINDS, generator=g), torch.randn(n, generator=g)
    known = None
    if features == "noise":
        known = normalize(torch.randn(n, DIM, generator=own_draws).abs(), dim=1).numpy()
    elif features:
        known = _of_kinds(kind, own_draws)
    selector = Selector(range(n), SPEC, dim=DIM, seed=seed, features=known, **rule)
    valid, kept, turned = (
        normalize(torch.randn(DIM, generator=g), dim=0),
        math.exp(-1 / memory),
        math.exp(-1 / turn),
    )
    total = best = 0.0
    for step in range(steps):
        if step % refresh == 0:
            selector.refresh(valid[None])
        useful = share**0.5 * common[kind] + (1 - share) ** 0.5 * own
        if step % stage == 0:
            chosen = selector.next(each * stage, step)
        ids = chosen[step % stage * each :][:each]
        total += float(useful[ids].mean())
        best += float(useful.topk(each * stage).values.mean())
        noise = normalize(torch.randn(each, DIM, generator=g), dim=1)
        _visit(selector, ids, 0.1 * useful[ids][:, None] * valid + noise, step)
        own = _drifted(own, kept, g)
        common = _drifted(common, kept, g)
        valid = normalize(
            turned * valid + (1 - turned**2) ** 0.5 * normalize(torch.randn(DIM, generator=g), dim=0), dim=0
        )
    return total / best


def moving(
    seed: int, *, moves: float, n: int = 200, steps: int = 200, each: int = 6, refresh: int = 10, **rule: Any
) -> float:
    """Prompts keep their gradients, those of eight kinds; the validation mean is a mixture of kinds that moves with a
    memory of ``moves`` steps."""
    g = torch.Generator().manual_seed(seed)
    directions = normalize(torch.randn(KINDS, DIM, generator=g), dim=1)
    kind = torch.randint(0, KINDS, (n,), generator=g)
    gradients = directions[kind] + torch.randn(n, DIM, generator=g) / 16
    mixture, kept = torch.randn(KINDS, generator=g), math.exp(-1 / moves)
    selector = Selector(range(n), SPEC, dim=DIM, seed=seed, **rule)
    total = best = 0.0
    for step in range(steps):
        valid = normalize(mixture @ directions, dim=0)
        if step % refresh == 0:
            selector.refresh(valid[None])
        useful = gradients @ valid
        useful = useful - useful.mean()
        ids = selector.next(each, step)
        total += float(useful[ids].mean())
        best += float(useful.topk(each).values.mean())
        noise = normalize(torch.randn(each, DIM, generator=g), dim=1)
        _visit(selector, ids, 0.3 * gradients[ids] + noise, step)
        mixture = _drifted(mixture, kept, g)
    return total / best


def _visit(selector: Selector, ids: list[int], rows: torch.Tensor, step: int) -> None:
    counts = selector.listens(step)
    selector.update(ids if counts else [], rows if counts else rows[:0], step)


def _drifted(values: torch.Tensor, kept: float, g: torch.Generator) -> torch.Tensor:
    return kept * values + (1 - kept**2) ** 0.5 * torch.randn(len(values), generator=g)


def _of_kinds(kind: torch.Tensor, g: torch.Generator) -> Any:
    """Half of a prompt's features are its kind's, half its own."""
    centers = normalize(torch.randn(KINDS, DIM, generator=g), dim=1)
    return normalize(
        centers[kind] + normalize(torch.randn(len(kind), DIM, generator=g), dim=1), dim=1
    ).numpy()


def show(stream: Callable[..., float], rule: dict[str, Any]) -> None:
    gains = [stream(seed, **rule) for seed in SEEDS]
    error = np.std(gains, ddof=1) / len(gains) ** 0.5
    name = f"{stream.__name__} {', '.join(f'{key}={value}' for key, value in rule.items())}"
    print(f"{name:84s} {np.mean(gains):.3f} +- {error:.3f}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    show(turning, {"explore": 0.0, "half_life": 100.0})
    for stage in (10, 2):
        for n in (200, 1000):
            for explore in (1.0, 0.5, 0.25):
                show(turning, {"n": n, "stage": stage, "explore": explore, "half_life": 100.0})
    for refresh, turn in ((10, math.inf), (10, 30.0), (40, math.inf)):
        for within in (None, 10, 40):
            show(turning, {"refresh": refresh, "turn": turn, "within": within, "half_life": 100.0})
    for within in (None, 10):
        show(moving, {"moves": 50.0, "within": within, "half_life": 100.0})
    stages: dict[str, Any] = {"each": 8, "stage": 10, "turn": 30.0, "explore": 0.5}
    for n in (200, 2000):
        for features in ("", "kind"):
            show(turning, {"n": n, "share": 0.5, "features": features, **stages})
    for features in ("", "noise"):
        show(turning, {"each": 4, "stage": 10, "memory": 1000.0, "features": features, "explore": 0.5})
    # Nothing is shared in a kind, so that the features say nothing.
    for features in ("", "kind"):
        show(turning, {"features": features, **stages})


if __name__ == "__main__":
    main()
