"""Small models of every family of experts that transformers has, and what they need to be built small."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from support import zoo

# By the names that configurations have: a family takes those that it knows.
SIZES: dict[str, Any] = dict(
    vocab_size=zoo.VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, sliding_window=32, pad_token_id=0,
    moe_intermediate_size=24, shared_expert_intermediate_size=24, n_shared_experts=1, num_shared_experts=1,
    num_experts=6, num_local_experts=6, n_routed_experts=6, moe_num_experts=6,
    num_experts_per_tok=2, num_experts_per_token=2, moe_k=2, top_k_experts=2, moe_topk=2, topk=2,
    n_group=2, topk_group=1, first_k_dense_replace=1, moe_layer_freq=1, decoder_sparse_step=1,
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    mamba_num_heads=4, mamba_head_dim=16, mamba_n_groups=2, mamba_d_state=8, mamba_d_head=16, mamba_n_heads=4,
    ssm_state_size=8, n_groups=2, chunk_size=8, enable_moe_block=True, hidden_size_per_layer_input=0,
)  # fmt: skip
INKLING: dict[str, Any] = dict(
    unpadded_vocab_size=zoo.VOCAB, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8,
    sliding_window_size=32, d_rel=4, rel_extent=32,
)  # fmt: skip
# Layers in the middle run several times.
INKLING_LOOP: dict[str, Any] = dict(
    INKLING, num_hidden_layers=3, n_layers_per_attn_res_block=1, loop_layer_index_start=1, loop_layer_index_end=2,
    loop_gate_rank=4,
)  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "inkling2_text": INKLING,
    "inkling2_loop_text": INKLING_LOOP,
    "zaya": dict(num_experts_per_tok=1),
    "longcat_flash": dict(
        num_layers=2, ffn_hidden_size=48, expert_ffn_hidden_size=24, zero_expert_num=2, head_dim=8
    ),
    "bailing_hybrid": dict(head_dim=16, layer_types=["linear_attention", "full_attention"]),
    # By default 32 linear heads of 128, in both layers.
    "kimi_linear": dict(
        linear_head_dim=8, linear_num_heads=4, layer_types=["linear_attention", "full_attention"]
    ),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
}
LARGEST = 4_000_000  # parameters


@functools.cache
def families() -> tuple[str, ...]:
    """Model types of causal LMs whose code has experts."""
    found = []
    for kind, name in CAUSAL.items():
        # Read and not imported: to import all of them takes seconds of every process that collects tests.
        spec = importlib.util.find_spec(f"transformers.{transformers._class_to_module[name]}")
        source = Path(str(spec and spec.origin)).read_text(encoding="utf-8")
        if "Experts" in source and kind not in found:
            found.append(kind)
    return tuple(found)


def small(kind: str) -> nn.Module:
    """A model of the family in float32, its weights seeded, scales and biases off 1 and 0.

    Raises:
        ValueError: the family asks for more than a few sizes; says what.
    """
    model_class = getattr(transformers, CAUSAL[kind])
    known = set(inspect.signature(model_class.config_class.__init__).parameters)
    sizes = {name: value for name, value in SIZES.items() if name in known}
    if "qk_rope_head_dim" in known:  # latent attention: as many heads of keys, of a width of their own
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    sizes |= CHANGES.get(kind, {})
    try:
        config = model_class.config_class(**sizes)
        with torch.device("meta"):
            total = sum(p.numel() for p in model_class(config).parameters())
    except Exception as error:  # their code
        raise ValueError(f"{kind} needs sizes of its own: {type(error).__name__}: {error}") from error
    if total > LARGEST:
        raise ValueError(f"{kind} has {total} parameters at these sizes")
    torch.manual_seed(0)
    return zoo.moved(model_class(config).eval(), 0.05)  # type: ignore[no-any-return]


def eager(model: nn.Module) -> nn.Module:
    """With the family's own loop over experts, the one implementation that takes float64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model
