"""Checked parts become stores, or the sketches of validation prompts in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from cropi.agreement import Alone, Ranks
from cropi.data.scan import Scan, check_covered
from cropi.model.policy import Policy
from cropi.pipeline.checks import Checked, Part, Setup, part_of, validation_sources
from cropi.pipeline.lost import followed
from cropi.sketching.interrupt import Interrupted
from cropi.sketching.job import SketchJob, with_date
from cropi.sketching.noise import sketch_noise
from cropi.sketching.run import check_tokens, sketch
from cropi.sketching.summary import Summary
from cropi.store.rows import OK
from cropi.store.store import SketchStore


class Sketches(Protocol):
    """How a job becomes a store: :func:`cropi.sketching.run.sketch`, or that of several processes together."""

    def __call__(self, policy: Policy, job: SketchJob, *, scan: Scan, progress: bool) -> Summary:
        """See :func:`cropi.sketching.run.sketch`."""


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
    setup: Setup,
    store_at: Callable[[str], Path | None],
    *,
    ranks: Ranks | None = None,
    say: Callable[[str], Any] = lambda line: None,
    progress: bool = True,
    by: Sketches = sketch,
) -> dict[str, SketchStore]:
    """Sketch the validation sets, then the training prompts: the stores of this rank by the name of their part.

    A rank without a share makes no store. ``by`` is how a part is sketched; where that gives no store (rank 0 has it),
    none is in what is returned. Before the long part, one process alone looks at its validation stores
    (:func:`cropi.pipeline.lost.followed`).
    """
    parts = [*checked.valid, checked.train]
    job = one_date(policy, setup.job, parts, [store_at(part.name) for part in parts])
    work = partial(sketch_parts, policy, job=job, store_at=store_at, say=say, progress=progress, by=by)
    stores = work(checked.valid)
    if (ranks or Alone()).world == 1 and stores:
        followed(list(stores.values()), setup.influence, later=setup.later)
    return stores | work([checked.train], coverage=not stores)


def sketch_parts(
    policy: Policy,
    parts: Sequence[Part],
    job: SketchJob,
    store_at: Callable[[str], Path | None],
    say: Callable[[str], Any],
    progress: bool,
    by: Sketches = sketch,
    on_summary: Callable[[Summary], Any] = lambda summary: None,
    coverage: bool = True,
) -> dict[str, SketchStore]:
    """Sketch some parts. ``coverage``: it is said, once, what is sketched of the model, which all parts share."""
    stores: dict[str, SketchStore] = {}
    for part in parts:
        if part.scan.prompts:
            say(f"== {part.groups.names}")
            summary = sketch_part(policy, part, job, store_at(part.name), progress=progress, by=by)
            say(summary.text(coverage))
            coverage = False
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
    """Sketch the noise of the gradients that :func:`sketch_all` has sketched.

    That is the noise of all validation prompts, and of the training prompts ``of``
    (:func:`cropi.sketching.noise.sampled`).
    ``by`` is as for :func:`sketch_all`; where that gives no store, none is in what is returned.
    """
    parts = [*checked.valid, checked.train]
    job = one_date(policy, job, parts, [store_at(part.name) for part in parts])
    say("== noise of the gradients, from the finite number of responses")
    stores: list[SketchStore] = []
    for part in parts:
        noise = partial(sketch_noise, of=None if part.set is not None else of, by=by)
        made = sketch_parts(
            policy, [part], job, lambda name: store_at(f"noise-{name}"), say, progress, noise, coverage=False
        )
        stores += made.values()
    return stores


def one_date(
    policy: Policy, job: SketchJob, parts: Sequence[Part], stores: Sequence[str | Path | None]
) -> SketchJob:
    """The job with one date for all parts, where the chat template prints one: compared prompts must not have two."""
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
) -> tuple[list[str], torch.Tensor, list[tuple[str, str]]]:
    """This rank's sketches of validation prompts, in memory: the set of each row, float32 rows ``[n, dim]``, and of
    every prompt without a row its set and the reason.

    Args:
        policy, valid, ranks, sets, before, option: as for :func:`check`.
        job: how they are sketched.

    Raises:
        CropiError: as :func:`check`, on every rank, before anything is sketched.
    """
    who = ranks or Alone()

    def checked() -> list[Part]:
        parts, scans = [], {}
        for name, source in validation_sources(valid).items():
            known = None if who.world == 1 else (lambda _: True)
            part, scans[name], _ = part_of(policy, source, job, f"valid-{name}", name, known, who)
            check_tokens(policy, job, part.groups, part.scan)
            parts.append(part)
        check_covered(scans, sets, option=option, before=before)
        return parts

    names, rows, lost = list[str](), [], list[tuple[str, str]]()
    parts = who.agree(checked)
    job = one_date(policy, job, parts, [None] * len(parts))
    for part in parts:
        if part.scan.prompts:
            store = sketch_part(policy, part, job, None, progress=False).store
            assert store is not None
            for kept, sketches in store.shards():
                names += [row.set_name for row in kept]
                rows.append(sketches.float())
            lost += [(row.set_name, row.reason) for row in store.rows() if row.status != OK]
    empty = torch.zeros(0, job.row_size, dtype=torch.float32, device="cpu")
    return names, torch.cat(rows) if rows else empty, lost
