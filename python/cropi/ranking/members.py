"""Which prompts of the stores count in a comparison: their sketches, and the mean sketch of every validation set."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

from cropi.data.rewards import EQUAL_REWARDS, ONE_RESPONSE
from cropi.errors import CropiError
from cropi.options import Influence
from cropi.store.differences import check_comparable, check_scaled, warn_unlike
from cropi.store.manifest import NOISE
from cropi.store.rows import OK, RowInfo
from cropi.store.store import SketchStore

# How much the lengths of one gradient may differ, made twice: in bfloat16 half a hundredth was measured.
SAME_LENGTH = 0.01


def check_stores(train: SketchStore, valid: Sequence[SketchStore], stages: str = "same") -> None:
    """Check that a store of training prompts can be compared with validation stores; warn where it seems not meant.

    Args:
        train, valid: the stores.
        stages: see :func:`cropi.ranking.influence.influence`.

    Raises:
        CropiError: the training store is unfinished, or two stores do not belong together.
    """
    train.check_finished()
    if train.manifest.get(NOISE):
        raise CropiError(
            f"{train.path} holds the noise of gradients (--noise), which has no influence: give it as noise, beside "
            "the stores of the gradients"
        )
    for store in valid:
        names = str(train.path), str(store.path)
        check_comparable(
            train.manifest, store.manifest, names, () if stages == "same" else ("stage", "model")
        )
        warn_unlike(train.manifest, store.manifest, names)
    check_scaled(
        train.manifest, [store.manifest for store in valid], [str(store.path) for store in (train, *valid)]
    )


def choose_members(
    stores: Sequence[SketchStore], cap: int | None, seed: int
) -> dict[str, set[tuple[int, str]]]:
    """The prompts of every set that count, as (store number, id)."""
    members: dict[str, list[tuple[int, str]]] = {}
    reasons: dict[str, list[str]] = {}
    held: dict[tuple[str, str], int] = {}
    for number, store in enumerate(stores):
        for row in store.rows():
            name = row.set_name
            if (before := held.setdefault((name, row.id), number)) != number:
                raise CropiError(
                    f"{store.path} holds the prompt {row.id!r} of the validation set {name!r}, and so does "
                    f"{stores[before].path}: it would count twice; give every prompt once, or sets of their own (--set)"
                )
            members.setdefault(name, [])
            if row.status == OK:
                members[name].append((number, row.id))
            else:
                reasons.setdefault(name, []).append(row.reason)
    if not members:
        raise CropiError(
            f"{', '.join(str(s.path) for s in stores)}: no validation prompt at all; give stores that "
            "hold some"
        )
    for name, candidates in members.items():
        if not candidates:
            raise CropiError(
                f"validation set {name!r} has no usable prompt: {left_out(reasons[name])}, or leave the set out"
            )
    chosen = {}
    for name in sorted(members):
        # By id alone: another order of the stores would be another draw.
        candidates = sorted(members[name], key=lambda member: member[1])
        if cap is not None and len(candidates) > cap:
            picked = np.random.default_rng(seed).choice(len(candidates), cap, replace=False)
            candidates = [candidates[i] for i in picked]
        chosen[name] = set(candidates)
    return chosen


def validation(
    stores: Sequence[SketchStore],
    max_valid: int | None = None,
    seed: int = 0,
    ids: Collection[str] | None = None,
) -> tuple[list[RowInfo], torch.Tensor]:
    """The usable validation prompts that count, of these those in ``ids``, and their sketches float32 ``[V, dim]``."""
    order = sorted(
        (name, prompt, number)
        for name, held in choose_members(stores, max_valid, seed).items()
        for number, prompt in held
        if ids is None or prompt in ids
    )
    place = {(number, prompt): i for i, (_, prompt, number) in enumerate(order)}
    found: list[RowInfo | None] = [None] * len(order)
    table = torch.empty(len(order), stores[0].dim, dtype=torch.float32, device="cpu")
    for number, store in enumerate(stores):
        for rows, sketches in store.shards():
            here = [(i, at) for i, row in enumerate(rows) if (at := place.get((number, row.id))) is not None]
            for i, at in here:
                found[at] = rows[i]
            table[[at for _, at in here]] = sketches[[i for i, _ in here]]
    there = [i for i, row in enumerate(found) if row is not None]
    return [row for row in found if row is not None], table if len(there) == len(found) else table[there]


def validation_means(
    stores: Sequence[SketchStore], comparing: Influence | None = None
) -> dict[str, torch.Tensor]:
    """The mean sketch of every validation set, float64 ``[dim]``, by set name in sorted order; of the options count
    ``mean``, ``aggregate``, ``max_valid`` and ``valid_seed``.

    Raises:
        CropiError: a store is unfinished, a set has no prompt with a usable sketch, or its mean is zero, unless the
            nearest prompts count alone.
    """
    given = comparing or Influence()
    means = any_means(stores, given)
    for name in means:
        if words := without_direction(name, means, given):
            raise CropiError(f"{words}; leave the set out, or give other prompts")
    return means


def without_direction(name: str, means: Mapping[str, torch.Tensor], given: Influence) -> str:
    """That no prompt can be scored against the mean of a set, in words; nothing where one can be."""
    if given.aggregate == "nearest" or float(means[name].norm()) > 0:
        return ""
    return f"validation set {name!r}: the mean of its gradients is zero, so it has no direction"


def any_means(stores: Sequence[SketchStore], given: Influence) -> dict[str, torch.Tensor]:
    """:func:`validation_means`, zero ones too."""
    for store in stores:
        store.check_finished()
    chosen = choose_members(stores, given.max_valid, given.valid_seed)
    sums = {name: torch.zeros(stores[0].dim, dtype=torch.float64, device="cpu") for name in chosen}
    for number, store in enumerate(stores):
        for kept, sketches in store.shards():
            for row, vector in zip(kept, sketches.double(), strict=True):
                name = row.set_name
                if (number, row.id) in chosen.get(name, ()):
                    sums[name] += vector / vector.norm() if given.mean == "normalised" else vector
    return {name: total / len(chosen[name]) for name, total in sums.items()}


def none_usable(train: SketchStore) -> CropiError:
    """The error for a store of training prompts of which none has a usable sketch."""
    reasons = [row.reason for row in train.rows() if row.status != OK]
    return CropiError(f"{train.path}: no training prompt has a usable sketch: {left_out(reasons)}")


def left_out(reasons: Sequence[str]) -> str:
    """How many prompts were left out and why, and what to give in their place."""
    remedies = {
        EQUAL_REWARDS: "prompts that are solved sometimes",
        ONE_RESPONSE: "several responses to each prompt",
    }
    # Gradients that vanish or overflow do so whatever the rewards, and an array's rows have none.
    other = (
        " and ".join(words for why, words in remedies.items() if why in reasons)
        or "others, finite and not zero"
    )
    return f"{len(reasons)} were left out ({', '.join(sorted(set(reasons)))}); give {other}"
