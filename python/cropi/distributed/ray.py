"""A sketching job on a Ray cluster: an actor a GPU (or CPU slot), each with the model and a store of its own.

The driver hands out the numbers of chunks. A worker that dies leaves its number, which another one gets; a new worker
takes its place as soon as the cluster has room for it. At the end the driver moves all rows to the job's store: that of
one process, row by row, however many workers died. Workers read the trajectories and the store's folder: both are on a
file system that all nodes and the driver share.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cropi.distributed.ranks import OTHER_CUTS, REMEDIES, check_whole, prompts_digest, together
from cropi.distributed.ray_worker import JobFacts, Make, Worker
from cropi.distributed.team import check_same
from cropi.errors import CropiError, optional
from cropi.progress import bar_of
from cropi.sketching.summary import Summary
from cropi.store.parts import next_part, take_parts
from cropi.store.rows import FAILED, OK
from cropi.store.store import InUse, SketchStore

# So many workers may die over one chunk, or one after the other before a chunk is done, until the job ends in words.
DEATHS = 3
# Seconds without any worker until the job ends; until the ends of workers are no longer waited for, and their locks.
PATIENCE, ENDING, UNLOCKING = 600.0, 60.0, 60.0


def sketch(
    make: Make,
    out: str | Path,
    *,
    address: str | None = None,
    workers: int | None = None,
    device: str = "auto",
    progress: bool = True,
    on_chunk: Callable[[int, Sequence[int]], Any] | None = None,
) -> Summary:
    """Sketch a job's prompts on the nodes of a Ray cluster.

    Args:
        make: gives the policy and the job; called in every worker, so it and what it holds are pickled. The model is
            given by name (a module would travel to every worker).
        out: the store's folder, on a file system that the driver and all nodes share; the job's own ``out`` is not
            looked at. Continued if it is there.
        address: of the cluster, as for ``ray.init``: ``auto``, ``host:6379``, ``local`` (start one here). Where the
            process is connected already, that connection is used and kept.
        workers: how many at most; None: one a GPU, or a CPU slot where the device is the CPU.
        device: "cuda", "cpu", or "auto": GPUs, if the cluster has any.
        progress: show a progress bar.
        on_chunk: called after every chunk with the number of finished ones and the process ids of the workers.

    Returns:
        The counts of all workers; ``store`` is the job's store, open for reading.

    Raises:
        CropiError: bad input or options, with the message of the worker that found it; workers that see other files,
            models or versions than the first one (named, before they do any work); workers that die again and again.
        ModuleNotFoundError: the package ray is not installed.
    """
    if workers is not None and workers < 1:
        raise CropiError(f"workers must be at least 1, got {workers}; leave it out for one a GPU or CPU slot")
    ray = optional("ray")
    own = not ray.is_initialized()
    if own:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # a bare one where a cluster that is started here does not come up in time
            if address == "local":
                text = f"no Ray cluster could be started here ({error}); try once more, or sketch without Ray"
            else:
                text = f"there is no Ray cluster at {address!r} ({error}); start one, or give local"
            raise CropiError(text) from error
    driver = _Driver(ray, make, Path(out).absolute(), _wanted(ray, device), progress, on_chunk)
    try:
        return driver.run(workers)
    finally:
        driver.close()
        if own:
            ray.shutdown()


def _wanted(ray: Any, device: str) -> str:
    """Which resource a worker takes one of."""
    if device not in ("auto", "cuda", "cpu"):
        raise CropiError(
            f"device must be auto, cuda or cpu for workers of Ray, which gives each its GPU, got {device!r}"
        )
    if device == "cpu":
        return "CPU"
    if _slots(ray, "GPU"):
        return "GPU"
    if device == "cuda":
        raise CropiError("device 'cuda': no node of the Ray cluster has a GPU; use 'cpu'")
    return "CPU"


def _slots(ray: Any, kind: str) -> int:
    return sum(int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"])


@dataclass(eq=False)
class _Held:
    """A worker as the driver knows it; ``chunk`` is what it works at."""

    actor: Any
    number: int
    doing: str = "prepare"
    chunk: int = -1
    pid: int = 0
    node: str = "?"

    def __str__(self) -> str:
        return (
            f"worker {self.number} (pid {self.pid} on {self.node})" if self.pid else f"worker {self.number}"
        )


class _Driver:
    """The state of a job: who does what, and what is left."""

    def __init__(self, ray: Any, make: Make, out: Path, kind: str, progress: bool, on_chunk: Any) -> None:
        self.ray, self.make, self.out, self.kind, self.on_chunk = ray, make, out, kind, on_chunk
        self.bar = bar_of(None, out.name, progress, unit="chunk")
        # Every worker that may be alive, also one that is in neither of the others: the driver was stopped in between.
        self.workers: list[_Held] = []
        self.refs: dict[Any, _Held] = {}
        self.idle: list[_Held] = []
        self.store: SketchStore | None = None
        self.first: JobFacts | None = None
        self.started = self.next = self.finished = self.early = 0
        self.end: int | None = None  # the number of chunks, once a worker has found it
        self.returned: list[int] = []
        self.deaths: Counter[int] = Counter()
        self.cuts: dict[int, str] = {}
        self.part = 0

    def run(self, workers: int | None) -> Summary:
        """The whole job."""
        count = _slots(self.ray, self.kind)
        count = count if workers is None else min(workers, count)
        if count < 1:
            raise CropiError(
                f"no node of the Ray cluster has a free {self.kind}: add nodes, or give another device"
            )
        for _ in range(count):
            self._start()
        interrupted, seen = False, time.monotonic()
        try:
            while not self._over:
                ready, _ = self.ray.wait(list(self.refs), num_returns=1, timeout=1.0)
                for ref in ready:
                    self._take(ref)
                if ready or self.idle or any(held.doing != "prepare" for held in self.refs.values()):
                    seen = time.monotonic()
                elif time.monotonic() - seen > PATIENCE:
                    raise CropiError(
                        f"the Ray cluster has had no room for a worker for {PATIENCE:.0f} s; finished prompts are "
                        "stored: add nodes, and run the same command again"
                    )
        except KeyboardInterrupt:
            interrupted = True
        return self._end(interrupted)

    @property
    def _over(self) -> bool:
        if self.store is not None and self.first is not None and len(self.store) >= self.first.total:
            return True
        busy = any(held.doing == "work" for held in self.refs.values())
        return self.end is not None and self.next >= self.end and not busy and not self.returned

    # ------------------------------------------------------------------------------------------------------ workers
    def _start(self) -> None:
        options: dict[str, Any] = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0}
        if self.kind == "GPU":
            options["num_gpus"] = 1
        held = _Held(self.ray.remote(Worker).options(**options).remote(self.make), self.started)
        self.started += 1
        self.workers.append(held)
        self._ask(held, "prepare", held.actor.prepare.remote())

    def _ask(self, held: _Held, doing: str, ref: Any) -> None:
        held.doing = doing
        self.refs[ref] = held

    def _take(self, ref: Any) -> None:
        """What a worker has done, or that it is dead; its next work."""
        held, errors = self.refs.pop(ref), self.ray.exceptions
        try:
            result = self.ray.get(ref)
        except errors.RayTaskError as error:  # its own code raised
            cause = getattr(error, "cause", None) or error
            raise CropiError(f"{held} of Ray failed: {cause}") from error
        except errors.RayError as error:
            self._lost(held, error)
            return
        if held.doing == "prepare":
            self._prepared(held, result)
        elif held.doing == "begin":
            assert self.store is not None
            there = {"store": prompts_digest(frozenset(row.id for row in self.store.rows()))}
            check_same([there, {"store": result}], ["the driver", str(held)], REMEDIES)
            self._assign(held)
        elif held.doing == "here":
            self._assign(held)
        else:
            self._done(held, result)

    def _prepared(self, held: _Held, prepared: JobFacts) -> None:
        held.pid, held.node = prepared.pid, prepared.node
        if self.first is None:
            self.first = prepared
            self.store = SketchStore.create(
                self.out, prepared.manifest, shard_rows=prepared.shard_rows, shard_bytes=prepared.shard_bytes
            )
            _unlocked(self.store)
        check_same([self.first.facts, prepared.facts], ["the first worker", str(held)], REMEDIES)
        number = next_part(self.out, self.part)
        self.part = number + 1  # its folder comes later
        # What fits into the memory of the first worker, where nobody said; others halve what does not fit into theirs.
        begun = held.actor.begin.remote(self.out, number, self.first.manifest, self.first.tokens_per_batch)
        self._ask(held, "begin", begun)

    def _assign(self, held: _Held) -> None:
        if self.returned:
            held.chunk = self.returned.pop()
        elif self.end is None or self.next < self.end:
            held.chunk, self.next = self.next, self.next + 1
        else:
            self.idle.append(held)
            return
        self._ask(held, "work", held.actor.work.remote(held.chunk))

    def _done(self, held: _Held, cuts: Mapping[int, str] | None) -> None:
        self.early = 0
        if cuts is None:
            self.end = held.chunk if self.end is None else min(self.end, held.chunk)
            self.returned = [number for number in self.returned if number < self.end]
        else:
            for window, cut in cuts.items():
                if self.cuts.setdefault(window, cut) != cut:
                    raise CropiError(
                        f"{held} of Ray cuts the prompts of window {window} into other micro-batches than another "
                        f"worker: {OTHER_CUTS}"
                    )
            self.finished += 1
            self.bar.update(1)
            if self.on_chunk is not None:
                self.on_chunk(self.finished, [one.pid for one in (*self.refs.values(), held) if one.pid])
        self._assign(held)

    def _lost(self, held: _Held, error: Exception) -> None:
        """A worker is dead: its chunk goes back, and another worker is started."""
        self.ray.kill(held.actor)
        self.workers.remove(held)
        why = str(error).strip().splitlines()[0]
        working = held.doing == "work"
        if working:
            self.deaths[held.chunk] += 1
            self.returned.append(held.chunk)
        elif held.doing != "here":
            self.early += 1
        if working and self.deaths[held.chunk] >= DEATHS or self.early > DEATHS + len(self.refs):
            what = f"over chunk {held.chunk}" if working else "before it did any work"
            raise CropiError(
                f"{held} of Ray died {what}, as {DEATHS - 1} others did ({why}); finished prompts are stored. If "
                "memory was too small, give a smaller --tokens-per-batch or larger nodes, and a new --out"
            )
        self.bar.write(f"{held} of Ray died ({why})" + "; its chunk goes to another one" * working)
        self._start()
        # Idle workers may have died without a word: one that does not answer has not died over the chunk.
        for _ in range(min(len(self.idle), len(self.returned))):
            woken = self.idle.pop()
            self._ask(woken, "here", woken.actor.here.remote())

    # ---------------------------------------------------------------------------------------------------------- end
    def _end(self, interrupted: bool) -> Summary:
        """End the workers, move all rows to the store, and count."""
        if self.store is None or self.first is None:
            raise KeyboardInterrupt
        before = {row.id for row in self.store.rows()}
        ending = {held.actor.finish.remote(): held for held in self.workers if held.doing != "prepare"}
        summaries = []
        if ending:
            ready, _ = self.ray.wait(list(ending), num_returns=len(ending), timeout=ENDING)
            for ref in ready:
                try:
                    summaries.append(self.ray.get(ref))
                except self.ray.exceptions.RayError:
                    pass  # its finished rows are on the disk
        self.close_workers()
        _unlocked(self.store)
        summary = together(summaries) if summaries else Summary(self.out)
        rows = [row for row in self.store.rows() if row.id not in before]
        summary = replace(
            summary,
            out=self.out,
            interrupted=interrupted,
            read=self.first.total,
            resumed=len(before),
            sketched=sum(row.status == OK for row in rows),
            skipped=Counter(row.reason for row in rows if row.status not in (OK, FAILED)),
            failed=[(row.id, row.reason) for row in rows if row.status == FAILED],
            bad_records=list(self.first.bad_records),
        )
        if not interrupted:
            check_whole(self.store, self.first.total)
            self.store.finish()
        summary.store = self.store
        return summary

    def close_workers(self) -> None:
        """End the processes of all workers."""
        for held in self.workers:
            self.ray.kill(held.actor)
        self.workers, self.idle, self.refs = [], [], {}

    def close(self) -> None:
        """Leave nothing behind."""
        self.close_workers()
        self.bar.close()
        if self.store is not None:
            self.store.close()


def _unlocked(store: SketchStore) -> None:
    """Move the rows of all parts, as soon as the processes that wrote them are gone."""
    deadline = time.monotonic() + UNLOCKING
    while True:
        try:
            take_parts(store)
            return
        except InUse:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def absolute(path: Any) -> Any:
    """A path as workers in other folders find it; anything that is not there is a name, and stays."""
    return os.path.abspath(path) if isinstance(path, (str, Path)) and os.path.exists(path) else path
