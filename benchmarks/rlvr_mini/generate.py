"""Rollouts: several sampled responses to each prompt, with the log-prob of every token as it was sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.rlvr_mini.tasks import END

MAX_RESPONSE = 12


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
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
    ).logits[:, -1]
    cache.batch_repeat_interleave(count)
    logits, mask = (t.repeat_interleave(count, 0) for t in (logits, mask))
    position = positions[:, -1:].repeat_interleave(count, 0)
    alive = torch.arange(len(logits), device=device)  # rows that have not ended; only these are computed
    tokens = torch.full((len(logits), longest), END, device=device)
    logprobs = torch.zeros(len(logits), longest, device=device)
    lengths = torch.zeros(len(logits), dtype=torch.long, device=device)
    for t in range(longest):
        scores = logits.float().log_softmax(-1)
        if generator is None:
            chosen = scores.argmax(-1)
        else:
            chosen = torch.multinomial(scores.exp(), 1, generator=generator)[:, 0]
        tokens[alive, t], lengths[alive] = chosen, t + 1
        logprobs[alive, t] = scores.gather(1, chosen[:, None])[:, 0]
        going = (chosen != END).nonzero()[:, 0]
        if t + 1 == longest or len(going) == 0:
            break
        if len(going) < len(alive):
            cache.batch_select_indices(going)
            alive, chosen, mask, position = alive[going], chosen[going], mask[going], position[going]
        mask, position = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), position + 1
        logits = model(
            input_ids=chosen[:, None], attention_mask=mask, position_ids=position, past_key_values=cache
        ).logits[:, -1]
    made = [
        Rollout(row[:n], values[:n])
        for row, values, n in zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), strict=True)
    ]
    return [made[i : i + count] for i in range(0, len(made), count)]
