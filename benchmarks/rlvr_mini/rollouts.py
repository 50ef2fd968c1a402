"""Problems and rollouts to the trajectory records that the rest of the library reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks.rlvr_mini.generate import Rollout
from benchmarks.rlvr_mini.tasks import Problem, decode, encode, verify
from cropi.data.records import PromptGroup
from cropi.gradient.tokenize import TokenGroup


def to_record(
    problem: Problem, rollouts: Sequence[Rollout], name: str, set: str | None = None
) -> PromptGroup:
    """The trajectory record of one prompt: token ids, log-probs as sampled, and the verifier's rewards."""
    return PromptGroup(
        id=name,
        prompt=problem.prompt,
        responses=[decode(r.ids) for r in rollouts],
        rewards=[verify(problem, r.ids) for r in rollouts],
        answer=problem.answer,
        prompt_ids=encode(problem.prompt),
        response_ids=[r.ids for r in rollouts],
        logprobs=[[min(value, 0.0) for value in r.logprobs] for r in rollouts],
        temperature=1.0,
        set=set,
        task=problem.family,
        extra={"difficulty": problem.difficulty},
    )


def to_tokens(record: PromptGroup) -> TokenGroup:
    """The record's own token ids; nothing is tokenised again."""
    assert record.prompt_ids and record.response_ids
    return TokenGroup(
        record, record.prompt_ids, record.response_ids, record.logprobs, record.temperature or 1.0
    )


def thinned(record: PromptGroup, keep: int) -> PromptGroup:
    """The record with ``keep`` of its responses, right and wrong ones as nearly in equal numbers as it has them.

    A group's gradient is a multiple of the mean over its right responses of the gradient of log pi, minus the mean over
    its wrong ones. So any subset with both estimates the same direction, and half of each does it with least noise. The
    responses were drawn independently: the first ones are as good as any.
    """
    assert record.response_ids and record.responses and record.logprobs
    right = [i for i, reward in enumerate(record.rewards) if reward > 0]
    wrong = [i for i, reward in enumerate(record.rewards) if reward <= 0]
    take = min(len(right), max(keep // 2, keep - len(wrong)))
    kept = sorted(right[:take] + wrong[: keep - take])
    return dataclasses.replace(
        record,
        responses=[record.responses[i] for i in kept],
        rewards=[record.rewards[i] for i in kept],
        response_ids=[record.response_ids[i] for i in kept],
        logprobs=[record.logprobs[i] for i in kept],
    )
