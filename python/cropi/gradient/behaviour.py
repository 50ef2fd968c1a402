"""Behaviour log-probs: where they come from, and the model that made the rollouts, where it has to be run again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cropi.data.scan import Scan
from cropi.errors import CropiError, RecordError
from cropi.gradient.batches import MicroBatch
from cropi.gradient.estimators import Estimator
from cropi.model.fingerprint import adapters_in_use
from cropi.model.policy import Policy, check_dropout
from cropi_kernels import token_logprobs
from cropi_kernels.sketcher.policy.lengths import measure_lengths

BEHAVIOURS = ("auto", "file", "current", "model")


class BehaviourModel:
    """Scores the tokens of a batch under the rollouts' temperature, without a gradient and without all logits.

    Args:
        model: the module, or a :class:`Policy` of it, which keeps its fingerprint for the next job.
    """

    def __init__(self, model: Any) -> None:
        self.policy = Policy.of(model)
        self.model = model = self.policy.model
        first = torch.zeros(1, dtype=torch.int64, device=next(model.parameters()).device)
        token_logprobs(model, first[None], positions=first, targets=first)  # what it cannot do is said now
        self.lengths = measure_lengths(model)

    def logprobs(self, batch: MicroBatch) -> torch.Tensor:
        """log beta of the scored tokens: float32 ``[N]`` on the batch's device."""
        if self.lengths.switch is not None:
            reaches = batch.reaches
            if not self.lengths.together(min(reaches), max(reaches)):
                return torch.cat([self.logprobs(half) for half in batch.halves()])
        here = batch.to(next(self.model.parameters()).device)
        result = token_logprobs(
            self.model,
            here.input_ids,
            positions=here.positions,
            targets=here.targets,
            attention_mask=here.attention_mask,
            position_ids=here.position_ids,
            temperature=batch.temperature,
        )
        return result.float().to(batch.targets.device)


@dataclass(frozen=True)
class Behaviour:
    """Where the behaviour log-probs come from, decided: ``source`` is "file", "current" (the policy itself: ratio 1) or
    "model", and ``model`` is there in the last case alone."""

    source: str
    model: BehaviourModel | None = None

    def __post_init__(self) -> None:
        if self.source not in BEHAVIOURS[1:]:
            raise CropiError(f"behaviour must be one of {', '.join(BEHAVIOURS[1:])}, got {self.source!r}")
        if (self.source == "model") != (self.model is not None):
            raise CropiError(
                f"behaviour is {self.source!r} {'with' if self.model else 'without'} a model; a model goes with 'model'"
            )


def behaviour_source(asked: str, scan: Scan, needed: bool, *, of_another: bool = False) -> str:
    """Where the behaviour log-probs come from: "file", "current" or "model".

    "auto" takes the file's log-probs when every record has them. When none has, it takes the current policy itself
    (ratio 1, right for the first stage of a curriculum), unless another model is known to have made the rollouts:
    then that model has to be run again. A mixture is an error, since ratios of two kinds would be ranked against each
    other. An estimator without a ratio uses "current", whatever was asked for.

    Args:
        asked: one of :data:`BEHAVIOURS`.
        scan: what the trajectory files hold.
        needed: whether the estimator has a ratio to them.
        of_another: whether another policy than the sketched one is known to have made the trajectories.

    Raises:
        CropiError: a record without log-probs where they are needed.
    """
    if asked not in BEHAVIOURS:
        raise CropiError(f"behaviour must be one of {', '.join(BEHAVIOURS)}, got {asked!r}")
    if not needed:
        return "current"
    if asked == "auto" and scan.with_logprobs == 0:
        return "model" if of_another else "current"
    if asked in ("auto", "file") and scan.with_logprobs < scan.prompts:
        raise CropiError(
            f"{scan.without_logprobs}: no 'logprobs' in this record, while {scan.with_logprobs} of "
            f"{scan.prompts} records have them; add them, or pass --behaviour current (ratio 1) or "
            "--behaviour-model"
        )
    return "file" if asked == "auto" else asked


def resolve_behaviour(
    asked: str, scan: Scan, estimator: Estimator, model: Any, *, policy: Policy
) -> Behaviour:
    """The behaviour of a job, from what was asked for, what the files hold, and the model that was given for it.

    Args:
        asked, scan: as for :func:`behaviour_source`.
        estimator: it may have no ratio, and then needs no behaviour.
        model: the model that made the rollouts (a module or a :class:`Policy`), or None.
        policy: the one that is sketched.

    Raises:
        CropiError: a record without log-probs where they are needed; a model that is needed and not given, or given and
            not used; a model with active dropout, or with the policy's own weights.
    """
    if model is not None:
        given = Policy.of(model).model
        check_dropout(given, "behaviour_model")
        _check_apart(given, policy.model)
    source = behaviour_source(asked, scan, estimator.ratio)
    if model is not None and not estimator.ratio:
        raise CropiError(
            f"behaviour_model: the estimator {estimator.name!r} has no ratio to it; leave the model out"
        )
    if source == "model" and model is None:
        raise CropiError("behaviour is 'model', but no model is given; name it with --behaviour-model")
    if model is not None and source != "model":
        raise CropiError(
            f"behaviour is {source!r}, which does not use the behaviour model that is given; leave one of them out"
        )
    made = BehaviourModel(model) if source == "model" else None
    largest, where = scan.largest_id
    if made is not None and largest >= made.policy.vocabulary:
        raise RecordError(
            where,
            f"token id {largest} is beyond the behaviour model's vocabulary of {made.policy.vocabulary}",
            "give the model that made the trajectories",
        )
    return Behaviour(source, made)


def _check_apart(model: Any, policy: Any) -> None:
    """Weights that both share are the policy's, after a step of training or adapters that PEFT put into them too: all
    ratios would be 1. A policy with weights of its own beside them (a soft prompt) is another model."""
    own, held = ({id(p) for p in one.parameters()} for one in (model, policy))
    if model is not policy and adapters_in_use(model) and not own.isdisjoint(held):
        raise CropiError(
            "behaviour_model shares its weights with the policy, whose adapters were put into it, so that both are the "
            "same model: load it a second time (or give its name), or copy it before get_peft_model"
        )
    if own == held:
        raise CropiError(
            "behaviour_model holds the very weights of the policy, so that every ratio would be 1, also after they are "
            "trained: give a copy from before (copy.deepcopy, or its name), or behaviour='current' where the policy "
            "made the responses"
        )
