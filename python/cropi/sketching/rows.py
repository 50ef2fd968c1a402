"""The row that a store keeps of a prompt, from its trajectory record."""

from __future__ import annotations

from typing import Any

from cropi.data.records import PromptGroup
from cropi.data.rewards import pass_rate
from cropi.store.rows import RowInfo, Status


def cost_of(group: PromptGroup, responses: int | None) -> int:
    """What sketching a prompt costs, in tokens: known before a text is tokenised, and of what goes through the model.

    Tokens that are not scored are among them, and equal responses: what counts is that a pool and the time of a token
    are in one unit.

    Args:
        responses: at most so many are sketched; None: all.
    """
    _, lengths = group.lengths
    # Where there are no token ids: about four characters are one.
    size = sum(lengths) if lengths is not None else sum(len(str(text)) for text in group.responses or ()) // 4
    share = 1.0 if responses is None else min(1.0, responses / group.size)
    return max(round(size * share), 1)


def row_of(
    group: PromptGroup,
    status: Status,
    reason: str,
    default_set: str | None,
    *,
    extra: dict[str, Any] | None = None,
    **figures: Any,
) -> RowInfo:
    """A row with what the record says: its set (or ``default_set``), task, pass rate and file; ``figures`` are
    others."""
    held = dict(extra or {}) | ({} if group.file is None else {"file": group.file})
    return RowInfo(
        group.id, status, reason, group.set or default_set, group.task, pass_rate(group.rewards), extra=held, **figures
    )  # fmt: skip
