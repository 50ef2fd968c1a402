"""Names of parameters: the same however a model is wrapped, and in messages.

A name is part of a parameter's coordinates, so wrappers must not change it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# Left in names by torch.compile, FSDP, DDP, activation-checkpoint wrappers and PEFT.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
_PEFT_PREFIX = re.compile(r"^base_model\.model\.")
# PEFT wraps a module once for every parameter of it that has an adapter: of those the place in the nest is kept.
_BASE_LAYER = re.compile(r"\.base_layer(?=\.)(?!\.(?:base_layer\.)*lora_)")


@functools.lru_cache(maxsize=16384)  # every batch of a live sketcher asks for those of all parameters
def canonical_name(name: str) -> str:
    """``name`` without the parts that wrappers insert.

    >>> canonical_name("_orig_mod.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
    'model.layers.0.self_attn.q_proj.weight'
    """
    return _BASE_LAYER.sub("", _PEFT_PREFIX.sub("", _WRAPPERS.sub("", name)))


def names_by_id(model: nn.Module) -> dict[int, str]:
    """The canonical names of a model's parameters, by their ids."""
    return {id(p): canonical_name(name) for name, p in model.named_parameters()}


def module_name(path: str) -> str:
    """:func:`canonical_name` of a module's path, which a wrapper may end.

    >>> module_name("_orig_mod.layers.0._checkpoint_wrapped_module")
    'layers.0'
    """
    return canonical_name(f"{path}.")[:-1]


def listed(names: Sequence[str], most: int) -> str:
    """The names in a message: at most so many, and how many more there are.

    >>> listed(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
