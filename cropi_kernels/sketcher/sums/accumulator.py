"""The sketches of the current batch, to which the taps of a model add, and the time that this took."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Protocol

import torch

from ... import _gpu
from ...reduce import reduce_sketch
from ...spec import SketchSpec
from ..batch.segments import Segments
from ..model.ranks import Ranks
from .backward_passes import BackwardPasses
from .clock import Clock
from .engine import CpuEngine, Operators
from .gpu_engine import GpuEngine
from .groups import Groups


class Hearing(Protocol):
    """What taps tell each of their calls to, while a test runs: see `checks.listener`."""

    def attached(self, tap: Any, y: torch.Tensor) -> None: ...

    def added(
        self,
        tap: Any,
        dy: torch.Tensor,
        kept: torch.Tensor | None,
        coarse: float = 0.0,
        rows: slice = slice(None),
    ) -> None: ...


def finished(outs: Sequence[torch.Tensor], spec: SketchSpec) -> torch.Tensor:
    """Sums [segments, base_dim] of each group of parameters as sketches [segments, groups * dim], side by side; rows
    that met a NaN or an infinity are NaN throughout."""
    if spec.dim < spec.base_dim:
        outs = [reduce_sketch(out, spec.dim, seed=spec.seed, version=spec.version) for out in outs]
    sketches = outs[0] if len(outs) == 1 else torch.cat(list(outs), dim=1)
    return sketches.masked_fill_(~sketches.isfinite().all(dim=1, keepdim=True), float("nan"))


def engine_for(
    segments: Segments, out: torch.Tensor, needed: Mapping[type[Operators], int] = MappingProxyType({})
) -> Operators:
    """The engine of one batch; ``needed``: what earlier batches of each engine `needed`."""
    if CpuEngine.serves(out):
        return CpuEngine(segments, out, needed.get(CpuEngine, 0))
    if GpuEngine.serves(out):
        return GpuEngine(segments, out, needed.get(GpuEngine, 0))
    return Operators(segments, out)


class Accumulator:
    """The engine of the batch that is open, and a cache of folded inputs that several layers share."""

    def __init__(self, spec: SketchSpec) -> None:
        self.spec = spec
        self.ranks: Ranks | None = None  # that share the model, and whose sketches add up
        self.segments: Segments | None = None  # of the open batch
        self._engines: list[Operators] = []  # of the open batch, one for each group of parameters
        self._groups: Groups | None = None
        self.listener: Hearing | None = None
        self._needed: dict[type[Operators], int] = {}  # by the last batch of each engine
        self._deaf = self._absent = False
        self.backwards = BackwardPasses()  # of the open batch
        # While a model is tried: the messages of the errors that taps would have raised, by module.
        self.refusals: dict[str, str] | None = None
        self._set_clock(Clock(torch.device("cpu")))
        self._device, self._stream = torch.device("cpu"), None  # type: torch.device, int | None
        self._passes = 0  # so far
        # What gives the share of its time that the latest timed pass spent on sketching.
        self._share: Callable[[], float] = float
        self._folds: dict[str, tuple[weakref.ref[torch.Tensor], int, torch.Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Accumulator:
        """Of a copied model, whose taps belong to no batch: an open one's kernels write to the original's memory."""
        copied = Accumulator(self.spec)
        copied.ranks = self.ranks
        return copied

    @property
    def engine(self) -> Operators:
        """The engine of the open batch, for what adds to no sketch; where groups of parameters have one each, the
        first, so that folded inputs lie in one block of memory."""
        if not self._engines:
            raise RuntimeError("no batch is open in this GradientSketcher")
        return self._engines[0]

    def engine_of(self, name: str) -> Operators:
        """The engine that adds the gradient of the parameter ``name``: that of its group."""
        # Taps ask hundreds of times a pass: by way of `engine` each would cost the host a second call.
        return self._engines[0 if self._groups is None else self._groups.place[name]]

    @property
    def out(self) -> torch.Tensor:
        """The sketches [segments, base_dim] of the open batch, which has no groups."""
        (out,) = self.outs
        return out

    @property
    def outs(self) -> list[torch.Tensor]:
        """The sketches [segments, base_dim] of the open batch, of each group of parameters; without groups, of all."""
        return [engine.settle() for engine in self._engines]

    def begin(
        self,
        segments: Segments,
        device: torch.device,
        groups: Groups | None = None,
        trained: Iterable[torch.Tensor] = (),
    ) -> None:
        """Open a batch; ``trained``: as for `BackwardPasses`."""
        shape = 1 if groups is None else len(groups.names), segments.count, self.spec.base_dim
        outs = torch.zeros(shape, dtype=torch.float32, device=device).unbind()
        engines = [engine_for(segments, out, self._needed) for out in outs]
        self._device, self._stream = device, _gpu.stream(device)
        # Nothing above may have left a batch open: memory can run out, a backend refuse.
        self.segments, self._engines, self._groups = segments, engines, groups
        self._passes += 1
        self.backwards = BackwardPasses(trained)
        self._set_clock(Clock(device, self._passes))
        self._folds.clear()

    def end(self) -> torch.Tensor:
        """See `finished`."""
        sketches = finished(self.outs if self.ranks is None else [self.ranks.sum(self.out)], self.spec)
        self.close()
        return sketches

    def close(self) -> None:
        """Free the batch, whether it has finished or failed: nothing of it stays in memory."""
        if self._engines:
            self._needed[type(self._engines[0])] = max(engine.needed for engine in self._engines)
        self.segments, self._engines, self._groups = None, [], None
        self.backwards = BackwardPasses()
        self._folds.clear()

    def hears(self, segments: Segments | None, where: str) -> bool:
        """Whether a backward pass that reaches ``where`` is to be added; ``segments`` is the batch of its forward.

        Raises:
            RuntimeError: that batch has ended (the graph of one that failed may still be run in the next), or what
                `BackwardPasses.note` raises.
        """
        if self.segments is not segments:
            raise RuntimeError(
                f"a backward pass reached {where} after its batch had ended: run it inside the batch"
            )
        if self._deaf:
            return False
        self.backwards.note(where)
        return True

    @property
    def listens(self) -> bool:
        """Whether taps are to be attached to the outputs of the modules that are called now."""
        return self.segments is not None and not self._absent and torch.is_grad_enabled()

    def listens_to(self, where: str) -> bool:
        """`listens`, of a module whose call begins now.

        Raises:
            RuntimeError: it is to be tapped, and runs on another stream than the batch began on. Autograd runs its
                backward on that stream as well, and two streams would add to the same sums at once.
        """
        if self.segments is None or self._absent or not torch.is_grad_enabled():
            return False
        if self._stream is None or torch.compiler.is_dynamo_compiling():
            return True
        if _gpu.stream(self._device) == self._stream:
            return True
        raise RuntimeError(
            f"{where} runs on another CUDA stream than the one on which its batch began, and sums are added on one "
            "stream alone: begin the batch inside of `with torch.cuda.stream(...)`, and run all sketched modules on "
            "that stream, or exclude its parameters"
        )

    @property
    def is_absent(self) -> bool:
        return self._absent

    @contextmanager
    def absent(self) -> Iterator[None]:
        """Forward passes inside are the sketcher's own: no tap is attached to a module's output."""
        before, self._absent = self._absent, True
        try:
            yield
        finally:
            self._absent = before

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Backward passes inside are the sketcher's own: no tap adds anything."""
        before, self._deaf = self._deaf, True
        try:
            yield
        finally:
            self._deaf = before

    def _set_clock(self, clock: Clock) -> None:
        """Of one pass: taps ask for its ``timed`` hundreds of times."""
        self.clock, self.timed = clock, clock.timed

    def sketch_share(self, clock: Clock, whole: Callable[[], float]) -> Callable[[], float]:
        """What gives the share of sketching in the pass that has ended, which took ``whole()`` seconds.

        It is what the pass's ``clock`` measured; of a pass whose clock did not measure, the latest timed pass's. The
        first call waits until the device has done the work, and it may come after later passes, or never.
        """
        if clock.measures:
            self._share = functools.cache(lambda: clock.seconds() / took if (took := whole()) > 0 else 0.0)
        return self._share

    def pass_seconds(self, clock: Clock, *marks: float | torch.cuda.Event) -> Callable[[], dict[str, float]]:
        """What gives the seconds of a pass that has ended, from its clock's marks before forward, between forward and
        backward, and behind; see `sketch_share`."""
        start, middle, end = marks
        share = self.sketch_share(clock, lambda: clock.between(start, end))

        def measure() -> dict[str, float]:
            seconds = {"forward": clock.between(start, middle), "backward": clock.between(middle, end)}
            return seconds | {"sketch": share() * sum(seconds.values())}

        return measure

    def folded(self, key: str | None, x: torch.Tensor, fold: Callable[[], torch.Tensor]) -> torch.Tensor:
        """``fold()``, computed once for all layers that fold the tensor ``x`` in the same way (q/k/v, gate/up).

        ``key`` names the way; None: no other layer folds in this way.
        """
        if key is None:
            return fold()
        kept = self._folds.get(key)
        if kept is not None and kept[0]() is x and kept[1] == x._version:
            return kept[2]
        result = fold()
        self.keep_fold(key, x, result)
        return result

    def keep_fold(self, key: str | None, x: torch.Tensor, folded: torch.Tensor) -> None:
        """Let `folded` find what was made of ``x`` elsewhere."""
        if key is None:
            return

        def forget(dead: weakref.ref[torch.Tensor]) -> None:
            # Under checkpointing nothing else keeps the folded copy of an input that is gone.
            if (entry := self._folds.get(key)) is not None and entry[0] is dead:
                del self._folds[key]

        self._folds[key] = weakref.ref(x, forget), x._version, folded
