"""Some of the prompt groups of a source: the share of one process, or those that a trainer knows."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from itertools import islice
from typing import Any

from cropi.data.places import kept_places
from cropi.data.readers import PromptGroups
from cropi.data.records import PromptGroup
from cropi.data.scan import Scan
from cropi.errors import RecordError


class Share(PromptGroups):
    """The groups of ``whole`` with these ids; read by their places where a full pass has kept those.

    Args:
        whole: the groups.
        ids: the ids, in the order of the source.
        scan: what is in the share.
    """

    def __init__(self, whole: PromptGroups, ids: Sequence[str], scan: Any) -> None:
        super().__init__(
            whole.sources, skip_bad=whole.skip_bad, columns=whole.columns, rewards=whole.rewards, scan=scan
        )
        self.whole, self.ids = whole, ids

    def each(
        self,
        on_bad: Callable[[RecordError], None] | None = None,
        on_line: Callable[[bytes], None] | None = None,
    ) -> Iterator[PromptGroup]:
        """Go through the groups of the share."""
        if on_line is None and (places := kept_places(self.sources, self.columns)) is not None:
            yield from self.whole.at(places, self.ids)
            return
        wanted = set(self.ids)
        yield from (group for group in self.whole.each(on_bad, on_line) if group.id in wanted)


def without(groups: PromptGroups, scan: Scan, left_out: Container[str], limit: int | None = None) -> Share:
    """The first ``limit`` groups without those with the ids ``left_out``; ``scan`` is that of all groups."""
    whole = groups.whole if isinstance(groups, Share) else groups
    counts, ids = Scan(), list[str]()
    for group in islice(groups.each(), limit):
        if group.id not in left_out:
            counts.add(group)
            ids.append(group.id)
    for name in ("fingerprint", "texts_checked", "texts_kept", "tokens_checked"):
        setattr(counts, name, getattr(scan, name))
    return Share(whole, ids, counts)
