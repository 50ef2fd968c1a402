"""Batched sampling with a KV cache, recording the log-prob of every sampled token.

Pure sampling at temperature 1: the recorded log-probs are those of the policy itself, no top-p or top-k renormalises
them. Row (prompt, k) draws its uniform numbers from its own generator, so what it samples does not depend on the
batch it happens to be in (up to float rounding of the logits).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache


@dataclass
class Rollout:
    """One sampled response: token ids (EOS included when it ended by itself) and their log-probs."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    truncated: bool = True


@torch.inference_mode()
def sample_groups(
    model: Any,
    prompts: list[list[int]],
    keys: list[str],
    *,
    rollouts: int,
    max_new_tokens: int,
    eos: int,
    seed: int,
) -> list[list[Rollout]]:
    """Sample ``rollouts`` responses to each prompt; ``keys`` (prompt ids) seed the rows."""
    logits, cache, mask = _prefill(model, prompts)
    cache.batch_repeat_interleave(rollouts)
    logits, mask = (t.repeat_interleave(rollouts, 0) for t in (logits, mask))
    uniform = torch.stack([_uniforms(seed, key, k, max_new_tokens) for key in keys for k in range(rollouts)])
    done = [Rollout() for _ in uniform]
    rows = torch.arange(len(done))  # which rollout each live batch row belongs to
    for step in range(max_new_tokens):
        logprobs = torch.log_softmax(logits.float(), -1)
        tokens = _inverse_cdf(logprobs, uniform[rows, step])
        picked = logprobs.gather(1, tokens[:, None])[:, 0]
        for row, token, logprob in zip(rows.tolist(), tokens.tolist(), picked.tolist()):
            done[row].ids.append(token)
            done[row].logprobs.append(logprob)
            done[row].truncated = token != eos
        live = tokens != eos
        if step + 1 == max_new_tokens or not live.any():
            break
        if not live.all():
            keep = live.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, tokens, mask = rows[keep], tokens[keep], mask[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    return [done[i : i + rollouts] for i in range(0, len(done), rollouts)]


def _prefill(model: Any, prompts: list[list[int]]) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """Left-pad, so that every row's last prompt token is in the last column."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    cache = DynamicCache(config=model.config)
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp_min(0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return out.logits[:, -1], cache, mask


def _uniforms(seed: int, key: str, k: int, count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([seed, zlib.crc32(key.encode()), k]).random(count))


def _inverse_cdf(logprobs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    cdf = logprobs.double().exp().cumsum(1)
    # Scaled by the last entry: rounding may leave it a hair under 1, and no draw may fall beyond it.
    return torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0].clamp_max(
        cdf.shape[1] - 1
    )


@torch.inference_mode()
def teacher_forced(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probs of the response's tokens by one plain forward over prompt and response: no cache, no padding."""
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].float()
    logprobs = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
    return logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]
