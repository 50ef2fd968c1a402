"""A causal LM split into the decoder (tokens to hidden states) and the head (hidden states to logits).

The fused pass runs them apart, so that logits exist for scored tokens only and one chunk at a time. That the parts make
the whole is not assumed: it is checked once against the model's own forward.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..ops.linear_logprob.slices import Words
from . import ranks, sharded
from .growing import forget_longest
from .measure import measure_head
from .precision import invocation_tokens, own_precision, unwrapped

REMEDY = "use `with sketcher.batch(...)` around your own loss instead of policy_gradient"


@dataclasses.dataclass(frozen=True)
class SplitModel:
    """``logits = softcap * tanh(scale * (decoder(tokens) @ head.weight.T + bias) / softcap)``; softcap None: no cap.

    The head multiplies in its own dtype, which may be wider than the decoder's: `head_input` is what it is given.
    """

    decoder: nn.Module
    head: nn.Linear
    scale: float
    softcap: float | None
    model: nn.Module

    def hidden(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        def run() -> torch.Tensor:
            forget_longest(self.decoder)
            out = self.decoder(input_ids=input_ids, use_cache=False, **kwargs)
            return _gathered(out[0] if isinstance(out, tuple) else out.last_hidden_state)

        return sharded.through(sharded.root_around(self.model, self.decoder), run)

    def whole_head(self) -> contextlib.AbstractContextManager[None]:
        """The head's weights as the pass uses them: of a sharded model they are whole inside alone."""
        return sharded.whole(self.model, self.head)

    @functools.cached_property
    def _ranks(self) -> ranks.Ranks | None:
        """Of a tensor-parallel head."""
        return ranks.ranks_of(self.model) if ranks.is_spread(self.head.weight) else None

    def head_here(self) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """This rank's words of the head: weight, bias, and the first of them."""
        weight, bias = ranks.local(self.head.weight), ranks.local(self.head.bias)
        if (group := self._ranks) is None:
            return weight, bias, 0
        share = group.share(self.head.weight)
        first = share.ranges[0][0] if share.axis == 0 and share.ranges else 0
        if bias is not None and not ranks.is_spread(self.head.bias) and share.axis == 0:
            bias = bias[first : first + len(weight)]
        return weight, bias, first

    def head_ranks(self) -> ranks.Ranks | None:
        """The ranks that the head's words are spread over; None: all are here."""
        group = self._ranks
        return None if group is None or group.share(self.head.weight).axis is None else group

    def words(self) -> Words | None:
        """The same for the products with the head."""
        group = self.head_ranks()
        return None if group is None else Words(self.head_here()[2], group.sum, group.max)

    def head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states in the head's dtype: a float32 head on a bfloat16 decoder is given them in float32."""
        return hidden.to(self.head.weight.dtype)

    def of_products(self, temperature: float) -> dict[str, Any]:
        """Temperature and soft-cap of ``h W^T + b`` itself, of which `linear_logprob` takes them."""
        cap = None if self.softcap is None else self.softcap / self.scale
        return {"temperature": temperature / self.scale, "softcap": cap}


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
        # Of the whole: PEFT may put tokens or keys of its own in front.
        try:
            hidden = split.hidden(ids)
            if hidden.shape[-1] != split.head.weight.shape[1]:
                raise ValueError(
                    f"the hidden states of {_name(model)} have {hidden.shape[-1]} features, and its head takes "
                    f"{split.head.weight.shape[1]}: {REMEDY}"
                )
            found = measure_head(model, split.decoder, split.head, hidden, ids)
        except RuntimeError as problem:
            dtypes = {str(p.dtype) for p in model.parameters() if p.dtype.is_floating_point}
            if "dtype" not in str(problem) or len(dtypes) == 1:
                raise
            raise ValueError(
                f"{type(model).__name__} does not run in the precision of its weights, which are of {len(dtypes)} "
                f"dtypes ({', '.join(sorted(dtypes))}): {problem}. A scoring pass runs without autocast: give "
                "all weights one dtype, for example by model.to(torch.bfloat16)"
            ) from problem
    if isinstance(found, str):
        raise ValueError(f"the decoder and head of {_name(model)} do not give its logits ({found}): {REMEDY}")
    scale, softcap = found
    return dataclasses.replace(split, scale=scale, softcap=softcap)


def _gathered(hidden: torch.Tensor) -> torch.Tensor:
    """All tokens, of a decoder that leaves some of them on every rank."""
    if not ranks.is_spread(hidden):
        return hidden
    from torch.distributed.tensor import Replicate

    whole: torch.Tensor = hidden.redistribute(placements=[Replicate()]).to_local(  # type: ignore[attr-defined]
        grad_placements=[Replicate()]
    )
    return whole


def _inner(model: Any) -> Any:
    model = unwrapped(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _name(model: Any) -> str:
    return type(_inner(model)).__name__


def split_parts(model: nn.Module) -> SplitModel:
    """The decoder and the head as the model names them; that they make the whole is not checked, nor is a factor or cap
    of the logits measured.

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
    return SplitModel(decoder, head, 1.0, None, unwrapped(model))


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
    return torch.arange(4, device=sharded.device_of(split.model))[None] % split.head.weight.shape[0]


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
