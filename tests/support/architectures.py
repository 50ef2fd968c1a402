"""Every causal architecture of the installed transformers, built small from its configuration class."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import signal
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cropi_kernels import GradientSketcher, SketchSpec
from cropi_kernels.testing import exact_gradient, sketch_gradients
from support import moe, zoo

SPEC = SketchSpec(width=16, vocab_width=64)
LARGEST = 3_000_000  # parameters
SECONDS = 120  # for one architecture, on a machine that others use too
# By every name that configurations have for it. What a class does not take is left out.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), zoo.VOCAB),
    **dict.fromkeys(
        (
            "hidden_size",
            "n_embd",
            "d_model",
            "embed_dim",
            "embedding_size",
            "word_embed_proj_dim",
            "dim",
            "n_embed",
        ),
        32,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "d_ff",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "n_inner",
            "ffn_hidden_size",
            "block_ff_dim",
            "dense_intermediate_size",
            "intermediate_size_mlp",
            "shared_expert_intermediate_size",
        ),
        48,
    ),  # fmt: skip
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "decoder_layers",
            "encoder_layers",
            "num_decoder_layers",
        ),
        2,
    ),  # fmt: skip
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
        ),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "global_head_dim", "d_kv", "rotary_dim"), 8),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length"), 64
    ),
    **dict.fromkeys(
        (
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
            "num_local_experts_per_layer",
        ),
        4,
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k", "num_experts_per_token"), 2),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "expert_ffn_hidden_size",
            "shared_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "hidden_size_per_layer_input",
        ),
        16,
    ),  # fmt: skip
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 8),
    "qk_rope_head_dim": 8,
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_state_dim"), 4),
    **dict.fromkeys(
        ("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "linear_num_key_heads"), 4
    ),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("sliding_window", "attention_window", "attention_chunk_size", "window_size"), 32),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BLT = dict(
    vocab_size=zoo.VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    max_position_embeddings=64,
)
_ROPE = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1])
_SIGLIP = dict(
    model_type="siglip_vision_model",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    image_size=16,
    patch_size=4,
)
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_CONV = {"layer_types": ["conv", "full_attention"]}
_LOCAL = {"layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"mlp_layer_types": ["dense", "sparse"]}
# What the sizes above do not say.
MORE: dict[str, dict[str, Any]] = {
    # A layer of every kind: attention that is linear, full or local, dense layers and experts.
    **dict.fromkeys(("granitemoehybrid", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _LINEAR),
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "bailing_hybrid": {**_LINEAR, **_EXPERTS, "num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1]},
    "beam": _EXPERTS,
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "flint": {"mlp_only_layers": [0]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    **dict.fromkeys(("lfm2", "lfm3"), _CONV),
    "llama4_text": {
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
        "moe_layers": [1],
    },
    "minimax_m3_vl_text": {**_EXPERTS, "layer_types": ["full_attention", "minimax_m3_sparse"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "smollm3": {"no_rope_layers": [1, 0]},
    **dict.fromkeys(
        (
            "afmoe",
            "cohere2",
            "exaone4",
            "exaone_moe",
            "gemma3_text",
            "kolibri1",
            "laguna",
            "mellum",
            "ministral",
            "olmo3",
        ),
        _LOCAL,
    ),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v2",
            "dots3_note_text",
            "glm4_moe_lite",
            "longcat_flash",
            "minicpm3",
            "sarvam_mla",
            "youtu",
        ),
        {"num_key_value_heads": 4},
    ),
    "deepseek_v3": {"num_key_value_heads": 4, "first_k_dense_replace": 1},
    # Layers in the middle run several times.
    "dory": dict(
        num_hidden_layers=3, n_input_layers=1, n_recurrent_layers=1, n_output_layers=1, n_recurrent_loops=3
    ),
    "inkling2_text": moe.INKLING,
    "inkling2_loop_text": moe.INKLING_LOOP,
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), {"num_key_value_heads": 4, **_EXPERTS}),
    "kimi_linear": {**_LINEAR, "linear_head_dim": 8, "linear_num_heads": 4, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2},
    "xmod": {"default_language": "en_XX"},
    "falcon_h1": {"mamba_d_ssm": 64},
    "lfm2_moe": {**_CONV, "num_dense_layers": 1},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "attention_head_dim": 16,
        "n_mamba_heads": 1,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    # Two layers take keys and values of those below, as all but the first do in the released ones.
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma3": {"vision_config": _SIGLIP, "mm_tokens_per_image": 4},
    "roc_bert": {"pronunciation_vocab_size": 97, "shape_vocab_size": 97},
    "xlm": {"n_words": 97, "emb_dim": 32},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": None},
    },
    "blt": dict(
        patch_in_forward=True,
        patch_size=4,
        cross_attn_k=2,
        encoder_hash_byte_group_vocab=50,
        encoder_hash_byte_group_size=[2, 3],
        encoder_hash_byte_group_nb_functions=1,
        patcher_config=_BLT,
        encoder_config={**_BLT, "cross_attn_k": 2, "hidden_size_global": 64},
        decoder_config={**_BLT, "cross_attn_k": 2, "hidden_size_global": 64},
        global_config={**_BLT, "hidden_size": 64, "head_dim": 16},
    ),
}
FLOAT32 = {"xglm"}  # their own code does not run in float64
NAMES = sorted(dict.fromkeys(str(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


class NotSmall(Exception):
    """The architecture is not built from sizes alone."""


@contextlib.contextmanager
def time_box(seconds: int) -> Iterator[None]:
    def ring(*args: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def sized(kind: Any) -> Any:
    """A small configuration of a class, and of those inside it."""
    taken = set(inspect.signature(kind.__init__).parameters)
    for base in kind.__mro__:
        taken |= set(getattr(base, "__annotations__", ()))
    given = {name: value for name, value in SIZES.items() if name in taken}
    for name, part in getattr(kind, "sub_configs", {}).items():
        if part is not transformers.AutoConfig and name in taken:
            given[name] = sized(part)
    return kind(**{**given, **MORE.get(kind.model_type, {})})


def small(model_type: str) -> nn.Module:
    """The model, in float32, with scales and biases moved off 1 and 0.

    Raises:
        NotSmall: says why it does not come about.
    """
    try:
        config = sized(transformers.CONFIG_MAPPING[model_type])
        for part in (config, config.get_text_config()):
            for flag in ("is_decoder", "use_cache"):
                if hasattr(part, flag):
                    setattr(part, flag, flag == "is_decoder")
        with torch.device("meta"):
            shape = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config))
        size = sum(p.numel() for p in shape.parameters())
        if size > LARGEST:
            raise NotSmall(f"{size:,} parameters")
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    except NotSmall:
        raise
    except Exception as error:
        raise NotSmall(f"{type(error).__name__}: {error}") from error
    try:
        with torch.no_grad():
            model(input_ids=rows()[0], use_cache=False)
    except Exception as error:  # sizes that do not fit each other, or other inputs than token ids
        raise NotSmall(f"{type(error).__name__}: {error}") from error
    return zoo.moved(model)  # type: ignore[no-any-return]


@functools.cache
def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two responses of one prompt and one of another: ids [3, 9], positions, targets, weights; no padding."""
    ids = (torch.arange(27).view(3, 9) * 7 + 5) % (zoo.VOCAB - 8) + 5
    positions = (torch.arange(3)[:, None] * 9 + torch.arange(3, 8)).flatten()
    targets = ids[:, 4:].flatten()
    return ids, positions, targets, torch.sin(torch.arange(15) + 1.0)


SEGMENTS = torch.tensor([0, 0, 1])


def exact(name: str, exclude: tuple[str, ...] = ()) -> torch.Tensor:
    """float64 sketches [2, dim] of plain autograd's gradients, one response at a time."""
    model = small(name)
    if name not in FLOAT32:
        model = model.double()
    if hasattr(model, "set_experts_implementation"):
        with contextlib.suppress(Exception):
            model.set_experts_implementation("eager")
    ids, _, targets, weights = rows()
    total = torch.zeros(2, SPEC.dim, dtype=torch.float64)
    for row, segment in enumerate(SEGMENTS.tolist()):
        chosen = slice(5 * row, 5 * row + 5)
        one = dict(positions=torch.arange(3, 8), targets=targets[chosen], weights=weights[chosen])
        gradient = exact_gradient(model, ids[row : row + 1], **one)  # type: ignore[arg-type]
        wide = {key: g.double() for key, g in gradient.items()}
        total[segment] += sketch_gradients(model, wide, SPEC, exclude)
    return total


def by_policy_gradient(sketcher: GradientSketcher) -> torch.Tensor:
    ids, positions, targets, weights = rows()
    return sketcher.policy_gradient(
        ids, segments=SEGMENTS, positions=positions, targets=targets, weigh=lambda logp, a, b: weights[a:b]
    ).sketches


def by_batch(sketcher: GradientSketcher, model: Any) -> torch.Tensor:
    ids, positions, targets, weights = rows()
    with sketcher.batch(SEGMENTS, shape=(3, 9)) as out:
        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[positions]
        (torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0] * weights).sum().backward()
    return out.sketches
