"""Which module of a model turns hidden states into logits."""

from __future__ import annotations

from torch import nn


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, if the model says which; of PEFT's copies the one that runs."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict) and not getattr(head, "disable_adapters", False):
        running = [copies[name] for name in getattr(head, "active_adapters", ()) if name in copies]
        head = running[0] if len(running) == 1 else head
    return head if isinstance(head, nn.Module) else None


def base_of(head: nn.Module | None) -> nn.Module | None:
    """The layer under LoRA's wrapper; any other module is its own base."""
    base = head.base_layer if head is not None and is_lora(head) else head
    assert base is None or isinstance(base, nn.Module)
    return base


def is_lora(head: nn.Module) -> bool:
    """Whether it is LoRA's wrapper around a layer."""
    return all(
        hasattr(head, name) for name in ("base_layer", "lora_A", "lora_B", "scaling", "active_adapters")
    )
