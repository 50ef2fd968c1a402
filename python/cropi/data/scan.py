"""A first pass over trajectory files: every mistake in them is reported before any compute is spent."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cropi.data.pieces import Pieces
from cropi.data.readers import read
from cropi.data.records import PromptGroup
from cropi.data.rewards import IDS_OF_RESPONSES, ONE_RESPONSE
from cropi.errors import CropiError, RecordError, warn


class LossyTokens(UserWarning):
    """Responses have to be tokenised again from text."""


@dataclass
class Scan:
    """What the files hold. ``fingerprint`` is the SHA-256 of their uncompressed lines, file by file in
    order."""

    prompts: int = 0
    responses: int = 0
    without_gradient: Counter[str] = field(default_factory=Counter)
    # Prompts by set, then by reason; "" for none.
    by_set: dict[str, Counter[str]] = field(default_factory=dict)
    # Prompts, and those that have a gradient, by task and by file; "" for none.
    by_task: dict[str, list[int]] = field(default_factory=dict)
    by_file: dict[str, list[int]] = field(default_factory=dict)
    demonstrations: int = 0  # prompts of records without rewards
    with_ids: int = 0
    with_prompt_ids: int = 0
    without_ends: int = 0  # responses are text, and which of them a limit cut is not said
    with_logprobs: int = 0
    without_logprobs: str = ""  # where the first record without log-probs stands
    largest_id: tuple[int, str] = (-1, "")  # the largest token id and where it stands
    bad: list[RecordError] = field(default_factory=list)
    fingerprint: str = ""
    unknown: int = 0  # prompts that were left out because their trainer does not know them
    # Of the prompts that have a gradient: the most tokens of a prompt and one response, where their ids are stored, and
    # how many have to be tokenised.
    longest: int = 0
    texts: int = 0
    # The policy and options for which all prompts were tokenised, and fit (:func:`cropi.sketching.run.check_tokens`).
    texts_checked: Any = None
    # What they were tokenised to; a :class:`cropi.gradient.kept.KeptTokens`.
    texts_kept: Any = field(default=None, repr=False, compare=False)
    tokens_checked: Any = None
    # The hash of every prompt (:func:`prompt_hash`).
    contents: array[int] = field(default_factory=lambda: array("q"), repr=False, compare=False)
    # The lines of the files, for the passes that follow.
    pieces: Pieces | None = field(default=None, repr=False, compare=False)

    @property
    def usable(self) -> int:
        """Prompts that have a gradient."""
        return self.prompts - sum(self.without_gradient.values())

    @property
    def sets(self) -> dict[str, int]:
        """Prompts of every set that records name."""
        return {name: counts.total() for name, counts in self.by_set.items() if name}

    def add(self, group: PromptGroup) -> None:
        """Count one group."""
        self.prompts += 1
        self.responses += group.size
        self.contents.append(prompt_hash(group))
        reason = group.no_gradient
        if reason:
            self.without_gradient[reason] += 1
        self.by_set.setdefault(group.set or "", Counter())[reason or ""] += 1
        for counts, name in ((self.by_task, group.task), (self.by_file, group.file)):
            count = counts.setdefault(name or "", [0, 0])
            count[0] += 1
            count[1] += not reason
        prompt, sizes = group.lengths
        self.demonstrations += group.demonstrations
        self.with_ids += sizes is not None
        self.with_prompt_ids += prompt is not None
        self.without_ends += sizes is None and group.truncated is None
        if group.has_logprobs:
            self.with_logprobs += 1
        elif not self.without_logprobs:
            self.without_logprobs = f"{group.where} (prompt {group.id!r})"
        if not reason and prompt is not None and sizes is not None:
            self.longest = max(self.longest, prompt + max(sizes))
        elif not reason:
            self.texts += 1
        if (largest := group.largest) > self.largest_id[0]:
            self.largest_id = largest, f"{group.where} (prompt {group.id!r})"


def prompt_hash(group: PromptGroup) -> int:
    """A hash of what a prompt says, which is its own in this process; see :mod:`cropi.data.twice`."""
    made = _hash_of_text(group)
    return hash((made, repr(group.response_ids or group.responses))) if group.demonstrations else made


def _hash_of_text(group: PromptGroup) -> int:
    if group.prompt_ids is not None:
        return hash(tuple(group.prompt_ids))
    prompt = group.prompt
    if isinstance(prompt, list):
        turns = tuple((message["role"], str(message.get("content"))) for message in prompt)
        if len(turns) > 1 or turns[0][0] != "user":
            return hash(turns)
        prompt = turns[0][1]
    return hash(str(prompt).strip())


class NothingToSelect(CropiError):
    """No training prompt has a gradient. Messages begin with ``before`` and end with ``otherwise``."""

    def __init__(self, prompts: int, reasons: Counter[str], *, before: str, otherwise: str = "") -> None:
        super().__init__(
            f"{before}there is nothing to select: none of the {prompts} training prompts has a gradient "
            f"({listed(reasons)}). Prompts teach only where some responses fail and some succeed: take more responses "
            "per prompt, easier or harder prompts, or a higher temperature, and check the reward function"
            + otherwise
        )


class NothingScored(NothingToSelect):
    """No reward function gave any response a finite number."""


def scan(
    source: Any,
    *,
    skip_bad: bool = False,
    on_group: Callable[[PromptGroup], None] | None = None,
) -> Scan:
    """Read every record once and count; groups that :func:`cropi.data.readers.read` gave are scanned once.

    ``on_group`` is called with every group, where the source is read.

    Raises what :meth:`cropi.data.readers.PromptGroups.each` raises.
    """
    groups = read(source, skip_bad=skip_bad)
    if isinstance(groups.scan, Scan) and on_group is None:
        return groups.scan
    counts, pieces = Scan(), Pieces()
    for group in groups.each(counts.bad.append, pieces.add):
        counts.add(group)
        if on_group is not None:
            on_group(group)
    if not counts.prompts:
        raise CropiError(
            f"{groups.names}: no usable record is left ({len(counts.bad)} bad ones skipped); the first: "
            f"{counts.bad[0].of_left_out}"
        )
    counts.fingerprint, counts.pieces = pieces.fingerprint(), pieces
    groups.scan = counts
    return counts


def warn_lossy(counts: Scan, name: str, eos: bool = True) -> None:
    """Say once that records without token ids will be tokenised again from their text, and of how many it is not known
    which responses were cut; ``name``: what holds them; ``eos``: whether these get an end token."""
    lossy = counts.prompts - counts.with_ids
    if not lossy or counts.demonstrations == counts.prompts:  # which nobody sampled
        return
    ends = ""
    if eos and counts.without_ends:
        ends = (
            f"; {counts.without_ends} of them do not say which responses a limit cut, and each is taken for whole "
            "and gets an end token: add 'truncated', or give --no-eos"
        )
    warn(
        f"{name}: {lossy} of {counts.prompts} records have no response_ids: their responses are tokenised again "
        f"from text, which may give other tokens than were sampled; store token ids to be exact{ends}",
        LossyTokens,
    )


def by_set(scans: Mapping[str, Scan]) -> dict[str, Counter[str]]:
    """Prompts of every validation set, by why they have no gradient ("" for those that have one).

    ``scans`` as for :func:`check_covered`.
    """
    counts: dict[str, Counter[str]] = {}
    for default, part in scans.items():
        for name, reasons in part.by_set.items():
            counts.setdefault(name or default, Counter()).update(reasons)
    return counts


def check_covered(
    scans: Mapping[str, Scan], wanted: Sequence[str], *, option: str, before: str = ""
) -> dict[str, int]:
    """How many trajectories with a gradient every validation set has, by its name.

    Args:
        scans: of the validation files, by the name of the set that their records without one belong to.
        wanted: sets that have to be there; those that are there are checked in any case.
        option: what names the wanted ones, for messages.
        before: what messages begin with.

    Raises:
        CropiError: a wanted set has no trajectory, or one has only prompts without a gradient.
    """
    counts = by_set(scans)
    for name in wanted:
        if name not in counts:
            raise CropiError(
                f"{before}{option}: no trajectory covers the validation set {name!r}; there are trajectories of "
                f'{", ".join(map(repr, sorted(counts)))}; add records with "set": "{name}", or take it out of {option}'
            )
    usable = {name: counts[name].pop("", 0) for name in sorted(counts)}
    for name, reasons in sorted(counts.items()):
        if not usable[name]:
            raise CropiError(
                f"{before}no trajectory covers the validation set {name!r} usefully: none of its {reasons.total()} "
                f"prompts has a gradient ({listed(reasons)}); give it prompts that are solved sometimes, or more "
                "responses per prompt, or leave the set out"
            )
    return usable


def check_pool(pool: Scan, names: str, *, known: bool = False, before: str = "", otherwise: str = "") -> None:
    """Check that there is something to select.

    Args:
        pool: what the prompts that may be chosen are.
        names: of the trajectories.
        known: whether they are those of a trainer's dataset.
        before, otherwise: what messages begin and end with.

    Raises:
        NothingToSelect: no prompt has a gradient.
        CropiError: no trajectory belongs to a prompt of the dataset.
    """
    if known and not pool.prompts:
        raise CropiError(
            f"{before}none of the trajectories in {names} belongs to a prompt of the dataset; their ids must be those "
            "of its id column"
        )
    if not pool.usable:
        start = before or f"{names}: "
        raise NothingToSelect(pool.prompts, pool.without_gradient, before=start, otherwise=otherwise)


def listed(reasons: Counter[str]) -> str:
    """Why prompts have no gradient, in words."""
    made = ", ".join(f"{count} with {reason}" for reason, count in sorted(reasons.items()))
    return f"{made}; {IDS_OF_RESPONSES}" if set(reasons) == {ONE_RESPONSE} else made
