"""mbarriers: words of shared memory at which warps arrive, and for whose phases others wait."""

from __future__ import annotations

import dataclasses

import numpy as np

from ptx_emulator.numbers import Array


@dataclasses.dataclass
class Phase:
    """``count`` arrivals end a phase; ``missing`` of the present one have not come; ``done`` phases have ended."""

    count: int
    missing: int
    done: int = 0


class Phases:
    """By block and address. Only what was begun can be arrived at or waited for."""

    def __init__(self) -> None:
        self.of: dict[tuple[int, int], Phase] = {}

    def begin(self, block: Array, address: Array, count: Array) -> None:
        for b, at, n in zip(block.tolist(), address.tolist(), count.tolist(), strict=True):
            self.of[b, at] = Phase(n, n)

    def arrive(self, block: Array, address: Array) -> None:
        """One arrival for each."""
        where, counts = np.unique(np.stack([block, address.astype(np.int64)], 1), axis=0, return_counts=True)
        for (b, at), n in zip(where.tolist(), counts.tolist(), strict=True):
            phase = self.of[b, at]
            assert n <= phase.missing, "more arrivals than a phase has"
            phase.missing -= n
            if phase.missing == 0:
                phase.missing, phase.done = phase.count, phase.done + 1

    def ended(self, block: Array, address: Array, parity: Array) -> Array:
        """Whether the phase of this parity has ended: the present one has not, the one before it has."""
        keys = zip(block.tolist(), address.tolist(), strict=True)
        return (np.array([self.of[key].done for key in keys], np.int64) & 1) != parity
