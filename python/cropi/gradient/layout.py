"""How a prompt group is laid out for the model: sharing the prompt among its responses, or one row a
response.

*shared*: one row holds ``[prompt, response_1, ..., response_m]``; the positions of every response go on from
the prompt's, and a mask lets a response see the prompt and itself only. The prompt is computed once.
*padded*: one row is ``[prompt, response]``, padded on the right, with plain causal attention.

Both give the same gradient wherever attention is the only path between tokens and positions come from
``position_ids``. That is not so for ALiBi, state-space or linear-attention layers, or attention code that
takes no boolean mask, so a model is asked, by running a dozen tokens through it in both layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cropi.errors import CropiError
from cropi.model.policy import Policy
from cropi_kernels.sketcher.decoder import evaluating
from cropi_kernels.sketcher.precision import own_precision, unwrapped

LAYOUTS = ("auto", "shared", "padded")
# Relative difference of the two layouts' logits in the check: far above rounding, far below what a leak
# causes.
AGREE = {torch.float32: 1e-3, torch.float64: 1e-6}
AGREE_HALF = 5e-2


@dataclass(frozen=True)
class Layout:
    """A layout and what bounds it.

    Attributes:
        shared: share the prompt where that is cheaper.
        window: the shortest sliding window of the model's layers: longer sequences cannot be shared, because
            the mask that is passed replaces the model's own in every layer.
        strict: "shared" was asked for by name, so a sequence beyond the window is an error.
        attention_cost: cost of attending to one token, in units of the cost of one token in all linear
            layers.
        note: why the layout is not the shared one, to be shown to the user.
    """

    shared: bool
    window: int | None = None
    strict: bool = False
    attention_cost: float = 0.0
    note: str = ""

    def shares(self, longest: int, name: str) -> bool:
        """Whether a group may be shared whose longest prompt + response has ``longest`` tokens."""
        if not self.shared or self.window is None or longest <= self.window:
            return self.shared
        if self.strict:
            raise CropiError(
                f"layout 'shared': prompt {name!r} needs {longest} tokens, but the model has sliding-window "
                f"layers of {self.window}; pass --layout auto or --layout padded"
            )
        return False


def choose_layout(model: Any, asked: str = "auto") -> Layout:
    """Decide on the layout for a model.

    Raises:
        CropiError: an unknown name, or "shared" for a model that would not compute the same in it.
    """
    if asked not in LAYOUTS:
        raise CropiError(f"layout must be one of {', '.join(LAYOUTS)}, got {asked!r}")
    if asked == "padded":
        return Layout(shared=False)
    model = unwrapped(model)
    problem = _why_not_shared(model)
    if problem and asked == "shared":
        raise CropiError(f"layout 'shared' does not work for this model: {problem}; pass --layout padded")
    if problem:
        return Layout(shared=False, note=f"prompts are not shared between responses: {problem}")
    return Layout(True, sliding_window(model), asked == "shared", attention_cost(model))


def layout_of(policy: Policy, asked: str = "auto") -> Layout:
    """:func:`choose_layout` for a policy; the model is asked once."""
    return policy.once(("layout", asked), lambda: choose_layout(policy.model, asked))


def prefix_mask(blocks: torch.Tensor) -> torch.Tensor:
    """The shared layout's mask from each token's block: 0 = prompt, r = r-th response, -1 = padding.

    Args:
        blocks: int64 ``[B, L]``.

    Returns:
        bool ``[B, 1, L, L]``: True where the token of the row (dim 2) attends to that of the column (dim 3).
        Padding attends to itself alone, so that no softmax runs over nothing.
    """
    length = blocks.shape[1]
    query, key = blocks[:, :, None], blocks[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=blocks.device).tril()
    seen = causal & ((key == 0) | (key == query)) & (query >= 0)
    return (seen | torch.eye(length, dtype=torch.bool, device=blocks.device))[:, None]


def additive_if_eager(model: Any, mask: torch.Tensor) -> torch.Tensor:
    """The mask as the sketcher hands it on: eager attention adds its mask to the scores, so False becomes -inf."""
    if mask.ndim != 4 or getattr(model.config, "_attn_implementation", None) != "eager":
        return mask
    lowest = torch.finfo(model.dtype).min
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, lowest)


def sliding_window(model: Any) -> int | None:
    """The shortest attention window of the model's layers, or None when all attend to everything."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    windows = []
    if kinds & {"sliding_attention", "chunked_attention"} or not kinds:
        in_use = getattr(config, "use_sliding_window", True)
        windows = [
            getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size") if in_use
        ]
    return min((int(window) for window in windows if window), default=None)


def attention_cost(model: Any) -> float:
    """Cost of attending to one token relative to that of one token in all linear layers of the blocks.

    With frozen weights a token costs 2 N operations forward and 2 N backward in N weights. Attending to one token
    costs two products of size H forward and five backward in each layer, 14 H operations.
    """
    config = model.config.get_text_config()
    heads = int(getattr(config, "num_attention_heads", 1))
    head_size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    tables = {
        id(table.weight) for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table
    }
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in tables)
    return 3.5 * heads * head_size * int(config.num_hidden_layers) / max(weights, 1)


def _why_not_shared(model: Any) -> str:
    """Run a small group through the model in both layouts; the reason when they disagree, else ""."""
    size, device = model.get_input_embeddings().weight.shape[0], model.get_input_embeddings().weight.device
    made = [(7919 * (i + 1)) % size for i in range(13)]
    prompt, answers = made[:5], [made[5:9], made[9:13]]
    blocks = torch.tensor([[0] * 5 + [1] * 4 + [2] * 4], device=device)
    positions = torch.tensor([[*range(5), *range(5, 9), *range(5, 9)]], device=device)
    try:
        with torch.no_grad(), evaluating(model), own_precision(model):
            alone = [_logits(model, [prompt + answer])[5:] for answer in answers]
            mask = additive_if_eager(model, prefix_mask(blocks))
            together = _logits(model, [made], attention_mask=mask, position_ids=positions)[5:]
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return f"the model does not take a 4-D mask and position_ids ({type(error).__name__}: {error})"
    expected = torch.cat(alone)
    change = float((together - expected).norm() / expected.norm().clamp_min(1e-30))
    if change <= AGREE.get(model.dtype, AGREE_HALF):
        return ""
    kind = getattr(model.config, "_attn_implementation", "?")
    return (
        f"its output changes by {change:.1%} when responses share a row (model type "
        f"{model.config.model_type!r}, attention {kind!r}), so its layers do not follow a custom mask"
    )


def _logits(model: Any, ids: Sequence[Sequence[int]], **inputs: torch.Tensor) -> torch.Tensor:
    device = model.get_input_embeddings().weight.device
    output = model(input_ids=torch.tensor(ids, device=device), use_cache=False, **inputs)
    return output.logits[0].float()
