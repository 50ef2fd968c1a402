"""The rule of a selection, prepared once for the prompts it ranks and then used on many score tables of them.

The rule runs in every group of prompts by itself: the whole pool (the default), every training file, as the released
CROPI code does, or every task. Resampling (:mod:`cropi.ranking.resampling`) runs the same rule on every draw.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from cropi.errors import CropiError
from cropi.options import Selecting
from cropi.ranking.shares import (
    NotInPool,
    apportion,
    check_named,
    how_many,
    left_by,
    part_of,
    read_quotas,
    with_quotas,
)
from cropi.ranking.table_rows import values_of
from cropi.ranking.values import (
    FROM_SCORES,
    baseline,
    best_of,
    counted,
    drawn_ties,
    order_of,
    ranks_of,
    value_of,
)
from cropi.store.rows import RowInfo

if TYPE_CHECKING:
    from cropi.data.scan import Scan

_OF_SCORES = (*FROM_SCORES, "p_selected")


def groups_of(rows: Sequence[RowInfo], places: np.ndarray, per: str) -> list[str]:
    """The names of the groups that some prompts belong to: of their tasks or files; "" for none.

    Raises:
        CropiError: as :func:`cropi.ranking.shares.check_named`, of all prompts: those that are left may name no task.
    """
    names = [name or "" for name in values_of(rows, per, places)]
    if "" in names:
        every = {*names, *(name or "" for name in values_of(rows, per, np.arange(len(rows))))}
        check_named(every, per, lambda: f"the row of {rows[int(places[names.index('')])].id!r:.100}")
    return names


def _places_by(names: Sequence[str]) -> dict[str, np.ndarray]:
    """Where every name stands, int64, by name in sorted order."""
    places: dict[str, array[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, array("q")).append(place)
    return {name: np.array(places[name]) for name in sorted(places)}


def grouped_by(given: Selecting) -> str:
    """What shares of the choice are fixed for: "pool", which is all, "task" or "file"."""
    return "task" if given.quota and given.per == "pool" else given.per


def fixed_groups(pool: Scan, given: Selecting) -> dict[str, list[int]] | None:
    """The prompts of every group of a pool that shares are fixed for: how many, and how many have a gradient; None
    where the pool is one group.

    Raises:
        CropiError: as :func:`cropi.ranking.shares.check_named`.
    """
    groups = {"task": pool.by_task, "file": pool.by_file}.get(per := grouped_by(given))
    if groups is not None:
        check_named(groups, per)
    return groups


def shared_out(
    given: Selecting,
    sizes: Mapping[str, int],
    usable: Mapping[str, int],
    least: int,
    known: Collection[str],
) -> tuple[int, dict[str, int]]:
    """How many prompts are chosen, and how many of every group; with quotas, of the groups that have one.

    Args:
        given: the options, which choose by groups.
        sizes: of every group in the pool.
        usable: prompts of every group that can be chosen; groups without one may be missing.
        known: the names of all groups, which quotas may be for.
        least: as for :class:`Rule`; quotas that leave fewer are raised, but for those of 0, which leave a group out.

    Raises:
        CropiError: nothing is chosen, or the quotas do not fit.
    """
    if given.quota:
        n = given.count or how_many(given.fraction, sum(sizes.values()), least)
        quotas = read_quotas(given.quota)
        counts = with_quotas(n, quotas, usable, grouped_by(given), known)
        held = left_by(counts, usable, given.count)
        if given.count is None and held < (wanted := min(least, sum(usable.values()))):
            room = {name: usable.get(name, 0) - number for name, number in counts.items()}
            weights = {name: max(number, 1) for name, number in counts.items() if quotas[name]}
            counts |= {
                name: counts[name] + more for name, more in apportion(wanted - held, weights, room).items()
            }
        return n, counts
    most = {name: usable.get(name, 0) for name in sizes}
    counts = {name: part_of(given.fraction, size) for name, size in sizes.items()}
    if given.count is not None:
        counts = apportion(given.count, sizes, most)
    elif sum(min(counts[name], most[name]) for name in counts) < least:
        counts = apportion(least, sizes, most)
    elif not any(counts.values()):
        largest = max(sizes.values(), default=0)
        raise CropiError(
            f"fraction {given.fraction} of groups of at most {largest} prompts chooses none; give a larger "
            "fraction, a count, or leave out per"
        )
    return sum(counts.values()), counts


class Rule:
    """Which prompts are chosen by a score table ``[usable prompts, sets]``.

    Args:
        rows: all prompts of the pool.
        usable: the places in ``rows`` of those with a score, int64; tables have a row for each of these.
        options: the selection's.
        least: choose at least so many, where there are so many usable ones.

    Raises:
        CropiError: the fraction chooses nothing, the pool is smaller than the count, or quotas do not fit.
    """

    def __init__(
        self, rows: Sequence[RowInfo], usable: np.ndarray, options: Selecting | None = None, least: int = 0
    ) -> None:
        self.options = given = options or Selecting()
        self._rows, self._usable = rows, usable
        self.ties = ranks_of(values_of(rows, "id", usable))
        size = len(rows) if given.pool == "all" else len(usable)
        if given.count is not None and given.count > len(usable):
            raise NotInPool(
                f"count {given.count} is more than the {len(usable)} prompts that have a score; lower it"
            )
        per = grouped_by(given)
        if per == "pool":
            n = given.count or how_many(given.fraction, size, least)
            self.groups = [(np.arange(len(usable)), n)]
            return
        names = groups_of(rows, usable, per)
        members = _places_by(names)
        every = groups_of(rows, np.arange(len(rows)), per) if given.pool == "all" or given.quota else names
        sizes = dict(Counter(names if given.pool == "usable" else every))
        able = {name: len(own) for name, own in members.items()}
        n, counts = shared_out(given, sizes, able, least, frozenset(every))
        self.groups = [
            (members[name], counts[name]) for name in (counts if given.quota else members) if counts[name]
        ]
        if given.quota and (left := n - sum(counts.values())):
            self.groups.append((np.flatnonzero([name not in counts for name in names]), left))

    # Lists of a million prompts, which most rules do not need.
    @cached_property
    def ids(self) -> list[str]:
        """The usable prompts' ids."""
        return values_of(self._rows, "id", self._usable)

    @cached_property
    def rates(self) -> np.ndarray:
        """The usable prompts' pass rates."""
        return np.array(values_of(self._rows, "pass_rate", self._usable))

    @property
    def n(self) -> int:
        """How many are chosen at most."""
        return sum(min(number, len(places)) for places, number in self.groups)

    def rank(
        self, table: np.ndarray, p_selected: np.ndarray | None = None
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Every group's prompts, best first, and the value of every prompt, float64 ``[usable]``; NaN without a
        group."""
        given = self.options
        orders, values = [], np.full(len(table), np.nan)
        ties = self.ties if given.method in _OF_SCORES else drawn_ties(self.ids, given.select_seed)
        for places, n in self.groups:
            own = _of(table, places)
            if given.method in FROM_SCORES:
                value, beyond = value_of(own, ties[places], n, given.method, given.rrf_constant)
            elif given.method == "p_selected":
                assert p_selected is not None
                value, beyond = p_selected[places], own.max(axis=1)
            else:
                value, beyond = baseline(given.method, self.rates[places]), np.zeros(len(places))
            orders.append(places[order_of(value, beyond, ties[places])])
            values[places] = value
        return orders, values

    def choose(self, table: np.ndarray, beside: np.ndarray | None = None) -> np.ndarray:
        """The chosen prompts' places, int64, in any order, by a method of
        :data:`~cropi.ranking.values.FROM_SCORES`; with ``beside`` (:meth:`counted`), by further columns, too."""
        return self.best(self.counted(table, beside))

    def best(self, value: np.ndarray) -> np.ndarray:
        """The places that are chosen by what :meth:`counted` gave, int64, in any order."""
        return np.concatenate([
            places[best_of(_of(value, places), _of(self.ties, places), n)] for places, n in self.groups
        ])  # fmt: skip

    def counted(self, table: np.ndarray, beside: np.ndarray | None = None) -> np.ndarray:
        """What prompts are chosen by, float64 ``[usable]``: fused ranks within every group, the highest score, or the
        sum of scores. Tables that have columns in common need these counted once; ``beside`` is theirs."""
        given, value = self.options, np.zeros(len(table))
        for places, n in self.groups:
            own = counted(
                _of(table, places), _of(self.ties, places), n, given.method, given.rrf_constant,
                None if beside is None else _of(beside, places),
            )  # fmt: skip
            if len(own) == len(value):
                return own
            value[places] = own
        return value

    def joined(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """What :meth:`counted` gives of the columns of both."""
        return np.maximum(one, other) if self.options.method == "max" else one + other

    def near_the_cut(self, table: np.ndarray, share: float) -> np.ndarray:
        """Prompts within ``share`` of the chosen number of places from the last one that is chosen, int64; where fewer
        can be chosen than were to be, the last ones."""
        orders, _ = self.rank(table)
        near = []
        for order, (_, n) in zip(orders, self.groups, strict=True):
            n = min(n, len(order))
            width = max(1, round(share * n))
            near.append(order[max(0, n - width) : n + width])
        return np.concatenate(near)


def _of(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The values of a group, which are not copied where it holds all prompts."""
    return values if len(places) == len(values) else values[places]
