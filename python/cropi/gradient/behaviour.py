"""Behaviour log-probs computed by the model that made the rollouts."""

from __future__ import annotations

from typing import Any

import torch

from cropi.gradient.batches import MicroBatch
from cropi_kernels import token_logprobs


class BehaviourModel:
    """Scores the tokens of a batch under the rollouts' temperature, without a gradient and without all logits."""

    def __init__(self, model: Any) -> None:
        self.model = model
        first = torch.zeros(1, dtype=torch.int64, device=next(model.parameters()).device)
        token_logprobs(model, first[None], positions=first, targets=first)  # what it cannot do is said now

    def logprobs(self, batch: MicroBatch) -> torch.Tensor:
        """log beta of the scored tokens: float32 ``[N]`` on the batch's device."""
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
