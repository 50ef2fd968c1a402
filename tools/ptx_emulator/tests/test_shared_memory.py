"""Shared memory that copies and products use, by itself: what is looked at only while there is one."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_emulator.memory import OutOfBounds, Race, SharedMemory

BLOCK = WARP = np.zeros(1, np.int64)
WORD = np.zeros((1, 4), np.uint8)


def at(address: int) -> np.ndarray:
    return np.array([address])


def test_a_copy_that_is_under_way_is_not_read_when_another_has_come() -> None:
    memory = SharedMemory(1, 64, 4)
    for address in (0, 4, 8):
        memory.announce(BLOCK, WARP, at(address), 4)
    memory.deliver(BLOCK, WARP, at(0), WORD)
    memory.deliver(BLOCK, WARP, at(4), WORD)
    memory.load(BLOCK, WARP, at(4), 4)
    with pytest.raises(Race, match="has not delivered"):
        memory.load(BLOCK, WARP, at(8), 4)


def test_an_operand_is_not_written_until_every_product_has_ended() -> None:
    memory = SharedMemory(1, 64, 4)
    place = memory.places(BLOCK, at(8), 4, "an operand").ravel()
    for _ in range(3):
        memory.use(place)
    for _ in range(3):
        for act in (memory.store, memory.announce):
            with pytest.raises(Race, match="still read"):
                act(BLOCK, WARP, at(8), WORD if act == memory.store else 4)  # type: ignore[operator]
        memory.leave(place)
    memory.store(BLOCK, WARP, at(8), WORD)


@pytest.mark.parametrize("address", [-4, 64, 1 << 40])
def test_addresses_outside_are_errors(address: int) -> None:
    with pytest.raises(OutOfBounds, match="of shared memory at"):
        SharedMemory(1, 64, 4).load(BLOCK, WARP, np.array([0, address]), 4)
