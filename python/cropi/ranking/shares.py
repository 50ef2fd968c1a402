"""How many prompts are chosen, and how many of each group: whole numbers that add up.

    n = floor(N * fraction + 1e-9)        or a count that is given

Without groups there is one n. With groups (the released CROPI code selects per training file) each has its own, from
its own number of prompts. Quotas name groups and what part of the selection, or how many prompts, they get.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from cropi.errors import CropiError, did_you_mean


class NotInPool(CropiError):
    """The pool has not what the options ask of it: a group, so many prompts, or scores so high; or a validation set has
    too few to be drawn anew. A training whose pool changes goes on without the choice
    (:func:`cropi.pipeline.lost.asked_of`)."""


def how_many(fraction: float, size: int, least: int = 0) -> int:
    """``floor(size * fraction + 1e-9)``, the number of prompts that a selection from a pool of ``size`` holds at most;
    ``least``, where that is more.

    CROPI's released code takes ``int(size * fraction)``, which is one less where the product should be whole and its
    rounding falls below: 28 of 100 for 0.29, against 29 here.

    Raises:
        CropiError: the fraction is not in (0, 1], or chooses nothing.
    """
    n = max(part_of(fraction, size), least)
    if n < 1:
        # 1 / size, rounded up to two digits.
        digits = 10 ** (len(str(size)) + 1)
        enough = f"a fraction of at least {-(-digits // size) / digits:g}, a count, or " if size else ""
        raise CropiError(
            f"fraction {fraction} of a pool of {size} prompts chooses none; give {enough}more prompts"
        )
    return n


def part_of(fraction: float, size: int) -> int:
    """``floor(size * fraction + 1e-9)``, which may be 0.

    Raises:
        CropiError: the fraction is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise CropiError(f"fraction must be in (0, 1], got {fraction}")
    # 0.29 * 100 is 28.999... in binary; the rule means 29.
    return math.floor(size * fraction + 1e-9)


def apportion(n: int, weights: Mapping[str, float], most: Mapping[str, int] | None = None) -> dict[str, int]:
    """``n`` as whole numbers in proportion to weights, by largest remainder (Hamilton's method); ties by name.

    With ``most``, what a group cannot hold goes to the others in the same way.

    >>> apportion(10, {"a": 1, "b": 1, "c": 1})
    {'a': 4, 'b': 3, 'c': 3}
    >>> apportion(10, {"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 9, "c": 9})
    {'a': 2, 'b': 4, 'c': 4}
    """
    if most is not None:
        given = dict.fromkeys(weights, 0)
        while (left := n - sum(given.values())) and (
            room := {name: weights[name] for name in weights if given[name] < most[name]}
        ):
            for name, number in apportion(left, room).items():
                given[name] = min(given[name] + number, most[name])
        return given
    total = sum(weights.values())
    exact = {name: n * weight / total for name, weight in weights.items()}
    whole = {name: math.floor(value) for name, value in exact.items()}
    left = n - sum(whole.values())
    for name in sorted(exact, key=lambda name: (whole[name] - exact[name], name))[:left]:
        whole[name] += 1
    return whole


def read_quotas(quotas: Sequence[str]) -> dict[str, float]:
    """``["gsm=0.5", "code=40"]`` as ``{"gsm": 0.5, "code": 40}``: a number with a point is a share, one without a
    count.

    Shares are kept as floats, counts as integers.

    Raises:
        CropiError: a quota that is not NAME=NUMBER, a name twice, or shares of more than the whole.
    """
    read: dict[str, float] = {}
    for quota in quotas:
        name, equal, text = quota.rpartition("=")
        try:
            value: float = float(text) if "." in text else int(text)
        except ValueError:
            value = -1
        good = 0 <= value <= 1 if isinstance(value, float) else value >= 0
        if not equal or not name or not good:
            raise CropiError(
                f"quota {quota!r} is not NAME=NUMBER: give a share of the selection with a point (gsm8k=0.5), or a "
                "number of prompts without one (gsm8k=40)"
            )
        if name in read:
            raise CropiError(f"quota names the group {name!r} twice")
        read[name] = value
    if (total := sum(value for value in read.values() if isinstance(value, float))) > 1 + 1e-9:
        raise CropiError(f"quota: the shares add up to {total:g}, more than the whole selection")
    return read


def check_named(groups: Collection[str], per: str, first: Callable[[], str] = lambda: "a prompt") -> None:
    """Check that prompts name the groups that shares are fixed for: every one its file, and one of them its task.

    Where no prompt names a task, the whole pool would be one group, which is what was not asked for.

    Args:
        groups: their names; "" stands for prompts that name none.
        per: "task" or "file".
        first: words for the first prompt that names none.

    Raises:
        CropiError: they do not; of tasks NotInPool.
    """
    if per == "file" and "" in groups:
        raise CropiError(
            f"per: {first()} does not name the file it came from (it came from memory); make the store again from "
            "files, or choose per task"
        )
    if per == "task" and set(groups) == {""}:
        raise NotInPool(
            "shares were to be fixed for every task (per task, or a quota), but no prompt names its task; name the "
            "column that holds it where records are read (--columns task=NAME), or choose from the whole pool or per "
            "file"
        )


def check_groups(quotas: Mapping[str, float], known: Collection[str], per: str) -> None:
    """Check that every named group is there.

    Raises:
        NotInPool: one is not.
    """
    for name in quotas:
        if name not in known:
            # As --columns has them.
            joined = "=" in name and "," in name
            apart = (
                "give one share after another (--quota gsm8k=0.5 math=0.25), without commas; "
                if joined
                else ""
            )
            raise NotInPool(
                f"quota: there is no {per} {name!r}; {apart}{did_you_mean(name, known)}there are "
                f"{', '.join(map(repr, sorted(known)))}"
            )


def numbers_of(n: int, quotas: Mapping[str, float]) -> tuple[dict[str, int], int]:
    """How many of ``n`` prompts every named group gets, and their sum.

    Raises:
        NotInPool: it is more than ``n``.
    """
    counts = {name: int(value) for name, value in quotas.items() if not isinstance(value, float)}
    shares = {name: value for name, value in quotas.items() if isinstance(value, float)}
    if shares:
        rest = max(1 - sum(shares.values()), 0.0)
        parts = apportion(n, shares | ({"": rest} if rest > 1e-9 else {}))
        counts |= {name: parts[name] for name in shares}
    taken = sum(counts.values())
    if taken > n:
        raise NotInPool(
            f"quota: the groups get {taken} prompts, but {n} are chosen; raise fraction or count, or lower the quotas"
        )
    return counts, taken


def with_quotas(
    n: int, quotas: Mapping[str, float], usable: Mapping[str, int], per: str, known: Collection[str]
) -> dict[str, int]:
    """How many of ``n`` prompts every named group gets; the rest is for the others. ``usable`` are prompts with a
    gradient, of the groups that have any of all that are ``known``.

    Raises:
        NotInPool: a group that is not there, has too few prompts with a gradient, or quotas that do not fit ``n``.
    """
    check_groups(quotas, known, per)
    counts, taken = numbers_of(n, quotas)
    for name, number in counts.items():
        if number > (able := usable.get(name, 0)):
            raise NotInPool(
                f"quota: {name!r} is to give {number} prompts, but {able} of it have a gradient; lower it"
            )
    check_rest(n, taken, quotas, usable)
    return counts


def check_rest(n: int, taken: int, quotas: Collection[str], known: Collection[str]) -> None:
    """Check that where quotas take fewer than ``n`` prompts, a group without one is left for the rest.

    Raises:
        NotInPool: none is.
    """
    if taken < n and set(quotas) >= set(known):
        raise NotInPool(
            f"quota: the groups get {taken} of {n} prompts and no other group is left for the rest; raise the "
            f"quotas, or choose {taken} (count)"
        )


def left_by(counts: Mapping[str, int], sizes: Mapping[str, int], count: int | None) -> int:
    """How many prompts quotas leave: of the groups that have one as many as ``counts`` says, all of the others.

    Raises:
        NotInPool: it is less than the ``count`` that is to be chosen.
    """
    held = sum(counts.get(name, size) for name, size in sizes.items())
    if count is not None and held < count:
        raise NotInPool(
            f"count {count} is more than the {held} prompts that the quotas leave; lower it, or raise the quotas"
        )
    return held
