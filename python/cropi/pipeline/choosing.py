"""From trajectories to the chosen prompts, in one call; and its last steps, for those who have the stores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cropi.agreement import Alone, Ranks
from cropi.data.twice import RepeatedPrompts
from cropi.errors import CropiError, warn
from cropi.files import is_folder
from cropi.locks import one_at_a_time
from cropi.model.policy import Policy
from cropi.options import Influence, Selecting
from cropi.pipeline.checks import Checked, Setup, check
from cropi.pipeline.lost import TooFewLeft, asked_of, on_first, usable_stores, warn_lost
from cropi.pipeline.rescoring import Anew
from cropi.pipeline.sketches import one_date, sketch_all, sketch_parts
from cropi.ranking.given import NUMBERED
from cropi.ranking.influence import influence
from cropi.ranking.pairwise import copies
from cropi.ranking.resampling import few_pairs, with_uncertainty
from cropi.ranking.scores import Scores
from cropi.ranking.selection import Selection, select
from cropi.ranking.selection_files import SELECTED, write_selection
from cropi.ranking.table import SCORES, write_scores
from cropi.store.rows import OK
from cropi.store.shares import shared_job
from cropi.store.store import SketchStore


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
        NothingToFollow: no validation set has a usable gradient, where ``setup.later``; or no training prompt has one,
            or the pool has not what the options ask of it, where ``setup.least``.
        Interrupted: Ctrl-C; finished prompts are in the stores.
    """
    setup, who = setup or Setup(), ranks or Alone()
    if checked is None:
        checked = who.agree(lambda: check(policy, train, valid, setup, ranks=who, option="valid", named=True))
    root = None if folder is None else Path(folder)
    if root is None and who.world > 1:
        raise CropiError(
            f"folder is None, but {who.world} processes share the work: give a folder for their stores"
        )

    def at(name: str, rank: int) -> Path | None:
        if store_at is not None:
            return store_at(name, rank)
        folder_of = name if who.world == 1 else f"{name}-{rank:05d}"
        return None if root is None else root / "sketches" / folder_of

    parts, stores = checked, _Stores(who, at)
    if anew is None:
        sketched = partial(
            sketch_all, policy, parts, setup, stores.here, ranks=who, say=say, progress=progress
        )
        stores.mine.update(who.agree(sketched))
    else:
        _sketch_anew(policy, parts, setup, stores, anew, say, progress)

    def finish() -> Selection:
        joined = {part.name: stores.joined(part.name) for part in parts.valid}
        joined["train"] = stores.joined("train", [anew.kept] if anew is not None else [])
        return conclude(joined, setup, root)

    return on_first(who, finish)


@dataclass(frozen=True)
class _Stores:
    """The stores of a choice, by the name of their part.

    Attributes:
        ranks: the processes that share the work.
        at: the folder of a part's store on a rank; None: it is in memory.
        mine: this rank's stores.
    """

    ranks: Ranks
    at: Callable[[str, int], Path | None]
    mine: dict[str, SketchStore] = field(default_factory=dict)

    def here(self, name: str) -> Path | None:
        """The folder of a part's store on this rank."""
        return self.at(name, self.ranks.rank)

    def joined(self, name: str, more: Sequence[Path] = ()) -> SketchStore:
        """The stores of a part on all ranks, and those in the folders ``more``, read as one."""
        if self.ranks.world == 1 and not more:
            return self.mine[name]
        paths = [*(self.at(name, rank) for rank in range(self.ranks.world)), *more]
        return SketchStore.join(
            [SketchStore.open(path) for path in paths if path is not None and is_folder(path)]
        )


def _sketch_anew(
    policy: Policy,
    checked: Checked,
    setup: Setup,
    stores: _Stores,
    anew: Anew,
    say: Callable[[str], Any],
    progress: bool,
) -> None:
    """Sketch the validation prompts, and those of the training prompts that ``anew`` then decides for."""
    parts = [*checked.valid, checked.train]
    job = one_date(policy, setup.job, parts, [stores.here(part.name) for part in parts])
    work = partial(sketch_parts, policy, job=job, store_at=stores.here, say=say, progress=progress)
    ranks = stores.ranks
    stores.mine.update(ranks.agree(lambda: work(checked.valid, on_summary=anew.took)))
    train = anew.settle(
        ranks, checked.train, lambda: [stores.joined(part.name) for part in checked.valid], setup
    )
    stores.mine.update(ranks.agree(lambda: work([train], coverage=False)))


def conclude(
    stores: Mapping[str, SketchStore],
    setup: Setup,
    folder: Path | None,
    noise: Sequence[SketchStore] = (),
) -> Selection:
    """The last part of :func:`choose`: from the stores of all parts to the selection, and its files in ``folder``."""
    valid = [store for name, store in stores.items() if name != "train"]
    given = setup.influence
    rows = stores["train"].rows() if setup.least else []
    if setup.least and not any(row.status == OK for row in rows):
        why = ", ".join(
            f"{count} with {reason}" for reason, count in Counter(row.reason for row in rows).items()
        )
        raise TooFewLeft(f"none of the {len(rows)} training prompts has a usable gradient ({why})")
    if setup.later:
        valid, given, lost = usable_stores(valid, given)
        warn_lost(lost, setup.before)
    with asked_of(setup.least):
        scores = score(stores["train"], valid, given, setup.selecting, noise, least=setup.least, checked=True)
        sketches = stores["train"] if setup.selecting.needs_sketches else None
        chosen = select(scores, setup.selecting, least=setup.least, sketches=sketches)
    if folder is not None:
        with one_at_a_time(folder / SCORES):  # two that write here at once mix no selection with other scores
            write_scores(folder / SCORES, scores, chosen)
            write_selection(folder / SELECTED, scores, chosen)
    return chosen


def score(
    train: SketchStore,
    valid: Sequence[SketchStore],
    options: Influence | None = None,
    selecting: Selecting | None = None,
    noise: Sequence[SketchStore] = (),
    *,
    least: int = 0,
    checked: bool = False,
) -> Scores:
    """:func:`cropi.ranking.influence.influence` by its options, and its uncertainty for the choice by ``selecting``
    (None: the best tenth, one prompt at least), of ``least`` prompts at least; stores of ``noise`` say what that owes
    to responses. Validation stores that are shares of one job count as one. ``checked``: :func:`check` has read the
    records, and has said where validation sets hold prompts twice."""
    given = options or Influence()
    valid = _whole(valid)
    pairs = given.draws > 1 and few_pairs(train, valid, given.max_valid)
    scores = influence(train, valid, given, pairs=pairs)
    if scores.pairs is not None and not checked and (found := copies(scores.pairs)) is not None:
        # Floats that no prompt is known of.
        numbered = any(store.manifest.get("notes", {}).get(NUMBERED) for store in valid)
        said = (
            ("the numbers", "row", "give every row once") if numbered else ("the responses and the gradient",)
        )
        warn(str(RepeatedPrompts.of(*found, *said)), RepeatedPrompts)
    # A tenth of fewer than ten prompts is none: their tables had no standard errors, and `cropi influence` has no
    # option that would have given them some.
    least = max(least, 0 if selecting else 1)
    return with_uncertainty(scores, train, valid, given, selecting or Selecting(), noise, least)


def _whole(stores: Sequence[SketchStore]) -> list[SketchStore]:
    """The stores, with those that are shares of one job (``--shard``) read as one."""
    jobs: dict[str | int, list[SketchStore]] = {}
    for number, store in enumerate(stores):
        # What is no store `influence` refuses by name.
        job = shared_job(store.manifest) if isinstance(store, SketchStore) else ""
        jobs.setdefault(job or number, []).append(store)
    return [SketchStore.join(parts) if len(parts) > 1 else parts[0] for parts in jobs.values()]
