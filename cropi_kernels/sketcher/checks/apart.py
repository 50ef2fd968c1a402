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

from ..model import sharded
from ..model.untouched import untouched
from ..policy.decoder import split_parts
from ..policy.lengths import same
from ..policy.split import decoded
from ..sums.accumulator import Accumulator

MIXED = (
    "what the model gives for the tokens of one segment changes with those of another in its row, so that no segment "
    "has a gradient of its own: give position_ids that begin anew with each sequence and no attention_mask [batch, "
    "length] (most models of transformers keep sequences apart so), or one sequence a row"
)
CACHES = ("past_key_values", "cache")  # before and since transformers 5.24
NOTHING, APART, LEAKS = range(3)  # what two runs show; ranks take the largest of their answers


class Apart:
    """Records the first call of a model's decoder, and repeats it.

    Args:
        model: a causal language model; of another one nothing is recorded.
        acc: the sums of its taps.
        segments: int64 [batch, length], the number of each token's segment, or [batch], that of each row's.
    """

    def __init__(self, model: nn.Module, acc: Accumulator, segments: torch.Tensor) -> None:
        self._model, self._acc = model, acc
        self._second: torch.Tensor | None = None  # of per-row segments
        if segments.ndim == 2:
            begins = (segments[:, 1:] != segments[:, :-1]).cpu()
            # The tokens of every second segment of a row.
            self._second = torch.nn.functional.pad(begins.cumsum(1), (1, 0)) % 2 == 1
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._decoder: nn.Module | None = None
        # The ranks of a sharded model run the same passes, whatever each one's rows hold.
        (several,) = sharded.largest(model, int(self._second is not None and bool(self._second.any())))
        if several:
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
        """Whether a segment's hidden states depend on another's tokens, on any rank of a sharded model; None: nothing
        was seen that tells."""
        given = self._given()
        if self._decoder is None or any(sharded.largest(self._model, int(given is None))):
            return None
        assert given is not None
        (seen,) = sharded.largest(self._model, self._seen(given))
        return None if seen == NOTHING else seen == LEAKS

    def _given(self) -> torch.Tensor | None:
        """The tokens that the decoder was called on, if the call can be repeated."""
        if self._call is None:
            return None
        args, kwargs = self._call
        given = args[0] if args else kwargs.get("input_ids")
        if not isinstance(given, torch.Tensor):
            return None
        if self._second is not None and given.shape != self._second.shape:
            return None
        # A call adds to keys and values.
        return given if all(kwargs.get(name) is None for name in CACHES) else None

    def _seen(self, given: torch.Tensor) -> int:
        assert self._call is not None
        args, kwargs = self._call
        mask = kwargs.get("attention_mask")
        second = torch.zeros_like(given, dtype=torch.bool)
        if self._second is not None:
            second = self._second.to(given.device)
        others = given.flatten().roll(1).view_as(given)
        ids = torch.where(second, given, others)
        with self._acc.absent(), untouched(self._model), torch.no_grad():
            # Dropout would make two forwards differ.
            self._model.eval()
            before, after = (self._run(x, args, kwargs) for x in (given, ids))
        if isinstance(mask, torch.Tensor) and mask.shape == second.shape:
            second = second & (mask != 0)
        if not bool(second.any()):
            return NOTHING
        alike = same(after[second], before[second], most=before.element_size() < 4)
        return APART if alike else LEAKS

    def _run(self, ids: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        assert self._decoder is not None
        if args:
            return decoded(self._model, self._decoder, ids, *args[1:], **kwargs)
        return decoded(self._model, self._decoder, **kwargs | {"input_ids": ids})


class ApartTests:
    """Which batches are looked at: all that were given a number for each token, until one has told. The ranks of a
    sharded model look at the same ones."""

    def __init__(self, model: nn.Module, acc: Accumulator) -> None:
        self._model, self._acc, self._spread = model, acc, bool(sharded.units(model))
        self.done = False

    def next(self, segments: torch.Tensor) -> Apart | None:
        """What looks at the batch that begins; None: nothing."""
        if self.done or not (self._spread or segments.ndim == 2):
            return None
        return Apart(self._model, self._acc, segments)
