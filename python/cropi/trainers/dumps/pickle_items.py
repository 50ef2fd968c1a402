"""The items of a long list in a pickle, one after the other, so that one at a time is in memory as objects.

A reader of pickles makes all objects before it returns, and these take up to fourteen times the bytes of the file. Here
the opcodes are gone through first, by regular expressions, to find where the items of the largest list begin. Then a
reader gets the bytes before the list, and item after item. What the pickle refers to by number (its memo) stays; the
other entries that an item has made are replaced by None once the item was given.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import numpy as np

from cropi.errors import warn

SMALL = 2**20  # a pickle of fewer bytes is read at once
LARGE = 72 * 2**20  # the objects of one with more bytes may take more than 1 GiB
MARK, PROTO, FRAME, STOP, APPEND, LIST, TABLE, NAMED = b"(\x80\x95.a]}c"
# How many bytes follow an opcode, and how many of them say how many more do.
FIXED = dict.fromkeys(b"N\x88\x89]})\x8fsabR\x81\x92\x85\x86\x87\x93\x94", 0) | dict.fromkeys(b"Khq\x80", 1)
FIXED |= dict.fromkeys(b"Jjr", 4) | dict.fromkeys(b"G\x95", 8) | {ord("M"): 2}
COUNTED = dict.fromkeys(b"\x8cUC\x8a", 1) | dict.fromkeys(b"XTB\x8b", 4) | dict.fromkeys(b"\x8d\x8e\x96", 8)
# What an opcode adds to the values on the stack; those of ENDS take what lies above a mark.
ADDS = dict.fromkeys((*b"N\x88\x89]})\x8fKhMJjGc", *COUNTED), 1) | dict.fromkeys(b"qr\x80\x94\x85\x95", 0)
ADDS |= dict.fromkeys(b"abR\x81\x86\x93", -1) | dict.fromkeys(b"s\x92\x87", -2)
MAKE = b"tdlo\x91"  # a value of it
ENDS = MAKE + b"eu\x90"
PUTS, GETS, NUMBERS = b"qr\x94", b"hj", b"KMJG"


def _any(*parts: bytes) -> bytes:
    return b"(?:" + b"|".join(parts) + b")"


def _one_of(ops: bytes) -> bytes:
    return b"[" + re.escape(ops) + b"]"


def _fixed(ops: bytes) -> list[bytes]:
    return [re.escape(bytes([op])) + b".{%d}" % FIXED[op] for op in ops]


MEMO = _any(*_fixed(PUTS + GETS))
GLOBAL = rb"c[^\n]*\n[^\n]*\n"
SHORT = [
    re.escape(bytes([op]))
    + _any(*(re.escape(size.to_bytes(COUNTED[op], "little")) + b".{%d}" % size for size in range(48)))
    for op in b"X\x8c\x8a"
]
PLAIN = _one_of(bytes(op for op in FIXED if not FIXED[op] and op not in PUTS))
OTHER = _any(*_fixed(NUMBERS), PLAIN, *SHORT, GLOBAL)
# Repetitions are bounded, because each takes memory until the expression has matched.
_run = re.compile(
    _any(MEMO, OTHER, rb"\(" + _any(MEMO, OTHER) + b"{0,99}[eut]") + b"{0,999}", re.DOTALL
).match
_memo = re.compile(_any(OTHER, _one_of(b"(" + ENDS)) + b"{0,999}(" + MEMO + b")?", re.DOTALL).findall
_numbers = re.compile(_any(*_fixed(NUMBERS)) + b"{100,1000}", re.DOTALL).match
_names = re.compile(GLOBAL).match


class Unsplit(Exception):
    """There is no list in a pickle that can be read item by item."""


def load(data: bytes, make: Callable[..., Any]) -> Any:
    """What a pickle holds; if it can be split, a :class:`PickleItems` stands in place of its largest list's items.

    That list, or tuple, is what the pickle holds, or a value of the table that it holds.

    Args:
        data: the pickle.
        make: makes a :class:`cropi.trainers.dumps.unpickle.Reader` of a file, and of what stands for the items.

    Raises:
        Forbidden, pickle.UnpicklingError, ...: as the reader.
    """
    feed, parts = _Feed(), None
    feed.give(data)
    if len(data) >= SMALL:
        try:
            before, parts, behind = _split(data, make)
            feed.give(before, b"(J\0\0\0\0Qe", behind)
        except (Unsplit, IndexError):  # of the latter: it ends within an opcode
            if (size := len(data)) >= LARGE:
                warn(
                    f"a pickle of {size >> 20} MiB is not one list, or a table with one behind its other values, as "
                    f"Python writes it: its objects are made at once and may take {14 * size / 2**30:.2g} GiB; dump "
                    "such a list, or write JSON lines, if memory is short"
                )
    return make(feed, parts=parts).load()


class PickleItems:
    """The items of a list in a pickle; they are made while it is gone through, anew each time.

    Args:
        make: makes a reader of a file.
        data: the pickle.
        before: the opcodes in front of the first item.
        items: the opcodes of every item.
        puts: how many entries of the memo are made in front of the first item, and by each one.
        used: the entries that are referred to.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        data: bytes,
        before: bytes,
        items: list[list[slice]],
        puts: list[int],
        used: set[int],
    ) -> None:
        self._make, self._data, self._before, self._items, self._puts = make, data, before, items, puts
        self._used = np.array(sorted(used), dtype=np.int64)

    def __iter__(self) -> Iterator[Any]:
        feed = _Feed()
        reader = self._make(feed)
        feed.give(self._before, b"N.")
        reader.load()
        protocol, entries, forget = (
            self._before[:2] if self._before[:1] == b"\x80" else b"",
            self._puts[0],
            b"",
        )
        for item, puts in zip(self._items, self._puts[1:]):
            feed.give(protocol, forget, *(self._data[piece] for piece in item), b".")
            yield reader.load()
            forget = self._forget(entries, entries + puts)
            entries += puts

    def _forget(self, begin: int, end: int) -> bytes:
        """Opcodes that put None in place of the entries from ``begin`` to ``end`` that nothing refers to."""
        first, last = np.searchsorted(self._used, (begin, end))
        entries = np.delete(np.arange(begin, end), self._used[first:last] - begin)
        ops = np.empty(len(entries), dtype=[("none", "S1"), ("put", "S1"), ("entry", "<u4"), ("pop", "S1")])
        ops["none"], ops["put"], ops["entry"], ops["pop"] = b"N", b"r", entries, b"0"
        return ops.tobytes()


class _Feed:
    """A file whose bytes are given while it is read."""

    def __init__(self) -> None:
        self._held, self._at = b"", 0

    def give(self, *parts: bytes) -> None:
        self._held, self._at = b"".join(parts), 0

    def peek(self, size: int) -> bytes:
        return self._held[self._at : self._at + size]

    def read(self, size: int) -> bytes:
        read = self.peek(size)
        self._at += len(read)
        return read

    def readline(self) -> bytes:
        end = self._held.find(b"\n", self._at) + 1
        return self.read((end or len(self._held)) - self._at)


def _split(data: bytes, make: Callable[..., Any]) -> tuple[bytes, PickleItems, bytes]:
    scan = _Scan(data)
    begin, items, end = scan.largest()
    scan.memo(end, len(data))
    if scan.used:  # by what is read before the items are
        raise Unsplit
    puts = [scan.memo(*place) for place in ((0, begin), *items)]
    pieces = [scan.without_frames(*place) for place in ((0, begin), *items, (end, len(data)))]
    before, behind = (b"".join(data[piece] for piece in pieces[i]) for i in (0, -1))
    return before, PickleItems(make, data, before, pieces[1:-1], puts, scan.used), behind


class _Scan:
    """Goes through the opcodes of a pickle.

    Attributes:
        used: the entries of the memo that are referred to, where :meth:`memo` has looked.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self.used = data, set[int]()
        # Where frames begin and end, and what :meth:`memo` passes by: these, long texts and many numbers;
        # in order.
        self._frames, self._unknown = array("q"), array("q")
        self._ends = dict[int, int]()  # of batches, by where they begin

    def largest(self) -> tuple[int, list[tuple[int, int]], int]:
        """The pickle's list, or the largest list of its table: where its first batch begins, its items, where the last
        batch has ended.

        Raises:
            Unsplit, IndexError: the pickle has another form, or the list fewer than two items.
        """
        data, place, end = self._data, self._behind(0), -1
        if data[place] == TABLE:
            place = self._behind(place + 1)
            if data[place] != MARK:
                raise Unsplit
            bounds = self._values(place + 1, ENDS)
            values = list(zip(bounds, bounds[1:]))[1::2]  # between keys
            place, end = max(values, key=lambda value: value[1] - value[0])
        if data[place] != LIST:
            raise Unsplit
        begin = place = self._behind(place + 1)
        items: list[tuple[int, int]] = []
        while place != end and data[place] != STOP:
            marked = data[place] == MARK
            bounds = self._values(place + marked, b"e" if marked else b"a")
            items += zip(bounds, bounds[1:])
            place = self._behind(bounds[-1] + 1)
        if len(items) < 2:
            raise Unsplit
        return begin, items, place

    def memo(self, begin: int, end: int) -> int:
        """How many entries are made between two places; those that are referred to are added to ``used``."""
        ops: list[bytes] = []
        for piece in _outside(begin, end, self._unknown):
            ops += filter(None, _memo(self._data, piece.start, piece.stop))
        self.used.update(int.from_bytes(op[1:], "little") for op in set(ops) if op[0] in GETS)
        kinds = bytes(map(itemgetter(0), ops))
        return len(kinds) - sum(map(kinds.count, GETS))

    def without_frames(self, begin: int, end: int) -> list[slice]:
        """What lies between two places, without the beginnings of frames, which may end behind an item."""
        return list(_outside(begin, end, self._frames))

    def _behind(self, place: int) -> int:
        """The next place at which something else stands than what a value may begin with or be followed by."""
        while (op := self._data[place]) in PUTS or op in (PROTO, FRAME):
            place = self._after(place)
        return place

    def _values(self, place: int, last: bytes) -> list[int]:
        """Where the values begin that are put on the stack from ``place`` on, and the place of the opcode of ``last``
        that takes them: APPEND takes one, the others all."""
        data, begins = self._data, list[int]()
        while (op := data[place]) not in last or op == APPEND and len(begins) > 1:
            if op == MARK:
                begin, place = place, self._after_batch(place + 1)
                if data[place - 1] in MAKE:
                    begins.append(begin)
                continue
            if (adds := ADDS.get(op)) is None or len(begins) + adds < 1:
                raise Unsplit
            if adds > 0:
                begins.append(place)
            else:
                del begins[len(begins) + adds :]
            place = self._after(place)
        return [*begins, place]

    def _after_batch(self, place: int) -> int:
        """The place behind the opcode that takes what was put on the stack since the mark before ``place``."""
        if place in self._ends:
            return self._ends[place]
        opened = [place]
        while opened:
            place = _run(self._data, place).end()  # type: ignore[union-attr]  # it matches nothing, too
            op = self._data[place]
            if op == MARK:
                opened.append(place + 1)
                place = self._behind_numbers(place + 1)
            elif op in ENDS:
                place += 1
                self._ends[opened.pop()] = place
            else:
                place = self._after(place)
        return place

    def _behind_numbers(self, place: int) -> int:
        """The place behind a batch that begins with many numbers."""
        if not (numbers := _numbers(self._data, place)):
            return place
        self._note(self._unknown, place, numbers.end())
        return numbers.end()

    def _after(self, place: int) -> int:
        """The place behind an opcode and what belongs to it."""
        op, begin = self._data[place], place + 1
        if op in FIXED:
            end = begin + FIXED[op]
        elif op in COUNTED:
            end = begin + COUNTED[op] + int.from_bytes(self._data[begin : begin + COUNTED[op]], "little")
        elif op == NAMED and (names := _names(self._data, place)):
            end = names.end()
        else:
            raise Unsplit
        if end > len(self._data):
            raise Unsplit
        if op in (PROTO, FRAME) or op in COUNTED:
            self._note(self._unknown, place, end)
        if op == FRAME:
            self._note(self._frames, place, end)
        return end

    def _note(self, holes: array[int], begin: int, end: int) -> None:
        """Add a hole; a part of the pickle may be gone through again."""
        if not holes or end > holes[-1]:
            holes.extend((begin, end))


def _outside(begin: int, end: int, holes: array[int]) -> Iterator[slice]:
    """What lies between two places and in none of the holes; each of these is two entries, in order."""
    first = bisect_left(holes, begin)
    for i in range(first + first % 2, len(holes), 2):  # one may end where this begins
        if holes[i] >= end:
            break
        yield slice(begin, holes[i])
        begin = holes[i + 1]
    yield slice(begin, end)
