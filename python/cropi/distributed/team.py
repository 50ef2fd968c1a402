"""The processes of a job, as far as they need each other: equal input, numbers of work, errors that reach all.

They talk through the list of keys and values that every launcher brings (``torch.distributed.TCPStore``): no process
group is made, no tensor is sent, and nobody waits for anybody while there is work.
"""

from __future__ import annotations

import itertools
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from cropi.agreement import agree
from cropi.errors import CropiError, shortened, shown
from cropi.store.differences import first_difference

T = TypeVar("T")

# A process says so often that it is there, and is given up after so long.
BEAT, SILENCE = 5.0, 300.0
# Once all were asked to stop, nobody waits longer for another one: schedulers kill after 30 s.
STOPPING = 10.0
AGAIN = "finished prompts are stored; run the same command again"


class RankFailed(CropiError):
    """Another process of the job failed, and this one ends with it."""


class Team:
    """This process among the others.

    Every process makes the same calls of :meth:`gather`, :meth:`agree`, :meth:`share` and :meth:`same` in the same
    order. An error outside of them is told to the others by :meth:`telling`.

    Args:
        store: a ``torch.distributed.Store`` that all of them share.
        rank, world: its number, and how many there are.
        silence: seconds without a sign of life after which a process is given up.
    """

    def __init__(self, store: Any, rank: int, world: int, *, silence: float = SILENCE) -> None:
        self.store, self.rank, self.world, self.silence = store, rank, world, silence
        # Whether processes share a model, and wait inside of it for each other.
        self.linked = False
        self._calls, self._jobs = itertools.count(), itertools.count()
        self._beats: dict[int, tuple[int, float]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="cropi-beat", daemon=True)
        self._thread.start()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what only one may write."""
        return self.rank == 0

    # --------------------------------------------------------------------------------- calls that all make together
    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank. Values are pickled."""
        call = next(self._calls)
        self._set(f"{call}/{self.rank}", pickle.dumps(value))
        values: list[T] = [pickle.loads(self._wait(f"{call}/{rank}", rank)) for rank in range(self.world)]
        if call:  # every process that began this call has read the values of the last one
            with suppress(RuntimeError):
                self.store.delete_key(f"{call - 1}/{self.rank}")
        return values

    def share(self, value: T | None) -> T:
        """Rank 0's value, in every process."""
        result: Any = self.gather(value if self.first else None)[0]
        done: T = result
        return done

    def agree(self, work: Callable[[], T]) -> T:
        """Do ``work`` here; if it fails in any process, raise in every one.

        Raises:
            RankFailed: another process failed; names it and repeats its message.
            Exception: whatever ``work`` raised here.
        """
        if self.linked:
            # Others may wait inside of ``work`` for this process, and come to no common call: an error ends them.
            result = work()
            self.gather(None)
            return result
        return agree(
            work, self.gather, _words, lambda rank, problem: RankFailed(f"rank {rank} failed: {problem}")
        )

    def same(self, facts: Mapping[str, Any], remedies: Mapping[str, str]) -> None:
        """Check that a fact is the same in all processes.

        Args:
            facts: JSON values by name.
            remedies: what to do, by the beginning of a fact's dotted name; "" stands for all others.

        Raises:
            CropiError: in every process, the same: names the first process that differs from rank 0, and how.
        """
        every = self.gather(dict(facts))
        try:
            check_same(every, [f"rank {rank}" for rank in range(self.world)], remedies)
        except Unlike as error:
            if self.rank not in (0, error.number):  # those two raise the error itself
                raise RankFailed(str(error)) from None
            raise

    # ------------------------------------------------------------------------------------------------ while they work
    def new_job(self) -> str:
        """A name for the numbers of a job; every process asks for as many names."""
        return f"job-{next(self._jobs)}"

    def claim(self, job: str) -> int:
        """The next number of a job that nobody has claimed yet."""
        return self._do(lambda: int(self.store.add(f"{job}/next", 1))) - 1

    def first_said(self, key: str, value: str) -> str:
        """The value of the process that called this first with ``key``."""
        return self._do(lambda: self.store.compare_set(key, "", value)).decode()

    def stop(self) -> None:
        """Ask all processes to end their work in hand and take no more (Ctrl-C)."""
        self._set("stopped", b"1")

    @property
    def stopped(self) -> bool:
        """Whether one asked for it."""
        return self._has("stopped")

    def check(self) -> None:
        """Raise what another process failed with.

        Raises:
            RankFailed: names it and repeats its message.
        """
        if self._has("failed"):
            rank, problem = pickle.loads(self._do(lambda: self.store.get("failed")))
            if rank != self.rank:
                raise RankFailed(f"rank {rank} failed: {problem}")

    def blame(self, seconds: float) -> None:
        """Wait so long for what another process failed with, and raise it.

        Raises:
            RankFailed: names it and repeats its message.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.check()
            time.sleep(0.05)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """An error inside ends all processes, with its message; at the end this one stops to give signs of life."""
        try:
            yield
        except BaseException as error:
            with suppress(CropiError):
                if not isinstance(error, RankFailed) and not self._has("failed"):
                    self._set("failed", pickle.dumps((self.rank, _words(error))))
            raise
        finally:
            self._leave()

    # ------------------------------------------------------------------------------------------------------- inside
    def _leave(self) -> None:
        """Rank 0 may hold the list: it waits a moment until the others need it no more."""
        self._over.set()
        self._thread.join(timeout=2 * BEAT)  # a thread inside of a call must not meet the interpreter's end
        with suppress(CropiError):
            self._do(lambda: self.store.add("left", 1))
            deadline = time.monotonic() + 10
            while (
                self.first
                and time.monotonic() < deadline
                and self._do(lambda: self.store.add("left", 0)) < self.world
            ):
                time.sleep(0.05)

    def _beat(self) -> None:
        while not self._over.wait(min(BEAT, self.silence / 8)):
            try:
                self.store.add(f"beat/{self.rank}", 1)
            except RuntimeError:  # the next call of the working thread raises it
                return

    def _wait(self, key: str, rank: int) -> bytes:
        """The value of a key that one process sets."""
        pause, begun = 0.001, time.monotonic()
        while not self._has(key):
            if self.stopped and time.monotonic() - begun > STOPPING:
                raise RankFailed(f"stopped, without rank {rank}, which still works or is gone; {AGAIN}")
            self.check()
            self._check_alive(rank)
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
        value: bytes = self._do(lambda: self.store.get(key))
        return value

    def _check_alive(self, rank: int) -> None:
        if rank == self.rank:
            return
        beats, now = self._do(lambda: int(self.store.add(f"beat/{rank}", 0))), time.monotonic()
        before, since = self._beats.get(rank, (-1, now))
        if beats != before:
            self._beats[rank] = beats, now
        elif now - since > self.silence:
            raise CropiError(
                f"rank {rank} has given no sign of life for {now - since:.0f} s: it was killed, or its machine is "
                f"gone; {AGAIN}, with any number of processes"
            )

    def _has(self, key: str) -> bool:
        return bool(self._do(lambda: self.store.check([key])))

    def _set(self, key: str, value: bytes) -> None:
        self._do(lambda: self.store.set(key, value))

    def _do(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except RuntimeError as error:
            raise CropiError(
                f"rank {self.rank} has lost the launcher or the process that keeps the list of work (rank 0): "
                f"{str(error).splitlines()[0]}; {AGAIN}"
            ) from error


class Unlike(CropiError):
    """Two processes do not have the same job; ``number`` is the second one's."""

    number = 0


def check_same(facts: Sequence[Mapping[str, Any]], names: Sequence[str], remedies: Mapping[str, str]) -> None:
    """Check that some processes have the same facts.

    Args:
        facts: of each process, JSON values by name.
        names: of the processes.
        remedies: what to do, by the beginning of a fact's dotted name; "" stands for all others.

    Raises:
        Unlike: names the first process that differs from the first, and how.
    """
    for number, other in enumerate(facts):
        differs = first_difference(dict(facts[0]), dict(other))
        if differs:
            field, left, right = differs
            keys = [key for key in remedies if field == key or field.startswith(f"{key}.")]
            error = Unlike(
                f"{names[number]} does not have the same job as {names[0]}: {field} = {shown(right, 80)} there, "
                f"{shown(left, 80)} in {names[0]}; {remedies[max(keys, key=len)] if keys else remedies['']}"
            )
            error.number = number
            raise error


def _words(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return shortened(text if isinstance(error, CropiError) else f"{type(error).__name__}: {text}")
