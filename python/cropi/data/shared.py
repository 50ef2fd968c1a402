"""Prompts that are both training and validation prompts, under any ids.

Two records hold one prompt where their token ids are equal or, without these, what they say: text, or the roles and
contents of messages; text is as good as one message of the user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def _is_copy(group: PromptGroup, other: PromptGroup) -> bool:
    return (group.id, group.rewards, group.response_ids, group.responses) == (
        other.id, other.rewards, other.response_ids, other.responses
    )  # fmt: skip
