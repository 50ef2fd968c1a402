"""Small models of families that use parameters in ways of their own: sinks, scales, gates, state spaces, experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from support.zoo import SIZES, moved

# Other implementations of the experts know no float64.
EAGER = dict(experts_implementation="eager")
SHORT = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2)
HEADS = dict(SHORT, num_attention_heads=4, max_position_embeddings=64)
SSM = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=2, mamba_chunk_size=4)
TWO = dict(layer_types=["full_attention"] * 2)
BART = dict(vocab_size=97, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48)
GEMMA3N = dict(
    vocab_size_per_layer_input=97,
    hidden_size_per_layer_input=8,
    laurel_rank=4,
    head_dim=8,
    num_kv_shared_layers=0,
    activation_sparsity_pattern=[0.0, 0.0],
)
NEMOTRON = dict(mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=2, chunk_size=4)
JAMBA = dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1)
QWEN3_NEXT = dict(
    head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    layer_types=["linear_attention", "full_attention"],
)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
DEEPSEEK = dict(
    LATENT,
    num_key_value_heads=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
)
DEEPSEEK4 = dict(
    SHORT,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=16,
    q_lora_rank=16,
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    o_groups=2,
    o_lora_rank=8,
    index_n_heads=2,
    index_head_dim=8,
    index_topk=4,
    sliding_window=32,
    partial_rotary_factor=0.5,
    max_position_embeddings=64,
)
ZAYA = dict(
    SHORT,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    moe_intermediate_size=16,
    num_experts=4,
    num_experts_per_tok=1,
    router_hidden_size=16,
    max_position_embeddings=64,
)

# name: (class, its configuration, a parameter that is used in a way of its own)
ODD: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt-oss": (
        "GptOss",
        dict(SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2, **TWO, **EAGER),
        "sinks",
    ),
    "opt": ("OPT", dict(HEADS, ffn_dim=48, word_embed_proj_dim=32), "embed_positions.weight"),
    "bart": ("Bart", dict(BART, max_position_embeddings=64), "embed_positions.weight"),
    "biogpt": ("BioGpt", dict(HEADS, intermediate_size=48), "embed_positions.weight"),
    "apertus": ("Apertus", SIZES, "act_fn.alpha_p"),
    "diffllama": ("DiffLlama", dict(SIZES, attn_implementation="eager"), "lambda_q1"),
    "cohere": ("Cohere", dict(SIZES, use_qk_norm=True), "q_norm.weight"),
    "gemma3n": (
        "Gemma3n",
        dict(SIZES, **GEMMA3N, **{**TWO, "intermediate_size": [48, 48]}),
        "correct_output_scale",
    ),
    "mamba": ("Mamba", dict(SHORT, state_size=8), "dt_proj.weight"),
    "mamba2": (
        "Mamba2",
        dict(SHORT, state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=4),
        "mixer.norm.weight",
    ),
    "bamba": ("Bamba", dict(SIZES, **SSM, attn_layer_indices=[1]), "mamba.norm.weight"),
    "nemotron-h": (
        "NemotronH",
        dict(SIZES, **NEMOTRON, layers_block_type=["mamba", "attention"]),
        "mixer.norm.weight",
    ),
    "falcon-h1": ("FalconH1", dict(SIZES, **SSM, mamba_d_ssm=64), "mamba.A_log"),
    "jamba": (
        "Jamba",
        dict(SIZES, **JAMBA, **EAGER, num_experts=2, mamba_d_state=8, use_mamba_kernels=False),
        "dt_proj.weight",
    ),
    "lfm2": (
        "Lfm2",
        dict(SIZES, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
        "conv.conv.weight",
    ),
    "rwkv": ("Rwkv", dict(SHORT, attention_hidden_size=32, context_length=64), "attention.time_decay"),
    "mixtral": ("Mixtral", dict(SIZES, num_local_experts=4, num_experts_per_tok=2, **EAGER), "gate.weight"),
    "qwen3-next": ("Qwen3Next", dict(SIZES, **QWEN3_NEXT, **EAGER), "linear_attn.dt_bias"),
    "deepseek-v4": ("DeepseekV4", dict(DEEPSEEK4, **EAGER), "sinks"),
    "zaya": ("Zaya", dict(ZAYA, **EAGER), "v_proj_delayed.weight"),
    "cpmant": (
        "CpmAnt",
        dict(SHORT, num_attention_heads=4, dim_head=8, dim_ff=48, prompt_length=4),
        "output_layernorm.weight",
    ),
    "deepseek-v3": ("DeepseekV3", dict(SIZES, **{**DEEPSEEK, **EAGER}), "gate.weight"),
}


# Releases of transformers in which a family is new, or was rewritten into what ODD says of it.
SINCE = {"cpmant": "5.16", "deepseek-v4": "5.12", "jamba": "5.15", "mamba": "5.15", "zaya": "5.13"}


def make(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """The model with seeded weights, moved."""
    pytest.importorskip("transformers", SINCE.get(name))
    family, sizes, _ = ODD[name]
    config = getattr(transformers, _config_class(family))(**{**sizes, **changes})
    torch.manual_seed(0)
    return moved(getattr(transformers, f"{family}ForCausalLM")(config).eval()).to(dtype)  # type: ignore[no-any-return]


def _config_class(family: str) -> str:
    return "Gemma3nTextConfig" if family == "Gemma3n" else f"{family}Config"


def llama4() -> Any:
    """Scales queries by the column and not by the position, from column 31 on."""
    sizes = {
        **SIZES,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = transformers.Llama4TextConfig(
        **sizes, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, no_rope_layers=[0, 0], moe_layers=[],
        attention_chunk_size=256, floor_scale=32, attn_scale=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    return moved(transformers.Llama4ForCausalLM(config).eval(), 0.1)
