"""The self-test of `GradientSketcher.batch`, where the caller runs the forward.

It runs on a few tokens if the model takes token ids alone, and else repeats the call that the caller made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .accumulator import Accumulator
from .attach import Attachment
from .inputs import embedded
from .probe import Run, is_causal
from .segments import Segments
from .selftest import SelfTest, Trial, self_test
from .trial import few_rows, scored_rows, two_segments, weights_of
from .untouched import untouched


def model_self_test(
    model: nn.Module,
    attachment: Attachment,
    acc: Accumulator,
    run: Run,
    ids: torch.Tensor,
    plain: torch.Tensor,
) -> SelfTest:
    """The self-test through the model's own forward; ``run``, ``ids`` and ``plain`` come from `takes_ids`."""
    with untouched(model), torch.no_grad():
        model.eval()  # dropout would make two forwards differ
        causal = is_causal(run, ids, run(ids))
    segments = two_segments(ids.shape[0], ids.shape[1], causal=causal)
    pattern = weights_of(plain.numel(), plain.device).view(plain.shape).flatten(0, 1)
    cotangents = []
    for mine in scored_rows(segments):
        one = torch.zeros_like(pattern)
        one[mine.to(one.device)] = pattern[mine.to(one.device)]
        cotangents.append(one.view(plain.shape))
    return self_test(model, attachment, acc, Trial(lambda: run(ids), segments, tuple(cotangents)))


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
    """The first call of a model: its arguments, copied."""

    def __init__(self) -> None:
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    @contextlib.contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        begun: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.call is None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                begun[:] = [(_copied(args), _copied(kwargs))]

        def end(module: nn.Module, args: Any, y: Any) -> None:  # a call that failed is not repeated
            if self.call is None and begun:
                self.call = begun.pop()

        with model.register_forward_pre_hook(begin, with_kwargs=True), model.register_forward_hook(end):
            yield


def _copied(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.detach().clone()
    if isinstance(x, dict):
        return {key: _copied(value) for key, value in x.items()}
    return type(x)(_copied(item) for item in x) if type(x) in (tuple, list) else x


def replayed_self_test(
    model: nn.Module, attachment: Attachment, acc: Accumulator, recorded: Recorded, segments: Segments
) -> SelfTest | None:
    """The self-test on the caller's own call; None: no call was made that returned floating-point numbers."""
    if recorded.call is None:
        return None
    args, kwargs = recorded.call

    def run() -> torch.Tensor:
        y = float_output(model(*_copied(args), **_copied(kwargs)))
        assert y is not None
        return y

    with untouched(model), torch.no_grad():
        out = float_output(model(*_copied(args), **_copied(kwargs)))
    if out is None:
        return None
    pattern = weights_of(out.numel(), out.device).view(out.shape)
    tokens = segments.batch * segments.length
    lead = out.shape[:2] == (segments.batch, segments.length)
    cotangents, owners = [pattern], [tuple(range(segments.count))]
    if lead or out.shape[:1] == (tokens,):
        first = next((s for s in range(segments.count) if segments.offsets[s + 1] > segments.offsets[s]), 0)
        begin, end = segments.offsets[first : first + 2].tolist()
        mine = torch.zeros(tokens, dtype=torch.bool, device=out.device)
        mine[begin:end] = True
        mine = mine.view(out.shape[: 2 if lead else 1] + (1,) * (out.ndim - (2 if lead else 1)))
        cotangents = [pattern * mine, pattern * ~mine]
        owners = [(first,), tuple(s for s in range(segments.count) if s != first)]
    trial = Trial(run, segments, tuple(cotangents), tuple(owners))
    return self_test(model, attachment, acc, trial)
