"""Memory as a kernel sees it: tensors at their own addresses, and shared memory that finds races."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

from ptx_emulator.numbers import Array


class OutOfBounds(AssertionError):
    """An access outside of every operand, or one that is not aligned to its size."""


class Race(AssertionError):
    """Two warps touch the same shared byte between two barriers, and one of them writes."""


def _word(size: int) -> np.dtype[Any]:
    """So many bytes as one element: numpy moves a row of bytes 70 times as slowly."""
    assert size & size - 1 == 0
    return np.dtype(f"u{size}" if size <= 8 else f"V{size}")


def _any(values: Array) -> bool:
    """`values.any()`, which takes three times as long for what few lanes touch."""
    return np.count_nonzero(values) > 0


def _differ(a: Array, b: Array) -> bool:
    return _any(a.view(np.uint8) != b.view(np.uint8))


class GlobalMemory:
    """The storages of a launch's tensors. Whatever is not one of them faults."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        spans = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors}
        self.spans = sorted(span for span in spans if span[1])
        self.begin = np.array([begin for begin, _ in self.spans], np.uint64)
        self.end = self.begin + np.array([size for _, size in self.spans], np.uint64)
        self.bytes = [
            np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(at)) for at, size in self.spans
        ]

    def _rows(self, s: int, size: int) -> tuple[Array, np.uint64]:
        """A span as words of ``size`` bytes, and where the first begins: an access that is aligned is one word."""
        skipped = -self.spans[s][0] % size
        whole = (len(self.bytes[s]) - skipped) // size * size
        return self.bytes[s][skipped : skipped + whole].view(_word(size)), self.begin[s] + np.uint64(skipped)

    def _spans_of(self, address: Array, size: int, what: str) -> Array:
        span = np.searchsorted(self.begin, address, "right").astype(np.int64) - 1
        good = (span >= 0) & (address + np.uint64(size) <= self.end[np.maximum(span, 0)])
        if not good.all():
            raise OutOfBounds(
                f"{what} of {size} bytes at {int(address[~good][0]):#x}: in no tensor of the launch"
            )
        if _any(address & np.uint64(size - 1)):
            raise OutOfBounds(f"{what} of {size} bytes at an address that is not a multiple of {size}")
        return span

    def load(self, address: Array, size: int) -> Array:
        """uint8 [lanes, size]"""
        span = self._spans_of(address, size, "a load")
        out = np.empty(len(address), _word(size))
        for s in np.flatnonzero(np.bincount(span)):
            rows, begin = self._rows(s, size)
            lanes = span == s
            out[lanes] = rows[(address[lanes] - begin) // np.uint64(size)]
        return out.view(np.uint8).reshape(-1, size)

    def store(self, address: Array, values: Array) -> None:
        size = values.shape[1]
        span = self._spans_of(address, size, "a store")
        words = np.ascontiguousarray(values).view(_word(size))[:, 0]
        for s in np.flatnonzero(np.bincount(span)):
            rows, begin = self._rows(s, size)
            lanes = span == s
            rows[(address[lanes] - begin) // np.uint64(size)] = words[lanes]


# Who touched a place last, and when, is one word: 64 times the number of the block's barriers, plus the warp (of 32 at
# most) or one of these.
TENSOR_CORES, SEVERAL = 62, 63


def _others(marks: Array, mine: Array) -> Array:
    """Which of the marks are of the same interval between two barriers and of another warp: 0 < difference < 64."""
    return (marks ^ mine) - np.uint32(1) < np.uint32(63)


class SharedMemory:
    """Of several blocks at once. An access names its block and warp; ``epoch`` counts a block's barriers.

    A place is ``grain`` bytes: every access touches whole places. Without ``marks``, two warps that touch a place
    between barriers are no race; copies that are under way and operands of products that have not ended still are.
    """

    def __init__(self, blocks: int, size: int, grain: int = 1, marks: bool = True) -> None:
        self.size, self.grain, self.marks = size, grain, marks
        self.of_a_block = -(-size // grain)
        places = blocks * self.of_a_block
        # NaN, whatever the width: nobody may count on zeros.
        self.words = np.full(places * grain, 0xFF, np.uint8).view(_word(grain))
        self.epoch = np.zeros(blocks, np.uint32)
        self.written, self.read = (np.full(places, 0xFFFFFFFF, np.uint32) for _ in range(2))
        self.in_flight = np.zeros(places, np.bool_)  # to where an asynchronous copy is under way
        # Operands of tensor cores that have not been waited for.
        self.in_use = np.zeros(places, np.int32)
        # Of either, how many: most of the time there are none to look at.
        self.n_in_flight = self.n_in_use = 0
        self.copies = AsyncCopies(self)

    def places(self, block: Array, address: Array, size: int, what: str) -> Array:
        """[accesses, size / grain] indices of places."""
        address = address.astype(np.int64)
        highest = int(address.view(np.uint64).max())  # of which a negative one is larger than any size
        if highest + size > self.size:
            raise OutOfBounds(f"{what} of {size} bytes of shared memory at {highest} of {self.size}")
        if np.bitwise_or.reduce(address) & size - 1:
            raise OutOfBounds(f"{what} of {size} bytes at an address that is not a multiple of {size}")
        assert size % self.grain == 0, "an access to a part of a place"
        address >>= self.grain.bit_length() - 1
        address += block * self.of_a_block
        first = address[:, None]
        return first if size == self.grain else first + np.arange(size // self.grain)

    def _marks(self, block: Array, warp: Array) -> Array:
        """[accesses, 1]"""
        return (self.epoch[block] * np.uint32(64) + warp.astype(np.uint32))[:, None]

    def _others_read(self, place: Array, mine: Array) -> bool:
        read = self.marks and _any(_others(self.read.take(place), mine))
        return read or self.n_in_use > 0 and _any(self.in_use.take(place))

    def _under_way(self, place: Array) -> bool:
        return self.n_in_flight > 0 and _any(self.in_flight.take(place))

    def use(self, place: Array) -> None:
        """A product reads there from now on, every place once."""
        self.in_use[place] += 1
        self.n_in_use += place.size

    def leave(self, place: Array) -> None:
        """`use`, ended."""
        self.in_use[place] -= 1
        self.n_in_use -= place.size

    def load(self, block: Array, warp: Array, address: Array, size: int) -> Array:
        """uint8 [accesses, size]"""
        place, mine = self.places(block, address, size, "a load"), self._marks(block, warp)
        if self._under_way(place):
            raise Race("a load of what an asynchronous copy has not delivered")
        got = self.words.take(place).view(np.uint8)
        if not self.marks:
            return got
        if _any(_others(self.written.take(place), mine)):
            raise Race("a load of what another warp wrote since the last barrier")
        several = mine | np.uint32(SEVERAL)
        self.read[place] = np.where(_others(self.read.take(place), mine), several, mine)
        shared = self.read.take(place) != mine  # also by warps that read a place in this very call
        if _any(shared):
            self.read[place[shared]] = np.broadcast_to(several, place.shape)[shared]
        return got

    def store(self, block: Array, warp: Array, address: Array, values: Array) -> None:
        place, mine = self.places(block, address, values.shape[1], "a store"), self._marks(block, warp)
        words = np.ascontiguousarray(values).view(self.words.dtype)
        if self._others_read(place, mine):
            raise Race("a store to what others have read since the last barrier, or still read")
        if self._under_way(place):
            raise Race("a store to where an asynchronous copy is under way")
        others = _others(self.written.take(place), mine)
        # Warps that write the same bytes do no harm.
        if self.marks and _any(others) and _differ(self.words[place[others]], words[others]):
            raise Race("a store to what another warp wrote since the last barrier")
        self.words[place] = words
        if _differ(self.words.take(place), words):
            raise Race("two lanes store different values to the same byte at once")
        self.written[place] = mine

    def announce(self, block: Array, warp: Array, address: Array, size: int) -> None:
        """A copy is under way: nobody may still be reading there, and nobody may until it is delivered."""
        place = self.places(block, address, size, "an asynchronous copy")
        if self._others_read(place, self._marks(block, warp)):
            raise Race("an asynchronous copy to what others have read since the last barrier, or still read")
        if self._under_way(place):
            raise Race("two asynchronous copies to the same place")
        self.in_flight[place] = True
        self.n_in_flight += place.size

    def deliver(self, block: Array, warp: Array, address: Array, values: Array) -> None:
        place = self.places(block, address, values.shape[1], "an asynchronous copy")
        self.in_flight[place] = False
        self.n_in_flight -= place.size
        self.store(block, warp, address, values)


class AsyncCopies:
    """cp.async: copies belong to their lane's group, and arrive when the lane waits for that group."""

    def __init__(self, shared: SharedMemory) -> None:
        self.shared = shared
        self.group: Array | None = None  # that the next copy of each lane belongs to
        self.pending: list[tuple[Array, Array, Array, Array]] = []  # lane, group, address, bytes

    def begin(self, lanes: Array, block: Array, warp: Array, address: Array, values: Array) -> None:
        self.shared.announce(block, warp, address, values.shape[1])
        group = np.zeros(len(lanes), np.int64) if self.group is None else self.group[lanes]
        self.pending.append((lanes, group, address, values))

    def commit(self, mask: Array) -> None:
        self.group = np.zeros(len(mask), np.int64) if self.group is None else self.group
        self.group[mask] += 1

    def wait(self, mask: Array, pending: int, block: Array, warp: Array) -> None:
        """Until no more than ``pending`` of a lane's committed groups are under way; -1: nor what is not committed."""
        if self.group is not None:
            self.deliver(self.taken(mask, self.group - pending), block, warp)

    def taken(self, mask: Array, before: Array | None = None) -> list[tuple[Array, Array, Array]]:
        """(lanes, addresses, bytes) of the lanes' pending copies, of groups below ``before``: no longer pending."""
        left, taken = [], []
        for lanes, group, address, values in self.pending:
            done = mask[lanes] if before is None else mask[lanes] & (group < before[lanes])
            if done.any():
                taken.append((lanes[done], address[done], values[done]))
            if not done.all():
                left.append((lanes[~done], group[~done], address[~done], values[~done]))
        self.pending = left
        return taken

    def deliver(self, copies: list[tuple[Array, Array, Array]], block: Array, warp: Array) -> None:
        for lanes, address, values in copies:
            self.shared.deliver(block[lanes], warp[lanes], address, values)
