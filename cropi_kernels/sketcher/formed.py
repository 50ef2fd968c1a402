"""`FormedSketcher`: the sketch of gradients that plain autograd forms, each changed before it is sketched.

For what a tap cannot do: ``S f(g)`` where f is not a sum over tokens' parts of it that a tap may scale, such as a
division of every coordinate by the root of an optimiser's second moment. One weight gradient exists at a time, and the
forward pass is the model's own, with the logits of the scored tokens: some 1.5 times the time of `GradientSketcher`,
and its reference.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..names import names_by_id
from ..ops.linear_logprob.contract import Weigh, check_temperature
from ..spec import SketchSpec
from .attach.attachment import plan_model
from .attach.coverage import Coverage
from .batch.host import on_device
from .batch.inputs import check_positions, check_rows, check_tensors, ordinary
from .batch.labels import Batch
from .batch.segments import Segments
from .checks.formed_sums import Add, TapGroups
from .model import sharded
from .model.attention import right_backward
from .model.hooks import unless_none
from .model.precision import check_adapters, own_precision, unwrapped
from .policy.head_pass import PolicyGradient, failed_segments, scored_segments
from .policy.logprobs import inputs_of_rows
from .policy.scale import SegmentScales
from .sums.accumulator import Accumulator, finished
from .sums.clock import Clock
from .sums.groups import planned

Change = Callable[[str, torch.Tensor], torch.Tensor]
TOKENS = 2048  # of one pass: its logits are in memory


class FormedSketcher:
    """Sketches ``f(g_s)``, ``g_s = sum_{n in s} w_n grad log pi(token_n)``, per segment s; f works on one parameter's
    gradient at a time.

    A context manager around a causal LM, in place of a `GradientSketcher`; the sketch map is the same, so that with
    ``change`` None the sketches agree up to rounding.

    Args:
        model, spec, exclude: as of `GradientSketcher`.
        change: ``change(name, gradient)`` gives what is sketched in the place of a parameter's ``gradient`` (float32,
            the parameter's shape) under its canonical name. It must be linear, since a segment's gradient may come in
            parts.
        only: canonical names of the parameters that are sketched; None: all that a `GradientSketcher` would. (Its
            ``coverage.names`` after its `check_model`: what it leaves out on a closer look is left out here.)
        groups: as of `GradientSketcher`.

    Raises:
        UncoveredParameterError, ValueError: as by `GradientSketcher`; a sharded model, whose gradients are shards.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: SketchSpec | None = None,
        exclude: Sequence[str] | str = (),
        *,
        change: Change | None = None,
        only: Collection[str] | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.model, self.spec = unwrapped(model), spec or SketchSpec()
        check_adapters(self.model)
        sharded.check_parallel(self.model)
        if sharded.units(self.model):
            raise ValueError(
                "the model is sharded, and whole gradients are formed here: give the unsharded model"
            )
        self.change = change
        plan = plan_model(self.model, Accumulator(self.spec), exclude)
        self.coverage: Coverage = plan.coverage
        self._groups = planned(groups, plan.coverage.names, plan.ranks)
        names = names_by_id(self.model)
        self._add = [
            (names[id(p)], p, add)
            for p, add in TapGroups(plan).formed.values()
            if only is None or names[id(p)] in only
        ]
        self._out: torch.Tensor | None = None  # [groups, 1, base_dim]
        self._before: list[tuple[nn.Parameter, bool, torch.Tensor | None]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> FormedSketcher:
        if self._handles:
            raise RuntimeError("this FormedSketcher is already active: leave its `with` block first")
        wanted = {id(p) for _, p, _ in self._add}
        self._before = [(p, p.requires_grad, p.grad) for p in self.model.parameters()]
        for p, _, _ in self._before:
            p.requires_grad_(id(p) in wanted)
            p.grad = None
        self._handles = [p.register_hook(unless_none(self._taker(name, add))) for name, p, add in self._add]
        return self

    def __exit__(self, *raised: object) -> None:
        for handle in self._handles:
            handle.remove()
        for p, required, gradient in self._before:
            p.requires_grad_(required)
            p.grad = gradient
        self._handles, self._before = [], []

    def check_model(self) -> None:
        """Nothing: what autograd forms needs no test of taps."""

    def policy_gradient(
        self,
        input_ids: torch.Tensor,
        *,
        segments: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
        weigh: Weigh,
        num_segments: int,
        whole: bool = False,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        temperature: float = 1.0,
        model_kwargs: dict[str, Any] | None = None,
    ) -> PolicyGradient:
        """As `GradientSketcher.policy_gradient`, for ``segments`` by row, int64 ``[batch]``, that do not decrease.

        ``weigh`` is asked for whole rows, so that ``whole`` changes nothing.
        """
        if not self._handles:
            raise RuntimeError("policy_gradient works inside of `with sketcher:`")
        check_tensors(input_ids=input_ids, segments=segments, positions=positions, targets=targets)
        check_temperature(temperature)
        check_rows(input_ids, attention_mask, position_ids)
        here = Batch(input_ids, segments, None, positions, targets, attention_mask, position_ids).on_host()
        segments = here.segments
        assert here.positions is not None
        check_positions(input_ids, here.positions, targets)
        if segments.ndim != 1:
            raise ValueError(
                f"segments has shape {tuple(segments.shape)}: give the segment of each row [{input_ids.shape[0]}]"
            )
        where = Segments.of(segments, input_ids.shape[0], input_ids.shape[1], num_segments)
        scored = scored_segments(where, here.positions)
        with own_precision(self.model), torch.no_grad():
            kwargs = inputs_of_rows(self.model, here, attention_mask, position_ids, model_kwargs)
        batch = _Batch(ordinary(input_ids), segments, positions, ordinary(targets), kwargs, temperature)
        groups = 1 if self._groups is None else len(self._groups.names)
        shape = groups, where.count, self.spec.base_dim
        out = torch.zeros(shape, dtype=torch.float32, device=input_ids.device)
        logprobs = torch.zeros(len(targets), dtype=torch.float32, device=input_ids.device)
        weights = torch.zeros_like(logprobs)
        scales = SegmentScales(*on_device(input_ids.device, *scored))
        weigh = scales.weigh(weigh)
        clock = Clock(input_ids.device)
        begun = clock.mark()
        attention = right_backward(input_ids.device, input_ids.shape[1])
        with own_precision(self.model), attention, torch.enable_grad():
            for segment, rows, tokens in batch.parts():
                if tokens.start == tokens.stop:
                    continue
                of_rows = batch.logprobs(self.model, rows, tokens)
                used = weigh(of_rows.detach(), tokens.start, tokens.stop)
                logprobs[tokens], weights[tokens] = of_rows.detach(), used
                with self._into(out[:, segment : segment + 1]):
                    (of_rows * used).sum().backward()
        for each in out:
            scales.restore(each)
        weights = scales.unscaled(weights)
        out.masked_fill_(failed_segments(logprobs, weights, scales), float("nan"))
        end = clock.mark()

        def measure() -> dict[str, float]:
            return {"forward": 0.0, "backward": clock.between(begun, end), "sketch": 0.0}

        return PolicyGradient(finished(out.unbind(), self.spec), logprobs, weights, measure)

    @contextmanager
    def _into(self, out: torch.Tensor) -> Iterator[None]:
        """Gradients that are formed inside are added to ``out`` [groups, 1, base_dim]."""
        self._out = out
        try:
            yield
        finally:
            self._out = None
            for _, p, _ in self._add:
                p.grad = None

    def _taker(self, name: str, add: Add) -> Callable[[torch.Tensor], torch.Tensor]:
        group = 0 if self._groups is None else self._groups.place[name]

        def take(gradient: torch.Tensor) -> torch.Tensor:
            if self._out is not None:
                with torch.no_grad():
                    wide = gradient.detach().float()
                    add(wide if self.change is None else self.change(name, wide), self._out[group])
            return gradient.new_zeros(()).expand_as(gradient)  # autograd keeps this: a gradient would stay

        return take


@dataclass(frozen=True)
class _Batch:
    """The rows of a batch in parts of one segment each, few enough for their logits."""

    input_ids: torch.Tensor
    segments: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    kwargs: dict[str, Any]  # of the model
    temperature: float

    def parts(self) -> Iterator[tuple[int, slice, slice]]:
        """``(segment, its rows, their scored tokens)``."""
        batch, length = self.input_ids.shape
        row_of = (self.positions // length).cpu()
        if bool((row_of.diff() < 0).any()):
            raise ValueError("positions must be in order of their rows")
        most, segments = max(1, TOKENS // length), self.segments.tolist()
        first = 0
        while first < batch:
            last = first + 1
            while last < batch and last - first < most and segments[last] == segments[first]:
                last += 1
            start, stop = torch.searchsorted(row_of, row_of.new_tensor([first, last])).tolist()
            yield segments[first], slice(first, last), slice(start, stop)
            first = last

    def logprobs(self, model: nn.Module, rows: slice, tokens: slice) -> torch.Tensor:
        batch, length = self.input_ids.shape
        kwargs = {
            key: value[rows] if isinstance(value, torch.Tensor) and value.shape[:1] == (batch,) else value
            for key, value in self.kwargs.items()
        }
        if (where := self.kwargs.get("position_ids")) is not None:  # also [3, batch, length]
            kwargs["position_ids"] = where[..., rows, :] if where.shape[-2] == batch else where
        z = model(input_ids=self.input_ids[rows], use_cache=False, **kwargs).logits
        scored = z.flatten(0, 1)[self.positions[tokens] - rows.start * length].float()
        logprobs = torch.log_softmax(scored / self.temperature, dim=-1)
        return logprobs.gather(1, self.targets[tokens, None])[:, 0]
