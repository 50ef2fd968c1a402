"""Memory as a kernel sees it: tensors at their own addresses, and shared memory that finds races."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]


class OutOfBounds(AssertionError):
    """An access outside of every operand, or one that is not aligned to its size."""


class Race(AssertionError):
    """Two warps touch the same shared byte between two barriers, and one of them writes."""


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

    def _spans_of(self, address: Array, size: int, what: str) -> Array:
        span = np.searchsorted(self.begin, address, "right").astype(np.int64) - 1
        good = (span >= 0) & (address + np.uint64(size) <= self.end[np.maximum(span, 0)])
        if not good.all():
            raise OutOfBounds(
                f"{what} of {size} bytes at {int(address[~good][0]):#x}: in no tensor of the launch"
            )
        if (address % np.uint64(size)).any():
            raise OutOfBounds(f"{what} of {size} bytes at an address that is not a multiple of {size}")
        return span

    def load(self, address: Array, size: int) -> Array:
        """uint8 [lanes, size]"""
        span = self._spans_of(address, size, "a load")
        out = np.empty((len(address), size), np.uint8)
        for s in np.unique(span):
            lanes = span == s
            out[lanes] = self.bytes[s][
                (address[lanes] - self.begin[s])[:, None] + np.arange(size, dtype=np.uint64)
            ]
        return out

    def store(self, address: Array, values: Array) -> None:
        span = self._spans_of(address, values.shape[1], "a store")
        for s in np.unique(span):
            lanes = span == s
            place = (address[lanes] - self.begin[s])[:, None] + np.arange(values.shape[1], dtype=np.uint64)
            self.bytes[s][place] = values[lanes]


NOBODY, SEVERAL = -1, -2


class SharedMemory:
    """Of several blocks at once. An access names its block and warp; ``epoch`` counts a block's barriers."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        # NaN, whatever the width: nobody may count on zeros.
        self.bytes = np.full(blocks * size, 0xFF, np.uint8)
        self.epoch = np.zeros(blocks, np.int32)
        self.written, self.read = (np.full(blocks * size, -1, np.int32) for _ in range(2))
        self.writer, self.reader = (np.full(blocks * size, NOBODY, np.int32) for _ in range(2))
        self.in_flight = np.zeros(blocks * size, np.bool_)  # to where an asynchronous copy is under way
        # Operands of tensor cores that have not been waited for.
        self.in_use = np.zeros(blocks * size, np.int32)
        self.copies = AsyncCopies(self)

    def places(self, block: Array, address: Array, size: int, what: str) -> Array:
        """[accesses, size] indices of bytes."""
        address = address.astype(np.int64)
        if (address < 0).any() or (address + size > self.size).any():
            raise OutOfBounds(f"{what} of {size} bytes of shared memory at {address.max()} of {self.size}")
        if (address % size).any():
            raise OutOfBounds(f"{what} of {size} bytes at an address that is not a multiple of {size}")
        return (block * self.size + address)[:, None] + np.arange(size)

    def _others_read(self, place: Array, block: Array, warp: Array) -> bool:
        now = self.epoch[block][:, None]
        late = (self.read[place] == now) & (self.reader[place] != warp[:, None])
        return bool((late | (self.in_use[place] > 0)).any())

    def load(self, block: Array, warp: Array, address: Array, size: int) -> Array:
        """uint8 [accesses, size]"""
        place, now, me = (
            self.places(block, address, size, "a load"),
            self.epoch[block][:, None],
            warp[:, None],
        )
        if ((self.written[place] == now) & (self.writer[place] != me)).any():
            raise Race("a load of what another warp wrote since the last barrier")
        if self.in_flight[place].any():
            raise Race("a load of what an asynchronous copy has not delivered")
        earlier = (self.read[place] == now) & (self.reader[place] != me)
        self.reader[place] = np.where(earlier, SEVERAL, me)
        self.reader[place[self.reader[place] != me]] = SEVERAL  # warps that read a byte in this very call
        self.read[place] = now
        return self.bytes[place]

    def store(self, block: Array, warp: Array, address: Array, values: Array) -> None:
        place = self.places(block, address, values.shape[1], "a store")
        now, me = (
            np.broadcast_to(self.epoch[block][:, None], place.shape),
            np.broadcast_to(warp[:, None], place.shape),
        )
        if self._others_read(place, block, warp):
            raise Race("a store to what others have read since the last barrier, or still read")
        if self.in_flight[place].any():
            raise Race("a store to where an asynchronous copy is under way")
        same = self.bytes[place] == values  # warps that write the same bytes do no harm
        if ((self.written[place] == now) & (self.writer[place] != me) & ~same).any():
            raise Race("a store to what another warp wrote since the last barrier")
        self.bytes[place] = values
        if (self.bytes[place] != values).any():
            raise Race("two lanes store different values to the same byte at once")
        self.written[place], self.writer[place] = now, me

    def announce(self, block: Array, warp: Array, address: Array, size: int) -> None:
        """A copy is under way: nobody may still be reading there, and nobody may until it is delivered."""
        place = self.places(block, address, size, "an asynchronous copy")
        if self._others_read(place, block, warp):
            raise Race("an asynchronous copy to what others have read since the last barrier, or still read")
        if self.in_flight[place].any():
            raise Race("two asynchronous copies to the same place")
        self.in_flight[place] = True

    def deliver(self, block: Array, warp: Array, address: Array, values: Array) -> None:
        self.in_flight[self.places(block, address, values.shape[1], "an asynchronous copy")] = False
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
        if self.group is None:
            return
        left = []
        for lanes, group, address, values in self.pending:
            done = mask[lanes] & (group < self.group[lanes] - pending)
            who = lanes[done]
            if len(who):
                self.shared.deliver(block[who], warp[who], address[done], values[done])
            if not done.all():
                left.append((lanes[~done], group[~done], address[~done], values[~done]))
        self.pending = left
