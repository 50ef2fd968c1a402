"""`GradientSketcher`: turns a backward pass into sketches of per-segment gradients."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import memory
from .._fork import one_thread_after_fork
from ..frozen import Linears, PackedLinears
from ..ops.linear_logprob.contract import Weigh, check_temperature
from ..spec import SketchSpec
from .attach.coverage import Coverage, origin_of
from .attach.tapped import TappedModel, check_entered
from .attach.unseen import calls
from .batch.host import on_device
from .batch.inputs import (
    check_positions,
    check_rows,
    check_tensors,
    check_vocabulary,
    known_ids,
    model_inputs,
    ordinary,
)
from .batch.labels import Batch, scored_tokens
from .batch.one_sequence import check_call
from .batch.segments import Segments, sizes
from .batch.trial import few_rows
from .checks.apart import MIXED, ApartTests
from .checks.beside import check_passes, watch_weights
from .checks.head_trial import policy_self_test
from .checks.replay import Recorded
from .checks.selftest import SelfTest, SelfTestError
from .checks.tap_tests import TapTests
from .model import sharded
from .model.attention import right_backward
from .model.bitsandbytes import check_8bit_layers
from .model.head import base_of, output_embeddings
from .model.precision import own_precision
from .model.state import code_shape
from .model.untouched import evaluating
from .policy.decoder import split_model, split_parts
from .policy.head_pass import PolicyGradient, failed_segments, head_pass, scored_segments
from .policy.probe import Probe, checked_rows, probe_longer, probe_policy
from .policy.scale import SegmentScales
from .policy.split import SplitModel
from .sums.clock import Clock
from .sums.groups import width


class GradientSketcher:
    """Sketches ``g_s = sum_{n in s} w_n grad log pi(token_n)`` per segment s while the backward pass runs.

    A context manager around a causal LM. Inside it the covered weights are frozen (autograd forms no weight gradient)
    and every module that owns one is tapped; afterwards everything is as it was.

    The model runs in the mode that it is in: in ``train()`` its dropout is part of log-probs and sketches, so call
    ``model.eval()`` first. Hugging Face's gradient checkpointing works in ``train()`` only: set dropout to 0 for it.

    Args:
        model: any Hugging Face causal LM, or any module for `batch`, also inside of PEFT, DistributedDataParallel or
            torch.compile's module. Trainable parameters are sketched, frozen ones are not (with LoRA: only the
            adapters).
        spec: what the sketch is; default: `SketchSpec()`.
        exclude: fnmatch patterns of parameter names to leave out; ``"uncovered"``, alone or among them, leaves out what
            cannot be sketched (`coverage` says how much that is).
        verify: before the first work, run the model on a few tokens: compare what its taps give with autograd
            (`SelfTest`), and in `policy_gradient` check that the model is causal and what else it relies on (`Probe`).
            False leaves both out, and with them the check that every tap is called in every batch.
        linears: which library multiplies by frozen float32 weights in `policy_gradient` on a CPU: ``"torch"``,
            ``"onednn"`` (with packed copies, which take twice the weights' memory inside the ``with`` block) or
            ``"auto"``: oneDNN where a measurement gives at most 0.6 of torch's time. None: the value of the environment
            variable ``CROPI_KERNELS_LINEARS``, else ``"auto"``. See `cropi_kernels.frozen`.
        more: other specs, whose sketches `policy_gradient` gives from the same pass. Each takes some 5 % of it
            (SmolLM2-135M on a CPU).
        fused: replace RMSNorm and SwiGLU modules of Llama, Mistral, Qwen2 and Qwen3 models, inside of the ``with``
            block, by fused kernels that give the sketch too; all others stay as they are, and `coverage` names them.
            Results are those without it but for rounding. What rides counts as sketching in ``seconds``.
        groups: patterns of parameter names by the name of a group (``["rest"]``: what no other has). The groups'
            sketches stand side by side, [segments, groups * dim], and add up to the sketch without groups.

    Attributes:
        probe: the properties of the model that were measured; None before `policy_gradient` or `check_model`.

    Raises:
        UncoveredParameterError: a trainable parameter has no tap; names it. Raised here, before any work.
        ValueError: adapters are merged into their base, nothing is left to sketch, a pattern matches nothing, a
            parameter is in no group or in two, ``more`` would sketch other parameters, ``fused`` finds nothing to fuse,
            or 8-bit layers whose results depend on other rows (LLM.int8's threshold).

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)).eval()
    >>> rows, labels = torch.tensor([[5, 6, 7], [5, 8, 9]]), torch.tensor([[-100, 6, 7], [-100, 8, 9]])
    >>> with GradientSketcher(model, SketchSpec(1024)) as sketcher:
    ...     result = sketcher.policy_gradient(rows, segments=torch.tensor([0, 1]), labels=labels, weights=torch.ones(2))
    >>> result.sketches.shape
    torch.Size([2, 1024])
    """

    def __init__(
        self,
        model: nn.Module,
        spec: SketchSpec | None = None,
        exclude: Sequence[str] | str = (),
        *,
        verify: bool = True,
        linears: Linears | None = None,
        more: Sequence[SketchSpec] = (),
        fused: bool = False,
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._tapped = TappedModel(model, spec, exclude, more, fused, groups)
        self.model, self.spec = self._tapped.model, self._tapped.spec
        check_8bit_layers(self.model)
        self._linears = PackedLinears(self.model.parameters(), sharded.linears_of(self.model, linears))
        self._head = base_of(output_embeddings(self.model))  # the taps were planned with it
        self._verify = verify
        self._forget(None)

    def __repr__(self) -> str:
        """The model, the spec, how much is covered, and whether the model is tapped now."""
        c, state = self.coverage, "active" if self._tapped.active else "not active"
        if self._linears.nbytes:
            state += f", {self._linears.nbytes / 1e6:.1f} MB of packed weights"
        return (
            f"GradientSketcher({type(self.model).__name__}, {self.spec}: {c.covered:,} of {c.total:,} parameters "
            f"sketched, {len(c.excluded)} left out by name; {state}{self._tapped.fusion})"
        )

    @property
    def coverage(self) -> Coverage:
        """Which parameters are sketched, and which are left out."""
        return self._tapped.coverage

    @property
    def self_test(self) -> SelfTest | None:
        """The result of the last self-test; None before it."""
        return self._tests.last

    @property
    def origin(self) -> dict[str, Any]:
        """Of which model the sketches are, by what training leaves as it is: ``parameters``, the shape of each by its
        name, and, where the model has them, ``model``, its type's name, and ``vocabulary``, its embedding's rows."""
        return origin_of(self.model, self.coverage)

    def __enter__(self) -> GradientSketcher:
        if self._tapped.active:
            raise RuntimeError("this GradientSketcher is already active: leave its `with` block first")
        # Where hooks or forwards have come or gone, the model is tested again.
        if (shape := code_shape(self.model)) != self._shape:
            self._tapped.fuse_again()
            self._forget(shape)
        self._tapped.tap()
        return self

    def __exit__(self, *raised: object) -> None:
        self._tapped.untap()
        self._linears.clear()

    def _forget(self, shape: object) -> None:
        """Nothing is known of a model whose code has this `code_shape`."""
        self._shape = shape
        self._split: SplitModel | None = None
        self.probe: Probe | None = None
        self._tests, self._apart = TapTests(self._tapped), ApartTests(self.model, self._tapped.acc)
        self._batches, self._watches = 0, self._verify

    def check_model(self) -> None:
        """Run the model on a few tokens and check it, which the first `policy_gradient` then does not do again.

        Raises:
            RuntimeError: outside the ``with`` block. ValueError: `policy_gradient` cannot take the model; says why.
            UncoveredParameterError: the model uses a parameter in a way that its tap does not see.
            SelfTestError: what a tap gives is not autograd's gradient; names the parameters.
        """
        self._check_entered("check_model")
        self._taken_apart()

    @contextmanager
    def batch(
        self, segments: torch.Tensor, *, shape: Sequence[int] | None = None, num_segments: int | None = None
    ) -> Iterator[BatchSketch]:
        """Sketch all backward passes that run inside the block: of any loss of one batch, after any forward.

        Args:
            segments: int64 ids per token [batch, length], or per row [batch] with ``shape=(batch, length)``; they must
                not decrease in flattened order. Padding may carry any neighbouring id: its gradients are zero.
            shape: of the batch. ``(batch,)`` where a row is an example of which modules may see anything (images,
                features, the pooled output of an encoder): then rows are all that is told apart.

        The yielded object's ``sketches`` is set when the block ends, row s to that of ``+grad L_s`` (`LiveSketcher`:
        ``-grad L_s``). The loss is a sum over tokens of terms of one segment each; a mean over the batch scales all.

        The first block is preceded by the self-test: on a few tokens where the model takes token ids; else the call of
        the model inside is made again when the block ends.

        Raises:
            RuntimeError: outside the ``with`` block, or a backward pass differentiates another or runs beside one of
                another thread. ValueError: segments do not fit; says how.
            SelfTestError: what a tap gives is not autograd's gradient, the block uses a weight beside its module, or
                taps were not heard; names the parameters or modules. Or tokens attend to another segment's, no backward
                pass ran, or one raised an error.
        """
        self._check_entered("batch")
        self._tapped.plan.check_places()
        check_tensors(segments=segments)
        batch, length = sizes(segments, shape)
        where = Segments.of(segments, batch, length, num_segments)
        if self._tapped.ranks is not None:
            self._tapped.ranks.check_same("segments", where.offsets)
        with contextlib.ExitStack() as watching:
            recorded, traced = Recorded(), list[bool]()
            if self._verify and not self._batches:
                self._tests.before_batches()
            # What the caller runs may change, or do something else with another batch: ever fewer are watched.
            if self._watches and self._batches & (self._batches - 1) == 0:
                traced = watching.enter_context(watch_weights(self._tapped.plan))
            if self._watches and self._tests.untested("batch"):
                watching.enter_context(recorded.of(self.model))
            apart = self._apart.next(segments) if self._verify else None
            if apart is not None:
                watching.enter_context(apart.watching())
            self._tapped.acc.begin(where, sharded.device_of(self.model), self._tapped.groups)
            result = BatchSketch()
            try:
                with sharded.starting_over(self.model):
                    yield result
                    check_passes(self._tapped.plan)
                    sketches = self._tapped.acc.end()
            finally:
                self._close()
        if self._verify:
            self._tests.again("batch", recorded.again(self.model), where)
            self._batches += 1
            # A graph would be made anew for every batch that is watched.
            self._watches = self._watches and not traced
            self._tests.check("batch", where)
            if apart is not None and (mixed := apart.mixed()) is not None:
                if mixed:
                    raise SelfTestError(f"{MIXED}; verify=False leaves out this test")
                self._apart.done = True
        result.sketches = sketches

    def policy_gradient(
        self,
        input_ids: torch.Tensor,
        *,
        segments: torch.Tensor,
        labels: torch.Tensor | None = None,
        weights: torch.Tensor | Weigh | None = None,
        positions: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        weigh: Weigh | None = None,
        whole: bool = False,
        num_segments: int | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        temperature: float = 1.0,
        model_kwargs: dict[str, Any] | None = None,
    ) -> PolicyGradient:
        """Forward, log-probs, weights, backward and sketches of one micro-batch in one pass.

        Give ``labels``, or ``positions`` and ``targets``, to say which tokens are scored; both give the same bits.

        Args:
            input_ids: int64 [batch, length].
            segments: int64 [batch] or [batch, length], as in `batch`.
            labels: int64 [batch, length], as Hugging Face models take them: ``labels[i, t]`` is the token in column t,
                where it is scored (predicted from column t - 1), or -100 where it is not. The first column is never
                scored; every row has a scored token.
            weights: the weights of the scored tokens. A tensor: [batch, length] (the weight of the token in each place;
                with ``labels``), [batch] (one for a row; with ``labels``) or [n] (one for each scored token, row by
                row). Or a function ``weights(logprobs, start, stop)`` that returns those of scored tokens start .. stop
                from their log-probs (float32, detached); it is called once per chunk, in order.
            positions: int64 [n]: flattened position (row * length + column) whose hidden state predicts scored token n.
                May repeat (K responses share the last prompt token); sorted by segment.
            targets: int64 [n], the scored tokens.
            weigh: another name of ``weights``, for a function.
            whole: call the function once, with all log-probs (for ratios of whole responses); this costs one more
                product with the head.
            attention_mask: None (causal), [batch, length], or [batch, 1, length, length]: bool, True where to attend,
                or of numbers that attention adds to its scores.
            position_ids: as the model takes them. Several sequences in one row need positions that begin anew with
                each, and a model that keeps them apart by these (`probe` says whether it does), or a 4-D mask.
            temperature: log-probs are those of softmax(logits / temperature), and so is the gradient.
            model_kwargs: more inputs of the model by name, such as ``token_type_ids``; its ``forward`` must take them.

        Logits exist for scored tokens only, one chunk at a time; no weight gradient is formed. The pass runs in the
        dtypes of the weights: autocast, the caller's or a trainer's around the model, does not apply. Small weights do
        not underflow in float16, whose smallest number is 6e-8: each segment is scaled by a power of two, and its
        sketch is scaled back.

        Raises:
            RuntimeError: outside the ``with`` block. ValueError: shapes, ranges or order are wrong; names which.
            UncoveredParameterError: as by `check_model`, on the first call.
            torch.OutOfMemoryError: names the sizes and the remedy. The sketcher stays usable.
        """
        self._check_entered("policy_gradient")
        check_tensors(input_ids=input_ids, segments=segments)
        check_temperature(temperature)
        check_rows(input_ids, attention_mask, position_ids)
        given = Batch(input_ids, segments, labels, positions, targets, attention_mask, position_ids)
        # What is checked by its values is copied to the host once, and what the pass needs of that to the device.
        here, positions, targets, weighing = scored_tokens(given, weights, weigh)
        if self._tapped.ranks is not None:
            every = input_ids, segments, positions, targets, attention_mask, position_ids
            self._tapped.ranks.check_same("the batch", *every)
        split = self._ready(here)
        batch, length = input_ids.shape
        where = Segments.of(here.segments, batch, length, num_segments)
        assert here.positions is not None
        scored = scored_segments(where, here.positions)
        kwargs = self._inputs(split, here, attention_mask, position_ids, model_kwargs)
        if labels is not None and segments.ndim == 1:
            masks = {"attention_mask": here.attention_mask, "position_ids": here.position_ids}
            check_call(batch, kwargs | masks)
        plans, device = self._tapped.plans, sharded.device_of(self.model)
        with self._surrounded(where, device, input_ids.shape, positions.numel()):
            with self._open(where, device) as clock:
                # Before the forward: see `head_pass`.
                of_labels = () if labels is None else (positions, targets)
                offsets, ranges, segment, *there = on_device(device, where.offsets, *scored, *of_labels)
                where.keep(offsets)
                scales = SegmentScales(ranges, segment)
                if labels is not None:
                    positions, targets = there
                start = clock.mark()
                with torch.enable_grad():
                    hidden = split.hidden(input_ids := ordinary(input_ids), **kwargs)
                with split.whole_head():
                    asked = positions, targets, weighing(positions), temperature, scales, whole
                    logprobs, grad, used = head_pass(split, plans, hidden, *asked)
                middle = clock.mark()
                if hidden.requires_grad:  # else nothing of the decoder is tapped
                    hidden.backward(grad)
                failed = failed_segments(logprobs, used, scales)
                for plan in plans:
                    for out in plan.acc.outs:
                        scales.restore(out)
                        out.masked_fill_(failed, float("nan"))
                end = clock.mark()
                self._tests.check("policy_gradient", where)
                sketches, *others = [plan.acc.end() for plan in plans]
            if self._verify:
                self._tests.again("policy_gradient", [partial(split.hidden, input_ids, **kwargs)], where)
        measure = self._tapped.acc.pass_seconds(clock, start, middle, end)
        return PolicyGradient(sketches, logprobs, used, measure, tuple(others))

    @contextmanager
    def _surrounded(
        self, where: Segments, device: torch.device, shape: torch.Size, scored: int
    ) -> Iterator[None]:
        """What a pass runs in: the precision of the weights, packed products, an attention whose backward is right;
        and what an error says where memory runs out."""
        batch, length = shape
        explained = memory.explained(
            f"policy_gradient on {batch} x {length} tokens with {scored} scored ones and {where.count} segments "
            f"(sketches: {memory.size(4 * where.count * width(self.spec, self._tapped.groups))})",
            "give fewer rows a call (nothing of this call is left; sketches of parts of a prompt add up), or turn on "
            "gradient checkpointing",
        )
        with (
            explained,
            own_precision(self.model, device),
            self._linears.around(self.model),
            right_backward(device, length),
            sharded.starting_over(self.model),
        ):
            yield

    @contextmanager
    def _open(self, where: Segments, device: torch.device) -> Iterator[Clock]:
        """A batch of every spec, with the clock of the pass; closed at the end, also where an error ends it."""
        acc = self._tapped.acc
        acc.begin(where, device, self._tapped.groups)
        try:
            for other in self._tapped.more:
                other.acc.begin(where, device)
            yield acc.clock
        finally:
            self._close()

    def _ready(self, here: Batch) -> SplitModel:
        """The model's decoder and head, and the batch's tokens checked against them."""
        input_ids, positions, targets = here.input_ids, here.positions, here.targets
        assert positions is not None and targets is not None
        if here.labels is None:
            check_positions(input_ids, positions, targets)
        split = self._taken_apart()
        # Not `out_features`: PEFT's copy of a tied head has it the wrong way round.
        check_vocabulary(input_ids, targets, split.head.weight.shape[0], known_ids(self.model))
        return split

    def _inputs(
        self,
        split: SplitModel,
        here: Batch,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        model_kwargs: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """What the decoder is called with beside the tokens, checked against what the probe has measured."""
        kwargs = model_inputs(self.model, attention_mask, position_ids, model_kwargs)
        if self.probe is not None:
            self.probe = probe_longer(self.probe, self.model, split, here)
        return kwargs | checked_rows(self.probe, here, attention_mask)

    def _taken_apart(self) -> SplitModel:
        """The model's decoder and head; the first call checks them, and everything that `policy_gradient` relies on."""
        head = output_embeddings(self.model)
        if base_of(head) is not self._head:
            raise ValueError(
                "another module is the model's head than when this GradientSketcher was made (another adapter is "
                "active?): make a new one"
            )
        # Adapters of the head may have been switched, or their scale changed.
        if self._split is not None and (head is not self._head or self._split.adapters):
            self._split = dataclasses.replace(self._split, adapters=split_parts(self.model).adapters)
        if self._split is None:
            with own_precision(self.model), torch.enable_grad():
                with calls(self._tapped.plan.taps) as called:
                    split = split_model(self.model)
                ids = few_rows(self.model, split.head.weight.shape[0], sharded.device_of(self.model))
                with evaluating(self.model):  # as when it was split
                    self._tapped.mend(split.hidden, ids, called, split.decoder)
                if self._verify:
                    self.probe = probe_policy(self.model, split)
                    plan = self._tapped.plan
                    self._tests.note("policy_gradient", policy_self_test(split, plan))
                    uncalled = (tap.where for module, tap in plan.taps.items() if module is self._head)
                    self._tests.leave("policy_gradient", frozenset(uncalled))
            self._split = split
        return self._split

    def _check_entered(self, method: str) -> None:
        one_thread_after_fork()
        check_entered(self, method, self._tapped.active, self._tapped.acc)

    def _close(self) -> None:
        for plan in self._tapped.plans:
            plan.acc.close()


class BatchSketch:
    """Filled by `GradientSketcher.batch` when its block ends: float32 [segments, dim], of ``+grad L_s``.

    >>> layer = torch.nn.Linear(4, 4)
    >>> with GradientSketcher(layer, SketchSpec(1024)) as sketcher:
    ...     with sketcher.batch(torch.tensor([0, 1]), shape=(2, 3)) as batch:
    ...         layer(torch.ones(2, 3, 4, requires_grad=True)).sum().backward()
    >>> batch.sketches.shape
    torch.Size([2, 1024])
    """

    sketches: torch.Tensor

    def __repr__(self) -> str:
        if not hasattr(self, "sketches"):
            return "BatchSketch(not filled yet: its block has not ended)"
        return f"BatchSketch({len(self.sketches)} segments, sketches of {self.sketches.shape[1]})"
