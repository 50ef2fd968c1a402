"""The self-tests of taps, and which taps they have heard: all of them are to be heard in later batches, and no others
untested.

A few token ids do not reach every module: an image tower is called where there are images. What its taps see may have
the batch's sizes by accident (as many images as rows, and as many patches as tokens), and they would give the parts of
one prompt to another. So a batch in which a tap is heard for the first time is itself made a test.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch

from ..._level import level_of_caller
from ...names import listed
from ..attach.tapped import TappedModel
from ..attach.unseen import calls
from ..batch.segments import Segments
from ..model import sharded
from ..model.state import inside_compiled
from ..model.untouched import untouched
from .beside import check_heard
from .replay import RunOfBatch, model_self_test, replayed_self_test, takes_ids
from .selftest import SelfTest


class TapTests:
    """The self-tests of a model's taps. Those that were heard in them are kept by the method that runs the batches.

    Attributes:
        last: the result of the last one; None before it.
    """

    def __init__(self, tapped: TappedModel) -> None:
        self._tapped = tapped
        self.last: SelfTest | None = None
        self._always: dict[str, frozenset[str]] = {}
        self._tested: dict[str, frozenset[str]] = {}

    def before_batches(self) -> None:
        """The checks before the first batch of a model that runs on token ids alone; of no other model."""
        tapped = self._tapped
        runnable = takes_ids(tapped.model)
        if runnable is None:
            return
        run, ids, plain = runnable
        # A graph that was compiled before the taps came calls no hook: the self-test will say so.
        if not inside_compiled(tapped.model):
            with untouched(tapped.model):
                with calls(tapped.plan.taps) as called, torch.no_grad():
                    run(ids)
                tapped.mend(run, ids, called)
        self.note("batch", model_self_test(tapped.plan, run, ids, plain))

    def again(self, method: str, runs: Iterable[RunOfBatch], where: Segments, apart: bool = True) -> None:
        """Run the batch ``where`` again as tests of the taps, until none was heard in it that no test has heard."""
        for run in runs:
            if not self.untested(method, where):
                return
            self.note(method, replayed_self_test(self._tapped.plan, run, where, apart))
        self.give_up(method, where)

    def note(self, method: str, test: SelfTest | None) -> None:
        """Take note of a test, if there was one: what is heard in a method's first is to be heard in every batch."""
        if test is not None:
            self.last = test
            self._always.setdefault(method, test.heard)
            self.leave(method, test.heard)

    def check(self, method: str, segments: Segments) -> None:
        """See `check_heard`."""
        if (heard := self._always.get(method)) is not None:
            check_heard(self._tapped.plan, heard, segments, partly=method == "batch")

    def untested(self, method: str, segments: Segments | None = None) -> frozenset[str]:
        """The taps that no test has heard; those that were heard in the batch ``segments``, if it is given.

        None of the latter where ranks of a sharded model heard others: FSDP2 spreads the gradients that a test forms,
        and waits for the same ones of all ranks.
        """
        sources = [source for _, source in self._tapped.plan.sources]
        left = frozenset(one.where for one in sources) - self._tested.get(method, frozenset())
        if segments is None or not left:
            return left
        heard = [one.heard is segments for one in sources]
        some = sharded.largest(self._tapped.model, *map(int, heard))
        none = sharded.largest(self._tapped.model, *(int(not one) for one in heard))
        if any(map(min, some, none)):
            return frozenset()
        return left.intersection(one.where for one, now in zip(sources, heard, strict=True) if now)

    def give_up(self, method: str, segments: Segments) -> None:
        """Test no more what was heard in the batch ``segments`` and in no test, and say so."""
        if left := self.untested(method, segments):
            named = listed([name or "the model itself" for name in sorted(left)], 10)
            warnings.warn(
                f"not compared with autograd: {named}. A few token ids do not reach them, and no call of the model in "
                "this batch that does can be repeated: the model is compiled as a whole, or a part of it was called. "
                "So it would not be noticed if they took one prompt's tokens for another's. Run one such batch through "
                "the model itself, before it is compiled",
                stacklevel=level_of_caller(),
            )
            self.leave(method, left)

    def leave(self, method: str, taps: frozenset[str]) -> None:
        """Test these no more."""
        self._tested[method] = self._tested.get(method, frozenset()) | taps
