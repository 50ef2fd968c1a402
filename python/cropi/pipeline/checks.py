"""Trajectories are read and checked before any compute is spent: the parts that the pipeline then sketches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cropi.agreement import Alone, Ranks
from cropi.data.readers import PromptGroups
from cropi.data.records import PromptGroup
from cropi.data.scan import Scan, check_covered, check_pool
from cropi.data.share import Share
from cropi.data.twice import RepeatedPrompts, repeated_prompts, shared_prompts
from cropi.errors import CropiError, warn
from cropi.gradient.behaviour import behaviour_source
from cropi.model.policy import Policy
from cropi.options import Influence, Selecting, SelectionOptions
from cropi.pipeline.lost import asked_of
from cropi.ranking.contrast import names_without
from cropi.ranking.influence import SharedPrompts
from cropi.ranking.resampling import one_alone
from cropi.ranking.rule import fixed_groups
from cropi.ranking.selection import check_selecting
from cropi.ranking.values import check_rewards
from cropi.sketching.job import SketchJob, make_job
from cropi.sketching.run import check_tokens, scan_groups
from cropi.store.rows import DEFAULT_SET


@dataclass(frozen=True)
class Setup:
    """How prompts are chosen. The job's trajectories and store are filled in for every part.

    ``least`` prompts are chosen, where there are so many usable ones and the fraction would choose fewer. ``later``:
    prompts were chosen before, so that a validation set without a usable gradient is left out, with a warning that
    begins with ``before``; else it is an error.
    """

    job: SketchJob = field(default_factory=lambda: SketchJob((), None))
    influence: Influence = field(default_factory=Influence)
    selecting: Selecting = field(default_factory=Selecting)
    least: int = 0
    later: bool = False
    before: str = ""

    def __post_init__(self) -> None:
        check_rewards(self.selecting.method, self.job.estimator.to_dict())

    @classmethod
    def of(
        cls,
        options: SelectionOptions,
        *,
        behaviour_model: Any = None,
        notes: Mapping[str, Any] | None = None,
    ) -> Setup:
        """The setup of some options."""
        job = make_job(options.sketching, (), None, behaviour_model=behaviour_model, notes=notes)
        return cls(job, options.influence, options.selecting)


@dataclass(frozen=True)
class Part:
    """Trajectories that have been checked, and what they are for.

    Attributes:
        name: of the store: "train", "valid" or "valid-<name>".
        groups: what this rank sketches of them.
        scan: what is in ``groups``.
        set: the validation set of records that carry none; None for training prompts.
        behaviour: where the behaviour log-probs come from; "auto" leaves it to what the trajectories hold.
        behaviour_model: the model that made them, where it has to be run again.
    """

    name: str
    groups: PromptGroups
    scan: Scan
    set: str | None = None
    behaviour: str = "auto"
    behaviour_model: Any = None


@dataclass(frozen=True)
class Checked:
    """The parts that passed :func:`check`, and figures of the whole pool of training prompts, all ranks together.

    Attributes:
        train, valid: what this rank sketches.
        prompts: training prompts that may be chosen.
        usable: those with a gradient.
        unknown: prompts of this rank's training files that may not be chosen.
        alone: why scores will not be resampled (:func:`cropi.ranking.resampling.one_alone`), or nothing.
    """

    train: Part
    valid: list[Part]
    prompts: int
    usable: int
    unknown: int = 0
    alone: str = ""


def check(
    policy: Policy,
    train: Any,
    valid: Any,
    setup: Setup,
    *,
    known: Callable[[str], bool] | None = None,
    sets: Sequence[str] = (),
    ranks: Ranks | None = None,
    before: str = "",
    option: str = "--valid",
    otherwise: str = "",
    named: bool = False,
) -> Checked:
    """Read all trajectories once, and find what is wrong with them before any compute is spent.

    Args:
        policy: the current policy. Of a name only the tokenizer and the configuration are loaded here.
        train, valid: see :func:`choose`.
        setup: how prompts are chosen.
        known: whether a training prompt may be chosen; the others are left out. None: all may.
        sets: validation sets that must be covered.
        ranks: the processes that share the work.
        before: what messages begin with.
        option: what names the validation sets, for messages.
        otherwise: what the message ends with where there is nothing to select.
        named: the keys of ``valid`` were given as the sets' names, so that records may not name other ones; else they
            are names for records that name none.

    Raises:
        RecordError: a bad record, or one that does not fit the model.
        NothingToSelect: no training prompt has a gradient.
        TooFewLeft: the pool has not what the choice asks of it, where ``setup.least``.
        CropiError: a validation set without a prompt that has one, records that name another set than their key, no
            set of the name that is subtracted, or a fraction that chooses nothing.
    """
    ranks, job = ranks or Alone(), setup.job
    sources = validation_sources(valid)
    parts, scans = [], {}
    for name, source in sources.items():
        stem = "valid" if len(sources) == 1 else f"valid-{name}"
        part, scans[name], _ = part_of(policy, source, replace(job, limit=None), stem, name, None, ranks)
        parts.append(part)
    if named and isinstance(valid, Mapping):
        check_keys(scans, option)
    sizes, given = check_covered(scans, sets, option=option, before=before), setup.influence
    names_without(list(sizes), given.minus)
    mine, _, pool = part_of(policy, train, job, "train", None, known, ranks)
    check_pool(pool, mine.groups.names, known=known is not None, before=before, otherwise=otherwise)
    if ranks.first:
        whole_sets = {str(part.set): (_whole(part.groups), scans[str(part.set)]) for part in parts}
        _warn_repeated(whole_sets)
        _warn_shared(mine.groups, pool, list(whole_sets.values()), known)
    most = job.limit or pool.prompts
    alone = one_alone(sizes, given.max_valid)
    with asked_of(setup.least):
        groups = fixed_groups(pool, setup.selecting)
        check_selecting(
            setup.selecting, prompts=min(pool.prompts, most), usable=min(pool.usable, most),
            groups=groups if most >= pool.prompts else None, least=setup.least, draws=given.draws,
        )  # fmt: skip
    # Like sets without a gradient, an error before the first choice.
    with asked_of(setup.least if setup.later else 0):
        check_selecting(setup.selecting, draws=given.draws, alone=alone)
    for part in (*parts, mine):
        check_tokens(policy, job if part is mine else replace(job, limit=None), part.groups, part.scan)
    return Checked(mine, parts, pool.prompts, pool.usable, mine.scan.unknown, alone)


def _whole(groups: PromptGroups) -> PromptGroups:
    """The groups of all ranks."""
    return groups.whole if isinstance(groups, Share) else groups


def _warn_repeated(valid: Mapping[str, tuple[PromptGroups, Scan]]) -> None:
    found = repeated_prompts(valid)
    if found is not None:
        warn(str(RepeatedPrompts.of(*found, "the text")), RepeatedPrompts)


def _warn_shared(
    train: PromptGroups,
    pool: Scan,
    valid: Sequence[tuple[PromptGroups, Scan]],
    known: Callable[[str], bool] | None,
) -> None:
    found = shared_prompts(_whole(train), pool, valid, known)
    if found is not None:
        count, mine, other = found
        warn(
            f"{count} training prompts are validation prompts too: they have the same text, for example {mine!r:.100} "
            f"and {other!r:.100}; scores favour what is validated on, so leave them out on one side, unless this is "
            "meant",
            SharedPrompts,
        )


def part_of(
    policy: Policy,
    source: Any,
    job: SketchJob,
    name: str,
    default_set: str | None,
    known: Callable[[str], bool] | None,
    ranks: Ranks,
) -> tuple[Part, Scan, Scan]:
    """The part of this rank, the scan of everything, and the scan of the prompts that may be chosen."""
    kind, _, key = name.partition("-")
    # As messages call it.
    groups = job.read(source, f"{kind}[{key!r}]" if key not in ("", DEFAULT_SET) else kind)
    if known is None and ranks.world == 1:
        scan = scan_groups(policy, job, groups)
        behaviour_source(job.behaviour, scan, job.estimator.ratio)
        return Part(name, groups, scan, default_set), scan, scan
    pool, mine, ids = Scan(), Scan(), list[str]()

    def take(group: PromptGroup) -> bool:
        if known is not None and not known(group.id):
            mine.unknown += 1
            return False
        here = pool.prompts % ranks.world == ranks.rank
        if here:
            mine.add(group)
            ids.append(group.id)
        pool.add(group)
        return here

    scan = scan_groups(policy, job, groups, on_group=take)
    source_of = behaviour_source(job.behaviour, scan, job.estimator.ratio)
    mine.fingerprint, mine.texts_checked = scan.fingerprint, scan.texts_checked
    part = Part(name, Share(groups, ids, mine), mine, default_set, behaviour=source_of)
    return part, scan, pool


def check_keys(scans: Mapping[str, Scan], option: str) -> None:
    """Check that the records of each key name that set, or none.

    Raises:
        CropiError: some name another one; names both.
    """
    for key, part in scans.items():
        for name, count in part.sets.items():
            if name != key:
                raise CropiError(
                    f"{option} has the key {key!r}, but {count} of the {part.prompts} records under it say that their "
                    f"set is {name!r}: take 'set' out of the records, or give them without keys, where a record's own "
                    "set counts"
                )


def validation_sources(valid: Any) -> dict[str, Any]:
    """Validation sources by the name of their set."""
    if not isinstance(valid, Mapping) or hasattr(valid, "column_names"):
        return {DEFAULT_SET: valid}
    if {"rewards", "reward", "responses", "prompt", "messages"} & valid.keys():
        raise CropiError("valid is one record: give a list of records, or {set name: list of records}")
    if not valid or not all(isinstance(name, str) and name for name in valid):
        raise CropiError(f"valid has the keys {list(valid)}: give {{set name: trajectories}}, at least one")
    return dict(valid)
