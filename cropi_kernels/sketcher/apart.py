"""Whether a model keeps the prompts of one row apart, in a batch that the caller runs himself.

Taps give a segment the part of a gradient that passes through its tokens. That is the gradient of its own loss only if
no token attends to another segment's. Models differ in what keeps packed sequences apart: most of transformers' read
``position_ids`` where they are given no mask; convolutions and scans run on from one sequence into the next. So the
decoder is run again, once, on the caller's own inputs with the tokens of every second segment of a row changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from . import sharded
from .accumulator import Accumulator
from .decoder import split_parts
from .lengths import same
from .untouched import untouched

MIXED = (
    "what the model gives for the tokens of one segment changes with those of another in its row, so that no segment "
    "has a gradient of its own: give position_ids that begin anew with each sequence and no attention_mask [batch, "
    "length] (most models of transformers keep sequences apart so), or one sequence a row"
)


class Apart:
    """Records the first call of a model's decoder, and repeats it.

    Args:
        model: a causal language model; of another one nothing is recorded.
        acc: the sums of its taps.
        ids: int64 [batch, length], the number of each token's segment, on the host.
    """

    def __init__(self, model: nn.Module, acc: Accumulator, ids: torch.Tensor) -> None:
        self._model, self._acc = model, acc
        begins = ids[:, 1:] != ids[:, :-1]
        # The tokens of every second segment of a row.
        self._second = torch.nn.functional.pad(begins.cumsum(1), (1, 0)) % 2 == 1
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._decoder: nn.Module | None = None
        # Of a sharded model some ranks alone might come here.
        if bool(begins.any()) and not sharded.units(model):
            with contextlib.suppress(ValueError):
                self._decoder = split_parts(model).decoder

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record the first call inside."""
        if self._decoder is None:
            yield
            return

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._call is None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._call = args, kwargs

        with self._decoder.register_forward_pre_hook(note, with_kwargs=True):
            yield

    def mixed(self) -> bool | None:
        """Whether a segment's hidden states depend on another's tokens; None: nothing was seen that tells."""
        if self._call is None or self._decoder is None:
            return None
        args, kwargs = self._call
        given = args[0] if args else kwargs.get("input_ids")
        if not isinstance(given, torch.Tensor) or given.shape != self._second.shape:
            return None
        if kwargs.get("past_key_values") is not None:  # a call adds to them
            return None
        second, mask = self._second.to(given.device), kwargs.get("attention_mask")
        others = given.flatten().roll(1).view_as(given)
        ids = torch.where(second, given, others)
        with self._acc.absent(), untouched(self._model), torch.no_grad():
            # Dropout would make two forwards differ.
            self._model.eval()
            before, after = (self._run(x, args, kwargs) for x in (given, ids))
        if isinstance(mask, torch.Tensor) and mask.shape == second.shape:
            second = second & (mask != 0)
        if not bool(second.any()):
            return None
        return not same(after[second], before[second], most=before.element_size() < 4)

    def _run(self, ids: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        assert self._decoder is not None
        out = (
            self._decoder(ids, *args[1:], **kwargs) if args else self._decoder(**{**kwargs, "input_ids": ids})
        )
        hidden = out[0] if isinstance(out, tuple) else out.last_hidden_state
        assert isinstance(hidden, torch.Tensor)
        return hidden
