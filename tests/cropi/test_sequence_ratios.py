"""Ratios of whole responses (GSPO), in a job and in a trainer's batch: right, in one pass of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.made_data import make_model
from support.oracle import gspo, sketch_of, stored_logprobs

import cropi
from cropi.gradient.estimators import make_estimator
from cropi.model.policy import Policy
from cropi.sketching.job import SketchJob
from cropi.sketching.run import sketch
from cropi_kernels import SketchSpec

SPEC = SketchSpec(1024)
GSPO = make_estimator("gspo", clip_low=0.5, clip_high=0.5)
PROMPT, RESPONSES, REWARDS = (
    [5, 6, 7],
    [[20, 21, 1], [22, 1], [23, 24, 25, 1], [20, 21, 1]],
    [1.0, 0.0, 0.5, 1.0],
)
RECORD = {"id": "a", "prompt_ids": PROMPT, "response_ids": RESPONSES, "rewards": REWARDS}


def near(scale: float = 0.05) -> Any:
    """A behaviour model not far from the policy: some ratios are clipped and some are not."""
    model = make_model()
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=scale)
    return model


def stored() -> list[list[float]]:
    return stored_logprobs(near(), RECORD)


def exact(old: list[list[float]]) -> torch.Tensor:
    return sketch_of(make_model().double(), RECORD | {"logprobs": old}, ("std", gspo(0.5, 0.5)), SPEC)


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("from_model", [False, True])
def test_a_job_runs_the_policy_as_often_as_for_ratios_of_tokens(layout: str, from_model: bool) -> None:
    old, model = stored(), make_model()
    record = RECORD if from_model else RECORD | {"logprobs": old}
    seen: list[int] = []
    model.model.register_forward_hook(lambda *_: seen.append(1))
    passes = []
    for estimator in (make_estimator("grpo"), GSPO):
        seen.clear()
        job = SketchJob(
            [record], None, spec=SPEC, estimator=estimator, layout=layout, behaviour="model" if from_model else "file",
            behaviour_model=near() if from_model else None, behaviour_check="off",
        )  # fmt: skip
        summary = sketch(Policy(model), job, progress=False)
        passes.append(len(seen))
    assert summary.store is not None
    ((_, got),) = summary.store.shards()
    want = exact(old)
    assert float(want.norm()) > 0 and float((got[0] - want).norm()) <= 2e-5 * float(want.norm())
    assert passes[0] == passes[1]


def test_a_trainers_batch() -> None:
    old = stored()
    width = len(PROMPT) + max(map(len, RESPONSES))
    ids, mask = (torch.zeros(len(RESPONSES), width, dtype=torch.int64) for _ in range(2))
    beta = torch.zeros(len(RESPONSES), width)
    scored = torch.zeros(len(RESPONSES), width)
    for i, response in enumerate(RESPONSES):
        end = len(PROMPT) + len(response)
        ids[i, :end], mask[i, :end] = torch.tensor(PROMPT + response), 1
        scored[i, len(PROMPT) : end], beta[i, len(PROMPT) : end] = 1, torch.tensor(old[i])
    batch = cropi.score_batch(
        make_model(), ids, mask, response_mask=scored, prompt_ids=["a"] * len(RESPONSES),
        rewards=torch.tensor(REWARDS), old_logprobs=beta, estimator=GSPO, spec=SPEC,
    )  # fmt: skip
    want = exact(old)
    assert float((batch.sketches[0] - want).norm()) <= 2e-5 * float(want.norm())
