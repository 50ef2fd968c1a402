"""Validation sets that no prompt can be chosen for any more: solved or hopeless by now, clipped in every token, or with
gradients that add up to zero.

A training does not end there. Such a set is left out, with a warning, until it has a gradient again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from cropi.agreement import Ranks
from cropi.data.readers import PromptGroups
from cropi.data.scan import by_set, listed, scan
from cropi.data.share import without
from cropi.errors import CropiError, warn
from cropi.options import Comparing, Influence
from cropi.ranking.members import any_means, validation_means, without_direction
from cropi.ranking.shares import NotInPool
from cropi.store.rows import DEFAULT_SET, OK
from cropi.store.store import SketchStore

T = TypeVar("T")
G = TypeVar("G", bound=Comparing)
# What becomes of such a set.
LEFT_OUT = "the set does not count until it has one again"


class LostSets(UserWarning):
    """A validation set has no gradient any more, and is left out."""


class NothingToFollow(CropiError):
    """No validation set is left to choose prompts for."""


class TooFewLeft(NothingToFollow):
    """Too few training prompts can be chosen, of those whose rewards differ: every token is clipped, say, or none of
    them names a task, of which each was to have its share."""


@contextmanager
def asked_of(least: int) -> Iterator[None]:
    """What a choice asks of a pool that changes under a training, which takes ``least`` prompts at once and does not
    end where the pool has it no more; 0: there is no training, and it is an error.

    Raises:
        TooFewLeft: the pool has not what is asked.
    """
    try:
        yield
    except NotInPool as error:
        if not least:
            raise
        raise TooFewLeft(str(error)) from None


def usable_sets(groups: PromptGroups, minus: str | None = None) -> tuple[PromptGroups | None, dict[str, str]]:
    """Validation prompts without the sets of which none has a gradient by its rewards, and of these what is wrong, by
    name; None: no set is left but perhaps ``minus``, which counts against a prompt."""
    counts = scan(groups)
    sets = by_set({DEFAULT_SET: counts})
    lost = {
        name: f"none of the {reasons.total()} prompts of the validation set {name!r} has a gradient ({listed(reasons)})"
        for name, reasons in sorted(sets.items())
        if not reasons.pop("", 0)
    }
    if set(sets) - set(lost) <= {minus}:
        return None, lost
    if lost:
        groups = without(groups, counts, {group.id for group in groups if (group.set or DEFAULT_SET) in lost})
    return groups, lost


def followed(
    stores: Sequence[SketchStore], given: Influence, *, later: bool
) -> tuple[list[SketchStore], Influence, dict[str, str]]:
    """The validation stores that prompts are scored against, and how: all of them, or, where prompts were chosen before
    (``later``), as :func:`usable_stores` gives them.

    Raises:
        CropiError: a set has no usable gradient, or no direction; where ``later``, NothingToFollow.
    """
    if later:
        return usable_stores(stores, given)
    validation_means(stores, given)
    return list(stores), given, {}


def no_gradient(name: str, reasons: Counter[str]) -> str:
    """That no sketch of a set can be used, in words."""
    return f"no prompt of the validation set {name!r} has a usable gradient ({listed(reasons)})"


def usable_stores(
    stores: Sequence[SketchStore], given: Influence
) -> tuple[list[SketchStore], Influence, dict[str, str]]:
    """Validation stores without the sets of which no prompt has a sketch, or whose mean is zero where it counts; the
    options without a ``minus`` that no store holds any more; and of the sets that are left out what is wrong, by name.

    Raises:
        NothingToFollow: no set is left but perhaps ``minus``.
    """
    sets: dict[str, Counter[str]] = {}
    for store in stores:
        for row in store.rows():
            sets.setdefault(row.set_name, Counter())["" if row.status == OK else row.reason] += 1
    lost = {
        name: no_gradient(name, reasons) for name, reasons in sorted(sets.items()) if not reasons.pop("", 0)
    }
    kept = _stores_without(stores, lost)
    # Where the nearest prompts count alone, as in the report, no mean does: making them reads every sketch.
    if kept and given.aggregate != "nearest":
        means = any_means(kept, given)
        lost |= {name: words for name in means if (words := without_direction(name, means, given))}
    left = set(sets) - set(lost)
    if left <= {given.minus}:
        raise NothingToFollow("; ".join(lost.values()) or "there is no validation set besides minus")
    if given.minus not in left:
        given = without_minus(given)
    return _stores_without(kept, lost), given, lost


def _stores_without(stores: Sequence[SketchStore], lost: Container[str]) -> list[SketchStore]:
    """The stores as if they held no prompt of some sets, but for those that then hold none."""
    kept = [store.without({row.id for row in store.rows() if row.set_name in lost}) for store in stores]
    return [store for store in kept if len(store)]


def without_minus(given: G) -> G:
    """The options where the set that counts against a prompt is left out: a weight without one is an error."""
    return replace(given, minus=None, minus_weight=1.0)


def on_first(ranks: Ranks, work: Callable[[], T]) -> T:
    """What ``work`` gives on rank 0, on every rank.

    Raises:
        NothingToFollow: rank 0 raised it. On every rank it is this one, which a training catches and goes on.
        CropiError: as ``ranks.agree``.
    """

    def done() -> Any:
        try:
            return work() if ranks.first else None
        except NothingToFollow as error:
            return error

    result: Any = ranks.share(ranks.agree(done))
    if isinstance(result, NothingToFollow):
        raise result
    given: T = result
    return given


def warn_lost(lost: Mapping[str, str], before: str = "") -> None:
    """Say which sets are left out; ``before``: what messages begin with."""
    for words in lost.values():
        warn(f"{before}{words}; {LEFT_OUT}", LostSets)
