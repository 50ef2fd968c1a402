"""What changes a model's gradients beside its weights: its configuration, those of its adapters, and its buffers.

Two models of equal weights and another RoPE, window, scale, activation or number of experts are two models. The keys of
a configuration differ between models and between releases of transformers, so that all are taken but those that are
known to change no gradient here (:data:`LEFT_OUT`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

# Names, formats and what a pass returns; tokens that generation ends with; how weights were initialised, quantised and
# laid out, which the weights show; dropout, which is off in scoring; losses beside that of the tokens; which code
# computes the same.
LEFT_OUT = re.compile(
    r"_?name_or_path|_commit_hash|architectures|auto_map|transformers_version|(torch_)?dtype|.*_token_ids?|use_cache"
    r"|use_return_dict|return_dict|output_(attentions|hidden_states|router_logits)|problem_type|finetuning_task|task_specific_params|.*(id2label|label2id)"
    r"|num_labels|is_encoder_decoder|tie_word_embeddings|tokenizer_class|torchscript|_\w+_implementation"
    r"|attn_implementation|quantization_config|pretraining_tp|base_model_\w+_plan|(gradient|activation)_checkpointing\w*"
    r"|num_logits_to_keep|model_max_length|(.*_)?init(ializer|_.*)?(_\w+)?|\w+_std(_dev)?|rescale_prenorm_residual"
    r"|\w*(drop|jitter)\w*|\w*(aux_loss|z_loss)\w*|mtp_\w+|num_(mtp|nextn_predict)_layers|(summary|classifier)_\w+"
    r"|chunk_size_(feed_forward|lm_head)|use_mamba_?\w+|use_associative_scan|use_mem_eff_path|use_kernels?"
)
# Of an adapter: where it came from, which modules have it (the weights' names say it), and how it was initialised.
ADAPTER_LEFT_OUT = re.compile(
    r"task_type|auto_mapping|peft_version|base_model_name_or_path|revision|inference_mode|bias|runtime_config"
    r"|(target|exclude)_(modules|parameters)|modules_to_save|layers_to_transform|layers_pattern|megatron_\w+"
    r"|init_\w+|\w*dropout\w*|(loftq|eva|corda|lora_ga)_config|trainable_token_indices|ensure_weight_tying"
)


def model_settings(model: Any) -> dict[str, Any]:
    """The configuration of a model's text part, without :data:`LEFT_OUT`, in JSON's types; ``adapter.NAME.KEY`` are
    those of PEFT's adapters that are in use. Empty for a module without a configuration of transformers."""
    config = getattr(model, "config", None)
    made = _plain(_text_config(config), LEFT_OUT) if hasattr(config, "to_dict") else {}
    configs = getattr(model, "peft_config", None) or {}
    used = {adapter for module in model.modules() for adapter in adapters_of(module) or ()}
    for name in sorted(used & configs.keys()):
        held = configs[name].to_dict() if hasattr(configs[name], "to_dict") else {}
        for key, value in _plain(held, ADAPTER_LEFT_OUT).items():
            # PEFT makes lists of its sets.
            made[f"adapter.{name}.{key}"] = sorted(value, key=str) if isinstance(value, list) else value
    return made


def adapters_of(module: Any) -> list[str] | None:
    """The adapters that a layer of PEFT adds; None for another module."""
    if not getattr(type(module), "adapter_layer_names", ()):
        return None
    return [] if module.disable_adapters else list(module.active_adapters)


def saved_buffers(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a checkpoint holds beside the parameters, in order of their names: a router's correction, a layer's
    scale, quantised numbers. Others are made of the configuration."""
    held = {
        f"{name}.{key}" if name else key: buffer
        for name, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    }
    yield from sorted(held.items(), key=lambda item: item[0])


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config().to_dict()
    except (AttributeError, ValueError):
        # Not of transformers, or of several text models.
        return config.to_dict()


def _plain(value: Any, left_out: re.Pattern[str] | None = None) -> Any:
    """A value in JSON's types; of a table's keys those that do not match."""
    if isinstance(value, Mapping):
        return {
            str(key): _plain(held, left_out)
            for key, held in value.items()
            if left_out is None or not left_out.fullmatch(str(key))
        }
    if isinstance(value, (list, tuple)):
        return [_plain(held, left_out) for held in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(held, left_out) for held in value), key=str)
    plain = (
        value is None
        or isinstance(value, (bool, int, str))
        or (isinstance(value, float) and math.isfinite(value))
    )
    return value if plain else str(value)
