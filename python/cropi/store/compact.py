"""Which small shards of a store are joined to a larger one, and when.

A row is safe as soon as it is on the disk, so a job writes small shards, and often. Files of a few rows cost time when
a store is opened and read. So small shards at the end of a store are joined: when together they have reached the size
of a full shard (256 MB), when 64 of them have come together, and when the job ends.

The joined shard gets the next number, and names in its header those that it replaces; they are removed once it is
committed. Killed before that, the new shard does not count; killed after, the old ones do not. The stored numbers are
copied as they are, and the order of the rows stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cropi.store.shards import Shard

SHARD_BYTES = 1 << 28
FEW = 64  # small shards, or joined ones that are not full, that a store holds at most


def tail(shards: Sequence[Shard], limit: int) -> list[Shard]:
    """The shards at the end of a store that are not full."""
    count = next((n for n, shard in enumerate(reversed(shards)) if shard.size >= limit), len(shards))
    return list(shards[len(shards) - count :])


def due(shards: Sequence[Shard], limit: int) -> list[Shard]:
    """The shards at the end of a store that are to be joined now; none, or at least two."""
    ends = tail(shards, limit)
    small = next((n for n, shard in enumerate(reversed(ends)) if shard.replaces), len(ends))
    if sum(shard.size for shard in ends) >= limit or len(ends) - small >= FEW:
        return ends
    return ends[len(ends) - small :] if small >= FEW else []


def filled(shards: Sequence[Shard], limit: int) -> list[list[Shard]]:
    """Shards in groups of about so many bytes, the last one smaller."""
    made: list[list[Shard]] = [[]]
    size = 0
    for shard in shards:
        made[-1].append(shard)
        size += shard.size
        if size >= limit:
            made.append([])
            size = 0
    return [group for group in made if group]


def groups(shards: Sequence[Shard], limit: int) -> list[list[Shard]]:
    """The shards that are not full, in groups of two or more that fill a shard (the last group may not)."""
    return [group for group in filled([s for s in shards if s.size < limit], limit) if len(group) > 1]


def join_blocks(shards: Sequence[Shard]) -> dict[str, torch.Tensor]:
    """The tensors of some shards of one store, one below the other, as they are stored."""
    joined = {
        name: torch.empty(
            sum(shard.tensors[name].shape[0] for shard in shards),
            held.shape[1],
            dtype=held.dtype,
            device="cpu",
        )
        for name, held in shards[0].tensors.items()
    }
    at = 0
    for shard in shards:
        for _, tensors in shard.blocks():
            count = len(next(iter(tensors.values())))
            for name, tensor in tensors.items():
                joined[name][at : at + count] = tensor
            at += count
    return joined
