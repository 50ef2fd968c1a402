"""A prompt group at a time, against loops that form its gradient."""

from __future__ import annotations

import statistics

import torch

from benchmarks.cost.steps import sketched, with_weight_gradients
from benchmarks.cost.timing import alternate, timed
from benchmarks.lib.examples import Example

TRAK_DIM, TRAK_TIMED = 32768, 16


def per_prompt(example: Example, rounds: int) -> list[str]:
    """Seconds per prompt group, one group at a time, against loops that form the gradient."""
    n = len(example.batches)
    n_parameters = sum(p.numel() for p in example.model.parameters())
    kept = n_parameters // 10
    generator = torch.Generator().manual_seed(0)
    bucket = torch.randint(0, 32768, (n_parameters,), generator=generator)
    sign = torch.randint(0, 2, (n_parameters,), generator=generator).float() * 2 - 1

    def flat(i: int) -> torch.Tensor:
        return torch.cat([g.reshape(-1) for g in with_weight_gradients(example, i)])

    def count_sketch(i: int) -> torch.Tensor:
        return torch.zeros(32768).index_add_(0, bucket, flat(i) * sign)

    jobs = {
        "sketch while the backward runs (ours)": lambda i: sketched(example, i % n),
        "flat gradient + CountSketch by index_add_": lambda i: count_sketch(i % n),
    }
    costs = alternate(jobs, rounds)
    seconds = {name: statistics.median(c.seconds for c in values) for name, values in costs.items()}
    flat_seconds = statistics.median(timed(lambda i=i: flat(i % n)).seconds for i in range(rounds))  # type: ignore[misc]
    projection = trak_seconds(kept)
    name = f"flat gradient + 10 % dropout + TRAK BasicProjector to {TRAK_DIM} (timed at {TRAK_TIMED}, scaled)"
    seconds[name] = flat_seconds + projection
    ours = seconds["sketch while the backward runs (ours)"]
    lines = ["| one prompt group at a time | s per prompt | ratio to ours |", "|---|---|---|"]
    lines += [f"| {name} | {value:.2f} | {value / ours:.1f} |" for name, value in seconds.items()]
    return lines


def trak_seconds(n: int) -> float:
    """Seconds that BasicProjector takes for one gradient of n coordinates to 32768, from a run to 16."""
    from trak.projectors import BasicProjector, ProjectionType

    block = 4
    projector = BasicProjector(n, TRAK_TIMED, 0, ProjectionType.normal, torch.device("cpu"), block_size=block)
    gradient = torch.randn(1, n)
    projector.project(gradient, model_id=0)  # warm-up; the matrix is generated block by block in every call
    return timed(lambda: projector.project(gradient, model_id=1)).seconds * TRAK_DIM / TRAK_TIMED
