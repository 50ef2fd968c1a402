"""Parameter names that do not change when a model is wrapped: a name is part of a parameter's coordinates."""

from __future__ import annotations

import re

# Left in names by torch.compile, FSDP, DDP, activation-checkpoint wrappers and PEFT.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
_PEFT_PREFIX = re.compile(r"^base_model\.model\.")
# PEFT wraps a module once for every parameter of it that has an adapter: of those the place in the nest is kept.
_BASE_LAYER = re.compile(r"\.base_layer(?=\.)(?!\.(?:base_layer\.)*lora_)")


def canonical_name(name: str) -> str:
    """``name`` without the parts that wrappers insert.

    >>> canonical_name("_orig_mod.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
    'model.layers.0.self_attn.q_proj.weight'
    """
    return _BASE_LAYER.sub("", _PEFT_PREFIX.sub("", _WRAPPERS.sub("", name)))
