"""The policy: a small Llama model over characters."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.rlvr_mini.config import Scale
from benchmarks.rlvr_mini.tasks import CHARACTERS, END, OFFSET

VOCABULARY = 64  # the alphabet and the end token, rounded up
CONTEXT = 64
assert len(CHARACTERS) + OFFSET <= VOCABULARY


def make_model(scale: Scale, seed: int) -> Any:
    """A fresh model of the scale's size, float32, on its device; equal seeds give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=scale.hidden,
                intermediate_size=scale.inner,
                num_hidden_layers=scale.layers,
                num_attention_heads=scale.heads,
                num_key_value_heads=scale.heads,
                max_position_embeddings=CONTEXT,
                tie_word_embeddings=False,
                pad_token_id=END,
                bos_token_id=END,
                eos_token_id=END,
                attn_implementation="sdpa",
            )
        )
    return model.to(scale.device).eval()
