"""``--dry-run``: everything is checked, a few prompts are sketched in memory, and what the whole would take is said."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from cropi.amounts import counted, duration, size

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from cropi.data.readers import PromptGroups
    from cropi.data.records import PromptGroup
    from cropi.gradient.kept import KeptTokens
    from cropi.gradient.tokenize import Tokenize
    from cropi.model.policy import Policy
    from cropi.sketching.job import SketchJob

    Planned = tuple[str, PromptGroups, SketchJob, str | Path | None]  # name, prompts, job and store of a part

# Prompts that are tried for a rate: so many at least, and until two batches are full (six prompts of a few tokens said
# a quarter of the rate of a job of full batches), but not more than seconds take.
TRIED, MOST = 6, 64


@dataclass
class Cost:
    """What sketching some prompts takes: prompts with a gradient, their tokens, seconds on this machine, bytes."""

    prompts: int = 0
    stored: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bytes: int = 0

    def line(self, name: str) -> str:
        """In words."""
        before = f" ({self.stored} more are stored already)" if self.stored else ""
        return (
            f"{name:<13} {counted(self.prompts, 'prompt')}{before}, {self.tokens:,} tokens, about "
            f"{duration(self.seconds)} on this machine, {size(self.bytes)} of sketches"
        )


def costs(policy: Policy, parts: Sequence[Planned]) -> dict[str, Cost]:
    """What each part takes, by its name.

    Args:
        policy: its weights are loaded.
        parts: what is sketched.
    """
    from cropi.data.scan import LossyTokens, Scan, warn_lossy
    from cropi.model.placing import tokens_at_once
    from cropi.progress import bar_of
    from cropi.sketching.interrupt import Interrupted
    from cropi.sketching.job import make_tokenize
    from cropi.sketching.run import sketch
    from cropi.store.codec import row_bytes

    by_part: dict[str, Cost] = {}
    rate = 0.0
    for name, groups, job, out in parts:
        tokens = make_tokenize(policy, job)
        scan = groups.scan if isinstance(groups.scan, Scan) else None
        if scan is not None:
            warn_lossy(scan, groups.names, job.eos)
        stored = _stored(out, groups, job)
        cost = by_part[name] = Cost(stored=len(stored))
        few: list[PromptGroup] = []
        sizes: list[int] = []
        full = 2 * tokens_at_once(policy, job.tokens_per_batch)
        kept = None if scan is None else scan.texts_kept
        # Of many texts that are not kept this takes minutes, as reading does.
        with bar_of(None, f"counting {name}", policy.progress, leave=False, delay=2.0) as bar:
            for group, length in _sizes(islice(groups.each(), job.limit), tokens, kept, job.skip_bad):
                bar.update(1)
                if group.id in stored:
                    continue
                cost.prompts += 1
                cost.tokens += length
                if len(few) < TRIED or (sum(sizes) < full and len(few) < MOST):
                    few.append(group)
                    sizes.append(length)
        if few and not rate:
            tried = replace(
                job, trajectories=few, out=None, limit=None, shard=None, columns=None, behaviour_check="off"
            )
            with warnings.catch_warnings():  # of the few: their files have been named
                warnings.simplefilter("ignore", LossyTokens)
                summary = sketch(policy, tried, progress=False)
            if summary.interrupted:
                raise Interrupted(None, summary)
            rate = sum(sizes) / max(summary.wall, 1e-9)
        cost.seconds = cost.tokens / rate if rate else 0.0
        cost.bytes = cost.prompts * row_bytes(job.store_dtype, job.row_size)
    return by_part


def _sizes(
    groups: Iterable[PromptGroup], tokens: Tokenize, kept: KeptTokens | None, skip_bad: bool
) -> Iterator[tuple[PromptGroup, int]]:
    """Prompts with a gradient, and how many tokens they and their responses have."""
    from cropi.errors import RecordError
    from cropi.gradient.tokenize import TooLong

    for group in groups:
        if group.no_gradient is not None:
            continue
        prompt, responses = group.lengths
        if prompt is None or responses is None:
            try:
                # The pass that checked the texts has tokenised them.
                made = None if kept is None else kept.get(group, tokens)
                made = tokens(group) if made is None else made
            except TooLong:
                continue
            except RecordError:
                if skip_bad:
                    continue
                raise
            prompt, responses = len(made.prompt), list(map(len, made.responses))
        yield group, prompt + sum(responses)


def _stored(out: str | Path | None, groups: PromptGroups, job: SketchJob) -> set[str]:
    """The ids of the prompts that a store holds; none where there is no store.

    Raises:
        CropiError: the run would refuse the store: it was made of other files, or by another sketch, stage or dtype.
    """
    from pathlib import Path

    from cropi.data.scan import Scan
    from cropi.files import is_file
    from cropi.store.differences import check_same_job
    from cropi.store.manifest import MANIFEST, read_manifest
    from cropi.store.store import SketchStore

    if out is None or not is_file(Path(out) / MANIFEST):
        return set()
    wanted = {"spec": job.spec.to_dict(), "stage": job.stage, "dtype": job.store_dtype}
    if isinstance(groups.scan, Scan):
        wanted["trajectories"] = groups.scan.fingerprint
    made = read_manifest(Path(out))
    check_same_job(Path(out), {name: made.get(name) for name in wanted}, wanted)
    return {row.id for row in SketchStore.open(out).rows()}


def show(args: argparse.Namespace, policy: Policy, parts: Sequence[Planned]) -> int:
    """Print what each part would take, and all of them together; the exit status."""
    from cropi.cli.manners import tell

    costs_of_parts = costs(policy, parts)
    for name, cost in costs_of_parts.items():
        print(cost.line(name))
    if len(costs_of_parts) > 1:
        whole = Cost(
            *(
                sum(getattr(cost, key) for cost in costs_of_parts.values())
                for key in Cost.__dataclass_fields__
            )
        )
        print(whole.line("together"))
    print("nothing was written (--dry-run)")
    tell(args, dry_run={name: vars(cost) for name, cost in costs_of_parts.items()})
    return 0
