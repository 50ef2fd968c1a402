"""The steps that are compared: without weight gradients, the same with the sketch, and with weight gradients."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks.cost.timing import timed
from benchmarks.lib.examples import Example
from benchmarks.lib.memory import peak
from cropi_kernels import GradientSketcher, SketchSpec, logprob_and_grad

SPEC = SketchSpec()


def frozen(example: Example, i: int) -> torch.Tensor:
    """Forward, log-probs, weights, backward to the embeddings: everything but the sketch."""
    for p in example.model.parameters():
        p.requires_grad_(False)
    b = example.batches[i]
    embedded = example.model.get_input_embeddings()(b.input_ids).requires_grad_(True)
    hidden = example.split.decoder(
        inputs_embeds=embedded, attention_mask=b.attention_mask, position_ids=b.position_ids, use_cache=False
    ).last_hidden_state
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    with torch.no_grad():
        _, grad, _ = logprob_and_grad(
            flat[b.positions],
            example.split.head.weight,
            b.targets,
            example.weigh(b),
            temperature=b.temperature,
        )
        full = torch.zeros_like(flat).index_add_(0, b.positions, grad).view_as(hidden)
    hidden.backward(full)
    assert embedded.grad is not None
    return embedded.grad


def sketcher_of(model: Any, made: dict[int, GradientSketcher] = {}) -> GradientSketcher:  # noqa: B006
    """One sketcher per model, as in a real job: planning 272 parameters is not part of a step."""
    if id(model) not in made:
        made[id(model)] = GradientSketcher(model, SPEC)
    return made[id(model)]


def sketched(example: Example, i: int) -> torch.Tensor:
    for p in example.model.parameters():
        p.requires_grad_(True)
    b = example.batches[i]
    with sketcher_of(example.model) as sketcher:
        return sketcher.policy_gradient(
            b.input_ids,
            segments=b.segments,
            positions=b.positions,
            targets=b.targets,
            weigh=example.weigh(b),
            attention_mask=b.attention_mask,
            position_ids=b.position_ids,
            temperature=b.temperature,
        ).sketches


def with_weight_gradients(example: Example, i: int) -> list[torch.Tensor]:
    """Plain torch: logits of the scored tokens, log-softmax, ordinary backward."""
    for p in example.model.parameters():
        p.requires_grad_(True)
    b = example.batches[i]
    example.model.zero_grad(set_to_none=True)
    hidden = example.split.hidden(b.input_ids, attention_mask=b.attention_mask, position_ids=b.position_ids)
    z = example.split.head(hidden.reshape(-1, hidden.shape[-1])[b.positions]) / b.temperature
    logprobs = torch.log_softmax(z, -1).gather(1, b.targets[:, None])[:, 0]
    weights = example.weigh(b)(logprobs.detach(), 0, len(logprobs))
    (weights * logprobs).sum().backward()
    return [p.grad for p in example.model.parameters() if p.grad is not None]


MODES: dict[str, Callable[[Example, int], Any]] = {
    "forward + backward, frozen weights": frozen,
    "the same with the sketch (default spec)": sketched,
    "forward + backward with weight gradients": with_weight_gradients,
}


def serve(example: Example, name: str, asked: Iterable[str]) -> None:
    """A line with the cost of micro-batch i for every line ``i`` of ``asked``; first one with their number."""
    print(len(example.batches), flush=True)
    for line in asked:
        print(json.dumps(timed(functools.partial(MODES[name], example, int(line)))), flush=True)


def peak_memory(example: Example, name: str) -> int:
    """Bytes resident at the peak of a step; loading takes more than any step."""
    return peak(lambda: [MODES[name](example, i) for i in range(min(2, len(example.batches)))])
