"""What runs in one actor of a Ray cluster: the job in a thread, which waits for the number of its next chunk."""

from __future__ import annotations

import functools
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from cropi.distributed.ranks import check_undivided, facts, prompts_digest
from cropi.errors import CropiError
from cropi.model.policy import Policy
from cropi.sketching.chunks import BATCHES, Chunk, Participant
from cropi.sketching.job import SketchJob
from cropi.sketching.job_store import settle_products
from cropi.sketching.run import Prepared, prepare
from cropi.sketching.summary import Summary
from cropi.store.parts import part_path
from cropi.store.store import SketchStore

Make = Callable[[], tuple[Policy, SketchJob]]
Call = TypeVar("Call", bound=Callable[..., Any])


@dataclass(frozen=True)
class JobFacts:
    """What a worker says of its job before it begins."""

    manifest: dict[str, Any]
    facts: dict[str, Any]
    total: int
    tokens_per_batch: int
    shard_rows: int
    shard_bytes: int
    bad_records: tuple[str, ...]
    pid: int
    node: str


def in_words(method: Call) -> Call:
    """Every error of a method as one that can be sent: where the driver cannot unpickle an error, Ray gives it one that
    looks like a worker's death."""

    @functools.wraps(method)
    def call(*args: Any) -> Any:
        try:
            return method(*args)
        except CropiError:
            raise
        except Exception as error:
            raise CropiError(f"{type(error).__name__}: {error}") from error

    return call  # type: ignore[return-value]


class Worker:
    """:meth:`prepare`, then :meth:`begin`, then :meth:`work` for every chunk, and :meth:`finish`; :meth:`here` at any
    time.

    Args:
        make: gives the policy and the job.
    """

    def __init__(self, make: Make) -> None:
        self.make = make
        self.ready: Prepared | None = None
        self.part = Asked(1, frozenset())

    @in_words
    def prepare(self) -> JobFacts:
        """Read the trajectories, load the model, and say what the rows depend on."""
        policy, job = self.make()
        check_undivided(job)
        ready = self.ready = prepare(policy, job, progress=False)
        budget, manifest = ready.tokens_per_batch, ready.manifest()
        ready.job = replace(ready.job, tokens_per_batch=None)  # the driver gives one for all workers
        return JobFacts(
            manifest, facts(ready, manifest), ready.total, budget, job.shard_rows, job.shard_bytes,
            tuple(ready.summary.bad_records), os.getpid(), socket.gethostname(),
        )  # fmt: skip

    def here(self) -> None:
        """Nothing: whether the worker lives."""

    @in_words
    def begin(self, out: Path, number: int, manifest: Mapping[str, Any], tokens_per_batch: int) -> str:
        """Open this worker's store; says which prompts it sees in the job's."""
        assert self.ready is not None
        whole = SketchStore.open(out)
        settle_products(whole.manifest)
        done = frozenset(row.id for row in whole.rows())
        job = self.ready.job = replace(self.ready.job, tokens_per_batch=tokens_per_batch)
        store = SketchStore.create(
            part_path(out, number), manifest, shard_rows=job.shard_rows, shard_bytes=job.shard_bytes
        )
        self.part = Asked(BATCHES * tokens_per_batch, done, store)
        threading.Thread(target=self._run, args=(store,), name="cropi-sketch", daemon=True).start()
        return prompts_digest(done)

    @in_words
    def work(self, number: int) -> dict[int, str] | None:
        """Compute a chunk; when this returns, its rows are on the disk.

        Returns:
            How the windows were cut that were met for the first time; None: there is no chunk with this number.
        """
        answer: dict[int, str] | None = self.part.ask(number)
        return answer

    @in_words
    def finish(self) -> Summary:
        """Close the store, if there is one."""
        assert self.ready is not None
        if self.part.store is not None:
            self.part.ask(None)
        return replace(self.ready.summary, store=None)

    def _run(self, store: SketchStore) -> None:
        assert self.ready is not None
        try:
            with store:
                while self.part.going_on:
                    self.ready.fill(store, progress=False, participant=self.part)
            self.part.answers.put(None)
        except BaseException as error:
            self.part.answers.put(error)


class Asked(Participant):
    """Chunks by the numbers that are asked for, in any order: see :class:`cropi.sketching.chunks.Participant`.

    A number before the place where a pass over the trajectories is ends the pass, and the next one begins with it.
    """

    writes = True

    def __init__(self, tokens: int, done: frozenset[str], store: SketchStore | None = None) -> None:
        self.tokens, self.done, self.store = tokens, done, store
        self.numbers: queue.Queue[int | None] = queue.Queue()
        self.answers: queue.Queue[Any] = queue.Queue()
        self.kept: int | None = None
        self.going_on = True
        self.told: set[int] = set()

    def ask(self, number: int | None) -> Any:
        """Ask for a chunk (None: for the end), and wait for the answer.

        Raises what ended the job.
        """
        self.numbers.put(number)
        answer = self.answers.get()
        if isinstance(answer, BaseException):
            self.answers.put(answer)  # a second call raises it again
            raise answer
        return answer

    def take(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """See :class:`cropi.sketching.chunks.Participant`."""
        number, self.kept = self.kept if self.kept is not None else self.numbers.get(), None
        cuts: dict[int, str] = {}
        last = -1
        for chunk in chunks:
            last = chunk.number
            if chunk.cut != "rows" and chunk.window not in self.told:
                self.told.add(chunk.window)
                cuts[chunk.window] = chunk.cut
            if number is not None and chunk.number < number:
                continue
            if number is None or chunk.number > number:
                break
            yield chunk
            assert self.store is not None
            self.store.flush()
            self.answers.put(cuts)
            number, cuts = self.numbers.get(), {}
        else:
            while number is not None and number > last:  # there is no chunk of that number
                self.answers.put(None)
                number = self.numbers.get()
        self.told -= set(cuts)
        self.kept, self.going_on = number, number is not None

    def finish(self, store: SketchStore) -> None:
        """The rows are safe; the driver moves them to the job's store."""
        store.flush()
