"""A sketching job on the processes of a launcher: one store at the end, row by row the one that one process makes.

check:  every process reads the trajectories and loads its model; what differs between two is named
work:   chunks are claimed one after the other, so that nobody waits while there is work; a store a process
end:    rank 0 moves all rows to the job's store and counts them
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cropi.data.scan import Scan
from cropi.distributed.team import Team
from cropi.errors import CropiError
from cropi.gradient.health import Health
from cropi.model.policy import Policy
from cropi.sketching.chunks import BATCHES, Chunk, Participant
from cropi.sketching.job import SketchJob
from cropi.sketching.job_store import settle_products
from cropi.sketching.run import Prepared, prepare, scan_groups
from cropi.sketching.summary import Summary
from cropi.store.memory import Nowhere
from cropi.store.parts import part_path, take_parts
from cropi.store.store import SketchStore

if TYPE_CHECKING:
    from cropi.distributed.sharding import Group

SAME_FILES = "give all processes the same files, on a file system that all share or as equal copies"
OTHER_CUTS = (
    "the model or the tokenizer behaves differently there; use one kind of machine and one version of all packages, or "
    "--layout padded"
)
REMEDIES = {
    "trajectories": SAME_FILES,
    "prompts": SAME_FILES,
    "model": "give all processes the same model",
    "behaviour.model": "give all processes the same --behaviour-model",
    "tokenizer": "give all processes the same tokenizer",
    "versions": "install the same versions for all processes",
    "store": "--out must be one folder, on a file system that all processes share; where there is none, run "
    "`cropi sketch --shard i/n` on each machine",
    "": "start all processes with the same options",
}


def sketch(
    team: Team,
    policy: Policy,
    job: SketchJob,
    *,
    scan: Scan | None = None,
    progress: bool = True,
    group: Group | None = None,
) -> Summary:
    """:func:`cropi.sketching.run.sketch` on all processes of a team; every one calls this.

    Args:
        team: the processes.
        policy, job, scan: as there; the same in every process. The store is a folder that all processes see.
        progress: show a progress bar, in rank 0.
        group: the processes that share the policy's weights with this one; None: it has them whole.

    Returns:
        In every process the counts of all of them together; ``store`` is the job's store, open for reading, in rank 0.

    Raises:
        CropiError: as there; or files, models, options or versions differ between two processes: both are named,
            before any work.
    """
    progress = progress and team.first
    out = team.agree(lambda: _folder(job))
    agreed_scan: Scan = team.agree(lambda: scan or scan_groups(policy, job))
    # Files that differ show before the time that loading the weights takes is spent.
    team.same({"trajectories": agreed_scan.fingerprint, "prompts": agreed_scan.prompts}, REMEDIES)
    if group is not None:
        group.check(team, policy, job)
    ready = team.agree(lambda: prepare(policy, job, agreed_scan, progress))
    # Where no number of tokens was given: the one that fits into every process's memory.
    fitting = team.gather(ready.tokens_per_batch)
    budget = min(fitting) if job.tokens_per_batch is None else job.tokens_per_batch
    ready.job = replace(ready.job, tokens_per_batch=budget)
    manifest = team.agree(ready.manifest)
    team.same(facts(ready, manifest), REMEDIES)
    whole = team.agree(lambda: ready.open() if team.first else None)
    try:
        held = team.agree(lambda: whole or SketchStore.open(out))
        settle_products(held.manifest)
        done = frozenset(row.id for row in held.rows())
        team.same({"store": prompts_digest(done)}, REMEDIES)
        ready.summary.resumed = len(done)
        if len(done) < ready.total:
            part = (Claimed if group is None else group.part)(team, BATCHES * ready.tokens_per_batch, done)
            _work(team, ready, out, manifest, part, progress)
        every = team.gather(replace(ready.summary, store=None))
        summary = together(every, 1 if group is None else group.copies)
        if whole is not None:
            take_parts(whole)
            if not summary.interrupted:
                check_whole(whole, ready.total)
                whole.finish()
            ready.summary.store = whole
        team.agree(lambda: None)  # rank 0 has the store
    finally:
        if whole is not None:
            whole.close()
    summary.store, summary.resumed = whole, len(done)
    return summary


def facts(ready: Prepared, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What all processes of a job must have alike: what rows depend on, and how they are cut into batches."""
    import torch

    import cropi

    job = ready.job
    running = {
        name: getattr(job, name)
        for name in ("tokens_per_batch", "layout", "fused", "limit", "skip_bad", "verify")
    }
    kind = ready.policy.device.type
    return {
        **{key: value for key, value in manifest.items() if key != "notes"},
        "options": running | {"device": kind},
        "versions": {"cropi": cropi.__version__, "torch": torch.__version__},
    }


class Claimed(Participant):
    """Chunks by the numbers that a team hands out: see :class:`cropi.sketching.chunks.Participant`."""

    writes = True  # whether the rows that are computed here are kept

    def __init__(self, team: Team, tokens: int, done: frozenset[str]) -> None:
        self.team, self.tokens, self.done = team, tokens, done
        self.job = team.new_job()

    def claim(self) -> int:
        """The number of the next chunk."""
        return self.team.claim(self.job)

    def take(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """The chunks that this process has claimed.

        Raises:
            RankFailed: another process failed.
            CropiError: another process cut the job in another way.
        """
        team, window = self.team, -1
        number = self.claim()
        for chunk in chunks:
            if chunk.window > window and chunk.cut != "rows":
                window = chunk.window
                if team.first_said(f"{self.job}/cut/{window}", chunk.cut) != chunk.cut:
                    raise CropiError(
                        f"rank {team.rank} cuts the prompts from {min(chunk.prompts, default='?')!r} on into other "
                        f"micro-batches than another rank: {OTHER_CUTS}"
                    )
            if chunk.number != number:
                continue
            team.check()
            if self.agreed(team.stopped):
                return
            yield chunk
            number = self.claim()

    def finish(self, store: SketchStore) -> None:
        """The rows are safe; they are moved to the job's store."""
        store.flush()


def check_whole(store: SketchStore, total: int) -> None:
    """Check that every prompt of a job has its row.

    Raises:
        CropiError: some are missing.
    """
    if len(store) != total:
        raise CropiError(
            f"the store {store.path} holds {len(store)} prompts, but the job has {total}; run the same command again"
        )


def together(every: Sequence[Summary], copies: int = 1) -> Summary:
    """The counts of all processes as those of one job. Times are means, ``wall`` and memory the largest.

    ``copies``: so many processes that follow each other compute the same rows.
    """
    interrupted, peak = any(one.interrupted for one in every), max(one.peak_gib for one in every)
    every = every[::copies]
    first, count = every[0], len(every)
    names = {name for one in every for name in one.seconds}
    health = Health()
    for one in every:
        health += one.health
    return replace(
        first,
        sketched=sum(one.sketched for one in every),
        skipped=sum((one.skipped for one in every), Counter()),
        failed=[pair for one in every for pair in one.failed],
        scored_tokens=sum(one.scored_tokens for one in every),
        model_tokens=sum(one.model_tokens for one in every),
        cost=sum(one.cost for one in every),
        seconds={name: sum(one.seconds.get(name, 0.0) for one in every) / count for name in names},
        wall=max(one.wall for one in every),
        read=max(one.read for one in every),
        coverage=next((one.coverage for one in every if one.coverage), ""),
        peak_gib=peak,
        interrupted=interrupted,
        health=health,
    )


def check_undivided(job: SketchJob) -> None:
    """Check that a job which several processes share is not a share itself.

    Raises:
        CropiError: it is.
    """
    if job.shard is not None:
        raise CropiError(
            f"shard {job.shard[0]}/{job.shard[1]} is for processes that do not know each other; those of a "
            "launcher or of Ray share the job by themselves: leave it out"
        )


def _folder(job: SketchJob) -> Path:
    check_undivided(job)
    if job.out is None:
        raise CropiError("out is None, but several processes share the job: give a folder for its store")
    return Path(job.out)


def _work(
    team: Team, ready: Prepared, out: Path, manifest: Mapping[str, Any], part: Claimed, progress: bool
) -> None:
    """Fill this process's own store."""
    with _part_store(team, ready, out, manifest, part.writes) as store:
        ready.fill(store, progress=progress, participant=part)
        ready.summary.interrupted |= team.stopped
        if ready.summary.interrupted:
            team.stop()


def _part_store(
    team: Team, ready: Prepared, out: Path, manifest: Mapping[str, Any], writes: bool
) -> SketchStore:
    if not writes:
        return Nowhere(manifest)
    return SketchStore.create(part_path(out, team.rank), manifest, shard_rows=ready.job.shard_rows)


def prompts_digest(names: frozenset[str]) -> str:
    """Which prompts these are, in a few characters."""
    text = "\n".join(sorted(names))
    return f"{len(names)} prompts, {hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
