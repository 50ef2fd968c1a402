"""Problems and rollouts to the trajectory records that the rest of the library reads."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.rlvr_mini.generate import Rollout
from benchmarks.rlvr_mini.tasks import Problem, decode, encode, verify
from cropi.records import PromptGroup
from cropi.tokenize import TokenGroup


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
