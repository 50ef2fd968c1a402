"""The job: trajectories in, a store of per-prompt gradient sketches out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cropi.data.readers import read_trajectories
from cropi.data.rewards import no_gradient_reason, pass_rate
from cropi.data.scan import Scan, resolve_behaviour, scan, warn_lossy
from cropi.errors import CropiError, RecordError, optional
from cropi.gradient.batches import MicroBatch, make_batches
from cropi.gradient.behaviour import BehaviourModel
from cropi.gradient.layout import choose_layout
from cropi.gradient.tokenize import TokenGroup, Tokenize, TooLong
from cropi.sketching.interrupt import Interrupt
from cropi.sketching.job import SketchJob, check_dropout, check_tokens, make_manifest, make_tokenize
from cropi.sketching.summary import Summary, peak_memory_gib
from cropi.store.shards import FAILED, OK, SKIPPED, RowInfo
from cropi.store.store import SketchStore
from cropi_kernels import GradientSketcher

FLUSH_SECONDS = 60.0


def sketch(
    model: Any, tokenizer: Any, job: SketchJob, *, found: Scan | None = None, progress: bool = True
) -> Summary:
    """Sketch the policy gradient of every prompt that has one, into the store ``job.out``.

    A store that is there is continued: prompts that it holds are not computed again. Ctrl-C lets the current
    micro-batch finish, writes what is done and returns with ``interrupted`` set; a second one stops at once.

    Args:
        model: a Hugging Face causal language model, without active dropout (as :func:`cropi.model.load.load_model`
            and ``model.eval()`` give it).
        tokenizer: its tokenizer.
        job: the options.
        found: what :func:`cropi.data.scan.scan` says of the files, if they have been checked already.
        progress: show a progress bar.

    Raises:
        CropiError: bad input or options, found as early as can be: files, token ids, settings and the store are
            checked before the first prompt is computed.
    """
    for name, given in (("model", model), ("behaviour_model", job.behaviour_model)):
        if given is not None:
            check_dropout(given, name)
    if found is None:
        found = scan(job.trajectories, skip_bad=job.skip_bad)
    warn_lossy(found)
    source = resolve_behaviour(job.behaviour, found, job.estimator.ratio)
    beta = _behaviour_model(job, source)
    tokens = make_tokenize(model, tokenizer, job, found)
    check_tokens(tokens, job, found, progress)
    layout = choose_layout(model, job.layout)
    summary = Summary(Path(job.out), bad_records=[str(error) for error in found.bad])
    with GradientSketcher(model, job.spec, exclude=tuple(job.exclude)) as sketcher:
        sketcher.check_model()
        manifest = make_manifest(model, tokenizer, job, found, source, sketcher.coverage)
        with (
            SketchStore.create(job.out, manifest, shard_rows=job.shard_rows) as store,
            Interrupt() as interrupt,
        ):
            summary.coverage = str(sketcher.coverage)
            summary.resumed = len(store)
            with _bar(found, job, store, progress) as bar:
                if layout.note:
                    bar.write(layout.note)
                groups = _groups(job, tokens, store, summary, bar.update)
                batches = make_batches(
                    groups,
                    job.estimator,
                    layout,
                    budget=job.tokens_per_batch,
                    stored_behaviour=source == "file",
                )
                pass_ = _Pass(sketcher, job, beta, summary, bar.write)
                _fill_store(store, batches, pass_, summary, bar, interrupt)
            if not summary.interrupted:
                store.finish()
    summary.peak_gib = peak_memory_gib(model.device)
    return summary


def _fill_store(
    store: SketchStore,
    batches: Iterable[MicroBatch],
    pass_: _Pass,
    summary: Summary,
    bar: Any,
    interrupt: Interrupt,
) -> None:
    """Compute batch after batch, until all are through or Ctrl-C was pressed."""
    flushed = time.monotonic()
    for batch in batches:
        for row, vector in pass_.run(batch):
            summary.count(row)
            store.add(row, vector)
            bar.update(1)
        bar.set_postfix_str(f"{summary.model_tokens / summary.wall:.0f} tokens/s", refresh=False)
        if time.monotonic() - flushed > FLUSH_SECONDS:
            store.flush()
            flushed = time.monotonic()
        if interrupt.asked:
            summary.interrupted = True
            return


@dataclass
class _Part:
    """The sum over micro-batches of what belongs to one prompt."""

    sketch: torch.Tensor
    ratio: float = 0.0
    clipped: float = 0.0

    def finish(self, group: TokenGroup, default_set: str | None) -> tuple[RowInfo, torch.Tensor | None]:
        record, status, reason = group.group, OK, ""
        norm = float(self.sketch.double().norm())
        if not bool(torch.isfinite(self.sketch).all()):
            status, reason, norm = FAILED, "NaN or infinity in its gradient", 0.0
        elif norm == 0:
            status, reason = SKIPPED, "zero gradient"  # every token is clipped
        row = RowInfo(
            id=group.id,
            status=status,
            reason=reason,
            set=record.set or default_set,
            task=record.task,
            pass_rate=pass_rate(record.rewards),
            tokens=group.scored,
            norm=norm,
            extra={"ratio": self.ratio / group.scored, "clipped": self.clipped / group.scored},
        )
        return row, self.sketch if status == OK else None


class _Pass:
    """Runs micro-batches, and gives out each prompt's row once its last one is through."""

    def __init__(
        self,
        sketcher: GradientSketcher,
        job: SketchJob,
        beta: BehaviourModel | None,
        summary: Summary,
        say: Callable[[str], Any],
    ) -> None:
        self.sketcher, self.job, self.beta, self.summary, self.say = sketcher, job, beta, summary, say
        self.device = next(sketcher.model.parameters()).device
        self.parts: dict[str, _Part] = {}
        self.too_many: int | None = None  # tokens, padding included, that the device's memory did not hold

    def run(self, batch: MicroBatch) -> Iterator[tuple[RowInfo, torch.Tensor | None]]:
        """One micro-batch; where the device's memory does not hold it, its halves: the sums are the same."""
        waiting = [batch]
        while waiting:
            part = waiting.pop()
            rows, tokens = part.input_ids.shape[0], part.input_ids.numel()
            if rows > 1 and self.too_many is not None and tokens >= self.too_many:
                waiting += reversed(part.halves())
                continue
            try:
                finished = self._compute(part)
            except torch.cuda.OutOfMemoryError as error:
                if rows == 1:
                    raise CropiError(
                        f"prompt {part.groups[0].id!r}: the {self.device.type} device has no memory for one row of "
                        f"{tokens} tokens ({error}); finished prompts are in {self.job.out}, and the same command goes "
                        "on with the rest on a larger device; here, leave long responses out by --max-length or load "
                        "the model in a smaller --dtype, into a new --out"
                    ) from error
                self.too_many = tokens
                self.say(
                    f"{rows} rows of {part.input_ids.shape[1]} tokens do not fit into the device's memory: halved; "
                    f"--tokens-per-batch {tokens // 2} spares the attempt"
                )
                waiting.append(part)
            else:
                yield from finished
                continue
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # the halves need other sizes

    def _compute(self, batch: MicroBatch) -> list[tuple[RowInfo, torch.Tensor | None]]:
        """Forward, weights, backward, sketches; the rows of the prompts that are complete with it."""
        begun, tokens, batch, estimator = (
            time.monotonic(),
            batch.tokens,
            batch.to(self.device),
            self.job.estimator,
        )
        behaviour = self.beta.logprobs(batch) if self.beta is not None else batch.behaviour

        def weigh(logprobs: torch.Tensor, start: int, stop: int) -> torch.Tensor:
            old = None if behaviour is None else behaviour[start:stop]
            return estimator.weights(logprobs, old, batch.advantages[start:stop], batch.divisors[start:stop])

        result = self.sketcher.policy_gradient(
            batch.input_ids,
            segments=batch.segments,
            positions=batch.positions,
            targets=batch.targets,
            weigh=weigh,
            num_segments=len(batch.groups),
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            temperature=batch.temperature,
        )
        ratio = torch.ones_like(result.logprobs)
        if behaviour is not None:
            ratio = torch.exp(result.logprobs - behaviour)
        clipped = estimator.clipped(ratio, batch.advantages)
        sums = torch.zeros(len(batch.groups), 2, dtype=torch.float64, device=self.device)
        sums.index_add_(0, batch.token_segments, torch.stack([ratio, clipped], dim=1).double())
        for s, group in enumerate(batch.groups):
            part = self.parts.setdefault(group.id, _Part(torch.zeros_like(result.sketches[s])))
            part.sketch = part.sketch + result.sketches[s]
            part.ratio += float(sums[s, 0])
            part.clipped += float(sums[s, 1])
        self.summary.add(result.seconds, time.monotonic() - begun, tokens, len(batch.targets))
        return [
            self.parts.pop(group.id).finish(group, self.job.set)
            for group, last in zip(batch.groups, batch.finished, strict=True)
            if last
        ]


def _groups(
    job: SketchJob, tokens: Tokenize, store: SketchStore, summary: Summary, advance: Callable[[int], Any]
) -> Iterator[TokenGroup]:
    """The prompts that are left to compute; those without a gradient go into the store right here."""
    for group in read_trajectories(job.trajectories, skip_bad=job.skip_bad):
        if job.limit is not None and summary.read >= job.limit:
            return
        summary.read += 1
        if group.id in store:
            continue
        status, reason = SKIPPED, no_gradient_reason(group.rewards)
        if not reason:
            try:
                yield tokens(group)
                continue
            except TooLong:
                reason = "too long"
            except RecordError as error:
                if not job.skip_bad:
                    raise
                status, reason = FAILED, error.problem
        rate = pass_rate(group.rewards)
        row = RowInfo(group.id, status, reason, group.set or job.set, group.task, rate)
        summary.count(row)
        store.add(row)
        advance(1)


def _behaviour_model(job: SketchJob, source: str) -> BehaviourModel | None:
    given = job.behaviour_model is not None
    if given and not job.estimator.ratio:
        raise CropiError(
            f"behaviour_model: the estimator {job.estimator.name!r} has no ratio to it; leave the model out"
        )
    if source == "model" and not given:
        raise CropiError("behaviour is 'model', but no model is given; name it with --behaviour-model")
    if given and source != "model":
        raise CropiError(
            f"behaviour is {source!r}, which does not use the behaviour model that is given; leave one of them out"
        )
    return BehaviourModel(job.behaviour_model) if source == "model" else None


def _bar(found: Scan, job: SketchJob, store: SketchStore, progress: bool) -> Any:
    total = min(found.prompts, job.limit) if job.limit is not None else found.prompts
    name = Path(job.out).name
    bar = optional("tqdm").tqdm
    return bar(
        total=max(total - len(store), 0), desc=name, unit="prompt", disable=not progress, smoothing=0.1
    )
