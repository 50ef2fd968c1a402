"""Steps of a live sketcher, compared with the gradients that autograd formed in those very steps.

For each parameter, the sketches of all prompts must add up to the sketch of its gradient, whatever the trainer's loss,
precision, checkpointing or compiler did. Whether a tap gives each prompt its own part, the self-test on a few tokens
shows.

A step may have no gradient at all (all rewards are equal, as where a run begins with hard prompts), and parameters may
have none in the first steps (adapters that begin at zero). Zeros agree whatever the taps do, so such a step proves
nothing. And what the first steps prove may change: a callback puts another function in a module's place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..attach.attachment import Attachment
from ..batch.segments import Segments
from ..sums.accumulator import Accumulator
from .formed_sums import FormedSums, TapGroups
from .listener import Listener
from .selftest import Comparison, SelfTestError, compare, named

PROBLEM = (
    "the sketches of this step do not add up to the gradient that its backward pass formed (a weight is used beside "
    "its module, a hook changes its gradient, or a module was compiled before the taps came):\n"
)
REMEDY = (
    "leave them out by name (exclude=[...]), or compile inside of the `with` block; verify=False leaves out "
)


class _Both(Listener):
    """Listens to each tap alone, and keeps the sum of all: the step's sketches."""

    def __init__(self, acc: Accumulator) -> None:
        super().__init__(acc)
        self.total = torch.zeros_like(acc.out)

    def _take(self, added: torch.Tensor, rows: slice) -> torch.Tensor:
        self.total[rows] += added
        return super()._take(added, rows)


class Schedule:
    """Which batches are compared.

    All are, until one has a gradient. After that come the next one, and ever fewer of the later ones (with 1, 2, 4, ...
    between them): a parameter may have its first gradient late, and the model's code may change.

    Attributes:
        heard: the modules whose taps were heard; None: in no batch so far.
    """

    def __init__(self) -> None:
        self.heard: frozenset[str] | None = None
        self._gap = self._wait = 0  # how many batches are left out after the next comparison, and still now

    def due(self) -> bool:
        """Whether the batch that begins is compared."""
        if self._wait > 0:
            self._wait -= 1
            return False
        return True

    def note(self, comparisons: list[Comparison], heard: frozenset[str]) -> None:
        """Take note of a batch that was compared, and is right; ``heard``: the modules whose taps were heard in it."""
        self.heard = heard | (self.heard or frozenset())
        if any(one.size > 0 for one in comparisons):
            self._wait, self._gap = self._gap, max(1, 2 * self._gap)


class Audit:
    """What the taps and autograd gave in one open batch."""

    def __init__(self, plan: Attachment) -> None:
        self._acc, self._groups = plan.acc, TapGroups(plan)
        self._listener = _Both(plan.acc)
        self._formed = FormedSums(self._groups, plan.acc.out.device, leave=True)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        self._acc.listener = self._listener
        try:
            with self._formed.hooked():
                yield
        finally:
            self._acc.listener = None
        self._acc.out.copy_(self._listener.total)

    def verdict(self, segments: Segments, schedule: Schedule) -> None:
        """Tell the schedule what the step has shown: nothing where a number is not finite, or no gradient came.

        Raises:
            SelfTestError: names the parameters that are off.
        """
        sums = [*self._listener.sums.values(), *self._formed.sums.values()]
        if not self._formed.sums or not all(bool(took.isfinite().all()) for took in sums):
            return
        every = tuple(range(segments.count))
        comparisons = compare(self._groups, self._listener, self._formed, every, segments)
        wrong = [one for one in comparisons if not one.right]
        if wrong:
            raise SelfTestError(PROBLEM + named(wrong) + REMEDY + "this test")
        heard = frozenset(tap.where for tap in self._listener.sums)
        schedule.note(comparisons, heard)
