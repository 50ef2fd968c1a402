"""Tokenised prompts to rows of a store: the loop that every sketching run ends in. No files are read here."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cropi.data.rewards import no_gradient_reason
from cropi.errors import CropiError, optional
from cropi.gradient.batches import make_batches
from cropi.gradient.behaviour import Behaviour
from cropi.gradient.estimators import ESTIMATORS, Estimator
from cropi.gradient.layout import layout_of
from cropi.gradient.tokenize import TokenGroup
from cropi.gradient.zero import cancels
from cropi.model.moments import SecondMoments
from cropi.model.policy import Policy
from cropi.sketching.interrupt import Interrupt
from cropi.sketching.passes import ZERO_GRADIENT, Passes
from cropi.sketching.rows import row_of
from cropi.sketching.summary import Summary, peak_memory_gib
from cropi.store.shards import SKIPPED, RowInfo
from cropi.store.store import SketchStore
from cropi_kernels import SketchSpec
from cropi_kernels.sketcher.formed import FormedSketcher

FLUSH_SECONDS = 60.0


def sketch_groups(
    policy: Policy,
    groups: Iterable[TokenGroup | RowInfo],
    store: SketchStore,
    estimator: Estimator = ESTIMATORS["cropi"],
    *,
    behaviour: Behaviour | str = "file",
    exclude: Iterable[str] = (),
    layout: str = "auto",
    tokens_per_batch: int = 1024,
    verify: bool = True,
    moments: SecondMoments | None = None,
    default_set: str | None = None,
    total: int | None = None,
    progress: bool = False,
    summary: Summary | None = None,
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
        store: where rows go. Its manifest names the sketch (``spec``); it is marked as finished at the end.
        estimator: the weight of every token.
        behaviour: where the log-probs of the policy that made the rollouts come from: "file" (each group's own),
            "current" (the policy itself: ratio 1), or a :class:`Behaviour`, which may hold a model.
        exclude: patterns of parameter names to leave out.
        layout, tokens_per_batch, verify: see :class:`cropi.sketching.job.SketchJob`.
        moments: of an optimiser: gradients are formed by autograd and divided by their roots before they are sketched.
        default_set: validation set of prompts that carry none.
        total: how many prompts there are, for the progress bar.
        progress: show one.
        summary: counts are added to this one; None: to a new one.

    Raises:
        CropiError: a group of another type, a behaviour that the groups do not carry, or a layout that the model cannot
            take.
        UncoveredParameterError: a trainable parameter cannot be sketched.
    """
    source = behaviour if isinstance(behaviour, Behaviour) else Behaviour(behaviour)
    summary = summary or Summary(Path(store.path))
    plan = layout_of(policy, layout)
    if source.model is not None:
        plan = plan.beside(source.model.lengths)
    spec = SketchSpec.from_dict(store.manifest["spec"])
    with _sketcher(policy, spec, tuple(exclude), verify, moments) as sketcher:
        sketcher.check_model()
        summary.coverage = str(sketcher.coverage)
        summary.resumed = len(store)
        done = frozenset(row.id for row in store.rows())
        left = None if total is None else max(total - len(store), 0)
        with Interrupt() as interrupt, _bar(left, Path(store.path).name, progress) as bar:
            if plan.note:
                bar.write(plan.note)
            batches = make_batches(
                _to_compute(groups, store, done, summary, bar, estimator, source.source, default_set),
                estimator,
                plan,
                budget=tokens_per_batch,
                stored_behaviour=source.source == "file",
                done=done,
            )
            passes = Passes(
                sketcher,
                estimator,
                source.model,
                default_set,
                summary,
                str(store.path),
                bar.write,
                plan.lengths,
            )
            flushed = time.monotonic()
            for batch in batches:
                for row, vector in passes.run(batch):
                    if row.id in done:  # it only fills its batch, as it did when it was computed
                        continue
                    summary.count(row)
                    store.add(row, vector)
                    bar.update(1)
                bar.set_postfix_str(f"{summary.model_tokens / summary.wall:.0f} tokens/s", refresh=False)
                if time.monotonic() - flushed > FLUSH_SECONDS:
                    store.flush()
                    flushed = time.monotonic()
                if interrupt.asked:
                    summary.interrupted = True
                    break
        if not summary.interrupted:
            store.finish()
    summary.peak_gib = peak_memory_gib(policy.device)
    return summary


def _sketcher(
    policy: Policy, spec: SketchSpec, exclude: tuple[str, ...], verify: bool, moments: SecondMoments | None
) -> Any:
    """The taps, or where gradients are scaled before they are sketched, what forms them; of the same parameters."""
    taps = policy.sketcher(spec, exclude, verify=verify)
    if moments is None:
        return taps
    with taps:
        taps.check_model()
    names = taps.coverage.names
    return FormedSketcher(policy.model, spec, exclude, change=moments.scaled, only=set(names))


def _to_compute(
    groups: Iterable[TokenGroup | RowInfo],
    store: SketchStore,
    done: frozenset[str],
    summary: Summary,
    bar: Any,
    estimator: Estimator,
    source: str,
    default_set: str | None,
) -> Iterator[TokenGroup]:
    """The prompts with a gradient, those that are done among them; the others go into the store right here."""
    for group in groups:
        if isinstance(group, RowInfo):
            row = group
        elif isinstance(group, TokenGroup):
            reason = no_gradient_reason(group.group.rewards)
            if not reason:
                if source == "file" and estimator.ratio and group.logprobs is None:
                    raise CropiError(
                        f"prompt {group.id!r} has no log-probs of the policy that made its responses, and behaviour is "
                        "'file'; give them, or behaviour='current' (ratio 1)"
                    )
                if not cancels(group, estimator, source):
                    yield group
                    continue
                reason = ZERO_GRADIENT
            row = row_of(group.group, SKIPPED, reason, default_set)
        else:
            raise CropiError(
                f"groups holds a {type(group).__name__}: give TokenGroups (see cropi.gradient.tokenize.Tokenize)"
            )
        if row.id in done:
            continue
        summary.count(row)
        store.add(row)
        bar.update(1)


def _bar(total: int | None, name: str, progress: bool) -> Any:
    bar = optional("tqdm.auto").tqdm
    return bar(total=total, desc=name, unit="prompt", disable=not progress, smoothing=0.1)
