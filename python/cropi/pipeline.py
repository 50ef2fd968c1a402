"""The one chain from trajectories to chosen prompts, which the command line, curricula, TRL and Python call.

    check:  scan all trajectories; every validation set and the training files need a prompt with a gradient
    choose: check -> sketch the validation sets -> sketch the training prompts -> influence -> select -> write

Its parts can be called alone: a curriculum keeps its state between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from cropi.agreement import Alone, Ranks
from cropi.data.readers import PromptGroups, read
from cropi.data.records import PromptGroup
from cropi.data.scan import Scan, check_covered, check_pool
from cropi.data.share import Share
from cropi.errors import CropiError
from cropi.gradient.behaviour import behaviour_source
from cropi.model.policy import Policy
from cropi.options import Influence, Selecting, SelectionOptions
from cropi.ranking.influence import influence, validation_means
from cropi.ranking.scores import DEFAULT_SET, Scores
from cropi.ranking.selection import Selection, check_selecting, select, write_selection
from cropi.ranking.table import SCORES, write_scores
from cropi.ranking.uncertainty import few_pairs, with_uncertainty
from cropi.rescoring import Anew, How
from cropi.sketching.interrupt import Interrupted
from cropi.sketching.job import SketchJob, make_job, with_date
from cropi.sketching.noise import sketch_noise
from cropi.sketching.run import check_tokens, scan_groups, sketch
from cropi.sketching.summary import Summary
from cropi.store.store import SketchStore


class Sketches(Protocol):
    """How a job becomes a store: :func:`cropi.sketching.run.sketch`, or that of several processes together."""

    def __call__(self, policy: Policy, job: SketchJob, *, scan: Scan, progress: bool) -> Summary:
        """See :func:`cropi.sketching.run.sketch`."""


@dataclass(frozen=True)
class Setup:
    """How prompts are chosen. The job's trajectories and store are filled in for every part.

    ``least`` prompts are chosen, where there are so many usable ones and the fraction would choose fewer.
    """

    job: SketchJob = field(default_factory=lambda: SketchJob((), None))
    influence: Influence = field(default_factory=Influence)
    selecting: Selecting = field(default_factory=Selecting)
    least: int = 0

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
    """What :func:`check` found: the parts, and figures of the whole pool of training prompts, all ranks together."""

    train: Part
    valid: list[Part]
    prompts: int
    usable: int
    unknown: int = 0


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

    Raises:
        RecordError: a bad record, or one that does not fit the model.
        NothingToSelect: no training prompt has a gradient.
        CropiError: a validation set without a prompt that has one, or a fraction that chooses nothing.
    """
    ranks, job = ranks or Alone(), setup.job
    sources = _validation(valid)
    parts, scans = [], {}
    for name, source in sources.items():
        stem = "valid" if len(sources) == 1 else f"valid-{name}"
        part, scans[name], _ = _part(policy, source, replace(job, limit=None), stem, name, None, ranks)
        parts.append(part)
    check_covered(scans, sets, option=option, before=before)
    mine, _, pool = _part(policy, train, job, "train", None, known, ranks)
    check_pool(pool, mine.groups.names, known=known is not None, before=before, otherwise=otherwise)
    most = job.limit or pool.prompts
    check_selecting(
        setup.selecting, prompts=min(pool.prompts, most), usable=min(pool.usable, most), least=setup.least,
        draws=setup.influence.draws,
    )  # fmt: skip
    for part in (*parts, mine):
        check_tokens(policy, job if part is mine else replace(job, limit=None), part.groups, part.scan)
    return Checked(mine, parts, pool.prompts, pool.usable, mine.scan.unknown)


def _part(
    policy: Policy,
    source: Any,
    job: SketchJob,
    name: str,
    default_set: str | None,
    known: Callable[[str], bool] | None,
    ranks: Ranks,
) -> tuple[Part, Scan, Scan]:
    """The part of this rank, the scan of everything, and the scan of the prompts that may be chosen."""
    kind = "train" if name == "train" else "valid"
    groups = read(source, skip_bad=job.skip_bad, columns=job.columns, name=kind)
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


def _validation(valid: Any) -> dict[str, Any]:
    """Validation sources by the name of their set."""
    if not isinstance(valid, Mapping) or hasattr(valid, "column_names"):
        return {DEFAULT_SET: valid}
    if {"rewards", "reward", "responses", "prompt", "messages"} & valid.keys():
        raise CropiError("valid is one record: give a list of records, or {set name: list of records}")
    if not valid or not all(isinstance(name, str) and name for name in valid):
        raise CropiError(f"valid has the keys {list(valid)}: give {{set name: trajectories}}, at least one")
    return dict(valid)


def sketch_part(
    policy: Policy,
    part: Part,
    job: SketchJob,
    out: Path | None,
    *,
    progress: bool = True,
    by: Sketches = sketch,
) -> Summary:
    """Sketch one part into a store.

    Raises:
        Interrupted: Ctrl-C; what is finished is in the store.
    """
    if part.set is not None:
        # Validation prompts are few, and their noise is in every score; --limit is for trying out the training files.
        job = replace(job, responses=None, token_share=None, limit=None)
    job = replace(
        job,
        trajectories=part.groups,
        out=out,
        set=part.set,
        # The validation side alone is scaled: <D g(s), g(v)> = <g(s), D g(v)>.
        optimizer_state=None if part.set is None else job.optimizer_state,
        behaviour=part.behaviour if part.behaviour != "auto" else job.behaviour,
        behaviour_model=part.behaviour_model if part.behaviour_model is not None else job.behaviour_model,
    )
    summary = by(policy, job, scan=part.scan, progress=progress)
    if summary.interrupted:
        raise Interrupted(out, summary)
    return summary


def sketch_all(
    policy: Policy,
    checked: Checked,
    job: SketchJob,
    store_at: Callable[[str], Path | None],
    *,
    ranks: Ranks | None = None,
    say: Callable[[str], Any] = lambda line: None,
    progress: bool = True,
    by: Sketches = sketch,
) -> dict[str, SketchStore]:
    """Sketch the validation sets, then the training prompts: the stores of this rank by the name of their part.

    A validation set whose mean gradient is zero shows before the long part. A rank without a share makes no store.
    ``by`` is how a part is sketched; where that gives no store (rank 0 has it), none is in what is returned.
    """
    parts = [*checked.valid, checked.train]
    job = one_date(policy, job, parts, [store_at(part.name) for part in parts])
    work = partial(_sketch_parts, policy, job=job, store_at=store_at, say=say, progress=progress, by=by)
    stores = work(checked.valid)
    if (ranks or Alone()).world == 1 and stores:
        validation_means(list(stores.values()))
    return stores | work([checked.train])


def _sketch_parts(
    policy: Policy,
    parts: Sequence[Part],
    job: SketchJob,
    store_at: Callable[[str], Path | None],
    say: Callable[[str], Any],
    progress: bool,
    by: Sketches = sketch,
    on_summary: Callable[[Summary], Any] = lambda summary: None,
) -> dict[str, SketchStore]:
    stores: dict[str, SketchStore] = {}
    for part in parts:
        if part.scan.prompts:
            say(f"== {part.groups.names}")
            summary = sketch_part(policy, part, job, store_at(part.name), progress=progress, by=by)
            say(summary.text())
            on_summary(summary)
            if summary.store is not None:
                stores[part.name] = summary.store
    return stores


def noise_stores(
    policy: Policy,
    checked: Checked,
    job: SketchJob,
    of: Sequence[str],
    store_at: Callable[[str], Path | None],
    *,
    say: Callable[[str], Any] = lambda line: None,
    progress: bool = True,
    by: Sketches = sketch,
) -> list[SketchStore]:
    """Stores of noise beside those that :func:`sketch_all` made: of all validation prompts and of the training prompts
    ``of`` (:func:`cropi.sketching.noise.sampled`). ``by`` as there, and what is returned."""
    parts = [*checked.valid, checked.train]
    job = one_date(policy, job, parts, [store_at(part.name) for part in parts])
    say("== noise of the gradients, from the finite number of responses")
    stores: list[SketchStore] = []
    for part in parts:
        noise = partial(sketch_noise, of=None if part.set is not None else of, by=by)
        made = _sketch_parts(
            policy, [part], job, lambda name: store_at(f"noise-{name}"), say, progress, noise
        )
        stores += made.values()
    return stores


def one_date(
    policy: Policy, job: SketchJob, parts: Sequence[Part], stores: Sequence[str | Path | None]
) -> SketchJob:
    """The job with one date for all parts, where the chat template prints one: what is compared must not have two."""
    for part in parts:
        job = with_date(policy, job, part.scan, stores)
    return job


def sketch_validation(
    policy: Policy,
    valid: Any,
    job: SketchJob,
    ranks: Ranks | None = None,
    *,
    sets: Sequence[str] = (),
    before: str = "",
    option: str = "--valid",
    progress: bool = True,
) -> tuple[list[str], torch.Tensor]:
    """This rank's sketches of validation prompts, in memory: the set of each row, and float32 rows ``[n, dim]``.

    Args:
        policy, valid, ranks, sets, before, option: as for :func:`check`.
        job: how they are sketched.
        progress: show a bar.

    Raises:
        CropiError: as :func:`check`, on every rank, before anything is sketched.
    """
    who = ranks or Alone()

    def checked() -> list[Part]:
        parts, scans = [], {}
        for name, source in _validation(valid).items():
            known = None if who.world == 1 else (lambda _: True)
            part, scans[name], _ = _part(policy, source, job, f"valid-{name}", name, known, who)
            check_tokens(policy, job, part.groups, part.scan)
            parts.append(part)
        check_covered(scans, sets, option=option, before=before)
        return parts

    names, rows, parts = [], [], who.agree(checked)
    job = one_date(policy, job, parts, [None] * len(parts))
    for part in parts:
        if part.scan.prompts:
            store = sketch_part(policy, part, job, None, progress=progress).store
            assert store is not None
            for kept, sketches in store.shards():
                names += [row.set or DEFAULT_SET for row in kept]
                rows.append(sketches.float())
    return names, torch.cat(rows) if rows else torch.zeros(0, job.row_size)


def choose(
    policy: Policy,
    train: Any,
    valid: Any,
    setup: Setup | None = None,
    folder: str | Path | None = None,
    ranks: Ranks | None = None,
    *,
    checked: Checked | None = None,
    store_at: Callable[[str, int], Path] | None = None,
    anew: Anew | None = None,
    say: Callable[[str], Any] = lambda line: None,
    progress: bool = True,
) -> Selection:
    """Choose the training prompts with the highest influence on the validation sets, under a policy.

    Args:
        policy: the current policy.
        train: stored trajectories of training prompts: anything that :func:`cropi.data.readers.read` takes.
        valid: the same for validation prompts, or a dict of them by the name of their set.
        setup: how to sketch, compare and select; None: the defaults.
        folder: sketches, ``scores.parquet`` and ``selected.jsonl`` go there, and sketches that are there already are
            not computed again. None: everything stays in memory.
        ranks: the processes that share the work; every one calls this, and every one gets the selection.
        checked: what :func:`check` said of these very trajectories; None: it is asked here.
        store_at: the folder of a part's store on a rank; None: ``<folder>/sketches/<part>``.
        anew: which training prompts are sketched, where earlier stages have sketches of them; None: all.
        say: takes lines for the user.
        progress: show progress bars.

    Returns:
        The selection; ``selection.scores`` is the table that it was made from.

    Raises:
        CropiError: as by :func:`check`, before anything is sketched.
        Interrupted: Ctrl-C; finished prompts are in the stores.
    """
    setup, who = setup or Setup(), ranks or Alone()
    if checked is None:
        checked = who.agree(lambda: check(policy, train, valid, setup, ranks=who))
    root = None if folder is None else Path(folder)
    if root is None and who.world > 1:
        raise CropiError(
            f"folder is None, but {who.world} processes share the work: give a folder for their stores"
        )

    def at(name: str, rank: int) -> Path | None:
        if root is None or store_at is not None:
            return None if store_at is None else store_at(name, rank)
        return root / "sketches" / (name if who.world == 1 else f"{name}-{rank:05d}")

    parts = checked

    def here(name: str) -> Path | None:
        return at(name, who.rank)

    def joined(name: str) -> SketchStore:
        kept = [anew.kept] if anew is not None and name == "train" else []
        return _joined(name, mine, at, who, kept)

    if anew is None:
        mine = who.agree(
            lambda: sketch_all(policy, parts, setup.job, here, ranks=who, say=say, progress=progress)
        )
    else:
        everything = [*parts.valid, parts.train]
        job = one_date(policy, setup.job, everything, [here(part.name) for part in everything])
        work = partial(_sketch_parts, policy, job=job, store_at=here, say=say, progress=progress)
        mine = who.agree(lambda: work(parts.valid, on_summary=anew.took))
        groups = anew.settle(
            who, parts.train.groups, parts.train.scan, lambda: [joined(part.name) for part in parts.valid],
            How(setup.influence, setup.selecting, setup.least), job,
        )  # fmt: skip
        train = replace(parts.train, groups=groups, scan=groups.scan)
        mine |= who.agree(lambda: work([train]))

    def finish() -> Selection:
        stores = {part.name: joined(part.name) for part in (*parts.valid, parts.train)}
        return conclude(stores, setup, root)

    result = who.agree(lambda: finish() if who.first else None)
    return who.share(result)


def conclude(
    stores: Mapping[str, SketchStore],
    setup: Setup,
    folder: Path | None,
    noise: Sequence[SketchStore] = (),
) -> Selection:
    """The last part of :func:`choose`: from the stores of all parts to the selection, and its files in ``folder``."""
    valid = [store for name, store in stores.items() if name != "train"]
    scores = score(stores["train"], valid, setup.influence, setup.selecting, noise)
    chosen = pick(scores, setup.selecting, setup.least, stores["train"])
    if folder is not None:
        write_scores(folder / SCORES, scores, chosen)
        write_selection(folder / "selected.jsonl", scores, chosen)
    return chosen


def _joined(
    name: str,
    mine: Mapping[str, SketchStore],
    at: Callable[[str, int], Path | None],
    ranks: Ranks,
    more: Sequence[Path] = (),
) -> SketchStore:
    """The stores of a part on all ranks, and ``more``, read as one."""
    if ranks.world == 1 and not more:
        return mine[name]
    paths = [*(at(name, rank) for rank in range(ranks.world)), *more]
    return SketchStore.join([SketchStore.open(path) for path in paths if path is not None and path.is_dir()])


def score(
    train: SketchStore,
    valid: Sequence[SketchStore],
    options: Influence | None = None,
    selecting: Selecting | None = None,
    noise: Sequence[SketchStore] = (),
) -> Scores:
    """:func:`cropi.ranking.influence.influence` by its options, and its uncertainty for the choice by ``selecting``;
    stores of ``noise`` say what that owes to responses."""
    given, choice = options or Influence(), selecting or Selecting()
    how = {name: value for name, value in vars(given).items() if name not in ("draws", "valid_seed")}
    pairs = given.draws > 1 and few_pairs(train, valid, given.max_valid)
    scores = influence(train, valid, **how, seed=given.valid_seed, pairs=pairs)
    return with_uncertainty(scores, train, valid, noise=noise, draws=given.draws, selecting=choice)


def pick(
    scores: Scores, options: Selecting | None = None, least: int = 0, sketches: SketchStore | None = None
) -> Selection:
    """:func:`cropi.ranking.selection.select` by its options."""
    return select(scores, options or Selecting(), least=least, sketches=sketches)
