"""Behaviour log-probs computed by the model that made the rollouts."""

from __future__ import annotations

from typing import Any

import torch

from cropi.gradient.batches import MicroBatch
from cropi.gradient.layout import additive_if_eager
from cropi_kernels import linear_logprob
from cropi_kernels.sketcher.decoder import SplitModel, split_model


class BehaviourModel:
    """Scores the tokens of a batch under the rollouts' temperature, without a gradient and without all logits."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._split: SplitModel = split_model(model)

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch) -> torch.Tensor:
        """log beta of the scored tokens: float32 ``[N]`` on the batch's device."""
        split, device = self._split, self._split.head.weight.device
        here = batch.to(device)
        hidden = split.hidden(
            here.input_ids,
            attention_mask=additive_if_eager(self.model, here.attention_mask),
            position_ids=here.position_ids,
        ).flatten(0, 1)[here.positions]
        result = linear_logprob(
            hidden, split.head.weight, here.targets,
            bias=split.head.bias, temperature=batch.temperature / split.scale, softcap=split.softcap,
        )  # fmt: skip
        assert isinstance(result, torch.Tensor)
        return result.float().to(batch.targets.device)
