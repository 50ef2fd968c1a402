"""Token log-probs of a causal LM: the forward half of a policy-gradient pass, without logits of all tokens."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import nn

from ..._fork import one_thread_after_fork
from ..batch.inputs import (
    check_positions,
    check_rows,
    check_tensors,
    check_vocabulary,
    known_ids,
    model_inputs,
)
from ..batch.labels import Batch
from ..model.bitsandbytes import check_8bit_layers
from ..model.precision import own_precision, unwrapped
from ..model.sharded import units
from ..model.state import attention_of
from .decoder import split_model, split_parts
from .probe import Probe, checked_rows, probe_longer, probe_rows
from .split import SplitModel

# The decoder, head, scale and cap of models that were measured. Weak references: a model may be large.
_MEASURED: weakref.WeakKeyDictionary[nn.Module, tuple[Any, ...]] = weakref.WeakKeyDictionary()
_PROBES: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Probe]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def token_logprobs(
    model: nn.Module,
    input_ids: torch.Tensor,
    *,
    positions: torch.Tensor,
    targets: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    temperature: float = 1.0,
    model_kwargs: dict[str, Any] | None = None,
) -> torch.Tensor:
    """``log softmax(logits / temperature)[targets]`` of the scored tokens, computed as `GradientSketcher` does.

    >>> logp = token_logprobs(model, input_ids, positions=positions, targets=targets)    # doctest: +SKIP

    Logits exist for scored tokens only, one chunk at a time. The model runs in the mode that it is in, without a
    gradient. Its first call runs it on four tokens, to see that its decoder and its head give its logits; the first one
    with a mask or positions runs it on some more, to see how it takes them (`GradientSketcher.probe`).

    Args:
        model: a Hugging Face causal LM with a linear head (also inside PEFT).
        input_ids: int64 [batch, length].
        positions: int64 [n]: flattened position (row * length + column) whose hidden state predicts scored token n.
        targets: int64 [n], the scored tokens.
        attention_mask, position_ids, temperature, model_kwargs: as in `GradientSketcher.policy_gradient`.

    Returns:
        float32 [n] (float64 for a float64 model), on the model's device.

    Raises:
        ValueError: the model has no decoder and linear head, an argument does not fit, or the model does not give for a
            row what it gives for it alone, without padding (as `GradientSketcher.policy_gradient`); names which.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)).eval()
    >>> token_logprobs(model, torch.tensor([[5, 6, 7]]), positions=torch.tensor([1]), targets=torch.tensor([7])).shape
    torch.Size([1])
    """
    one_thread_after_fork()
    check_tensors(input_ids=input_ids, positions=positions, targets=targets)
    check_rows(input_ids, attention_mask, position_ids)
    rows = torch.arange(len(input_ids), device="cpu")
    here = Batch(input_ids, rows, None, positions, targets, attention_mask, position_ids).on_host()
    assert here.positions is not None and here.targets is not None
    check_positions(here.input_ids, here.positions, here.targets)
    model = unwrapped(model)
    split = measured_split(model)
    check_vocabulary(here.input_ids, here.targets, split.head.weight.shape[0], known_ids(model))
    with own_precision(model):
        kwargs = inputs_of_rows(model, here, attention_mask, position_ids, model_kwargs)
        hidden = split.hidden(input_ids, **kwargs)
    with split.whole_head():
        picked = split.head_input(hidden.reshape(-1, hidden.shape[-1])[positions])
        return split.logprobs(picked, targets, temperature)


def inputs_of_rows(
    model: nn.Module,
    here: Batch,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    model_kwargs: dict[str, Any] | None,
) -> dict[str, Any]:
    """What the decoder is called with beside the tokens, checked against what is measured of the model here, at its
    first call with a mask or positions; at its first call where it is sharded, since all ranks run the same passes.

    Raises:
        ValueError: as `model_inputs` and `checked_rows`.
    """
    kwargs = model_inputs(model, attention_mask, position_ids, model_kwargs)
    given = attention_mask is not None or position_ids is not None
    probe = _measured_probe(model, here) if given or units(model) else None
    return kwargs | checked_rows(probe, here, attention_mask) if given else kwargs


def measured_split(model: nn.Module) -> SplitModel:
    """The model's decoder and head, measured at the first call, and again when the model has other parts.

    Raises:
        ValueError: as `split_model` and `check_8bit_layers`.
    """
    named = split_parts(model)
    parts = weakref.ref(named.decoder), weakref.ref(named.head)
    known = _MEASURED.get(model)
    if known is None or known[:2] != parts:
        check_8bit_layers(model)
        split = split_model(model)
        known = _MEASURED[model] = *parts, split.scale, split.softcap
    return dataclasses.replace(named, scale=known[2], softcap=known[3])


def _measured_probe(model: nn.Module, here: Batch) -> Probe:
    """How the model takes rows, measured at the first call, and again for another kind of attention or longer rows."""
    kind = attention_of(model)
    known, split = _PROBES.get(model), measured_split(model)
    probe = known[1] if known is not None and known[0] == kind else probe_rows(model, split)
    probe = probe_longer(probe, model, split, here)
    _PROBES[model] = kind, probe
    return probe
