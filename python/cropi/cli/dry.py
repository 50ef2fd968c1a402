"""``--dry-run``: everything is checked, a few prompts are sketched in memory, and what the whole would take is said."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from cropi.amounts import duration, size

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from cropi.data.readers import PromptGroups
    from cropi.data.records import PromptGroup
    from cropi.gradient.tokenize import Tokenize
    from cropi.model.policy import Policy
    from cropi.sketching.job import SketchJob

    Planned = tuple[str, PromptGroups, SketchJob, str | Path | None]  # name, prompts, job and store of a part

# Enough for a rate, few enough for seconds.
TRIED = 6


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
            f"{name:<13} {self.prompts} prompts{before}, {self.tokens:,} tokens, about {duration(self.seconds)} on "
            f"this machine, {size(self.bytes)} of sketches"
        )


def costs(policy: Policy, parts: Sequence[Planned]) -> dict[str, Cost]:
    """What each part takes, by its name.

    Args:
        policy: its weights are loaded.
        parts: what is sketched.
    """
    from cropi.sketching.interrupt import Interrupted
    from cropi.sketching.job import make_tokenize
    from cropi.sketching.run import sketch
    from cropi.store.codec import row_bytes

    by_part: dict[str, Cost] = {}
    rate = 0.0
    for name, groups, job, out in parts:
        tokens = make_tokenize(policy, job)
        stored = _stored(out)
        cost = by_part[name] = Cost(stored=len(stored))
        few: list[PromptGroup] = []
        sizes: list[int] = []
        for group, length in _sizes(islice(groups.each(), job.limit), tokens, job.skip_bad):
            if group.id in stored:
                continue
            cost.prompts += 1
            cost.tokens += length
            if len(few) < TRIED:
                few.append(group)
                sizes.append(length)
        if few and not rate:
            tried = replace(
                job, trajectories=few, out=None, limit=None, shard=None, columns=None, behaviour_check="off"
            )
            summary = sketch(policy, tried, progress=False)
            if summary.interrupted:
                raise Interrupted(None, summary)
            rate = sum(sizes) / max(summary.wall, 1e-9)
        cost.seconds = cost.tokens / rate if rate else 0.0
        cost.bytes = cost.prompts * row_bytes(job.store_dtype, job.row_size)
    return by_part


def _sizes(
    groups: Iterable[PromptGroup], tokens: Tokenize, skip_bad: bool
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
                made = tokens(group)
            except TooLong:
                continue
            except RecordError:
                if skip_bad:
                    continue
                raise
            prompt, responses = len(made.prompt), list(map(len, made.responses))
        yield group, prompt + sum(responses)


def _stored(out: str | Path | None) -> set[str]:
    """The ids of the prompts that a store holds; none where there is no store."""
    from pathlib import Path

    from cropi.files import is_file
    from cropi.store.manifest import MANIFEST
    from cropi.store.store import SketchStore

    if out is None or not is_file(Path(out) / MANIFEST):
        return set()
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
