"""The self-test on what the caller runs.

That of `GradientSketcher.batch` runs on a few tokens if the model takes token ids alone, and else repeats the calls
that the caller made. So does a test of taps that a few tokens do not reach.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..attach.attachment import Attachment
from ..batch.inputs import embedded
from ..batch.segments import Segments
from ..batch.trial import few_rows, scored_rows, two_segments, weights_of
from ..model import sharded
from ..model.untouched import untouched
from ..policy.probe import Run, is_causal
from .selftest import SelfTest, Trial, self_test

# On the batch's own inputs; None: it gives no tensor of numbers.
RunOfBatch = Callable[[], torch.Tensor | None]


def model_self_test(plan: Attachment, run: Run, ids: torch.Tensor, plain: torch.Tensor) -> SelfTest:
    """The self-test through the model's own forward; ``run``, ``ids`` and ``plain`` come from `takes_ids`."""
    with untouched(plan.model), torch.no_grad():
        plan.model.eval()  # dropout would make two forwards differ
        causal = is_causal(run, ids, run(ids))
    segments = two_segments(ids.shape[0], ids.shape[1], causal=causal)
    pattern = weights_of(plain.numel(), plain.device).view(plain.shape).flatten(0, 1)
    cotangents = []
    for mine in scored_rows(segments):
        one = torch.zeros_like(pattern)
        one[mine.to(one.device)] = pattern[mine.to(one.device)]
        cotangents.append(one.view(plain.shape))
    return self_test(plan, Trial(lambda: run(ids), segments, tuple(cotangents)))


def takes_ids(model: nn.Module) -> tuple[Run, torch.Tensor, torch.Tensor] | None:
    """How the model is run on token ids: the function, a few ids [batch, length], and its result [batch, length, n].
    Every run draws the same random numbers.

    None: the model does not run on token ids alone.
    """
    if (weight := embedded(model)) is None:
        return None
    ids = few_rows(model, weight.shape[0], weight.device)
    options: dict[str, Any] = dict(use_cache=False) if hasattr(model, "config") else {}
    devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.random.fork_rng(devices=devices):
            y = float_output(model(x, **options))
        if y is None:
            raise TypeError("no tensor of numbers comes out")
        return y

    try:
        with untouched(model), torch.no_grad():
            plain = run(ids)
    except Exception:  # not a function of ids alone; the code is not ours and may raise anything
        return None
    return (run, ids, plain) if plain.shape[:2] == ids.shape and plain.ndim >= 3 else None


def float_output(out: Any) -> torch.Tensor | None:
    """The first tensor of numbers in what a model returned; of Hugging Face's outputs the logits."""
    if isinstance(out, torch.Tensor):
        return out if out.is_floating_point() else None
    logits = getattr(out, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    inner = out.values() if isinstance(out, dict) else out if isinstance(out, (tuple, list)) else ()
    return next((output for item in inner if (output := float_output(item)) is not None), None)


class Recorded:
    """The calls of a model, each in the precision in which it was made: the arguments are copied."""

    def __init__(self) -> None:
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any], bool, torch.dtype]] = []

    @contextlib.contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        begun: list[tuple[tuple[Any, ...], dict[str, Any], bool, torch.dtype]] = []
        kind = sharded.device_of(model).type

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            begun.clear()
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                cast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
                begun.append((_copied(args), _copied(kwargs), *cast))

        def end(module: nn.Module, args: Any, y: Any) -> None:  # a call that failed is not repeated
            self._calls.extend(begun)
            begun.clear()

        with model.register_forward_pre_hook(begin, with_kwargs=True), model.register_forward_hook(end):
            yield

    def again(self, model: nn.Module) -> Iterator[RunOfBatch]:
        """What repeats each call, and gives its first tensor of numbers, if there is one."""
        kind = sharded.device_of(model).type
        for args, kwargs, enabled, dtype in self._calls:

            def run(given: Any = (args, kwargs), cast: Any = (dtype, enabled)) -> torch.Tensor | None:
                inputs, named = _copied(given)
                with torch.autocast(kind, *cast):
                    return float_output(model(*inputs, **named))

            yield run


def _copied(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.detach().clone()
    if isinstance(x, dict):
        return {key: _copied(value) for key, value in x.items()}
    return type(x)(_copied(item) for item in x) if type(x) in (tuple, list) else x


def replayed_self_test(plan: Attachment, run: RunOfBatch, segments: Segments, apart: bool) -> SelfTest | None:
    """The self-test on what ``run`` gives of the batch's own inputs; None: it gives nothing.

    Whatever tokens a tap takes for another segment's, two of its tests tell the two segments apart. Not ``apart``:
    segments in one row may depend on each other, and only their sum is tested.
    """
    with untouched(plan.model), torch.no_grad():
        out = run()
    sharded.reshard(plan.model)
    if out is None:
        return None

    def again() -> torch.Tensor:
        y = run()
        assert y is not None
        return y

    pattern = weights_of(out.numel(), out.device).view(out.shape)
    whole_rows = not (segments.offsets % segments.length).any()
    owner = torch.repeat_interleave(segments.offsets.diff()).to(out.device)
    if out.shape[:2] == (segments.batch, segments.length):
        owner = owner.view(segments.batch, segments.length)
    elif out.shape[:1] == (segments.batch,) and whole_rows:
        owner = owner[:: segments.length]
    every = range(segments.count)
    told = out.shape[: owner.ndim] == owner.shape and (apart or whole_rows)
    # The ranks of a sharded model run the same passes, however many segments each one has.
    (bits,) = sharded.largest(plan.model, (segments.count - 1).bit_length() if told else 0)
    halves = [(bit, side) for bit in range(bits) for side in (0, 1)]
    cotangents, owners = [pattern.new_ones(())] * max(1, len(halves)), [tuple(every)] * max(1, len(halves))
    if told and halves:
        owner = owner.view(*owner.shape, *(1,) * (out.ndim - owner.ndim))
        cotangents = [(owner >> bit & 1 == side).to(pattern.dtype) for bit, side in halves]
        owners = [tuple(s for s in every if s >> bit & 1 == side) for bit, side in halves]
    trial = Trial(again, segments, tuple(cotangents), tuple(owners), pattern=pattern)
    return self_test(plan, trial)
