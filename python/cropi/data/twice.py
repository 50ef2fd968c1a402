"""Prompts that are both training and validation prompts, or several times in one validation set, under any ids.

Two records hold one prompt where their token ids are equal or, without these, what they say: text, or the roles and
contents of messages; text is as good as one message of the user. Demonstrations have to have one response, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cropi.data.readers import PromptGroups
from cropi.data.records import PromptGroup
from cropi.data.scan import Scan, prompt_hash


def shared_prompts(
    train: PromptGroups,
    pool: Scan,
    valid: Sequence[tuple[PromptGroups, Scan]],
    known: Callable[[str], bool] | None = None,
) -> tuple[int, str, str] | None:
    """How many training prompts are validation prompts too, and the ids of one on both sides.

    None where there are none, and where all of these have one id and the same responses: the stores then show whether
    they count (:class:`cropi.ranking.influence.SharedPrompts`).

    Args:
        train, valid: the records and what was counted in them; they are read again where prompts are shared.
        pool: of the training prompts that may be chosen.
        known: whether a training prompt may be chosen; None: all may.
    """
    held = np.unique(np.concatenate([scan.contents for _, scan in valid]).astype(np.int64))
    mine = np.frombuffer(pool.contents, dtype=np.int64)
    both = mine[np.isin(mine, held)]
    if not len(both):
        return None
    wanted, others = set(both.tolist()), dict[int, list[PromptGroup]]()
    for groups, _ in valid:
        for group in groups:
            if (key := prompt_hash(group)) in wanted:
                others.setdefault(key, []).append(group)
    for group in train:
        for other in others.get(prompt_hash(group), ()):
            if (known is None or known(group.id)) and not _is_copy(group, other):
                return len(both), group.id, other.id
    return None


class RepeatedPrompts(UserWarning):
    """A validation set holds prompts more than once."""

    @classmethod
    def of(
        cls,
        counts: Mapping[str, tuple[int, int]],
        example: tuple[str, str],
        what: str,
        one: str = "prompt",
        remedy: str = "give every prompt once, with all of its responses",
    ) -> RepeatedPrompts:
        """The warning: by the name of a set how many of its prompts have ``what`` another one has, of how many.
        ``one``: what a row is, where it is no prompt."""
        named = ", ".join(f"{again} of {size} {one}s of {name!r}" for name, (again, size) in counts.items())
        first, other = example
        return cls(
            f"validation sets hold {one}s more than once: {named} repeat another, for example {other!r:.100} {what} "
            f"of {first!r:.100}; each counts as a {one} of its own, so that standard errors are too small: {remedy}"
        )


def repeated_prompts(
    valid: Mapping[str, tuple[PromptGroups, Scan]],
) -> tuple[dict[str, tuple[int, int]], tuple[str, str]] | None:
    """How many prompts with a gradient repeat another of their validation set, of how many that it has, by its name;
    and the ids of two that are one. None where no set holds a prompt twice.

    Args:
        valid: records and what was counted in them, by the name of the set of those that name none; they are read again
            where prompts are there twice.
    """
    contents = np.concatenate([np.frombuffer(scan.contents, dtype=np.int64) for _, scan in valid.values()])
    values, counts = np.unique(contents, return_counts=True)
    wanted = set(values[counts > 1].tolist())
    if not wanted:
        return None
    first, sizes, again = dict[tuple[str, int], str](), Counter[str](), Counter[str]()
    example: tuple[str, str] | None = None
    for default, (groups, _) in valid.items():
        for group in groups:
            if group.no_gradient is not None:
                continue
            name, key = group.set or default, prompt_hash(group)
            sizes[name] += 1
            if key not in wanted:
                continue
            if (other := first.setdefault((name, key), group.id)) != group.id:
                again[name] += 1
                example = example or (other, group.id)
    return example and ({name: (again[name], sizes[name]) for name in sorted(again)}, example)


def _is_copy(group: PromptGroup, other: PromptGroup) -> bool:
    return (group.id, group.rewards, group.response_ids, group.responses) == (
        other.id, other.rewards, other.response_ids, other.responses
    )  # fmt: skip
