"""One rank of a training step that is sketched: `tests/sketcher/test_live_ranks.py` starts two. Prints what it found.

PYTHONPATH=tests python tests/support/live_ranks.py       with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from cropi import Selector
from cropi_kernels import LiveSketcher
from support import live as made
from support import zoo
from support.launch import as_rank
from support.tensors import off

ROWS = [[0, 1, 2], [3, 4, 5]]  # of each rank: of a prompt with two rows each may have one


def wrapped(way: str) -> nn.Module:
    model = zoo.make("llama")
    if way == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def stepped(model: nn.Module, step: made.Step, live: LiveSketcher | None) -> Any:
    """Two training steps; what the second one's batch gave, and the weights afterwards."""
    optimizer, got = torch.optim.SGD(model.parameters(), lr=0.1), None
    for _ in range(2):
        optimizer.zero_grad()
        if live is None:
            made.grpo(made.logits_of(model, step), step, step.rows(None)).backward()
        else:
            with live.batch(step.prompts, shape=step.shape, num_segments=3) as got:
                made.grpo(made.logits_of(model, step), step, step.rows(None)).backward()
        optimizer.step()
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]
    return got, weights


def run(way: str, rank: int) -> dict[str, Any]:
    step = made.Step()
    mine = step.part(ROWS[rank])
    _, want = stepped(wrapped(way), mine, None)
    model = wrapped(way)
    with LiveSketcher(model, made.SPEC) as live:
        got, weights = stepped(model, mine, live)
    after = zoo.make("llama")  # where the second step began: the gradients of both ranks' rows, on average
    optimizer = torch.optim.SGD(after.parameters(), lr=0.1)
    (made.grpo(made.logits_of(after, step), step, step.rows(None)) / 2).backward()
    optimizer.step()
    optimizer.zero_grad()
    with LiveSketcher(after, made.SPEC) as alone:
        with alone.batch(step.prompts, shape=step.shape) as whole:
            made.grpo(made.logits_of(after, step), step, step.rows(None)).backward()
        with alone.batch(mine.prompts, shape=mine.shape, num_segments=3) as part:
            made.grpo(made.logits_of(after, mine), mine, mine.rows(None)).backward()
    both = [torch.empty_like(got.sketches) for _ in ROWS]
    dist.all_gather(both, got.sketches)
    selectors = [Selector(range(3), made.SPEC, dim=1024) for _ in range(2)]
    for selector in selectors:
        selector.refresh(whole.sketches[:1])
    selectors[0].update(range(3), got, 1, gather=True)
    selectors[1].update(range(3), whole, 1)
    return {
        "loss": live.loss,
        "weights": all(torch.equal(a, b) for a, b in zip(weights, want, strict=True)),
        # As one row: a prompt may have none on this rank, and no gradient.
        "own": off(got.sketches.reshape(1, -1), part.sketches.reshape(1, -1)),
        "sum": off(sum(both), whole.sketches),
        "scores": [selector.scores(range(3)).tolist() for selector in selectors],
        "origin": selectors[0].state_dict()["origin"] == selectors[1].state_dict()["origin"],
    }


if __name__ == "__main__":
    as_rank(lambda: {way: run(way, dist.get_rank()) for way in ("ddp", "fsdp2")})
