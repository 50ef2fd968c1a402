"""The time that work takes on a device, measured without making the host wait for each piece of it.

Two events around each of several hundred pieces of work cost the host more than the launches of that work. So on a CUDA
device spans are measured in passes 1, 2, 4, 8, ...; in between, the latest share of the pass stands for them.
"""

from __future__ import annotations

import contextlib
import time

import torch

_NOTHING = contextlib.nullcontext()


class Clock:
    """Marks on the host's clock, or for a CUDA device on its current stream; `seconds` waits for the marks.

    ``number``: of this pass, from 1 on. ``measures``: whether spans are measured in it.
    """

    def __init__(self, device: torch.device, number: int = 1) -> None:
        self._device = device if device.type == "cuda" else None
        self.measures = self._device is None or number & (number - 1) == 0
        self._spans: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []

    def mark(self) -> float | torch.cuda.Event:
        if self._device is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def timed(self) -> contextlib.AbstractContextManager[None]:
        """``with clock.timed():`` adds a span, where spans are measured."""
        return _Span(self) if self.measures else _NOTHING

    def add(self, start: float | torch.cuda.Event) -> None:
        self._spans.append((start, self.mark()))

    @staticmethod
    def between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        if isinstance(start, float) or isinstance(end, float):
            assert isinstance(start, float) and isinstance(end, float)
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000.0

    def seconds(self) -> float:
        """The sum of all timed spans."""
        return sum(self.between(start, end) for start, end in self._spans)


class _Span:
    """A plain object: entered hundreds of times a batch, where a generator's context manager costs more."""

    __slots__ = ("_clock", "_start")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __enter__(self) -> None:
        self._start = self._clock.mark()

    def __exit__(self, *error: object) -> None:
        self._clock.add(self._start)
