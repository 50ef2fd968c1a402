"""A causal LM split into the decoder (tokens to hidden states) and the head (hidden states to logits).

The fused pass runs them apart, so that logits exist for scored tokens only and one chunk at a time. That the parts make
the whole is not assumed: it is checked once against the model's own forward.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

REMEDY = "use `with sketcher.batch(...)` around your own loss instead of policy_gradient"


@dataclasses.dataclass(frozen=True)
class SplitModel:
    """``logits = softcap((decoder(tokens) @ head.weight.T + bias) * scale)``; no model has both softcap and scale."""

    decoder: nn.Module
    head: nn.Linear
    scale: float
    softcap: float | None

    def hidden(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        out = self.decoder(input_ids=input_ids, use_cache=False, **kwargs)
        hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out.last_hidden_state
        return hidden


def split_model(model: nn.Module) -> SplitModel:
    """Split a Hugging Face causal LM (also inside PEFT).

    Raises:
        ValueError: the model has no decoder + linear head, or its parts do not reproduce its logits; the message
            points to `GradientSketcher.batch`, which needs no split.
    """
    split = split_parts(model)
    error = _split_error(model, split)  # of the whole: PEFT may put tokens or keys of its own in front
    if error is not None:
        raise ValueError(f"the decoder and head of {_name(model)} do not give its logits ({error}): {REMEDY}")
    return split


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _name(model: Any) -> str:
    return type(_inner(model)).__name__


def split_parts(model: nn.Module) -> SplitModel:
    """The parts as the model names them; that they make the whole is not checked.

    Raises:
        ValueError: as `split_model`.
    """
    inner = _inner(model)
    head = output_embeddings(inner)
    # Llama 4's prefix names no part of its text model.
    names = (getattr(inner, "base_model_prefix", ""), "model")
    decoder = next((getattr(inner, name) for name in names if name and hasattr(inner, name)), None)
    if not isinstance(head, nn.Linear) or not isinstance(decoder, nn.Module) or decoder is inner:
        found = "" if head is None else f" (its head: {type(head).__module__}.{type(head).__name__})"
        raise ValueError(f"{type(inner).__name__} is not a decoder with a linear head{found}: {REMEDY}")
    config = getattr(inner, "config", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap and scale != 1.0:
        raise ValueError(f"{type(inner).__name__} scales its logits by {scale} before a softcap: {REMEDY}")
    return SplitModel(decoder, head, scale, float(softcap) if softcap else None)


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, if the model says which; of PEFT's copies the one that runs."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict) and not getattr(head, "disable_adapters", False):
        running = [copies[name] for name in getattr(head, "active_adapters", ()) if name in copies]
        head = running[0] if len(running) == 1 else head
    return head if isinstance(head, nn.Module) else None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` for a while; then every module is in its own mode again: some may be in eval, others not."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def few_tokens(split: SplitModel) -> torch.Tensor:
    """Ids [1, 4] to try the model on."""
    return torch.arange(4, device=split.head.weight.device)[None] % split.head.weight.shape[0]


@torch.no_grad()
def _split_error(model: Any, split: SplitModel) -> str | None:
    ids, head = few_tokens(split), split.head
    with evaluating(model):  # dropout would make the two forwards differ
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        # By the weights, as the fused pass has it: a head's own forward may do more.
        z = (nn.functional.linear(split.hidden(ids)[0], head.weight, head.bias) * split.scale).float()
    if z.shape != expected.shape:
        return f"they give {list(z.shape)} for 4 tokens, the model {list(expected.shape)}"
    if split.softcap is not None:
        z = split.softcap * torch.tanh(z / split.softcap)
    # A model that has diverged fails segment by segment later; here NaN in both is no difference.
    off = (z - expected).abs().masked_fill_(z.isnan() & expected.isnan() | (z == expected), 0.0)
    error, size = (
        float(off.nan_to_num(torch.inf).max()),
        float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()),
    )
    tolerance = 3e-2 if split.head.weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if error <= tolerance * max(size, 1.0):
        return None
    return f"largest difference {error:.2g} at logits up to {size:.2g}"
