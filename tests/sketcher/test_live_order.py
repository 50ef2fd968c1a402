"""Losses that put a batch's values in order: which are sums over prompts, and that each batch is looked at."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from support import live as made
from support import zoo
from support.live import SPEC, Step

from cropi_kernels import CoupledLossError, LiveSketcher
from cropi_kernels.sketcher.checks.split_loss import _sorts

BY_RANK: dict[str, Any] = {
    "aot": lambda x: x.sort()[0], "aot_unpaired": lambda x: x[x.argsort(stable=True)],
    "detached": lambda x: x[x.detach().argsort(dim=0)], "topk": lambda x: x.topk(3)[0],
}  # fmt: skip


def by_rank(logits: torch.Tensor, step: Step, kind: str, moved: bool) -> torch.Tensor:
    """TRL's losses aot and aot_unpaired: sorted over the batch and compared by rank; ``moved``: off the reference."""
    sums = (made.logprobs_of(logits, step) * step.scored).sum(1)
    rows = [(step.prompts == prompt).nonzero()[:, 0].tolist() for prompt in range(3)]
    chosen, rejected = sums[[of[0] for of in rows]], sums[[of[-1] for of in rows]]
    # All ratios are zero at the reference, and those of prompts 0, 1, 2 are in these orders off it.
    chosen = chosen - chosen.detach() + moved * torch.tensor([1.0, 0.0, 2.0])
    rejected = rejected - rejected.detach() + moved * torch.tensor([0.5, 1.0, 0.0])
    ordered = BY_RANK[kind]
    against = torch.tensor([-0.5, 0.0, 0.5]) if kind == "aot" else ordered(rejected)
    margins = ordered(chosen - rejected if kind == "aot" else chosen) - against
    return -torch.nn.functional.logsigmoid(margins).sum()


@pytest.mark.long
@pytest.mark.parametrize("kind", BY_RANK)
def test_a_loss_by_ranks_is_looked_at_in_every_batch(kind: str) -> None:
    """Against constants a sum over prompts, against each other none once orders differ (in a batch that is not
    compared with autograd)."""
    model, step, found = zoo.make("llama"), Step(), False
    with LiveSketcher(model, SPEC) as live:
        for moved in (False, False, True, False):
            coupled = moved and kind != "aot"
            wrong = pytest.raises(CoupledLossError, match="not a sum over prompts")
            with wrong if coupled else contextlib.nullcontext(), live.batch(step.prompts, shape=step.shape):
                by_rank(made.logits_of(model, step), step, kind, moved).backward()
            found = found or coupled
            assert live.loss == f"{'not ' if found else ''}a sum over prompts"
    with live, live.batch(step.prompts, shape=step.shape):
        made.cross_entropy(made.logits_of(model, step), step, step.rows(None)).backward()
    assert live.loss == "a sum over prompts"


def test_what_may_pair_prompts() -> None:
    """Along the first axis, or with a gradient; routers choose experts for each token."""
    x = torch.rand(3, 4)
    learnt = x.clone().requires_grad_()
    for func, args, kwargs, wanted in (
        (torch.Tensor.argsort, (x[:, 0],), {}, True),
        (torch.sort, (), {"input": x, "dim": 0}, True),
        (torch.sort, (x, 0), {}, True),
        (torch.topk, (x, 2, -2), {}, True),
        (torch.msort, (x,), {}, True),
        (torch.sort, (learnt,), {}, True),
        (torch.sort, (x,), {}, False),
        (torch.Tensor.topk, (learnt, 2), {"dim": -1}, False),
        (torch.argsort, (x[:1, 0],), {}, False),
        (torch.argsort, ((8 * x[:, 0]).long(),), {}, False),
        (torch.exp, (learnt,), {}, False),
    ):
        assert _sorts(func, args, kwargs) == wanted, (func, args, kwargs)
