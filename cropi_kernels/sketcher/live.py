"""`LiveSketcher`: sketches of what a trainer's own backward pass makes, one for each prompt of the step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from ..spec import SketchSpec
from .attach.attachment import Attachment
from .attach.coverage import Coverage, origin_of
from .attach.tapped import TappedModel, check_entered
from .batch.one_sequence import one_sequence_a_row
from .batch.row_segments import Runs
from .batch.segments import Segments
from .checks.apart import MIXED, Apart, ApartTests
from .checks.beside import check_heard, check_passes
from .checks.live_audit import Audit, Schedule
from .checks.replay import Recorded
from .checks.selftest import SelfTest
from .checks.split_loss import COUPLED, LATER, PARTS, SUM, UNSEEN, CoupledLossError, LossCheck, is_sum
from .checks.tap_tests import TapTests
from .model import sharded
from .model.precision import own_precision
from .model.state import code_shape
from .policy.fused_head import HeadCall, listen


class Scaler(Protocol):
    """What a mixed-precision trainer multiplies its loss by: `torch.amp.GradScaler` is one."""

    def get_scale(self) -> float: ...


class LiveSketcher:
    """Sketches ``g_s``, prompt s's part of a training step's gradient, while the trainer's backward pass runs.

    For a loss ``L = sum_s L_s`` over prompts, ``g_s = -grad L_s`` with respect to every trainable parameter: the
    direction that lowers the loss, and so the policy gradient, as in `GradientSketcher`. No pass is added. Weights stay
    trainable, autograd forms their gradients as always and with the same bits, and taps read the inputs and output
    gradients that it uses.

    >>> model = torch.nn.Sequential(torch.nn.Embedding(16, 8), torch.nn.Linear(8, 16))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> rows, prompt_of_row = torch.randint(16, (4, 6)), torch.tensor([0, 0, 1, 1])
    >>> with LiveSketcher(model, SketchSpec(1024)) as live:
    ...     with live.batch(prompt_of_row, shape=rows.shape) as step:
    ...         logprobs = model(rows).log_softmax(-1)[:, :-1].gather(2, rows[:, 1:, None])
    ...         (-logprobs.mean()).backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> step.sketches.shape, live.loss
    (torch.Size([2, 1024]), 'a sum over prompts')

    Gradient accumulation: a block for each micro-batch that has a backward pass, with the step's own numbers of prompts
    and `num_segments`; add the sketches up. Checkpointing, autocast, LoRA, DistributedDataParallel (each rank its own
    prompts, before gradients are averaged), FSDP2 and modules that are compiled inside of the ``with`` block work as
    they are. Fused experts run in this package's own code while they are tapped: equal but for rounding, not in the
    same bits.

    Args:
        model: as for `GradientSketcher`: any module, also inside of PEFT or DistributedDataParallel; what has
            ``requires_grad`` now is sketched.
        spec: what the sketch is; default: `SketchSpec()`.
        exclude: as for `GradientSketcher`.
        verify: before the first step, compare the taps with autograd on a few tokens (taps that these do not reach, on
            the first batch that does); in the first steps with a gradient, and in ever fewer later ones, compare their
            sum with it; in the first with two prompts that have one, and beside those comparisons, check that the loss
            is a sum over prompts (in every batch, where values of the batch are sorted). False: no checks.
        coupled: take losses that are not a sum over prompts: ``g_s`` is then the part of the gradient that passes
            through the tokens of s. The parts add up to the gradient all the same.

    Attributes:
        self_test: the result of the last test of taps: on a few tokens or, of taps that these do not reach, on the
            first batch that does; None before it.
        loss: whether the loss is a sum over prompts, as a sentence; None before the first step.

    Raises:
        UncoveredParameterError, ValueError: as `GradientSketcher`, but 8-bit layers with LLM.int8's threshold are
            taken: the sketch is of the step's own gradient, which depends on the batch's other rows in the same way.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: SketchSpec | None = None,
        exclude: Sequence[str] | str = (),
        *,
        verify: bool = True,
        coupled: bool = False,
    ) -> None:
        self._tapped = TappedModel(model, spec, exclude)
        self._tests = TapTests(self._tapped)
        self.model, self.spec, self.coupled = self._tapped.model, self._tapped.spec, coupled
        self._acc = self._tapped.acc
        self._handles: list[Any] = []
        self._verify = verify
        # The weight gradients of a sharded model are shards: the step's sketches are not compared with them.
        self._whole = not sharded.units(self.model)
        self._audited = self._whole and self._plan.ranks is None
        self._shape: object = None  # of the model's code, when it was tested
        self._tapped_shape: object = None  # the same with the taps
        self._audits = Schedule()
        self._ready, self._apart = False, ApartTests(self.model, self._acc)
        self._runs: Runs | None = None  # those of the open batch
        self.loss: str | None = None
        self._sorts = False  # whether the last loss that was looked at put values in order

    def __repr__(self) -> str:
        c, state = self.coverage, "active" if self._handles else "not active"
        return (
            f"LiveSketcher({type(self.model).__name__}, {self.spec}: {c.covered:,} of {c.total:,} parameters sketched; "
            f"{state})"
        )

    @property
    def _plan(self) -> Attachment:
        return self._tapped.plan

    @property
    def coverage(self) -> Coverage:
        """Which parameters are sketched, and which are left out."""
        return self._plan.coverage

    @property
    def origin(self) -> dict[str, Any]:
        """As `GradientSketcher.origin`."""
        return origin_of(self.model, self.coverage)

    @property
    def self_test(self) -> SelfTest | None:
        """The comparison of the taps with autograd on a few tokens; None before it."""
        return self._tests.last

    # ---------------------------------------------------------------------------------------------- the block

    def __enter__(self) -> LiveSketcher:
        if self._handles:
            raise RuntimeError("this LiveSketcher is already active: leave its `with` block first")
        if self._forget_another_shape():
            self._audits, self.loss = Schedule(), None
        if self.loss == COUPLED:  # which was caught; the loss may be another now
            self.loss = None
        try:
            self._hook()
        except BaseException:
            self._plan.unhook(self._handles)
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self._plan.unhook(self._handles)
        self._acc.close()

    @contextmanager
    def batch(
        self,
        segments: torch.Tensor,
        *,
        shape: Sequence[int] | None = None,
        num_segments: int | None = None,
        scale: float | torch.Tensor | Scaler = 1.0,
    ) -> Iterator[LiveSketch]:
        """Sketch all backward passes that run inside the block: forward and backward of one micro-batch.

        Args:
            segments: int64 number of the prompt, per row [batch] with ``shape=(batch, length)`` (the model may then be
                run on the last columns only, as trainers run its head), or per token [batch, length]; in any order.
                Padding may have the number of any token beside it: its gradients are zero.
            shape: of the batch; ``(batch,)`` where rows are examples of another kind (see `GradientSketcher.batch`).
            num_segments: rows of the sketches; None: the highest number plus one.
            scale: the factor by which the trainer multiplies the loss, a number or a `torch.amp.GradScaler`; the
                sketches are divided by it.

        The yielded `LiveSketch` is filled when the block ends.

        Raises:
            RuntimeError: outside the ``with`` block, inside another batch, or a backward pass differentiates another,
                is one of `torch.autograd.grad` beside one of ``backward()``, or runs beside one of another thread.
            ValueError: ``segments`` do not fit, a row that was given one number holds several sequences, or what is
                trainable has changed.
            SelfTestError: a tap does not give autograd's gradient; names the parameters. Or no backward pass ran, or
                one raised an error.
            CoupledLossError: the loss is not a sum over prompts, or tokens attend to those of another prompt in their
                row.
        """
        self._check_state()
        runs = Runs.of(segments, shape, num_segments)
        if self._plan.ranks is not None:
            self._plan.ranks.check_same("segments", runs.segments.offsets)
        size = _number(scale)
        due = self._verify and self._audited and self._audits.due()
        self._test_taps(due)
        check = LossCheck(self.model, self._acc, runs) if self._asks(runs, due) else None
        apart = self._apart.next(segments) if self._verify and not self.coupled else None
        trained = self._plan.wanted if self._verify else ()
        self._acc.begin(runs.segments, sharded.device_of(self.model), trained=trained)
        self._runs = runs
        result, recorded, started = LiveSketch(), Recorded(), time.perf_counter()
        try:
            audit = Audit(self._plan) if due else None
            with self._watching(runs, audit, check, apart, recorded):
                yield result
            self._judge(runs, audit, check, apart)
            clock, sketches = self._acc.clock, self._acc.end()
        finally:
            if check is not None and check.verdict == COUPLED:
                self.loss = COUPLED
            self._acc.close()
            self._runs = None
        if self._untested(runs.segments):
            again = recorded.again(self.model)
            self._try(lambda: self._tests.again("batch", again, runs.segments, not self.coupled))
        sketches /= -size  # down the loss
        result.sketches, result.visited = runs.gathered(sketches), runs.visited
        result.spec, result.names, result.origin = self.spec, self.coverage.names, self.origin
        block = time.perf_counter() - started
        result.seconds = {"block": block, "sketch": self._acc.sketch_share(clock, lambda: block)() * block}

    def _test_taps(self, due: bool) -> None:
        """Before the first batch, and once more where the model's code has changed since."""
        if due and code_shape(self.model) != self._tapped_shape:
            with self._untapped():  # hooks or forwards of others have come or gone
                self._forget_another_shape()
        if self._verify and self._whole and not self._ready:
            with own_precision(self.model):
                self._try(lambda: self._tests.before_batches())
            self._ready = True

    @contextmanager
    def _watching(
        self,
        runs: Runs,
        audit: Audit | None,
        check: LossCheck | None,
        apart: Apart | None,
        recorded: Recorded,
    ) -> Iterator[None]:
        """Whatever is to be seen of the passes inside, for `_judge` and for a test of the taps afterwards."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(one_sequence_a_row(self.model, runs))
            if audit is not None:
                stack.enter_context(audit.listening())
            if check is not None:
                stack.enter_context(check.watching())
            if apart is not None:
                stack.enter_context(apart.watching())
            if self._untested():
                stack.enter_context(recorded.of(self.model))
            yield

    def _judge(self, runs: Runs, audit: Audit | None, check: LossCheck | None, apart: Apart | None) -> None:
        """Raise what the passes of the open batch have shown: see `batch`."""
        check_passes(self._plan)
        if audit is not None:
            audit.verdict(runs.segments, self._audits)
        if check is not None:  # a backward pass has run: `check_passes`
            self._note(check)
        if apart is not None and (mixed := apart.mixed()) is not None:
            if mixed:
                self.loss = COUPLED
                raise CoupledLossError(f"{MIXED}, or take {PARTS}: coupled=True")
            self._apart.done = True
        if self._audits.heard is not None:
            check_heard(self._plan, self._audits.heard, runs.segments, partly=True)

    def fused_head(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        rows: torch.Tensor,
        log_probs: torch.Tensor,
        entropy: torch.Tensor | None = None,
        *,
        temperature: float = 1.0,
        softcap: float | None = None,
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Report a function that multiplies by the head's weight itself and returns log-probs, not logits.

        Call this right after that function, with its inputs and outputs. It must have computed
        ``log_probs[i] = log softmax(z_i)[targets[i]]`` with ``z = cap(scale * (hidden W^T + b)) / temperature``. The
        head's sketch then costs one more product with W.

        Args:
            hidden: [n, features], what the head was given.
            targets: int64 [n]. rows: int64 [n], the row of the batch that each token is in.
            log_probs, entropy: [n], the function's own outputs.
            dtype: in which ``hidden`` and W are multiplied; None: that of ``hidden``.
            softcap: ``cap(y) = softcap * tanh(y / softcap)``; None: no cap.

        Raises:
            ValueError: shapes do not fit, or the batch's segments are per token.
        """
        if self._runs is None or not self._acc.listens:
            return
        call = HeadCall(
            hidden, targets, rows, float(temperature), softcap, float(scale), dtype or hidden.dtype
        )
        listen(self._plan, self._runs, call, log_probs, entropy)

    def _check_state(self) -> None:
        check_entered(self, "batch", bool(self._handles), self._acc)
        places = self._plan.check_places()
        known = {*self._plan.coverage.names, *self._plan.coverage.excluded, *self._plan.coverage.uncovered}
        now = {
            name
            for (module, key), name in places.items()
            if (p := module._parameters[key]) is not None and p.requires_grad
        }
        if changed := sorted(known ^ now):
            raise ValueError(
                f"what is trainable has changed since this LiveSketcher was made ({changed[0]} and {len(changed) - 1} "
                "more): make a new one"
            )

    def _asks(self, runs: Runs, due: bool) -> bool:
        """Whether this batch can say more of the loss than those before."""
        if not self._verify or self.coupled:
            return False
        if self.loss in (None, UNSEEN, COUPLED):
            return True
        # What was not checked for another reason is not asked again: where the model is compiled from outside, a hook
        # has its graph compiled anew.
        again = is_sum(self.loss) and (due or self._sorts)
        return runs.present > 1 and (self.loss == LATER or again)

    def _note(self, check: LossCheck) -> None:
        """What a batch has shown; one that shows less takes nothing back."""
        self._sorts = check.sorts
        if self.loss == COUPLED:  # it couples other prompts than those of this batch
            return
        if not is_sum(self.loss) or check.verdict == SUM:  # which was perhaps linear before
            self.loss = check.verdict or UNSEEN

    def _untested(self, segments: Segments | None = None) -> bool:
        """Whether no test has heard some of the taps, or of those that were heard in the batch ``segments``."""
        return self._verify and self._whole and bool(self._tests.untested("batch", segments))

    def _forget_another_shape(self) -> bool:
        """Where hooks or forwards have come or gone, the taps are to be tested again; called without the taps."""
        if (shape := code_shape(self.model)) == self._shape:
            return False
        self._shape, self._tests, self._ready = shape, TapTests(self._tapped), False
        self._apart = ApartTests(self.model, self._acc)
        return True

    @contextmanager
    def _untapped(self) -> Iterator[None]:
        self._plan.unhook(self._handles)
        try:
            yield
        finally:
            self._hook()

    def _hook(self) -> None:
        self._handles.extend(self._plan.hook())
        self._tapped_shape = code_shape(self.model)

    def _try(self, check: Callable[[], None]) -> None:
        """Make a check of `GradientSketcher.batch`, with frozen weights."""
        with self._untapped():
            self._forget_another_shape()
            self._tapped.tap()
            try:
                check()
            finally:
                self._tapped.untap()


class LiveSketch:
    """Filled by `LiveSketcher.batch` when its block ends.

    Attributes:
        sketches: float32 [num_segments, dim], of ``-grad L_s``; a row of NaN where the prompt's gradient has a NaN or
            an infinity; zero where the prompt has no gradient.
        visited: bool [num_segments], on the CPU: which prompts have a row in the batch.
        spec: what a sketch is; names: the parameters that are in it; origin: of which model (`LiveSketcher.origin`).
        seconds: ``block``, all that ran inside, and ``sketch``, the taps' part of it.
    """

    sketches: torch.Tensor
    visited: torch.Tensor
    spec: SketchSpec
    names: tuple[str, ...]
    origin: dict[str, Any]
    seconds: dict[str, float]

    def __repr__(self) -> str:
        if not hasattr(self, "sketches"):
            return "LiveSketch(not filled yet: its block has not ended)"
        return f"LiveSketch({len(self.sketches)} prompts, sketches of {self.sketches.shape[1]})"

    @property
    def failed(self) -> torch.Tensor:
        """bool [num_segments]: whose gradient is not finite."""
        return ~self.sketches.isfinite().all(dim=1)


def _number(scale: float | torch.Tensor | Scaler) -> float:
    value = scale.get_scale() if hasattr(scale, "get_scale") else scale
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"scale is {scale!r}: give a number, or a torch.amp.GradScaler") from error
    if not 0.0 < abs(number) < float("inf"):
        raise ValueError(f"scale is {number}: give a finite number other than 0")
    return number
