"""Real micro-batches for benchmarks: a model and prompt groups of the example data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from cropi.data.readers import read
from cropi.data.rewards import no_gradient_reason
from cropi.gradient.batches import MicroBatch, make_batches
from cropi.gradient.estimators import Estimator, make_estimator
from cropi.gradient.layout import choose_layout
from cropi.gradient.tokenize import TokenGroup
from cropi.model.load import load_model
from cropi.model.policy import Policy
from cropi.sketching.job import SketchJob, make_tokenize
from cropi_kernels.sketcher.policy.decoder import split_model
from cropi_kernels.sketcher.policy.split import SplitModel


@dataclasses.dataclass
class Example:
    model: Any
    split: SplitModel
    estimator: Estimator
    batches: list[MicroBatch]
    groups: list[TokenGroup]

    def weigh(self, b: MicroBatch) -> Callable[[torch.Tensor, int, int], torch.Tensor]:
        return self.estimator.weigher(b.advantages, b.divisors, b.behaviour, b.responses)

    def describe(self) -> str:
        tokens = sum(b.input_ids.numel() for b in self.batches)
        scored = sum(len(b.positions) for b in self.batches)
        groups = sum(len(b.groups) for b in self.batches)
        shape = f"{tokens} tokens with padding, {scored} scored"
        return f"{groups} prompt groups in {len(self.batches)} micro-batches, {shape}"


def read_groups(model: Any, tokenizer: Any, path: str) -> list[TokenGroup]:
    """Tokenised prompt groups with a gradient, in the file's order."""
    tokenize = make_tokenize(Policy(model, tokenizer), SketchJob([path], "unused"))
    return [tokenize(g) for g in read([path]) if no_gradient_reason(g.rewards) is None]


def load_example(name: str, path: str, n_groups: int, tokens: int) -> Example:
    """The first ``n_groups`` groups of a file in micro-batches of at most ``tokens`` tokens."""
    model, tokenizer = load_model(name)
    groups = read_groups(model, tokenizer, path)[:n_groups]
    empty = Example(model, split_model(model), make_estimator("cropi"), [], groups)
    return rebatch(empty, n_groups, tokens)


def rebatch(example: Example, n_groups: int, tokens: int) -> Example:
    """The same model on the first ``n_groups`` groups with another token budget; 1: a group at a time."""
    groups = example.groups[:n_groups]
    stored = all(g.logprobs is not None for g in groups)
    layout = choose_layout(example.model)
    if tokens == 1:
        rows = [make_batches([g], example.estimator, layout, stored_behaviour=stored) for g in groups]
        batches = [b for row in rows for b in row]
    else:
        batches = list(
            make_batches(groups, example.estimator, layout, budget=tokens, stored_behaviour=stored)
        )
    return dataclasses.replace(example, batches=batches, groups=groups)
