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

from .precision import own_precision, unwrapped

REMEDY = "use `with sketcher.batch(...)` around your own loss instead of policy_gradient"


@dataclasses.dataclass(frozen=True)
class SplitModel:
    """``logits = softcap((decoder(tokens) @ head.weight.T + bias) * scale)``; no model has both softcap and scale.

    The head multiplies in its own dtype, which may be wider than the decoder's: `head_input` is what it is given.
    """

    decoder: nn.Module
    head: nn.Linear
    scale: float
    softcap: float | None

    def hidden(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        out = self.decoder(input_ids=input_ids, use_cache=False, **kwargs)
        hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out.last_hidden_state
        return hidden

    def head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states in the head's dtype: a float32 head on a bfloat16 decoder is given them in float32."""
        return hidden.to(self.head.weight.dtype)


def split_model(model: nn.Module) -> SplitModel:
    """Split a Hugging Face causal LM (also inside PEFT, DistributedDataParallel and torch.compile's module).

    The parts and the whole are compared in the precision of the weights: see `precision`.

    Raises:
        ValueError: the model has no decoder + linear head, or its parts do not reproduce its logits; the message
            points to `GradientSketcher.batch`, which needs no split. Or its weights lie on several devices, or on none,
            or it does not run in the precision of its weights.
    """
    model = unwrapped(model)
    _check_place(model)
    split = split_parts(model)
    with own_precision(model):
        error = _split_error(model, split)  # of the whole: PEFT may put tokens or keys of its own in front
    if error is not None:
        raise ValueError(f"the decoder and head of {_name(model)} do not give its logits ({error}): {REMEDY}")
    return split


def _inner(model: Any) -> Any:
    model = unwrapped(model)
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


def _check_place(model: nn.Module) -> None:
    devices = sorted({str(p.device) for p in model.parameters()})
    if "meta" in devices:
        raise ValueError(
            f"parameters of {type(model).__name__} are on the meta device: they are not loaded, or a device_map has "
            "moved them to the disk or to the host; load the model whole on one device (device_map=None)"
        )
    if len(devices) > 1:
        raise ValueError(
            f"the parameters of {type(model).__name__} lie on {', '.join(devices)}: a pass needs them on one device; "
            f"load the model with device_map={{'': {devices[-1]!r}}}"
        )


@torch.no_grad()
def _split_error(model: Any, split: SplitModel) -> str | None:
    ids, head = few_tokens(split), split.head
    with evaluating(model):  # dropout would make the two forwards differ
        try:
            expected = model(input_ids=ids, use_cache=False).logits[0].float()
        except RuntimeError as problem:
            dtypes = {str(p.dtype) for p in model.parameters() if p.dtype.is_floating_point}
            if "dtype" not in str(problem) or len(dtypes) == 1:
                raise
            raise ValueError(
                f"{type(model).__name__} does not run in the precision of its weights, which are of {len(dtypes)} "
                f"dtypes ({', '.join(sorted(dtypes))}): {problem}. A scoring pass runs without autocast: give "
                "all weights one dtype, for example by model.to(torch.bfloat16)"
            ) from problem
        # By the weights, as the fused pass has it: a head's own forward may do more.
        hidden = split.hidden(ids)[0]
        z = nn.functional.linear(split.head_input(hidden), head.weight, head.bias).float() * split.scale
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
    half = (torch.bfloat16, torch.float16)
    tolerance = 3e-2 if hidden.dtype in half or head.weight.dtype in half else 1e-4
    if error <= tolerance * max(size, 1.0):
        return None
    return f"largest difference {error:.2g} at logits up to {size:.2g}"
