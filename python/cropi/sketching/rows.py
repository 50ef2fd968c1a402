"""The row that a store keeps of a prompt, from its trajectory record."""

from __future__ import annotations

from typing import Any

from cropi.data.records import PromptGroup
from cropi.data.rewards import pass_rate
from cropi.store.rows import RowInfo, Status


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
