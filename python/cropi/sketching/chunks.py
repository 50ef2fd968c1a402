"""The work of a job in numbered pieces that processes take one after the other.

Every process that has the same prompts, model and options cuts the same pieces, so that a number alone says what is to
be computed. A piece is whole micro-batches of the job's order: rows get the bits that one process alone gives them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from cropi.errors import CropiError, shown
from cropi.gradient.batches import MicroBatch, Row, built, cut_batches
from cropi.gradient.estimators import Estimator
from cropi.gradient.layout import Layout
from cropi.gradient.tokenize import TokenGroup
from cropi.store.rows import RowInfo
from cropi.store.store import SketchStore

# A chunk holds at least so many micro-batches, so that whoever hands out chunks has little to do.
BATCHES = 2
# Prompts that are sorted and cut together, unless they hold more tokens; rows without a gradient in a chunk.
WINDOW, MOST_TOKENS, MOST_ROWS = 256, 2**22, 4096
# A chunk of so many times its tokens is cut inside a prompt, at the price of one micro-batch that is computed twice.
LONGEST = 4


@dataclass(frozen=True)
class Chunk:
    """A piece of the work.

    Attributes:
        number: its place in the job, from 0.
        window: the number of the window of prompts that it is cut from.
        prompts: whose rows it gives.
        batches: the rows of the micro-batches that hold one of them; other prompts only fill these.
        rows: of prompts for which nothing has to be computed.
        tokens: through the model, padding included.
        cut: a hash of how the whole window was cut; "" where nobody compares it.
    """

    number: int
    window: int
    prompts: frozenset[str] = frozenset()
    batches: list[list[Row]] = field(default_factory=list)
    rows: list[RowInfo] = field(default_factory=list)
    tokens: int = 0
    cut: str = ""

    def built(self, estimator: Estimator, stored: bool, done: frozenset[str]) -> Iterator[MicroBatch]:
        """The chunk's micro-batches, without those whose prompts are all ``done`` or belong to another chunk."""
        return built(self.batches, estimator, stored, done if not self.cut else _Rest(self.prompts, done))


class _Rest:
    """The prompts that need not be computed: those of other chunks, and those that are done."""

    def __init__(self, prompts: frozenset[str], done: frozenset[str]) -> None:
        self.prompts, self.done = prompts, done

    def __contains__(self, name: object) -> bool:
        return name not in self.prompts or name in self.done


class Participant(Protocol):
    """How one process takes part in a job that several share.

    Attributes:
        tokens: of a chunk, about; padding included. None: a chunk is a whole window.
        done: prompts whose rows are in other stores.
        linked: other processes run every pass of the model with this one, which may not leave one out or add one.
        writes: :meth:`take` uses the store: when the next chunk is asked for, the rows of the last one were added.
    """

    tokens: int | None
    done: frozenset[str]
    linked: bool = False
    writes: bool = False

    def take(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """The chunks that this process computes."""

    def finish(self, store: SketchStore) -> None:
        """Called when all chunks of this process are in the store."""

    def begin_pass(self) -> None:
        """A pass of the model follows."""
        return None

    def agreed(self, said: bool) -> bool:
        """One decision for all processes that compute the same, whose ``said`` may differ."""
        return said

    def leave(self, interrupted: bool, idle: Callable[[], None]) -> None:
        """Called when no chunk follows; ``idle()`` runs an empty pass of the model."""
        return None


class EveryChunk(Participant):
    """This process computes all chunks."""

    tokens = None
    done = frozenset()

    def take(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """See :class:`Participant`."""
        return chunks

    def finish(self, store: SketchStore) -> None:
        """The store holds all prompts of the job."""
        store.finish()


class Dealt(Participant):
    """Chunk after chunk goes to the process that has the fewest tokens yet; nobody has to be asked.

    >>> chunks = [Chunk(number, 0, tokens=tokens) for number, tokens in enumerate([5, 1, 2, 2])]
    >>> [chunk.number for chunk in Dealt(2, 3).take(iter(chunks))]
    [1, 3]
    """

    def __init__(self, number: int, count: int, tokens: int = 1, done: frozenset[str] = frozenset()) -> None:
        self.number, self.count, self.tokens, self.done = number, count, tokens, done

    def take(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """See :class:`Participant`."""
        loads = [0] * self.count
        for chunk in chunks:
            least = loads.index(min(loads))
            loads[least] += chunk.tokens
            if least == self.number - 1:
                yield chunk

    def finish(self, store: SketchStore) -> None:
        """The store holds all prompts of the share."""
        store.finish()


def make_chunks(
    items: Iterable[TokenGroup | RowInfo],
    layout: Layout,
    *,
    budget: int,
    tokens: int | None = None,
    window: int = WINDOW,
) -> Iterator[Chunk]:
    """Cut a job into chunks.

    Args:
        items: all prompts of the job, those that are done too; or rows, where nothing has to be computed.
        layout, budget: as for :func:`cropi.gradient.batches.make_batches`.
        tokens: of a chunk, at least, padding included; None: a chunk is a whole window.
        window: prompts that are sorted and cut together; fewer, where they hold :data:`MOST_TOKENS`.
    """
    held: list[TokenGroup] = []
    rows: list[RowInfo] = []
    number = windows = size = 0
    for item in items:
        if isinstance(item, RowInfo):
            rows.append(item)
        else:
            held.append(item)
            size += len(item.prompt) + sum(map(len, item.responses))
        if len(rows) == MOST_ROWS:
            yield Chunk(number, windows, rows=rows, cut="rows" if tokens else "")
            rows, number = [], number + 1
        if len(held) == window or size >= MOST_TOKENS:
            for chunk in _window(held, rows, layout, budget, tokens, number, windows):
                yield chunk
                number = chunk.number + 1
            held, rows, windows, size = [], [], windows + 1, 0
    yield from _window(held, rows, layout, budget, tokens, number, windows)


def _window(
    groups: list[TokenGroup],
    rows: list[RowInfo],
    layout: Layout,
    budget: int,
    tokens: int | None,
    number: int,
    window: int,
) -> Iterator[Chunk]:
    """The chunks of one window; the first one gives the rows too."""
    twice = [name for name, count in Counter(group.id for group in groups).items() if count > 1]
    if twice:  # those of other windows, the store finds
        raise CropiError(
            f"groups holds the prompt {shown(twice[0])} twice: give every prompt an id of its own"
        )
    batches = cut_batches(groups, layout, budget)
    if tokens is None:
        if batches or rows:
            yield Chunk(number, window, frozenset(group.id for group in groups), batches, rows)
        return
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for b, batch in enumerate(batches):
        for row in batch:
            first.setdefault(row.group.id, b)
            last[row.group.id] = b
    cut = _digest(batches, rows)
    for names, size in _shares(batches, tokens):
        part = batches[first[names[0]] : last[names[-1]] + 1]
        yield Chunk(number, window, frozenset(names), part, rows, size, cut)
        number, rows = number + 1, []
    if rows:
        yield Chunk(number, window, rows=rows, cut=cut)


def _shares(batches: list[list[Row]], tokens: int) -> Iterator[tuple[list[str], int]]:
    """The prompts of each chunk, in order of their first rows, and its tokens."""
    names: list[str] = []
    size, before = 0, ""
    for batch in batches:
        for row in batch:
            if row.group.id != before:
                before = row.group.id
                names.append(before)
        size += len(batch) * max(row.length for row in batch)
        if names and size >= tokens and (batch[-1].last or size >= LONGEST * tokens):
            yield names, size
            names, size = [], 0
    if names:
        yield names, size


def _digest(batches: list[list[Row]], rows: list[RowInfo]) -> str:
    shape = [[(row.group.id, row.chosen, row.shared) for row in batch] for batch in batches]
    text = repr((shape, [(row.id, row.status, row.reason) for row in rows]))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
