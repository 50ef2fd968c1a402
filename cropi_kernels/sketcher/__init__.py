"""`GradientSketcher`: turns a backward pass into sketches of per-segment gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from .. import _memory
from ..ops.linear_logprob import logprob_and_grad
from ..ops.norm_grad import bias_grad
from ..ops.sketch_vector import sketch_vector
from ..spec import SketchSpec
from .accumulator import Accumulator
from .batch import Segments
from .coverage import Coverage, UncoveredParameterError, plan_model
from .decoder import SplitModel, split_model

__all__ = ["Coverage", "GradientSketcher", "PolicyGradient", "UncoveredParameterError"]

Weigh = Callable[[torch.Tensor, int, int], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
    """Result of `GradientSketcher.policy_gradient`.

    ``sketches`` float32 [segments, dim], a row of NaN where the segment met a NaN or an infinity; ``logprobs`` and
    ``weights`` float32 [scored tokens]; ``seconds``: forward, backward, and the part of both that was sketching.
    """

    sketches: torch.Tensor
    logprobs: torch.Tensor
    weights: torch.Tensor
    seconds: dict[str, float]


class GradientSketcher:
    """Sketches ``g_s = sum_{n in s} w_n grad log pi(token_n)`` per segment s while the backward pass runs.

    A context manager around a causal LM. Inside it the covered weights are frozen (autograd forms no weight gradient)
    and every module that owns one is tapped; afterwards everything is as it was.

    >>> with GradientSketcher(model, SketchSpec()) as sketcher:            # doctest: +SKIP
    ...     result = sketcher.policy_gradient(input_ids, segments=..., positions=..., targets=..., weigh=...)

    Args:
        model: any Hugging Face causal LM, or any module for `batch`; trainable parameters are sketched, frozen ones are
            not (LoRA: the adapters only).
        spec: what the sketch is.
        exclude: fnmatch patterns of parameter names to leave out.

    Raises:
        UncoveredParameterError: a trainable parameter has no tap; names it. Raised here, before any work.
        ValueError: nothing is left to sketch, or a pattern of ``exclude`` matches nothing.
    """

    def __init__(self, model: nn.Module, spec: SketchSpec, exclude: Sequence[str] = ()) -> None:
        self.model, self.spec = model, spec
        self._acc = Accumulator(spec)
        self._plan = plan_model(model, spec, self._acc, exclude)
        self._handles: list[Any] = []
        self._thawed: list[nn.Parameter] = []
        self._split: SplitModel | None = None

    @property
    def coverage(self) -> Coverage:
        return self._plan.coverage

    def __enter__(self) -> GradientSketcher:
        if self._handles:
            raise RuntimeError("this GradientSketcher is already active: leave its `with` block first")
        # Everything is frozen, excluded parameters too: their gradients would cost memory and nobody reads them.
        self._thawed = [p for p in self.model.parameters() if p.requires_grad]
        for p in self._thawed:
            p.requires_grad_(False)
        embeddings = getattr(self.model, "get_input_embeddings", lambda: None)()
        if isinstance(embeddings, nn.Module):
            self._handles.append(embeddings.register_forward_hook(_start_graph))
        for module, tap in self._plan.taps.items():
            self._handles.append(module.register_forward_hook(tap, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for p in self._thawed:
            p.requires_grad_(True)
        self._handles, self._thawed = [], []

    @contextmanager
    def batch(
        self, segments: torch.Tensor, *, shape: tuple[int, int] | None = None, num_segments: int | None = None
    ) -> Iterator[BatchSketch]:
        """Sketch whatever backward runs inside: any loss, any forward of the model on one batch.

        Args:
            segments: int64 ids per token [batch, length], or per row [batch] with ``shape=(batch, length)``; they must
                not decrease in flattened order. Padding may carry any neighbouring id: its gradients are zero.

        The yielded object's ``sketches`` is set when the block ends. The loss must be a sum over tokens of terms that
        each belong to one segment; a mean over the batch scales all sketches.
        """
        self._active("batch")
        if segments.ndim != 2 and shape is None:
            raise ValueError(
                f"segments has shape {tuple(segments.shape)}: give ids per token, or shape=(batch, length)"
            )
        batch, length = shape if shape is not None else segments.shape
        self._begin(Segments.of(segments, batch, length, num_segments))
        result = BatchSketch()
        try:
            yield result
            result.sketches = self._acc.end()
        finally:
            self._acc.close()

    def policy_gradient(
        self,
        input_ids: torch.Tensor,
        *,
        segments: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
        weigh: Weigh,
        num_segments: int | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        temperature: float = 1.0,
        model_kwargs: dict[str, Any] | None = None,
    ) -> PolicyGradient:
        """Forward, log-probs, weights, backward and sketches of one micro-batch in one pass.

        Args:
            input_ids: int64 [batch, length].
            segments: int64 [batch] or [batch, length], as in `batch`.
            positions: int64 [n]: flattened position (row * length + column) whose hidden state predicts scored token n.
                May repeat (K responses share the last prompt token); sorted by segment.
            targets: int64 [n], the scored tokens.
            weigh: ``weigh(logprobs, start, stop)`` gives the weights of scored tokens start .. stop from their
                log-probs (float32, detached). Called once per chunk, in order.
            attention_mask: None (causal), [batch, length], or bool [batch, 1, length, length], True where to attend.
            temperature: log-probs are those of softmax(logits / temperature), and so is the gradient.

        Logits exist for scored tokens only, one chunk at a time; no weight gradient is formed.

        Raises:
            RuntimeError: outside the ``with`` block. ValueError: shapes, ranges or order are wrong; names which.
            torch.OutOfMemoryError: names the sizes and the remedy. The sketcher stays usable.
        """
        split = self._ready(input_ids, positions, targets)
        batch, length = input_ids.shape
        where = Segments.of(segments, batch, length, num_segments)
        scored = _scored_offsets(where, positions)
        kwargs = dict(model_kwargs or {})
        if attention_mask is not None:
            kwargs["attention_mask"] = self._mask(attention_mask)
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        self._begin(where)
        try:
            with _memory.explained(
                f"policy_gradient on {batch} x {length} tokens with {positions.numel()} scored ones and {where.count} "
                f"segments (sketches: {_memory.size(self._acc.out.nbytes)})",
                "give fewer rows a call (nothing of this call is left; sketches of parts of a prompt add up), or turn "
                "on gradient checkpointing",
            ):
                mark = self._acc.clock.mark
                start = mark()
                with torch.enable_grad():
                    hidden = split.hidden(input_ids, **kwargs)
                logprobs, grad, weights = self._head_pass(
                    split, hidden, positions, targets, weigh, temperature, scored
                )
                middle = mark()
                hidden.backward(grad)
                end = mark()
                self._mark_failed(logprobs, weights, scored)
                clock, sketches = self._acc.clock, self._acc.end()
            seconds = {
                "forward": clock.between(start, middle),
                "backward": clock.between(middle, end),
                "sketch": clock.seconds(),
            }
            return PolicyGradient(sketches, logprobs, weights, seconds)
        finally:
            self._acc.close()

    def _head_pass(
        self,
        split: SplitModel,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
        weigh: Weigh,
        temperature: float,
        scored: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probs, gradient of the hidden states, weights; the head's own sketch rides along chunk by chunk."""
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        picked = flat[positions]
        matrix, bias, acc = self._plan.head_matrix, self._plan.head_bias, self._acc
        scored = scored.to(flat.device)

        def sketch_head(begin: int, end: int, dz: torch.Tensor) -> None:
            with acc.timed():
                offsets = scored.clamp(begin, end) - begin
                if matrix is not None:
                    matrix.add(dz, matrix.keep(picked[begin:end]), offsets, acc.out)
                if bias is not None:
                    sketch_vector(bias_grad(dz, offsets), bias, acc.out)

        with torch.no_grad():
            logprobs, grad_picked, weights = logprob_and_grad(
                picked,
                split.head.weight,
                targets,
                weigh,
                bias=split.head.bias,
                temperature=temperature / split.scale,
                softcap=split.softcap,
                on_dlogits=sketch_head if matrix is not None or bias is not None else None,
            )
            grad = _add_rows(torch.zeros_like(flat), positions, grad_picked.to(flat.dtype))
        return logprobs, grad.view_as(hidden), weights

    def _ready(self, input_ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor) -> SplitModel:
        self._active("policy_gradient")
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}: give a non-empty [batch, length]"
            )
        if positions.shape != targets.shape or positions.ndim != 1 or positions.dtype != torch.int64:
            raise ValueError(
                f"positions {tuple(positions.shape)} {positions.dtype} and targets {tuple(targets.shape)} "
                f"{targets.dtype} must be int64 of one length: a position and a token id per scored token"
            )
        if positions.numel():
            low, high = int(positions.min()), int(positions.max())
            if low < 0 or high >= input_ids.numel():
                last = input_ids.numel() - 1
                raise ValueError(f"positions run from {low} to {high}: input_ids holds 0 .. {last}")
        if self._split is None:
            self._split = split_model(self.model)
        vocab = self._split.head.out_features
        for name, ids in (("input_ids", input_ids), ("targets", targets)):
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
                low, high = int(ids.min()), int(ids.max())
                raise ValueError(f"{name} runs from {low} to {high}: the vocabulary is 0 .. {vocab - 1}")
        return self._split

    def _active(self, method: str) -> None:
        if not self._handles:
            raise RuntimeError(f"{method} outside the `with GradientSketcher(...)` block: nothing is tapped")

    def _begin(self, segments: Segments) -> None:
        if self._acc.segments is not None:
            raise RuntimeError("a batch is already open in this GradientSketcher: close it first")
        self._acc.begin(segments, next(self.model.parameters()).device)

    def _mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Bool 4-D masks become additive for eager attention, which adds what it is given."""
        config = getattr(self.model, "config", None)
        if (
            mask.ndim != 4
            or mask.dtype != torch.bool
            or getattr(config, "_attn_implementation", None) != "eager"
        ):
            return mask
        dtype = next(self.model.parameters()).dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
            ~mask, torch.finfo(dtype).min
        )

    def _mark_failed(self, logprobs: torch.Tensor, weights: torch.Tensor, scored: torch.Tensor) -> None:
        """A log-prob or weight that is not finite fails its segment even if the sum hides it."""
        bad = ~(logprobs.isfinite() & weights.isfinite())
        if bool(bad.any()):
            at = torch.searchsorted(scored, bad.nonzero().flatten().cpu(), right=True) - 1
            self._acc.out[at.unique()] = float("nan")


class BatchSketch:
    """Filled by `GradientSketcher.batch` when its block ends: float32 [segments, dim]."""

    sketches: torch.Tensor


def _add_rows(out: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``out[positions] += rows`` in a fixed order: on a GPU `index_add_` adds in the order of arrival."""
    if out.is_cuda:
        return out.index_put_((positions,), rows, accumulate=True)  # sorts the positions first
    return out.index_add_(0, positions, rows)


def _scored_offsets(where: Segments, positions: torch.Tensor) -> torch.Tensor:
    """Range of scored tokens of each segment, from the segment of the token that predicts them."""
    segment = torch.searchsorted(where.offsets, positions.cpu().contiguous(), right=True) - 1
    if bool((segment[1:] < segment[:-1]).any()):
        raise ValueError("positions jump back to an earlier segment: sort the scored tokens by segment")
    return torch.searchsorted(segment, torch.arange(where.count + 1))


def _start_graph(module: nn.Module, args: Any, output: Any) -> Any:
    """Frozen weights give outputs without a graph: start one at the embeddings, where the taps' gradients end."""
    if isinstance(output, torch.Tensor) and torch.is_grad_enabled() and not output.requires_grad:
        return output.detach().requires_grad_(True)
    return output
