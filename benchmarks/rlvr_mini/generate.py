"""Rollouts: several sampled responses to each prompt, with the log-prob of every token as it was sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.rlvr_mini.decode import Decoder
from benchmarks.rlvr_mini.tasks import END
from cropi.rollouts.generate import past

MAX_RESPONSE = 12
SHRINK = 0.75


@dataclass(frozen=True)
class Rollout:
    """One response: its token ids, the end token included if it ended by itself, and their log-probs."""

    ids: list[int]
    logprobs: list[float]


@torch.no_grad()
def generate(
    model: Any,
    prompts: list[list[int]],
    count: int,
    *,
    generator: torch.Generator | None = None,
    rows: int = 256,
    longest: int = MAX_RESPONSE,
) -> list[list[Rollout]]:
    """``count`` responses to every prompt, at temperature 1; with ``generator=None`` the likeliest token is taken.

    A prompt is computed once and its keys and values are copied for its responses. Prompts are padded on the left;
    a position counts from the prompt's first token. At most ``rows`` responses are decoded together.
    """
    done: list[list[Rollout]] = []
    per_batch = max(1, rows // count)
    for start in range(0, len(prompts), per_batch):
        done.extend(_batch(model, prompts[start : start + per_batch], count, generator, longest))
    return done


def _batch(
    model: Any, prompts: list[list[int]], count: int, generator: torch.Generator | None, longest: int
) -> list[list[Rollout]]:
    device, width = model.device, max(map(len, prompts))
    ids = torch.tensor([[END] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, **past(model, cache)
    ).logits[:, -1]
    decoder = Decoder(model, cache, count, mask.bool(), longest)
    logits = logits.repeat_interleave(count, 0)
    rows = torch.arange(len(logits), device=device)  # the row of each line of logits; a line may have ended
    tokens = torch.full((len(rows), longest), END, device=device)
    logprobs = torch.zeros(len(rows), longest, device=device)
    lengths = torch.full((len(rows),), longest, device=device)
    alive = torch.ones(len(rows), dtype=torch.bool, device=device)
    for t in range(longest):
        scores = logits.float().log_softmax(-1)
        if generator is None:
            chosen = scores.argmax(-1)
        else:
            chosen = torch.multinomial(scores.exp(), 1, generator=generator)[:, 0]
        tokens[rows, t] = chosen
        logprobs[rows, t] = scores.gather(1, chosen[:, None])[:, 0]
        ended = alive & (chosen == END)
        lengths[rows[ended]] = t + 1
        alive &= ~ended
        left = int(alive.sum())
        if t + 1 == longest or left == 0:
            break
        # Dropping rows copies the keys and values of the others: only when it saves much.
        if left < SHRINK * len(rows):
            going = alive.nonzero()[:, 0]
            decoder.keep(going)
            rows, chosen, alive = rows[going], chosen[going], alive[going]
        logits = decoder.step(chosen)
    made = [
        Rollout(row[:n], values[:n])
        for row, values, n in zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), strict=True)
    ]
    return [made[i : i + count] for i in range(0, len(made), count)]
