"""Tokenised prompts to rows of a store: the loop that every sketching run ends in. No files are read here."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cropi.errors import CropiError, article, shortened
from cropi.gradient.batches import MicroBatch
from cropi.gradient.behaviour import Behaviour
from cropi.gradient.layout import layout_of
from cropi.gradient.tokenize import TokenGroup
from cropi.gradient.zero import no_sketch_reason
from cropi.model.moments import SecondMoments
from cropi.model.placing import tokens_at_once
from cropi.model.policy import Policy
from cropi.progress import bar_of
from cropi.sketching.behind import Behind
from cropi.sketching.chunks import Chunk, EveryChunk, Participant, make_chunks
from cropi.sketching.interrupt import Interrupt
from cropi.sketching.job import SketchJob
from cropi.sketching.passes import Others, Passes
from cropi.sketching.rows import row_of
from cropi.sketching.summary import Summary, peak_memory_gib
from cropi.store.manifest import groups_in
from cropi.store.memory import MemoryStore
from cropi.store.rows import SKIPPED, RowInfo
from cropi.store.store import SketchStore
from cropi_kernels import GradientSketcher, SketchSpec
from cropi_kernels.sketcher.formed import FormedSketcher

FLUSH_SECONDS = 60.0


def sketch_groups(
    policy: Policy,
    groups: Iterable[TokenGroup | RowInfo],
    store: SketchStore,
    job: SketchJob,
    behaviour: Behaviour,
    *,
    moments: SecondMoments | None = None,
    others: Others | None = None,
    total: int | None = None,
    progress: bool = False,
    summary: Summary | None = None,
    participant: Participant | None = None,
) -> Summary:
    """Sketch tokenised prompts into a store, on disk or in memory.

    Prompts that the store holds are not computed again; those without a gradient (equal rewards) become rows without a
    sketch. Ctrl-C, SIGTERM and SIGHUP let the current micro-batch finish; the call returns with ``interrupted`` set.

    A store that is continued gets the same bits as one that was filled at once, if ``groups`` holds the prompts that
    are done too, at their places: micro-batches are cut from all of them. With other groups (another limit, another
    share of the prompts) or ``tokens_per_batch`` the rows agree up to float32 rounding of the sums.

    Args:
        policy: the current policy.
        groups: the prompts, each with its responses as token ids; or a :class:`RowInfo`, for a prompt that could not be
            tokenised, which becomes a row as it is. Read once, a few hundred at a time.
        store: where rows go. Its manifest names the sketch (``spec``, and the ``groups`` of parameters whose sketches
            are kept apart); it is marked as finished at the end.
        job: what is computed, and how; its trajectories and its folder are not asked for.
        behaviour: where the log-probs of the policy that made the rollouts come from.
        moments: of an optimiser: gradients are formed by autograd and divided by their roots before they are sketched.
        others: other specs, whose sketches are made in the same passes and kept there; not with ``moments``.
        total: how many prompts there are, for the progress bar.
        progress: show it.
        summary: counts are added to this one; None: to a new one.
        participant: of several processes that share the job: which of its chunks are computed here. ``groups`` are all
            prompts of the job.

    Raises:
        CropiError: a group of another type, a behaviour that the groups do not carry, or a layout that the model cannot
            take.
        UncoveredParameterError: a trainable parameter cannot be sketched.
    """
    summary = summary or Summary(Path(store.path))
    layout = layout_of(policy, job.layout)
    if behaviour.model is not None:
        layout = layout.beside(behaviour.model.lengths)
    with _sketcher(policy, store.manifest, job, moments, others) as sketcher:
        sketcher.check_model()
        summary.coverage = str(sketcher.coverage)
        summary.resumed = len(store)
        left = None if total is None or participant else max(total - len(store), 0)
        participant = participant or EveryChunk()
        done = frozenset(row.id for row in store.rows()) | participant.done
        # A store in memory is called memory-1, which says nothing to a reader: the prompts have a name.
        held = shortened(", ".join(job.names), 40)
        name = held if isinstance(store, MemoryStore) else Path(store.path).name
        with Interrupt() as interrupt, bar_of(left, name, progress) as bar:
            if layout.note:
                bar.write(layout.note)
            chunks = make_chunks(
                _checked(groups, job, behaviour.source),
                layout,
                budget=tokens_at_once(policy, job.tokens_per_batch),
                tokens=participant.tokens,
            )
            passes = Passes(
                sketcher, job, behaviour.model, summary, layout, participant, others,
                keeps=str(store.path), say=bar.write,
            )  # fmt: skip

            with Behind(store) as behind:
                filling = _Filling(behind, passes, summary, bar, interrupt, participant, done)
                for chunk in participant.take(chunks):
                    filling.compute(chunk, chunk.built(job.estimator, behaviour.source == "file", done))
                    if summary.interrupted:
                        break
                    if participant.writes:
                        behind.wait()
                participant.leave(summary.interrupted, passes.idle)
        if not summary.interrupted:
            participant.finish(store)
    summary.peak_gib = peak_memory_gib(policy.device)
    return summary


@dataclass
class _Filling:
    """Computes chunks and adds their rows to the store, until the user asks to stop.

    Attributes:
        done: prompts whose rows are there already.
        flushed: when the store was last flushed.
    """

    store: Behind
    passes: Passes
    summary: Summary
    bar: Any
    interrupt: Interrupt
    participant: Participant
    done: frozenset[str]
    flushed: float = field(default_factory=time.monotonic)

    def compute(self, chunk: Chunk, batches: Iterable[MicroBatch]) -> None:
        """Compute a chunk. If the user asks to stop, it ends early, and ``summary.interrupted`` is set."""
        # Prompts of a batch are counted at once: a rate by the first of them was several times too low.
        self.bar.update(sum(map(self._add, chunk.rows)))
        for batch in batches:
            added = sum(self._add(row, vector, chunk) for row, vector in self.passes.run(batch))
            if self.summary.wall:  # no pass has been looked at before the second was launched
                self.bar.set_postfix_str(
                    f"{self.summary.model_tokens / self.summary.wall:.0f} tokens/s", refresh=False
                )
            self.bar.update(added)
            if time.monotonic() - self.flushed > FLUSH_SECONDS:
                self.store.flush()
                self.flushed = time.monotonic()
            if self.participant.agreed(self.interrupt.asked):
                self.summary.interrupted = True
                break
        self.bar.update(sum(self._add(row, vector, chunk) for row, vector in self.passes.end()))
        if not self.summary.interrupted:
            self.summary.interrupted = self.participant.agreed(self.interrupt.asked)

    def _add(self, row: RowInfo, vector: torch.Tensor | None = None, chunk: Chunk | None = None) -> bool:
        """Add a row that is not there yet; of the prompts in a batch those of its chunk, the others only fill it."""
        if row.id in self.done or (chunk is not None and row.id not in chunk.prompts):
            return False
        self.summary.count(row)
        self.store.add(row, vector)
        return True


def _sketcher(
    policy: Policy,
    manifest: Mapping[str, Any],
    job: SketchJob,
    moments: SecondMoments | None,
    others: Others | None,
) -> GradientSketcher | FormedSketcher:
    """The sketcher of a policy's gradients, as a store's manifest says.

    With ``moments`` it forms the gradients, because they are divided before they are sketched; of the same parameters.
    """
    spec, apart, exclude = SketchSpec.from_dict(manifest["spec"]), groups_in(manifest), tuple(job.exclude)
    more = () if others is None else tuple(others.specs)
    taps = policy.sketcher(spec, exclude, verify=job.verify, more=more, groups=apart, fused=job.fused)
    if moments is None:
        return taps
    if more:
        raise CropiError(
            "others are not sketched with moments, under which gradients are formed: leave one out"
        )
    with taps:
        taps.check_model()
    names = taps.coverage.names
    return FormedSketcher(policy.model, spec, exclude, change=moments.scaled, only=set(names), groups=apart)


def _checked(
    groups: Iterable[TokenGroup | RowInfo], job: SketchJob, source: str
) -> Iterator[TokenGroup | RowInfo]:
    """The prompts with a gradient, and rows in place of the others."""
    estimator, subset = job.estimator, job.subset
    for group in groups:
        if isinstance(group, RowInfo):
            yield group
            continue
        if not isinstance(group, TokenGroup):
            raise CropiError(
                f"groups holds {article(type(group).__name__)}: give TokenGroups (see cropi.gradient.tokenize.Tokenize)"
            )
        if reason := no_sketch_reason(group, estimator, source, zero_check=job.zeros, noise=job.noise):
            yield row_of(group.group, SKIPPED, reason, job.set)
        else:
            yield subset.of(group, estimator)
