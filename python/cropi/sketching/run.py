"""The job: trajectories in, a store of per-prompt gradient sketches out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cropi.data.readers import read_trajectories
from cropi.data.rewards import no_gradient_reason, pass_rate
from cropi.data.scan import Scan, warn_lossy
from cropi.data.scan import scan as scan_trajectories
from cropi.errors import CropiError, RecordError
from cropi.gradient.behaviour import resolve_behaviour
from cropi.gradient.layout import layout_of
from cropi.gradient.tokenize import TokenGroup, Tokenize, TooLong
from cropi.model.policy import Policy, check_dropout
from cropi.sketching.groups import sketch_groups
from cropi.sketching.job import SketchJob, check_tokens, make_tokenize, open_store, with_date
from cropi.sketching.summary import Summary
from cropi.store.shards import FAILED, SKIPPED, RowInfo
from cropi.store.store import SketchStore


def sketch(
    policy: Policy, job: SketchJob, *rest: Any, scan: Scan | None = None, progress: bool = True, **old: Any
) -> Summary:
    """Sketch the policy gradient of every prompt that has one, into the store ``job.out``.

    A store that is there is continued: prompts that it holds are not computed again. Ctrl-C lets the current
    micro-batch finish, writes what is done and returns with ``interrupted`` set; a second one stops at once.

    Args:
        policy: the current policy, without active dropout (``model.eval()``; as a name loads it).
        job: the options.
        scan: what :func:`cropi.data.scan.scan` says of the files, if they have been checked already.
        progress: show a progress bar.

    Returns:
        Counts and times; ``store`` is the store, open for reading.

    Raises:
        CropiError: bad input or options, found as early as can be: files, token ids, settings and the store are
            checked before the first prompt is computed.
    """
    policy, job, scan = _arguments(policy, job, rest, scan, old)
    check_dropout(policy.model, "model")
    if scan is None:
        scan = scan_files(job)
    warn_lossy(scan)
    behaviour = resolve_behaviour(job.behaviour, scan, job.estimator, job.behaviour_model)
    job = with_date(policy, job, scan)
    tokens = make_tokenize(policy, job, scan)
    check_tokens(tokens, job, scan, progress)
    layout_of(policy, job.layout)  # a layout that the model cannot take shows before a store is made
    summary = Summary(Path(job.out or "memory"), bad_records=[str(error) for error in scan.bad])
    with open_store(policy, job, behaviour, scan) as store:
        sketch_groups(
            policy,
            _token_groups(job, tokens, store, summary),
            store,
            job.estimator,
            behaviour=behaviour,
            exclude=job.exclude,
            layout=job.layout,
            tokens_per_batch=job.tokens_per_batch,
            default_set=job.set,
            total=min(scan.prompts, job.limit or scan.prompts),
            progress=progress,
            summary=summary,
        )
    summary.store = store
    return summary


def scan_files(job: SketchJob) -> Scan:
    """The first pass over the files of a job."""
    return scan_trajectories(job.trajectories, skip_bad=job.skip_bad)


def _token_groups(
    job: SketchJob, tokens: Tokenize, store: SketchStore, summary: Summary
) -> Iterator[TokenGroup | RowInfo]:
    """All prompts of the job, tokenised, or as rows where there is nothing to compute; of a store that is full, none.

    Those that the store holds come too: batches are cut from all of them (see :func:`sketch_groups`).
    """
    full = len(store) >= store.expected
    for group in read_trajectories(job.trajectories, skip_bad=job.skip_bad):
        if job.limit is not None and summary.read >= job.limit:
            return
        summary.read += 1
        if full and group.id in store:
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
        yield RowInfo(group.id, status, reason, group.set or job.set, group.task, pass_rate(group.rewards))


def _arguments(
    policy: Any, job: Any, rest: tuple[Any, ...], scan: Scan | None, old: dict[str, Any]
) -> tuple[Policy, SketchJob, Scan | None]:
    """The arguments as they are now; ``sketch(model, tokenizer, job, found=...)`` is taken for one more release."""
    if len(rest) == 1 and isinstance(rest[0], SketchJob):
        warnings.warn(
            "sketch(model, tokenizer, job) is now sketch(Policy(model, tokenizer), job), and found= is scan=; the old "
            "form goes with the next release",
            DeprecationWarning,
            stacklevel=3,
        )
        policy, job, rest, scan = Policy(policy, job), rest[0], (), old.pop("found", scan)
    if not isinstance(policy, Policy):
        raise CropiError(f"policy is a {type(policy).__name__}: give cropi.Policy(model, tokenizer)")
    if not isinstance(job, SketchJob):
        raise CropiError(f"job is a {type(job).__name__}: give a cropi.sketching.job.SketchJob")
    if rest or old:
        raise TypeError(f"sketch() takes a policy, a job, scan= and progress=, got {[*rest, *old]} too")
    return policy, job, scan
