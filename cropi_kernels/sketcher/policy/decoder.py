"""Splits a causal LM into its decoder and its head, and checks once that the two give the model's own logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from ..model import sharded
from ..model.head import base_of, output_embeddings
from ..model.precision import invocation_tokens, own_precision, unwrapped
from ..model.state import check_loaded
from ..model.untouched import evaluating
from ..taps.again import random_numbers
from .adapters import adapters_of
from .measure import measure_head
from .split import SplitModel

REMEDY = "use `with sketcher.batch(...)` around your own loss instead of policy_gradient"


def split_model(model: nn.Module) -> SplitModel:
    """Split a Hugging Face causal LM (also inside PEFT, DistributedDataParallel and torch.compile's module).

    The parts and the whole are compared in the precision of the weights: see `precision`. The factor and cap of the
    logits are measured.

    Raises:
        ValueError: the model has no decoder + linear head, or its parts do not reproduce its logits; the message
            points to `GradientSketcher.batch`, which needs no split. Or its weights lie on several devices, or on none,
            or it does not run in the precision of its weights.
    """
    model = unwrapped(model)
    _check_place(model)
    if invocation_tokens(model):
        raise ValueError(
            f"{_name(model)} has adapters that are active behind invocation tokens (aLoRA): PEFT looks for these in "
            f"its own forward, which does not run here, and the adapters would take no part: {REMEDY}"
        )
    split = split_parts(model)
    ids = few_tokens(split)
    with own_precision(model), evaluating(model), torch.no_grad():  # dropout would make two forwards differ
        # Compared with the whole model, because PEFT may put tokens or keys of its own in front.
        try:
            hidden = split.hidden(ids)
            if hidden.shape[-1] != split.head.weight.shape[1]:
                raise ValueError(
                    f"the hidden states of {_name(model)} have {hidden.shape[-1]} features, and its head takes "
                    f"{split.head.weight.shape[1]}: {REMEDY}"
                )
            measured = measure_head(model, split.decoder, split.logits, hidden, ids)
            if isinstance(measured, str):
                with random_numbers(ids.device) as drawn:
                    again = split.hidden(ids)
                # Others change with what ran before, which has another remedy (PEFT's Shadow).
                if drawn and not torch.equal(again.nan_to_num(), hidden.nan_to_num()):
                    raise ValueError(
                        f"the decoder of {_name(model)} gives other hidden states each time it runs on the same "
                        "tokens, after model.eval() too: set the rate of the dropout or noise that stays on to 0"
                    )
        except RuntimeError as problem:
            dtypes = {str(p.dtype) for p in model.parameters() if p.dtype.is_floating_point}
            if "dtype" not in str(problem) or len(dtypes) == 1:
                raise
            raise ValueError(
                f"{type(model).__name__} does not run in the precision of its weights, which are of {len(dtypes)} "
                f"dtypes ({', '.join(sorted(dtypes))}): {problem}. A scoring pass runs without autocast: give "
                "all weights one dtype, for example by model.to(torch.bfloat16)"
            ) from problem
    if isinstance(measured, str):
        raise ValueError(
            f"the decoder and head of {_name(model)} do not give its logits ({measured}): {REMEDY}"
        )
    scale, softcap = measured
    return dataclasses.replace(split, scale=scale, softcap=softcap)


def _inner(model: Any) -> Any:
    model = unwrapped(model)
    if type(model).__name__ == "PeftMixedModel":  # which has no `get_base_model`
        return model.base_model.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _name(model: Any) -> str:
    return type(_inner(model)).__name__


def split_parts(model: nn.Module) -> SplitModel:
    """The decoder and the head as the model names them. Nothing is checked or measured.

    Raises:
        ValueError: as `split_model`.
    """
    inner = _inner(model)
    called = output_embeddings(inner)
    head = base_of(called)
    # Llama 4's prefix names no part of its text model.
    names = (getattr(inner, "base_model_prefix", ""), "model")
    decoder = next((getattr(inner, name) for name in names if name and hasattr(inner, name)), None)
    if not isinstance(head, nn.Linear) or not isinstance(decoder, nn.Module) or decoder is inner:
        described = "" if head is None else f" (its head: {type(head).__module__}.{type(head).__name__})"
        raise ValueError(f"{type(inner).__name__} is not a decoder with a linear head{described}: {REMEDY}")
    try:
        split = SplitModel(decoder, head, 1.0, None, unwrapped(model), adapters_of(called))
    except ValueError as error:
        raise ValueError(f"{error}: {REMEDY}") from None
    if split.adapters and split.head_ranks() is not None:
        raise ValueError(
            f"the head of {type(inner).__name__} is split over ranks and has the adapter {split.adapters[0].name!r}, "
            "which is not followed: adapt other modules, or give every rank the whole head"
        )
    return split


def few_tokens(split: SplitModel) -> torch.Tensor:
    """Ids [1, 4] to try the model on."""
    return torch.arange(4, device=sharded.device_of(split.model))[None] % split.head.weight.shape[0]


def _check_place(model: nn.Module) -> None:
    check_loaded(model)
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1:
        raise ValueError(
            f"the parameters of {type(model).__name__} lie on {', '.join(devices)}: a pass needs them on one device; "
            f"load the model with device_map={{'': {devices[-1]!r}}}"
        )
