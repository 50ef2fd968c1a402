"""Micro-batches to rows: forward, weights, backward, and the sums over the micro-batches of one prompt.

On a GPU a pass is launched before the results of the one before it are looked at. So the device works while the host
adds up sketches, writes rows and cuts the next micro-batch.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch

from cropi.errors import CropiError
from cropi.gradient.batches import MicroBatch, make_batches
from cropi.gradient.behaviour import BehaviourModel
from cropi.gradient.estimators import Estimator
from cropi.gradient.health import Health, health_sums
from cropi.gradient.layout import Layout
from cropi.gradient.masks import handed
from cropi.gradient.tokenize import TokenGroup
from cropi.gradient.zero import ZERO_GRADIENT, Suspicion, is_zero, rounding
from cropi.sketching.chunks import Participant
from cropi.sketching.job import SketchJob
from cropi.sketching.rows import cost_of, row_of
from cropi.sketching.summary import Summary
from cropi.store.rows import FAILED, OK, SKIPPED, RowInfo
from cropi_kernels import GradientSketcher, PolicyGradient, SketchSpec
from cropi_kernels.adding import add_rows
from cropi_kernels.memory import is_out_of_memory
from cropi_kernels.sketcher.batch.host import Fetched
from cropi_kernels.sketcher.formed import FormedSketcher
from cropi_kernels.sketcher.model.sharded import device_of

Finished = tuple[RowInfo, torch.Tensor | None]
AHEAD = ("cuda",)  # devices that work while the host does something else


@dataclass
class Sums:
    """The sums of one prompt over the micro-batches so far."""

    sketch: torch.Tensor
    health: Health = field(default_factory=Health)
    weight: float = 0.0  # the sum of its tokens' absolute weights


@dataclass(frozen=True)
class Passed:
    """A micro-batch that went through the model: ``batch`` and what is fetched of it, on the host, the pass's times,
    and when it was begun, by the clock."""

    batch: MicroBatch
    fetched: Fetched
    result: PolicyGradient
    begun: float


# What is fetched of a pass over a micro-batch on the device, with the log-probs of the behaviour.
Fetch = Callable[[MicroBatch, torch.Tensor | None, PolicyGradient], Fetched]


def fetch(
    estimator: Estimator, there: MicroBatch, behaviour: torch.Tensor | None, result: PolicyGradient
) -> Fetched:
    """Of each prompt its sketch, the numbers of its health, and the sum of its tokens' absolute weights; and the
    sketches by other specs, ``[S, specs, dim]``."""
    ratios = estimator.ratio_behaviour(result.logprobs, behaviour, there.responses)
    health = health_sums(estimator, there, result.logprobs, ratios)
    weights = health.new_zeros(len(there.groups))
    add_rows(weights, there.token_segments, result.weights.double().abs())
    more = result.more or (result.sketches[:, :0],)
    return Fetched(result.sketches, health, weights, torch.stack(more, dim=1))


@dataclass
class Others:
    """Sketches by other specs from the same passes: ``sums``, float32 ``[specs, dim]`` by the prompts' ids."""

    specs: Sequence[SketchSpec]
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, batch: MicroBatch, more: torch.Tensor) -> None:
        """Add the sketches ``[S, specs, dim]`` of one micro-batch."""
        for group, sketches in zip(batch.groups, more, strict=True):
            self.sums[group.id] = self.sums.get(group.id, 0.0) + sketches


@dataclass
class Passes:
    """Runs micro-batches, and gives out each prompt's row once its last one is through.

    Attributes:
        sketcher: the active taps.
        job: the weight of every token, and the validation set of prompts that carry none.
        behaviour: the model that made the rollouts, or None where its log-probs are in the batches, or are not needed.
        summary: counts and times are added to it.
        layout: how the rows are laid out.
        participant: how other processes take part in what is run here.
        others: takes the sketches by other specs, where the taps have some.
        keeps: where finished prompts are, for the message when a device's memory is too small.
        say: takes a line for the user.
    """

    sketcher: GradientSketcher | FormedSketcher
    job: SketchJob
    behaviour: BehaviourModel | None
    summary: Summary
    layout: Layout
    participant: Participant
    others: Others | None
    _: KW_ONLY
    keeps: str
    say: Callable[[str], Any]

    def __post_init__(self) -> None:
        self.estimator = self.job.estimator
        self.device = device_of(self.sketcher.model)
        self.bound = rounding(self.sketcher.model)
        self.suspicion = Suspicion(self.bound)
        self.sums: dict[str, Sums] = {}
        self.too_many: int | None = None  # tokens, padding included, that the device's memory did not hold
        # Processes that share a model decide on their prompts together, between their passes.
        self.ahead = self.device.type in AHEAD and not self.participant.linked
        self._waiting: Passed | None = None
        self._looked = 0.0  # when the results of a pass had been looked at, by the clock

    def run(self, batch: MicroBatch) -> Iterator[Finished]:
        """Run one micro-batch; in halves, where the device's memory does not hold it. The sums are equal.

        Args:
            batch: on the host.

        Yields:
            Prompts that are finished: of this batch, or, where passes run ahead, of those before its last pass.
        """
        try:
            for passed in self._passes(batch, functools.partial(fetch, self.estimator)):
                before, self._waiting = self._waiting, passed
                if before is not None:
                    yield from self._rows(before)
                if not self.ahead:
                    yield from self.rest()
        except Exception:
            yield from self.rest()  # what is finished is kept
            raise

    def rest(self) -> Iterator[Finished]:
        """The finished prompts of the last pass, if they have not been given out."""
        before, self._waiting = self._waiting, None
        if before is not None:
            yield from self._rows(before)

    def end(self) -> Iterator[Finished]:
        """The rest; the sums of prompts that began are dropped: the batches that come next hold all of theirs."""
        yield from self.rest()
        self.sums = {}

    def _rows(self, passed: Passed) -> Iterator[Finished]:
        batch = passed.batch
        sketches, health, weights, more = passed.fetched.wait()
        if self.others is not None:
            self.others.add(batch, more)
        for group, sketch, numbers, weight in zip(
            batch.groups, sketches, health.tolist(), weights.tolist(), strict=True
        ):
            sums, of_batch = self.sums.setdefault(group.id, Sums(torch.zeros_like(sketch))), Health(*numbers)
            sums.sketch = sums.sketch + sketch
            sums.health += of_batch
            sums.weight += weight
            self.summary.health += of_batch
        now = time.monotonic()
        wall, self._looked = now - max(passed.begun, self._looked), now
        self.summary.add(passed.result.seconds, wall, batch.tokens, len(batch.targets))
        for group, last in zip(batch.groups, batch.finished, strict=True):
            if last:
                yield self._finished(group, self.sums.pop(group.id), batch)

    def _passes(self, batch: MicroBatch, fetch: Fetch) -> Iterator[Passed]:
        """The passes over a micro-batch: one, or those over its parts, where the device's memory does not hold it."""
        waiting = [batch]
        while waiting:
            piece = waiting.pop()
            rows, tokens = piece.input_ids.shape[0], piece.input_ids.numel()
            if self.too_many is not None and tokens >= self.too_many and piece.divisible:
                waiting += reversed(piece.halves())
                continue
            begun = time.monotonic()
            try:
                there = piece.to(self.device)
                behaviour = self._behaviour_of(there)
                result = self._gradient(there, behaviour)
                passed = Passed(piece, fetch(there, behaviour, result), result, begun)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if not piece.divisible:
                    raise CropiError(
                        f"prompt {piece.groups[0].id!r}: the {self.device.type} device has no memory for one row of "
                        f"{tokens} tokens ({error}); finished prompts are in {self.keeps}, and the same command goes "
                        "on with the rest on a larger device; here, leave long responses out by --max-length or load "
                        "the model in a smaller --dtype, into a new --out"
                    ) from error
                size = f"{rows} x {piece.input_ids.shape[1]} tokens do not fit into the device's memory"
                if self.participant.linked:  # the others do not halve theirs
                    raise CropiError(
                        f"{size}, and processes that share a model cannot halve them alone ({error}): give "
                        f"--tokens-per-batch {tokens // 2}; finished prompts are in {self.keeps}"
                    ) from error
                self.too_many = tokens
                self.say(f"{size}: halved; --tokens-per-batch {tokens // 2} spares the attempt")
                waiting.append(piece)
            else:
                yield passed
                continue
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # the halves need other sizes

    def idle(self) -> None:
        """Run an empty pass on two tokens, because processes that share the model run theirs."""
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        first = ids[0, :1]
        self.sketcher.policy_gradient(
            ids,
            segments=first,
            positions=first,
            targets=first,
            weigh=lambda logprobs, *_: torch.zeros_like(logprobs),
            num_segments=1,
        )

    def _behaviour_of(self, batch: MicroBatch) -> torch.Tensor | None:
        return self.behaviour.logprobs(batch) if self.behaviour is not None else batch.behaviour

    def _gradient(self, batch: MicroBatch, behaviour: torch.Tensor | None) -> PolicyGradient:
        self.participant.begin_pass()
        return self.sketcher.policy_gradient(
            batch.input_ids,
            segments=batch.segments,
            positions=batch.positions,
            targets=batch.targets,
            weigh=self.estimator.weigher(
                batch.advantages, batch.divisors, behaviour, batch.responses, batch.noise
            ),
            # The ratio of a response is known with its last token, but weights are asked for chunk by chunk.
            whole=self.estimator.level == "sequence" and behaviour is not None,
            num_segments=len(batch.groups),
            attention_mask=handed(batch.attention_mask, self.layout.added),
            position_ids=batch.position_ids,
            temperature=batch.temperature,
        )

    def _finished(self, group: TokenGroup, sums: Sums, batch: MicroBatch) -> Finished:
        """The row of a finished prompt, and its sketch if that is usable.

        A gradient that is small beside its weights may be rounding and nothing else: it is compared with the sizes of
        its responses' gradients.
        """
        status, reason, norm, zero = OK, "", float(sums.sketch.double().norm()), False
        if (
            self.job.zeros
            and len(group.equal) > 1
            and self.participant.agreed(self.suspicion.is_suspicious(norm, sums.weight))
        ):
            size = self._sizes(group, batch.input_ids.numel(), batch.behaviour is not None)
            zero = self.participant.agreed(is_zero(norm, size, self.bound))
        if not bool(torch.isfinite(sums.sketch).all()):
            status, reason, norm = FAILED, "NaN or infinity in its gradient", 0.0
        elif norm == 0 or zero:  # every token is clipped, or the responses cancel
            status, reason, norm = SKIPPED, ZERO_GRADIENT, 0.0
        health = sums.health.to_dict()
        self.summary.cost += cost_of(group.group, self.job.responses)
        row = row_of(group.group, status, reason, self.job.set, tokens=group.scored, norm=norm, extra=health)
        return row, sums.sketch if status == OK else None

    def _sizes(self, group: TokenGroup, budget: int, stored: bool) -> float:
        """The root of the sum of squares of its responses' gradients, each in a segment of its own."""
        total = 0.0
        padded = Layout(shared=False, lengths=self.layout.lengths)
        for batch in make_batches([group], self.estimator, padded, budget=budget, stored_behaviour=stored):
            count = batch.input_ids.shape[0]
            rows = replace(
                batch,
                groups=[group] * count,
                finished=[False] * count,
                segments=torch.arange(count, device="cpu"),
            )
            for passed in self._passes(rows, lambda there, behaviour, result: Fetched(result.sketches)):
                (sketches,) = passed.fetched.wait()
                total += float(sketches.double().square().sum())
        return math.sqrt(total)
