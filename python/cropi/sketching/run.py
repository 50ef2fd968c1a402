"""The job: trajectories in, a store of per-prompt gradient sketches out."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from cropi.data.pieces import Again
from cropi.data.readers import PromptGroups
from cropi.data.records import PromptGroup
from cropi.data.scan import Scan, warn_lossy
from cropi.data.scan import scan as scan_trajectories
from cropi.data.sources import PathSource
from cropi.errors import CropiError, RecordError, article, warn
from cropi.files import check_room, is_file
from cropi.form import check_noted
from cropi.gradient.behaviour import Behaviour, resolve_behaviour
from cropi.gradient.behaviour_check import check_behaviour
from cropi.gradient.kept import KeptTokens
from cropi.gradient.layout import layout_of
from cropi.gradient.tokenize import TokenGroup, Tokenize, TooLong
from cropi.model.moments import SecondMoments, read_moments
from cropi.model.placing import tokens_at_once
from cropi.model.policy import Policy, check_dropout
from cropi.progress import bar_of
from cropi.sketching.chunks import BATCHES, Dealt, Participant
from cropi.sketching.groups import sketch_groups
from cropi.sketching.job import SketchJob, make_tokenize, with_date
from cropi.sketching.job_store import manifest_of, open_store
from cropi.sketching.rows import row_of
from cropi.sketching.summary import Summary
from cropi.store.codec import row_bytes
from cropi.store.manifest import MANIFEST
from cropi.store.rows import FAILED, SKIPPED, RowInfo
from cropi.store.store import SketchStore

# Without it nothing was said for 15 s (SmolLM2 on two cores), while layouts, log-probs and taps were checked.
TRIED = "trying out    the model on a few tokens, before the first prompt"


def sketch(
    policy: Policy, job: SketchJob, *rest: Any, scan: Scan | None = None, progress: bool = True
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
            checked before the first prompt is computed. So are stored log-probs, on a few prompts: see
            :func:`cropi.gradient.behaviour_check.check_behaviour`.
    """
    policy, job = _arguments(policy, job, rest)
    ready = prepare(policy, job, scan, progress)
    with ready.open() as store:
        ready.fill(store, progress=progress)
    ready.summary.store = store
    return ready.summary


@dataclass
class Prepared:
    """A job whose input has been checked, so that only computing is left.

    Attributes:
        policy: with its weights.
        job: the options; the date of the chat template and the tokens a batch are filled in.
        groups: the trajectories.
        scan: what they hold.
        tokens: how they become token ids.
        behaviour: where the log-probs of the policy that made them come from.
        summary: what is counted.
        moments: what the gradients are scaled by.
    """

    policy: Policy
    job: SketchJob
    groups: PromptGroups
    scan: Scan
    tokens: Tokenize
    behaviour: Behaviour
    summary: Summary
    moments: SecondMoments | None = None

    def open(self) -> SketchStore:
        """The job's store: see :func:`cropi.sketching.job_store.open_store`."""
        return open_store(self.job, self.manifest)

    @functools.cached_property
    def manifest(self) -> Callable[[], dict[str, Any]]:
        """What its rows depend on: see :func:`cropi.sketching.job_store.manifest_of`, which runs the model."""
        return manifest_of(self.policy, self.job, self.behaviour, self.scan, self.moments)

    @property
    def tokens_per_batch(self) -> int:
        """Tokens that go through the model at once."""
        return tokens_at_once(self.policy, self.job.tokens_per_batch)

    @property
    def total(self) -> int:
        """Prompts of the job."""
        return min(self.scan.prompts, self.job.limit or self.scan.prompts)

    def fill(
        self, store: SketchStore, *, progress: bool = True, participant: Participant | None = None
    ) -> None:
        """Sketch the prompts that the store lacks; of a job that several processes share, those of ``participant``."""
        job = self.job
        if job.shard is not None:
            participant = Dealt(*job.shard, BATCHES * self.tokens_per_batch)
        sketch_groups(
            self.policy,
            _token_groups(job, self.groups, self.tokens, store, self.summary, self.scan),
            store,
            job,
            self.behaviour,
            moments=self.moments,
            total=self.total,
            progress=progress,
            summary=self.summary,
            participant=participant,
        )


def prepare(policy: Policy, job: SketchJob, scan: Scan | None = None, progress: bool = True) -> Prepared:
    """Load the policy, and find what is wrong with a job before the first prompt is computed. See :func:`sketch`."""
    if policy.loaded:
        check_dropout(policy.model, "model")
    for name in job.names if job.out is not None else ():
        check_noted(name)
    groups = job.read()
    if scan is None:
        scan = scan_groups(policy, job, groups)
    check_tokens(policy, job, groups, scan)
    _check_space(job, scan)
    if not job.noise:  # whose gradients it was said of
        warn_lossy(scan, groups.names, job.eos)
    check_dropout(policy.model, "model")
    if progress:
        policy.once("said", lambda: print(TRIED, file=sys.stderr, flush=True))
    if job.shard is not None and job.tokens_per_batch is None and policy.plan[0].type != "cpu":
        raise CropiError(
            f"shard {job.shard[0]}/{job.shard[1]} on {policy.plan[0]}: give tokens_per_batch, the same for every share "
            "(--tokens-per-batch); left to the free memory of each GPU, shares would hold some prompts twice"
        )
    budget = tokens_at_once(policy, job.tokens_per_batch)
    behaviour = resolve_behaviour(job.behaviour, scan, job.estimator, job.behaviour_model, policy=policy)
    job = replace(with_date(policy, job, scan), tokens_per_batch=budget)
    tokens = make_tokenize(policy, job)
    layout = layout_of(policy, job.layout)  # one that the model cannot take shows before a store is made
    summary = Summary(Path(job.out or "memory"), bad_records=[error.of_left_out for error in scan.bad])
    summary.behaviour = behaviour.source if job.estimator.ratio else ""
    if behaviour.source == "file" and job.estimator.ratio and job.behaviour_check != "off":
        summary.finding = check_behaviour(
            policy,
            _few_groups(groups, tokens),
            job.estimator,
            layout=layout,
            budget=budget,
            level=job.behaviour_check,
        )
        if progress and summary.finding is not None:
            print(f"behaviour     {summary.finding}", file=sys.stderr)
    moments = None if job.optimizer_state is None else read_moments(job.optimizer_state, policy.model)
    return Prepared(policy, job, groups, scan, tokens, behaviour, summary, moments)


def _check_space(job: SketchJob, scan: Scan) -> None:
    """Check that the disk has room for a new store, where it is known how many rows that has at least.

    Raises:
        CropiError: names the folder, what is needed and what is free.
    """
    part = job.limit is not None or job.shard is not None or job.skip_bad or job.too_long != "error"
    if job.out is None or part or is_file(Path(job.out) / MANIFEST):
        return
    # With layer groups a row is longer; how many there are is known with the model.
    needed = scan.usable * row_bytes(job.store_dtype, job.spec.dim)
    check_room(Path(job.out), needed, f"the sketches of {scan.usable} prompts")


def _few_groups(groups: PromptGroups, tokens: Tokenize) -> Iterator[TokenGroup]:
    """Prompts with a gradient and log-probs, tokenised. Bad ones are left out here, and reported later."""
    for group in groups:
        if group.no_gradient is None and group.logprobs is not None:
            with suppress(RecordError):
                yield tokens(group)


def scan_groups(
    policy: Policy,
    job: SketchJob,
    groups: PromptGroups | None = None,
    *,
    on_group: Callable[[PromptGroup], bool] | None = None,
) -> Scan:
    """The first pass over the trajectories of a job. Text is tokenised on the way, where a tokenizer is at hand.

    Args:
        policy: weights are not loaded for it.
        job: the options.
        groups: the trajectories; None: those of the job.
        on_group: called with every group; where it returns False, the group is not tokenised. It makes this pass read
            the trajectories, also where they have been scanned before.

    Raises:
        RecordError: a bad record, or one that does not fit the model.
    """
    groups = job.read(groups)
    tokens: Tokenize | None = None
    kept: list[KeptTokens] = []
    at_hand, count = policy.at_hand and not job.skip_bad, 0

    def take(group: PromptGroup) -> None:
        nonlocal tokens, at_hand, count
        count += 1
        bar.update(1)
        wanted = (on_group is None or on_group(group)) and (job.limit is None or count <= job.limit)
        exact = group.prompt_ids is not None and group.response_ids is not None
        if not (wanted and at_hand) or exact or group.no_gradient is not None:
            return
        if tokens is None:
            try:
                tokens = make_tokenize(policy, job)
            except (ValueError, OSError, ImportError):
                # It comes again when the model is loaded; bad records go first.
                at_hand = False
                return
        try:
            made = tokens(group)
            if not kept:
                kept.append(KeptTokens(tokens))
            kept[0].put(made)
        except TooLong:
            pass
        except RecordError:  # bad records go first; check_tokens finds this one again
            at_hand = False

    if on_group is None and isinstance(groups.scan, Scan):
        return groups.scan
    # Of millions of prompts this takes minutes.
    with bar_of(None, "reading", policy.progress, leave=False, delay=2.0) as bar:
        scan = scan_trajectories(groups, on_group=take)
    scan.texts_checked = _checked_for(policy, job) if at_hand else None
    scan.texts_kept = kept[0] if kept else None
    return scan


def check_tokens(policy: Policy, job: SketchJob, groups: PromptGroups, scan: Scan) -> None:
    """Check that every prompt with a gradient fits the model. Trajectories are read again only where the first pass
    could not tell.

    Args:
        policy: its tokenizer, vocabulary and context; weights are not loaded for it.
        job: the options. With ``skip_bad``, what does not fit becomes a row of the store, so nothing is checked.
        groups: the trajectories.
        scan: of the first pass over them.

    Raises:
        RecordError: a token id beyond the vocabulary, or a prompt that does not fit.
        CropiError: an option does not fit the model or the tokenizer.
    """
    if scan.tokens_checked == _checked_for(policy, job):
        return
    tokens = make_tokenize(policy, job)
    limit = job.max_length or policy.context
    if not job.skip_bad:
        if scan.largest_id[0] >= policy.vocabulary:
            raise RecordError(
                scan.largest_id[1],
                f"token id {scan.largest_id[0]} is beyond the model's vocabulary of {policy.vocabulary}",
                "use the model that made the trajectories, or pass --skip-bad",
            )
        if (scan.texts and scan.texts_checked != _checked_for(policy, job)) or (
            limit is not None and scan.longest > limit
        ):
            for group in islice(groups.each(), job.limit):
                if group.no_gradient is None:
                    with suppress(TooLong):
                        tokens(group)
    scan.tokens_checked = _checked_for(policy, job)


def _checked_for(policy: Policy, job: SketchJob) -> tuple[Any, ...]:
    """The policy and options that a check of tokens holds for: prompts may be scanned once for several policies."""
    template = job.chat_template, job.tools, job.chat_template_kwargs
    return policy.identity, template, job.eos, job.max_length, job.too_long, job.limit, job.skip_bad


def _token_groups(
    job: SketchJob,
    groups: PromptGroups,
    tokens: Tokenize,
    store: SketchStore,
    summary: Summary,
    scan: Scan,
) -> Iterator[TokenGroup | RowInfo]:
    """All prompts of the job: tokenised, or as rows where there is nothing to compute. A full store needs none.

    Those that the store holds come too: batches are cut from all of them (see :func:`sketch_groups`).
    """
    full = len(store) >= store.expected
    kept: KeptTokens | None = scan.texts_kept
    again = _again(groups, scan)
    for group in groups.each(on_line=None if again is None else again.check):
        if job.limit is not None and summary.read >= job.limit:
            return
        summary.read += 1
        if full and group.id in store:
            continue
        status, reason = SKIPPED, group.no_gradient
        if not reason:
            try:
                made = None if kept is None else kept.get(group, tokens)
                yield tokens(group) if made is None else made
                continue
            except TooLong:
                reason = "too long"
            except RecordError as error:
                if not job.skip_bad:
                    raise
                status, reason = FAILED, error.problem
        yield row_of(group, status, reason, job.set)
    if again is not None:
        again.finish()


def _again(groups: PromptGroups, scan: Scan) -> Again | None:
    """The comparison of this pass with the first one, line by line; None where lines are not read in order."""
    files = all(isinstance(one, PathSource) for one in groups.sources)
    if scan.pieces is None or not files or type(groups) is not PromptGroups:
        return None
    return scan.pieces.again(groups.names)


def _arguments(policy: Any, job: Any, rest: tuple[Any, ...]) -> tuple[Policy, SketchJob]:
    """The arguments as they are now; ``sketch(model, tokenizer, job)`` is taken for one more release."""
    if len(rest) == 1 and isinstance(rest[0], SketchJob):
        warn(
            "sketch(model, tokenizer, job) is now sketch(Policy(model, tokenizer), job); the old form goes with the "
            "next release",
            DeprecationWarning,
        )
        policy, job, rest = Policy(policy, job), rest[0], ()
    if not isinstance(policy, Policy):
        raise CropiError(f"policy is {article(type(policy).__name__)}: give cropi.Policy(model, tokenizer)")
    if not isinstance(job, SketchJob):
        raise CropiError(f"job is {article(type(job).__name__)}: give a cropi.sketching.job.SketchJob")
    if rest:
        raise TypeError(f"sketch() takes a policy, a job, scan= and progress=, got {[*rest]} too")
    return policy, job
