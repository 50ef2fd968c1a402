"""What may go into a policy-gradient pass: the checks of its tensors, and what the model is handed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..model.state import attention_of
from .host import values

# What a pass gives to the model itself: see `model_inputs`.
_OWN = (
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "past_key_values", "cache", "use_cache",
)  # fmt: skip


def check_tensors(**given: object) -> None:
    for name, x in given.items():
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} is of type {type(x).__name__}: give a tensor (torch.as_tensor({name}))")


def check_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> None:
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: give a non-empty [batch, length]")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids is {input_ids.dtype}: give int64 token ids (input_ids.long())")
    batch, length = input_ids.shape
    optional = {"attention_mask": attention_mask, "position_ids": position_ids}
    check_tensors(**{name: x for name, x in optional.items() if x is not None})
    # Torch would broadcast some wrong shapes of a mask, and the wrong tokens be attended to.
    if attention_mask is not None:
        shape = tuple(attention_mask.shape)
        square = len(shape) == 4 and shape[0] in (1, batch) and shape[2:] == (length, length)
        if shape != (batch, length) and not square:
            raise ValueError(
                f"attention_mask has shape {shape}: give [{batch}, {length}], 1 for tokens and 0 for padding, or bool "
                f"[{batch}, 1, {length}, {length}], True where to attend"
            )
        if square and attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
            raise of_ones(attention_mask)
    if position_ids is not None and tuple(position_ids.shape[-2:]) not in ((batch, length), (1, length)):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}: give int64 [{batch}, {length}], as input_ids"
        )


def of_ones(mask: torch.Tensor) -> ValueError:
    """Of a mask of pairs that holds ones where to attend: attention would add them to its scores."""
    return ValueError(
        f"attention_mask {tuple(mask.shape)} is {mask.dtype}, of ones and zeros: give attention_mask.bool(), True "
        "where to attend, or one that is added, 0 where to attend"
    )


def ordinary(x: Any) -> Any:
    """``x``, or a copy of a tensor that was made under `torch.inference_mode`: autograd does not save such a one."""
    return x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x


def check_positions(input_ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor) -> None:
    if positions.shape != targets.shape or positions.ndim != 1 or positions.dtype != torch.int64:
        raise ValueError(
            f"positions {tuple(positions.shape)} {positions.dtype} and targets {tuple(targets.shape)} "
            f"{targets.dtype} must be int64 of one length: a position and a token id per scored token"
        )
    if positions.numel():
        low, high = _range(positions)
        if low < 0 or high >= input_ids.numel():
            last = input_ids.numel() - 1
            raise ValueError(f"positions run from {low} to {high}: input_ids holds 0 .. {last}")


def check_vocabulary(input_ids: torch.Tensor, targets: torch.Tensor, vocab: int, known: int | None) -> None:
    """Targets are rows of the head (``vocab``), inputs rows of the embedding (``known``; None: as many)."""
    for name, ids, size in (("input_ids", input_ids, known or vocab), ("targets", targets, vocab)):
        low, high = _range(ids) if ids.numel() else (0, 0)
        if low < 0 or high >= size:
            raise ValueError(f"{name} runs from {low} to {high}: the vocabulary is 0 .. {size - 1}")


def _range(x: torch.Tensor) -> tuple[int, int]:
    """The smallest and the largest number of a tensor of the host."""
    numbers = values(x)
    return numbers.min().item(), numbers.max().item()


def known_ids(model: nn.Module) -> int | None:
    """Rows of the model's embedding, if it names one."""
    weight = embedded(model)
    return None if weight is None else int(weight.shape[0])


def embeddings(model: nn.Module) -> nn.Module | None:
    """The module that looks up tokens, if the model says which."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        found = get() if callable(get) else None
    except NotImplementedError:  # transformers' answer for a model that it cannot tell of, or of images
        return None
    return found if isinstance(found, nn.Module) else None


def embedded(model: nn.Module) -> torch.Tensor | None:
    """The weight [words, features] of the model's embedding of tokens; None: it does not say which one that is."""
    weight = getattr(embeddings(model), "weight", None)
    return weight if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None


def model_inputs(
    model: nn.Module,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    more: dict[str, Any] | None,
) -> dict[str, Any]:
    """What the decoder is called with beside the tokens; `ordinary` tensors.

    Bool 4-D masks (True where to attend) become additive for eager attention, which adds what it is given.

    Raises:
        ValueError: ``more`` holds what has an argument of its own, or what the model does not take.
    """
    _check_more(model, more)
    inputs = dict(more or {})
    if attention_mask is not None:
        if attention_mask.ndim == 4 and attention_mask.dtype == torch.bool and _eager(model):
            dtype = next(model.parameters()).dtype
            zeros = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
            attention_mask = zeros.masked_fill_(~attention_mask, torch.finfo(dtype).min)
        inputs["attention_mask"] = attention_mask
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    return {name: ordinary(value) for name, value in inputs.items()}


def _eager(model: nn.Module) -> bool:
    return attention_of(model) == "eager"


def _check_more(model: nn.Module, more: Any) -> None:
    """Check the names of ``model_kwargs``: a model that passes on whatever it is given takes a wrong one in silence."""
    if more is None:
        return
    if not isinstance(more, Mapping):
        raise ValueError(
            f"model_kwargs is of type {type(more).__name__}: give a dictionary of the model's inputs by name"
        )
    if own := [name for name in more if name in _OWN]:
        raise ValueError(
            f"model_kwargs holds {', '.join(own)}, which the pass gives to the model itself: leave it out, or use the "
            "argument of that name"
        )
    # Of transformers' models alone, and of those in a wrapper, which takes anything.
    forwards = [part.forward for part in model.modules() if hasattr(part, "base_model_prefix")]
    known = {name for forward in forwards for name in inspect.signature(forward).parameters}
    common = getattr(sys.modules.get("transformers.utils"), "TransformersKwargs", None)
    known |= set(getattr(common, "__annotations__", ()))
    if forwards and (unknown := [name for name in more if name not in known]):
        raise ValueError(
            f"model_kwargs holds {', '.join(map(repr, unknown))}, which {type(model).__name__} does not take; it takes "
            f"{', '.join(sorted(known - {'self', 'args', 'kwargs', *_OWN}))}"
        )
