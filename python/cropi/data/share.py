"""Some of the prompt groups of a source: the share of one process, or those that a trainer knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cropi.data.places import kept_places
from cropi.data.readers import PromptGroups
from cropi.data.records import PromptGroup
from cropi.errors import RecordError


class Share(PromptGroups):
    """The groups of ``whole`` with these ids; read by their places where a full pass has kept those.

    Args:
        whole: the groups.
        ids: the ids, in the order of the source.
        found: what is in the share.
    """

    def __init__(self, whole: PromptGroups, ids: Sequence[str], found: Any) -> None:
        super().__init__(whole.sources, skip_bad=whole.skip_bad, columns=whole.columns, found=found)
        self.whole, self.ids = whole, ids

    def each(
        self,
        on_bad: Callable[[RecordError], None] | None = None,
        on_line: Callable[[bytes], None] | None = None,
    ) -> Iterator[PromptGroup]:
        """Go through the groups of the share."""
        if on_line is None and kept_places(self.sources, self.columns) is not None:
            yield from self.whole.take(self.ids)
            return
        wanted = set(self.ids)
        yield from (group for group in self.whole.each(on_bad, on_line) if group.id in wanted)
